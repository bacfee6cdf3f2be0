// Votes on the turns of the page: given, taken back, passed over, explained, and told to other tabs. The bar is in vote.js.

import { call, segment } from "/web/api.js";
import { announce } from "/web/element.js";
import { verdictOf } from "/web/turn.js";
import { VoteBar } from "/web/vote.js";

const pathOf = (turn) => `/v1/comparisons/${segment(turn.comparison)}/vote`;

export class Voting {
  // page: { turns(), isRunning(), failed(error), changed() }
  constructor(page) {
    this.page = page;
    this.bar = new VoteBar({
      cast: (turn, choice) => this.cast(turn, choice),
      undo: () => this.undo(page.turns().findLast((turn) => turn.choice)),
    });
    this.otherTabs = new BroadcastChannel("ratchet-votes");
    this.otherTabs.addEventListener("message", ({ data }) => this.hear(data));
  }

  async cast(turn, choice) {
    if (choice === "skip") {
      this.passOver();
      announce("Skipped.");
      return;
    }
    try {
      const { policies } = await call("PUT", pathOf(turn), { body: { choice } });
      this.show(turn, choice, policies);
      this.otherTabs.postMessage({ comparison: turn.comparison, choice, policies });
      announce(verdictOf(choice, policies));
    } catch (error) {
      if (/^(replies|comparison)_/.test(error.code ?? "")) this.leave(turn, error.message, false);
      else this.page.failed(error);
    }
  }

  show(turn, choice, policies) {
    const hadFocus = this.drop(turn);
    turn.showVote(choice, policies);
    if (hadFocus) turn.note.querySelector(".undo").focus();
    this.page.changed();
  }

  // The vote that is open stays so: the conversation goes on with the first answer.
  passOver() {
    if (this.bar.turn) this.leave(this.bar.turn, "Skipped: it goes on with the first.", true);
  }

  leave(turn, why, canVote) {
    const hadFocus = this.drop(turn);
    turn.showUnvoted(why, canVote);
    if (hadFocus) turn.note.querySelector("button")?.focus();
  }

  // The bar no longer asks about this turn. True where the focus was in it.
  drop(turn) { return this.bar.turn === turn && this.bar.end(); }

  async undo(turn) {
    if (!turn?.note.querySelector(".undo") || this.page.isRunning()) return;
    if (turn.choice !== "skip") {
      try {
        await call("DELETE", pathOf(turn));
      } catch (error) {
        this.page.failed(error);
        return;
      }
      this.otherTabs.postMessage({ comparison: turn.comparison, choice: null });
    }
    this.reopen(turn);
    announce("Undone. Both answers are shown again.");
    this.page.changed();
  }

  reopen(turn) {
    if (this.bar.turn !== turn) this.passOver();
    const hadFocus = turn.note.contains(document.activeElement);
    turn.choice = null;
    turn.unsettle();
    this.bar.ready(turn);
    if (hadFocus) this.bar.buttons[0].focus();
    turn.element.scrollIntoView({ block: "nearest" });
  }

  async explain(turn, comment) {
    try {
      await call("PUT", pathOf(turn), { body: { choice: turn.choice, comment } });
      turn.note.querySelector(".explain").replaceWith("Thank you, that is kept with your vote.");
    } catch (error) {
      this.page.failed(error);
    }
  }

  // Another tab voted, or took a vote back.
  hear({ comparison, choice, policies }) {
    const turn = this.page.turns().find((one) => one.comparison === comparison);
    if (!turn) return;
    if (choice) this.show(turn, choice, policies);
    else this.reopen(turn);
  }
}
