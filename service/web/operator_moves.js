// Promote, reject, roll back, start a cycle: each says what it will do before it is done, and takes the reason.

import { Trouble, send } from "/web/operator_api.js";
import { byId, make } from "/web/element.js";
import { tallyWords } from "/web/operator_parts.js";

const dialog = byId("move");

// What each move would do, given the overview; null where there is nothing to do it to.
const MOVES = {
  promote({ deployment: { live, challenger }, duels }) {
    if (!challenger) return null;
    return {
      title: `Let ${challenger} go live?`,
      button: `Promote ${challenger}`,
      policy: challenger,
      what: [
        `${challenger} will answer every user from the next request on. Replies under way end as they began.`,
        `${live} stays loaded as previous: rolling back returns to it.`,
        `Its trial ends here: ${trialWords(challenger, duels)}.`,
      ],
      done: (answer) => `${answer.live} is live.`,
    };
  },
  reject({ deployment: { live, challenger }, duels }) {
    if (!challenger) return null;
    return {
      title: `End the trial of ${challenger}?`,
      button: `Reject ${challenger}`,
      policy: challenger,
      what: [
        `${challenger} will be shown to nobody any more, and its cycle ends as rejected.`,
        `${live} goes on answering. Its votes are kept, and the next cycle learns from them.`,
        `Its trial ends here: ${trialWords(challenger, duels)}.`,
      ],
      done: (answer) => `The challenger is rejected. ${answer.live} goes on answering.`,
    };
  },
  rollback({ deployment: { live, challenger, previous } }) {
    if (!previous) return null;
    return {
      title: `Go back to ${previous}?`,
      button: `Roll back to ${previous}`,
      policy: previous,
      what: [
        `${previous} will answer every user from the next request on. Replies under way end as they began.`,
        `${live} stays loaded as previous: rolling back again returns to it.`,
        challenger
          ? `The trial of ${challenger} against ${live} stops, and begins anew against ${previous}.`
          : "Votes, snapshots and policies are kept: nothing is deleted.",
      ],
      done: (answer) => `${answer.live} is live.`,
    };
  },
  cycle({ cycles, votes, new_votes: fresh, cycle_votes: most }) {
    if (cycles[0] && !cycles[0].ended_at) return null;
    const many = fresh >= most ? `${most} or more` : fresh;
    return {
      title: "Start a cycle now?",
      button: "Start a cycle",
      what: [
        `The trainer takes a snapshot of all ${votes} votes (${many} of them newer than the last cycle) and learns a policy from them.`,
        "Users go on chatting meanwhile; the engine shares this machine with it where they are one.",
        "What it makes reaches users only if it passes the gate, and then first on trial.",
      ],
      done: (answer) => `Cycle ${answer.id} is asked for. The trainer takes it up in a moment.`,
    };
  },
};
const PATHS = { promote: "promote", reject: "reject", rollback: "rollback", cycle: "cycles" };
const NOTHING = {
  promote: "No policy is on trial.",
  reject: "No policy is on trial.",
  rollback: "There is no previous policy.",
  cycle: "A cycle is running.",
};

function trialWords(challenger, duels) {
  const trial = duels.find((duel) => duel.kind === "trial" && duel.challenger === challenger && !duel.ended_at);
  return trial ? `it ${tallyWords(trial)}` : "no duel has begun";
}

let overview = null;   // as last read
let chosen = null;     // the move that the dialog is about

// Enables the buttons that have something to do. A disabled one says why.
export function offerMoves(now) {
  overview = now;
  for (const [name, plan] of Object.entries(MOVES)) {
    const possible = plan(now) !== null;
    byId(name).disabled = !possible;
    byId(name).title = possible ? "" : NOTHING[name];
  }
}

function openDialog(name) {
  const plan = MOVES[name](overview);
  if (!plan) return;
  chosen = { name, ...plan };
  byId("move-title").textContent = plan.title;
  byId("move-what").replaceChildren(...plan.what.map((line) => make("li", {}, line)));
  byId("move-do").textContent = plan.button;
  byId("move-why").value = "";
  byId("move-trouble").textContent = "";
  dialog.showModal();
  byId("move-why").focus();
}

// Sends the move that was confirmed, and names the policy that was meant: the pointer may have moved meanwhile.
async function carryOut(done) {
  const button = byId("move-do"), reason = byId("move-why").value.trim();
  button.disabled = true;
  byId("move-trouble").textContent = "";
  try {
    const body = { ...(reason && { reason }), ...(chosen.policy && { policy: chosen.policy }) };
    const answer = await send(PATHS[chosen.name], body);
    dialog.close();
    byId("done").textContent = chosen.done(answer);
    done();
  } catch (error) {
    if (error instanceof Trouble && error.needsKey) {
      dialog.close();
      done(error);
      return;
    }
    byId("move-trouble").textContent = words(error);
    if (!(error instanceof Trouble)) console.error(error);
  } finally {
    button.disabled = false;
  }
}

// That nothing is done twice is the service's word: it refuses a move that is not the one that was meant.
function words(error) {
  if (!(error instanceof Trouble)) return "It could not be done.";
  return error.status === 0 ? `${error.message} You can try again: nothing is done twice.` : error.message;
}

// done: called after each move, with the trouble where the key is no longer good.
export function prepareMoves(done) {
  for (const name of Object.keys(MOVES)) byId(name).addEventListener("click", () => openDialog(name));
  byId("move-cancel").addEventListener("click", () => dialog.close());
  byId("move-form").addEventListener("submit", (event) => {
    event.preventDefault();
    carryOut(done);
  });
}
