// Small parts of the operator's page. What people or models wrote becomes text nodes, never markup.

import { make } from "/web/element.js";

// Rows of texts or elements. It may scroll sideways, and so can be reached by the keyboard.
export function table(caption, head, rows) {
  const cell = (child, i) => make(i === 0 ? "th" : "td", i === 0 ? { scope: "row" } : {}, child);
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    make("table", {},
      make("caption", {}, caption),
      make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name)))),
      make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map(cell))))));
}

// Fills an element anew only where what it shows has changed: focus and selection stay. Returns whether it has.
const shown = new WeakMap();
export function show(element, data, children) {
  const now = JSON.stringify(data);
  if (shown.get(element) === now) return false;
  shown.set(element, now);
  element.replaceChildren(...children());
  return true;
}

export const bar = (label, value, max) => make("label", { class: "bar" }, label, make("progress", { value, max }));

export const share = (value) => value.toFixed(2);
export const percent = (value) => `${Math.round(100 * value)} %`;
export const between = (low, high) => `${share(low)} to ${share(high)}`;

const MINUTE = 60_000, HOUR = 60 * MINUTE, DAY = 24 * HOUR;
export const since = (time) => Date.now() - Date.parse(time);

export function ago(time) {
  const passed = Math.max(0, since(time));
  if (passed < MINUTE) return "just now";
  if (passed < HOUR) return `${Math.floor(passed / MINUTE)} min ago`;
  if (passed < 2 * DAY) return `${Math.floor(passed / HOUR)} h ago`;
  return `${Math.floor(passed / DAY)} days ago`;
}

export function at(time) {
  const words = new Date(time).toLocaleString([], { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" });
  return make("time", { datetime: time, title: new Date(time).toLocaleString() }, words);
}

export const seconds = (value) => (value < 90 ? `${value.toFixed(value < 10 ? 1 : 0)} s` : `${Math.round(value / 60)} min`);

// A duel's votes, as its row has them; null before the first look at them.
export function tally(duel) {
  const { wins, losses, ties, interval } = duel.metrics;
  if (interval === undefined) return null;
  const decided = wins + losses;
  return { wins, losses, ties, decided, rate: decided ? wins / decided : null, low: interval.low, high: interval.high };
}

export function tallyWords(duel) {
  const votes = tally(duel);
  if (!votes || votes.rate === null) return `no decided votes yet against ${duel.incumbent}`;
  return `won ${share(votes.rate)} of ${votes.decided} decided votes against ${duel.incumbent} ` +
    `(interval ${between(votes.low, votes.high)}; ${votes.ties} for both or neither)`;
}
