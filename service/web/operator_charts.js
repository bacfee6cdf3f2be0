// The operator's charts, by Chart.js (the global `Chart`): each with what it shows in words, and as a table.

import { byId, make } from "/web/element.js";
import { at, between, percent, seconds, share, show, table, tally } from "/web/operator_parts.js";

const Chart = globalThis.Chart;
Chart.defaults.animation = false;
Chart.defaults.maintainAspectRatio = false;
const drawn = new Map();   // figure -> { chart, plan }: to be drawn again in another theme

// A canvas cannot follow a style sheet: asks the page what a colour is now.
function colour(name) {
  const probe = byId("probe");
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

function options({ x = {}, y = {}, stacked = false, legend = true }) {
  const axis = (given) => ({
    stacked,
    ...given,
    grid: { color: colour("line") },
    border: { color: colour("line") },
    ticks: { color: colour("quiet"), maxRotation: 0, autoSkipPadding: 12, ...given.ticks },
    title: { display: Boolean(given.title), text: given.title, color: colour("quiet") },
  });
  const labels = { color: colour("front"), usePointStyle: true, boxHeight: 7, pointStyleWidth: 16, filter: (item) => !item.text.startsWith("_") };
  return {
    scales: { x: axis(x), y: axis(y) },
    plugins: {
      legend: { display: legend, position: "bottom", labels },
      tooltip: { filter: (item) => !item.dataset.label.startsWith("_") },
    },
  };
}

// plan: { title, words, head, rows, config(): Chart.js configuration }. Nothing to show: { title, none }.
function draw(id, data, makePlan) {
  const figure = byId(id), plan = makePlan();
  const canvas = make("canvas", { role: "img", "aria-label": `${plan.title}. ${plan.words}` });
  const changed = show(figure, data, () => [
    make("figcaption", {}, make("h3", {}, plan.title)),
    ...(plan.none ? [make("p", { class: "quiet" }, plan.none)] : [
      make("div", { class: "plot" }, canvas),
      make("p", { class: "quiet" }, plan.words),
      make("details", {}, make("summary", {}, "As a table"), table(plan.title, plan.head, plan.rows)),
    ]),
  ]);
  if (!changed) return;
  drawn.get(figure)?.chart.destroy();
  drawn.delete(figure);
  if (!plan.none) drawn.set(figure, { chart: new Chart(canvas, plan.config()), plan, canvas });
}

export function drawAgain() {
  for (const one of drawn.values()) {
    one.chart.destroy();
    one.chart = new Chart(one.canvas, one.plan.config());
  }
}
new MutationObserver(drawAgain).observe(document.documentElement, { attributeFilter: ["data-theme"] });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAgain);

const line = (label, name, points, more = {}) => ({
  type: "line", label, data: points, borderColor: colour(name), backgroundColor: colour(name),
  borderWidth: 2, pointRadius: 2.5, tension: 0, ...more,
});
// Intervals are thin bars from low to high: Chart.js has no error bars of its own.
const whiskers = (points, name) => ({
  type: "bar", label: "_interval", data: points, backgroundColor: colour(name), barThickness: 3, order: 2,
});
const level = (label, xs, y) => ({
  type: "line", label, data: xs.map((x) => ({ x, y })), borderColor: colour("quiet"), backgroundColor: colour("quiet"),
  borderWidth: 1, borderDash: [5, 4], pointRadius: 0, pointStyle: "line",
});
const hourTicks = { type: "time", time: { tooltipFormat: "MMM d, HH:mm", displayFormats: { hour: "HH:mm", minute: "HH:mm", day: "MMM d" } } };

// Every policy against the one before it: trials, and watches after a promotion.
export function drawDuels(duels) {
  const known = duels.filter((duel) => tally(duel)?.rate != null).reverse();
  draw("duels-figure", known, () => {
    const title = "Policies against the one before them";
    if (!known.length) return { title, none: "No duel has a decided vote yet." };
    const labels = known.map((duel) => [duel.challenger.replace("policy-", ""), duel.kind]);
    const last = known.at(-1), votes = tally(last);
    return {
      title,
      words: `Share of decided votes that the newer policy won, with the interval. The last, ${last.challenger}: ` +
        `${share(votes.rate)} (${between(votes.low, votes.high)}). Above one half it is better.`,
      head: ["policy", "duel", "against", "won", "interval", "for it, against, neither", "outcome", "began"],
      rows: known.map((duel) => {
        const { wins, losses, ties, rate, low, high } = tally(duel);
        return [duel.challenger, duel.kind, duel.incumbent, share(rate), between(low, high), `${wins}, ${losses}, ${ties}`,
          duel.outcome ?? "runs", at(duel.created_at)];
      }),
      config: () => ({
        data: {
          labels,
          datasets: [
            line("won by the newer policy", "accent", known.map((duel) => tally(duel).rate), { showLine: false, pointRadius: 6 }),
            whiskers(known.map((duel) => [tally(duel).low, tally(duel).high]), "one-faint"),
            { ...level("one half", [], 0), data: known.map(() => 0.5) },
          ],
        },
        options: options({ y: { min: 0, max: 1, title: "share of decided votes" }, x: { offset: true } }),
      }),
    };
  });
}

export function drawCourse(course) {
  draw("course-figure", course, () => {
    const title = course ? `The ${course.duel.kind} of ${course.duel.challenger}, vote by vote` : "A duel, vote by vote";
    const points = course?.points.filter((point) => point.wins + point.losses > 0) ?? [];
    if (!points.length) return { title, none: "No decided vote yet." };
    const rate = (point) => point.wins / (point.wins + point.losses);
    const xs = points.map((point) => point.at), last = points.at(-1);
    return {
      title,
      words: `After ${last.wins + last.losses + last.ties} votes it has won ${share(rate(last))} of the decided ones; what the votes ` +
        `leave open is ${between(last.low, last.high)}. The interval holds at all times at once.`,
      head: ["when", "for it", "against", "neither", "won", "interval"],
      rows: points.map((point) =>
        [at(point.at), String(point.wins), String(point.losses), String(point.ties), share(rate(point)), between(point.low, point.high)]),
      config: () => ({
        data: {
          datasets: [
            line("won so far", "accent", points.map((point) => ({ x: point.at, y: rate(point) })), { pointRadius: 0 }),
            line("interval", "one-faint", points.map((point) => ({ x: point.at, y: point.high })), { pointRadius: 0, borderWidth: 1, fill: "+1", backgroundColor: colour("one-fill") }),
            line("_low", "one-faint", points.map((point) => ({ x: point.at, y: point.low })), { pointRadius: 0, borderWidth: 1 }),
            level("one half", [xs[0], xs.at(-1)], 0.5),
          ],
        },
        options: options({ x: hourTicks, y: { min: 0, max: 1, title: "share of decided votes" } }),
      }),
    };
  });
}

const KINDS = [["first", "one"], ["second", "two"], ["tie", "three"], ["neither", "four"]];
const count = (hour) => hour.first + hour.second + hour.tie + hour.neither;

export function drawVotes({ hours, first_low: low, first_high: high }) {
  const sum = (kind) => hours.reduce((total, hour) => total + hour[kind], 0);
  const [first, second] = [sum("first"), sum("second")];
  draw("votes-figure", ["votes", hours], () => {
    const title = "Votes an hour";
    if (!hours.length) return { title, none: "No votes in this time." };
    const most = hours.reduce((one, other) => (count(other) > count(one) ? other : one));
    return {
      title,
      words: `${hours.reduce((total, hour) => total + count(hour), 0)} votes; at most ${count(most)} in an hour.`,
      head: ["hour", "first", "second", "tie", "neither"],
      rows: hours.map((hour) => [at(hour.hour), ...KINDS.map(([kind]) => String(hour[kind]))]),
      config: () => ({
        type: "bar",
        data: {
          datasets: KINDS.map(([kind, name]) => ({
            label: kind, data: hours.map((hour) => ({ x: hour.hour, y: hour[kind] })), backgroundColor: colour(name), maxBarThickness: 28, pointStyle: "rect",
          })),
        },
        options: options({ x: { ...hourTicks, offset: true }, y: { beginAtZero: true, ticks: { precision: 0 }, title: "votes" }, stacked: true }),
      }),
    };
  });
  draw("side-figure", ["side", hours], () => {
    const title = "Side bias";
    const decided = hours.filter((hour) => hour.first + hour.second > 0);
    if (!decided.length) return { title, none: "No decided votes in this time." };
    const rate = (hour) => hour.first / (hour.first + hour.second);
    return {
      title,
      words: `${percent(first / (first + second))} of decided votes are for the reply shown first (interval ${between(low, high)}): ` +
        `${low > 0.5 || high < 0.5 ? "people lean to one side" : "no side bias is proven"}. The order is drawn, so that it cancels in duels.`,
      head: ["hour", "first", "of decided votes"],
      rows: decided.map((hour) => [at(hour.hour), percent(rate(hour)), String(hour.first + hour.second)]),
      config: () => ({
        data: {
          datasets: [
            line("for the reply shown first", "accent", decided.map((hour) => ({ x: hour.hour, y: rate(hour) }))),
            level("one half", [decided[0].hour, decided.at(-1).hour], 0.5),
          ],
        },
        options: options({ x: hourTicks, y: { min: 0, max: 1, title: "share of decided votes" } }),
      }),
    };
  });
  draw("seconds-figure", ["seconds", hours], () => {
    const title = "Time to vote";
    const timed = hours.filter((hour) => hour.seconds !== null);
    if (!timed.length) return { title, none: "No votes in this time." };
    const sorted = timed.map((hour) => hour.seconds).sort((a, b) => a - b);
    return {
      title,
      words: `From the end of the reply to the vote: ${seconds(sorted[0])} to ${seconds(sorted.at(-1))}, each the median of an hour. ` +
        "Votes within a second or two were hardly read.",
      head: ["hour", "median"],
      rows: timed.map((hour) => [at(hour.hour), seconds(hour.seconds)]),
      config: () => ({
        data: { datasets: [line("median of the hour", "accent", timed.map((hour) => ({ x: hour.hour, y: hour.seconds })))] },
        options: options({ x: hourTicks, y: { beginAtZero: true, title: "seconds" }, legend: false }),
      }),
    };
  });
}

export function drawAccuracy(cycles) {
  const known = cycles.filter((cycle) => cycle.accuracy).reverse();
  draw("accuracy-figure", known, () => {
    const title = "Reward model: accuracy of each cycle";
    if (!known.length) return { title, none: "No cycle has fit a reward model yet." };
    const last = known.at(-1).accuracy;
    return {
      title,
      words: `Held-out pairs that it orders as the user did. The last: ${share(last.share)} (${between(last.low, last.high)}) ` +
        `of ${last.num_pairs} pairs. A coin has one half.`,
      head: ["cycle", "right", "interval (95 %)", "pairs", "calibration error"],
      rows: known.map(({ id, accuracy, calibration_error: error }) =>
        [`cycle ${id}`, share(accuracy.share), between(accuracy.low, accuracy.high), String(accuracy.num_pairs), error === null ? "" : share(error)]),
      config: () => ({
        data: {
          labels: known.map((cycle) => `cycle ${cycle.id}`),
          datasets: [
            line("right on held-out pairs", "accent", known.map((cycle) => cycle.accuracy.share), { showLine: false, pointRadius: 6 }),
            whiskers(known.map((cycle) => [cycle.accuracy.low, cycle.accuracy.high]), "one-faint"),
            { ...level("a coin", [], 0), data: known.map(() => 0.5) },
          ],
        },
        options: options({ y: { min: 0, max: 1, title: "share right" }, x: { offset: true } }),
      }),
    };
  });
}

export function drawCalibration(cycle) {
  const bins = cycle?.metrics.reward_model?.reliability ?? [];
  draw("calibration-figure", [cycle?.id, bins], () => {
    const title = cycle ? `Reward model of cycle ${cycle.id}: calibration` : "Calibration";
    if (!bins.length) return { title, none: "This cycle has fit no reward model." };
    return {
      title,
      words: `How often it was right, by how sure it was. Expected calibration error ${share(cycle.metrics.reward_model.calibration_error)}; on the ` +
        "dashed line confidence and accuracy agree.",
      head: ["how sure", "right", "pairs"],
      rows: bins.map((bin) => [share(bin.confidence), share(bin.accuracy), String(bin.num_pairs)]),
      config: () => ({
        data: {
          datasets: [
            line("reward model", "accent", bins.map((bin) => ({ x: bin.confidence, y: bin.accuracy })), { pointRadius: 4 }),
            { ...level("calibrated", [], 0), data: [{ x: 0.5, y: 0.5 }, { x: 1, y: 1 }] },
          ],
        },
        options: options({
          x: { type: "linear", min: 0.5, max: 1, title: "how sure it was" }, y: { min: 0, max: 1, title: "share right" },
        }),
      }),
    };
  });
}

export function drawReward(cycle) {
  const { iterations = [], kept, why } = cycle?.metrics.training ?? {};
  draw("reward-figure", [cycle?.id, iterations.length, kept], () => {
    const title = cycle ? `Cycle ${cycle.id}: reward against KL` : "Reward against KL";
    if (!iterations.length) return { title, none: "This cycle has not trained." };
    const points = (name) => iterations.map((one) => ({ x: one.kl, y: one[name] }));
    const end = iterations[kept ?? iterations.length - 1];
    const marked = kept === undefined ? [] : [line("kept", "two", [{ x: end.kl, y: end.judge }], { showLine: false, pointRadius: 7, order: -1 })];
    return {
      title,
      words: `${iterations.length} iterations. ${kept === undefined ? "The last" : `Kept is iteration ${kept} (${why}), which`} has a reward of ` +
        `${share(end.score)}, ${share(end.judge)} by the held-out judge, at ${share(end.kl)} nats a reply from the anchor. Where the reward rises and the ` +
        "judge does not, it is over-optimised.",
      head: ["iteration", "KL", "reward", "judge", "length", "ended", "repeated"],
      rows: iterations.map((one) =>
        [String(one.number), share(one.kl), share(one.score), share(one.judge), one.length.toFixed(1), percent(one.ended), percent(one.repeated)]),
      config: () => ({
        data: {
          datasets: [
            line("reward (ensemble)", "three", points("score")),
            line("held-out judge", "accent", points("judge")),
            ...marked,
          ],
        },
        options: options({
          x: { type: "linear", min: 0, title: "KL to the anchor, nats a reply" }, y: { title: "score, standard deviations" },
        }),
      }),
    };
  });
}
