// How it is now, what is being learnt, where the live policy comes from, and what happened: all from one overview.

import { byId, make } from "/web/element.js";
import { ago, at, bar, between, percent, share, show, since, table, tally, tallyWords } from "/web/operator_parts.js";

const STAGES = ["snapshot", "reward_model", "training", "gate", "swap", "duel"];
const WORDS = {
  requested: "asked for", reward_model: "reward model", swap: "being loaded and verified", duel: "on trial", rolled_back: "rolled back",
};
const words = (name) => WORDS[name] ?? name;
const TAKEN_UP_MS = 60_000;   // a trainer that runs takes a cycle up within its tick

export function showNow(now) {
  showHealth(now);
  showPolicies(now);
  showRunning(now);
  showCycles(now.cycles);
  showLine(now);
  showHappened(now);
}

function showHealth({ engines, deployment }) {
  const { healthy, replicas, policies } = engines;
  let state = ["good", `Healthy: ${healthy} of ${replicas} engines answer, ${deployment.live} is loaded.`];
  if (healthy < replicas) state = ["poor", `${healthy} of ${replicas} engines answer: there is less room for users.`];
  if (!policies.includes(deployment.live)) {
    state = ["bad", `No engine has ${deployment.live} ready: users get errors. ${healthy} of ${replicas} engines answer.`];
  }
  show(byId("health"), state, () => [make("span", { class: `dot ${state[0]}`, "aria-hidden": "true" }), state[1]]);
}

function showPolicies({ deployment, duels, duel_votes: most }) {
  const roles = [
    ["live", "Live", `answers every user; the pointer last moved ${ago(deployment.changed_at)}`],
    ["challenger", "Challenger", "on trial, blind, against live"],
    ["previous", "Previous", "loaded, to fall back to"],
  ];
  const about = roles.map(([role, title, does]) => ({
    title, does, name: deployment[role], fought: duels.filter((duel) => duel.challenger === deployment[role]).slice(0, 2),
  }));
  show(byId("policies"), [about, most], () => about.map(({ title, does, name, fought }) =>
    make("article", { class: "card" },
      make("h3", {}, title),
      make("p", { class: "name" }, name ?? "none"),
      name ? make("p", { class: "quiet" }, does) : null,
      ...fought.map((duel) => duelPart(duel, most)))));
}

function duelPart(duel, most) {
  const votes = tally(duel), ended = duel.outcome ? `, ${duel.outcome}` : "";
  const kind = duel.kind === "trial" ? "Trial" : "Watch";
  if (duel.ended_at || !votes) return make("p", {}, `${kind}${ended}: ${tallyWords(duel)}.`);
  return make("div", {},
    make("p", {}, `${kind}: ${tallyWords(duel)}.`),
    bar(`${votes.decided + votes.ties} of at most ${most} votes`, votes.decided + votes.ties, most));
}

function showRunning({ cycles, new_votes: fresh, cycle_votes: most }) {
  const cycle = cycles[0] && !cycles[0].ended_at ? cycles[0] : null;
  const late = cycle?.stage === "requested" && since(cycle.created_at) > TAKEN_UP_MS;
  const begun = cycle && ago(cycle.created_at);
  show(byId("running"), [cycle, late, begun, fresh, most], () => {
    if (!cycle) return [bar(`No cycle runs. ${fresh} of the ${most} new votes that start the next one`, fresh, most)];
    const { progress } = cycle, reached = STAGES.indexOf(cycle.stage);
    const steps = STAGES.map((stage, i) => make("li", {
      class: i < reached ? "past" : i === reached ? "current" : "", "aria-current": i === reached ? "step" : null,
    }, words(stage)));
    return [
      make("p", {}, `Cycle ${cycle.id}, begun ${begun} (${cycle.trigger}): ${words(cycle.stage)}` +
        (cycle.policy ? `, ${cycle.policy}.` : ".")),
      late ? make("p", { class: "trouble" }, "No trainer has taken it up yet. Is one running?") : null,
      make("ol", { class: "stages" }, ...steps),
      progress?.total && progress.stage === cycle.stage ? bar(`${words(progress.stage)}: ${progress.done} of ${progress.total}`, progress.done, progress.total) : null,
    ].filter((part) => part !== null);
  });
}

function showCycles(cycles) {
  show(byId("cycles"), cycles, () => {
    if (!cycles.length) return [make("p", { class: "quiet" }, "No cycle has run yet.")];
    const head = ["cycle", "stage", "policy", "votes", "reward model right", "reward", "judge", "KL", "why"];
    const rows = cycles.map(({ id, stage, policy, votes, accuracy, kept, reason }) => [
      String(id), words(stage), policy ?? "", votes === null ? "" : String(votes),
      accuracy ? `${share(accuracy.share)} (${between(accuracy.low, accuracy.high)})` : "",
      ...["score", "judge", "kl"].map((name) => (kept ? share(kept[name]) : "")), reason ?? "",
    ]);
    return [make("details", { open: true }, make("summary", {}, "Cycles"), table("The newest cycles", head, rows))];
  });
}

// The base first: how each policy of the live one's line came about.
function showLine({ line, cycles, deployment, duels }) {
  const steps = [...line].reverse().map((policy) => ({
    policy,
    cycle: cycles.find((cycle) => cycle.id === policy.cycle_id) ?? null,
    trial: duels.find((duel) => duel.kind === "trial" && duel.challenger === policy.name) ?? null,
  }));
  show(byId("line"), [steps, deployment.live], () => steps.map(({ policy, cycle, trial }) => {
    const from = policy.cycle_id === null
      ? [policy.parent === null ? "the base: the operator's model" : "no cycle is on record"]
      : [`${policy.votes ?? "?"} votes, snapshot ${policy.snapshot_sha256?.slice(0, 12) ?? "unknown"}`,
        cycle?.accuracy ? `reward model right on ${percent(cycle.accuracy.share)} of held-out pairs` : null,
        cycle?.kept ? `reward ${share(cycle.kept.score)} at ${share(cycle.kept.kl)} nats a reply` : null,
        trial ? tallyWords(trial) : null];
    return make("li", { class: policy.name === deployment.live ? "card live" : "card" },
      make("p", { class: "name" }, policy.name, policy.name === deployment.live ? " (live)" : ""),
      make("p", { class: "quiet" }, policy.cycle_id === null ? "" : `cycle ${policy.cycle_id}, `, at(policy.created_at)),
      make("ul", {}, ...from.filter(Boolean).map((part) => make("li", {}, part))));
  }));
}

const DONE = { promote: "promoted", reject: "rejected", rollback: "rolled back to", "start cycle": "started cycle" };

// What operators did, how cycles and duels ended, what was refused: the newest first.
function showHappened({ actions, cycles, duels, policies }) {
  const events = [
    ...actions.map((one) => ({
      time: one.created_at, what: `${one.account || "somebody on this machine"} ${DONE[one.action] ?? one.action} ${one.subject ?? ""}`, why: one.reason,
    })),
    ...cycles.map((one) => ({ time: one.created_at, what: `cycle ${one.id} began (${one.trigger})`, why: null })),
    ...cycles.filter((one) => one.ended_at).map((one) => ({ time: one.ended_at, what: `cycle ${one.id}: ${words(one.stage)}`, why: one.reason })),
    ...duels.map((one) => ({ time: one.created_at, what: `${one.kind} of ${one.challenger} against ${one.incumbent} began`, why: null })),
    ...duels.filter((one) => one.ended_at).map((one) => ({
      time: one.ended_at, what: `${one.kind} of ${one.challenger}: ${one.outcome}`, why: one.reason,
    })),
    ...policies.filter((one) => one.cycle_id !== null).map((one) => ({
      time: one.created_at, what: `${one.name} was published; it is ${words(one.state)} now`, why: one.reason,
    })),
  ].sort((one, other) => Date.parse(other.time) - Date.parse(one.time)).slice(0, 30);
  show(byId("happened"), events, () => {
    if (!events.length) return [make("p", { class: "quiet" }, "Nothing yet.")];
    return [table("What happened, the newest first", ["when", "what", "why"], events.map(({ time, what, why }) => [at(time), what, why ?? ""]))];
  });
}
