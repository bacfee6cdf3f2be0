// The operator's page: reads the overview every few seconds, and what it leads to when that has changed.

import { KeyForm } from "/web/key.js";
import { Trouble, read } from "/web/operator_api.js";
import { drawAccuracy, drawCalibration, drawCourse, drawDuels, drawReward, drawVotes } from "/web/operator_charts.js";
import { offerMoves, prepareMoves } from "/web/operator_moves.js";
import { showNow } from "/web/operator_now.js";
import { byId, make } from "/web/element.js";
import { show, table } from "/web/operator_parts.js";
import { offerPolicies, prepareTalk, showSamples, showVotes } from "/web/operator_talk.js";

const TICK_MS = 3_000;
let now = null;            // the overview, as last read
let timer = 0;
let reading = false;       // a tick is under way
let again = false;         // and something has changed meanwhile
const seen = new Map();    // what was last read for, by name
const picked = new Set();  // the choices that the operator has made

const keyForm = new KeyForm(byId("key-form"), () => tick());

// Reads again only where what it depends on has changed. Where it fails, the next tick tries again.
async function follow(name, on, get, use) {
  const key = JSON.stringify(on);
  if (seen.get(name) === key) return;
  use(await get());
  seen.set(name, key);
}

// The newest, until the operator picks another.
function choose(select, options, label) {
  const before = picked.has(select.id) ? select.value : null;
  show(select, options.map((one) => [one.id, label(one)]), () => options.map((one) => make("option", { value: one.id }, label(one))));
  if (options.some((one) => String(one.id) === before)) select.value = before;
  select.closest("label").hidden = !options.length;
  return options.find((one) => String(one.id) === select.value) ?? null;
}

async function showAll() {
  now = await read("overview");
  byId("page").hidden = false;
  showNow(now);
  offerMoves(now);
  offerPolicies(now.engines.policies);
  drawDuels(now.duels);
  drawAccuracy(now.cycles);
  const minute = Math.floor(Date.now() / 60_000);   // time to vote and the hours move on without votes, too
  await Promise.all([followDuel(), followCycle(), followVotes(minute), followSamples()]);
}

async function followDuel() {
  const duel = choose(byId("duel"), now.duels, (one) => `${one.id}: ${one.kind} of ${one.challenger}${one.ended_at ? "" : ", running"}`);
  if (!duel) return drawCourse(null);
  return follow("duel", duel, () => read(`duels/${duel.id}/course`), drawCourse);
}

async function followCycle() {
  const cycle = choose(byId("learnt"), now.cycles, (one) => `${one.id}: ${one.stage}`);
  if (!cycle) return showCycle(null);
  return follow("cycle", cycle, () => read(`cycles/${cycle.id}`), showCycle);
}

function showCycle(cycle) {
  drawCalibration(cycle);
  drawReward(cycle);
  const checks = cycle?.metrics.gate?.checks ?? [];
  show(byId("gate"), [cycle?.id, checks], () => {
    if (!checks.length) return [];
    const rows = checks.map((one) => [one.name, one.value.toFixed(3), one.threshold.toFixed(3), one.passed ? "passed" : "FAILED", one.meaning]);
    return [make("details", {}, make("summary", {}, `The gate of cycle ${cycle.id}`),
      table(`The gate of cycle ${cycle.id}`, ["check", "value", "threshold", "verdict", "what it is"], rows))];
  });
}

async function followVotes(minute) {
  const hours = byId("hours").value, commented = byId("commented").checked;
  await Promise.all([
    follow("hours", [hours, now.votes, minute], () => read(`votes/hours?hours=${hours}`), (found) => {
      byId("votes-summary").textContent = `${now.votes.toLocaleString()} votes in all.` +
        (found.complete ? "" : " Of this time, the newest 5,000 were read.");
      drawVotes(found);
    }),
    follow("votes", [commented, now.votes, minute], () => read(`votes?limit=10&commented=${commented}`), showVotes),
  ]);
}

const followSamples = () =>
  follow("samples", now.cycles.map((cycle) => [cycle.id, cycle.stage]), () => read("samples"), showSamples);

function showTrouble(error) {
  const banner = byId("banner");
  if (error instanceof Trouble && error.needsKey) {
    banner.hidden = true;
    byId("page").hidden = true;
    byId("move").close();
    keyForm.show(error.message);
    return;
  }
  if (!(error instanceof Trouble)) console.error(error);
  banner.textContent = error instanceof Trouble
    ? `${error.message} Asking again every ${TICK_MS / 1000} seconds; what is shown below was read before.`
    : "Something went wrong on this page. Reload it.";
  banner.hidden = false;
}

// One at a time; an outage is shown until it is over, and what was read before stays.
async function tick() {
  if (reading) {
    again = true;
    return;
  }
  clearTimeout(timer);
  reading = true;
  again = false;
  let good = true;
  try {
    if (!document.hidden) {
      await showAll();
      byId("banner").hidden = true;
      keyForm.hide();
    }
  } catch (error) {
    showTrouble(error);
    good = !(error instanceof Trouble && error.needsKey);   // a key that is not good is not tried again
  }
  reading = false;
  if (good) timer = setTimeout(tick, again ? 0 : TICK_MS);
}

prepareMoves((trouble) => (trouble ? showTrouble(trouble) : tick()));
prepareTalk(() => tick());
for (const id of ["duel", "learnt", "hours"]) {
  byId(id).addEventListener("change", () => {
    picked.add(id);
    tick();
  });
}
document.addEventListener("visibilitychange", () => { if (!document.hidden) tick(); });
tick();
