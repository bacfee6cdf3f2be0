"""`ppo_math` against what TRL 1.12.0's PPOTrainer computed on a stored batch (`trl_values.json`, by `make_trl_values.py`).

All that both compute agrees to 1e-5. Where Ratchet departs from TRL it does so on purpose:

1. *Where the score stands.* On the reply's last token; TRL puts it one slot later wherever a reply ended before the longest length,
   as if ending were followed by one more action. Nothing is chosen there: the reward belongs to the token that ended the reply.
2. *The value after the last token* is 0, since the reply is over; TRL's is the value model's at that slot. Given TRL's mask, which
   counts the slot, ours gives TRL's numbers.
3. *Whitening* divides by the standard deviation of these tokens (1/n); TRL by an estimate of a population's (1/(n - 1)).
   There is no population here, and one token alone must not divide by 0.
4. *KL in the reward* is k1 alone, which is unbiased and TRL's default; TRL offers k3, which ours only reports.
5. *Old log-probabilities* are the sampler's where a part that is read again by the pass that trains shows no more than rounding,
   and else all are read again; TRL's come from the sampler's cache unlooked at, and its first ratio is off by rounding, here by less
   than 1e-5.
6. *No value loss*: the value is a linear head, fit exactly (`value.py`), so TRL's clipped value loss has no counterpart.
7. *A ratio may rise further than it may fall*; TRL's clip is the same both ways. Given the same, ours is TRL's.
8. *Temperature* divides logits as it is; TRL adds 1e-7. TRL marks padding by a log-probability of 1.0; ours by the mask.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer import ppo_math

STORED = json.loads(Path(__file__).with_name("trl_values.json").read_text())
K1, K3 = STORED["k1"], STORED["k3"]
SETTINGS = K1["settings"]
PROMPT, PADDING = 3, 2
"""Columns before and after the reply: ours are (B, L) of prompt and reply, TRL's (B, T) of the reply alone."""


@dataclass(frozen=True, slots=True)
class Stored:
    """TRL's rollout in our layout: (B, L), with nonsense outside of the reply that must not matter."""

    values: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        return widen(torch.tensor(self.values[name]), 0.0)

    def noisy(self, name: str, noise: float = 7.0) -> Tensor:
        return widen(torch.tensor(self.values[name]), noise)

    @property
    def scores(self) -> Tensor:
        return torch.tensor(self.values["scores"])

    @property
    def mask(self) -> Tensor:
        """1.0 at the reply's tokens."""
        return widen(1.0 - torch.tensor(self.values["padding_mask"]), 0.0)

    @property
    def mask_with_slot(self) -> Tensor:
        """The same and TRL's extra slot after replies that ended early."""
        return widen(1.0 - torch.tensor(self.values["padding_mask_p1"]), 0.0)


def widen(reply: Tensor, fill: float) -> Tensor:
    """(B, T) -> (B, L)."""
    return torch.nn.functional.pad(reply, (PROMPT, PADDING), value=fill)


ROLLOUT = Stored(K1["rollout"])


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def token_rewards(mask: Tensor) -> Tensor:
    logprobs, reference = ROLLOUT.noisy("logprobs"), ROLLOUT.noisy("ref_logprobs", 8.0)
    return ppo_math.token_rewards(ROLLOUT.scores, logprobs, reference, mask, SETTINGS["kl_coef"])


def test_the_stored_batch_has_replies_that_end_early_and_one_that_does_not() -> None:
    assert ROLLOUT.mask.sum(1).tolist() == [3, 4, 1, 6]
    assert ROLLOUT.mask_with_slot.sum(1).tolist() == [4, 5, 2, 6]


@pytest.mark.parametrize(("stored", "estimate"), [(K1, ppo_math.kl_k1), (K3, ppo_math.kl_k3)])
def test_kl(stored: dict[str, Any], estimate: Any) -> None:
    rollout = Stored(stored["rollout"])
    close(estimate(rollout["logprobs"], rollout["ref_logprobs"]) * rollout.mask, rollout["kl"])


def test_rewards_per_token_given_trls_slot_for_the_score() -> None:
    close(token_rewards(ROLLOUT.mask_with_slot), ROLLOUT["rewards"])


def test_rewards_per_token_are_trls_but_for_the_place_of_the_score() -> None:
    slot = ROLLOUT.mask_with_slot - ROLLOUT.mask  # (B, L) 1.0 at TRL's extra slot
    theirs = ROLLOUT["rewards"]
    close(token_rewards(ROLLOUT.mask), theirs * ROLLOUT.mask + (theirs * slot).roll(-1, dims=1))


def test_advantages_and_returns() -> None:
    advantages, returns = ppo_math.gae(
        ROLLOUT.noisy("rewards"),
        ROLLOUT.noisy("values"),
        ROLLOUT.mask_with_slot,
        SETTINGS["gamma"],
        SETTINGS["lam"],
    )
    close(advantages, ROLLOUT["advantages"])
    close(returns, ROLLOUT["returns"])


def test_a_reply_of_full_length_has_trls_advantages_from_end_to_end() -> None:
    full = ROLLOUT.mask.sum(1) == 6
    advantages, returns = ppo_math.gae(
        token_rewards(ROLLOUT.mask), ROLLOUT["values"], ROLLOUT.mask, SETTINGS["gamma"], SETTINGS["lam"]
    )
    close(advantages[full], ROLLOUT["advantages"][full])
    close(returns[full], ROLLOUT["returns"][full])


def test_whitening_is_trls_but_for_bessels_correction() -> None:
    count = ROLLOUT.mask.sum()
    ours = ppo_math.whiten(ROLLOUT.noisy("advantages"), ROLLOUT.mask)
    close(ours * torch.sqrt((count - 1) / count), ROLLOUT["whitened"] * ROLLOUT.mask)


@pytest.mark.parametrize("update", K1["updates"] + K3["updates"])
def test_clipped_policy_loss(update: dict[str, Any]) -> None:
    stored = Stored(update)
    mask = stored["mask"]
    losses, clipped = ppo_math.policy_loss(
        stored.noisy("new_logprobs"),
        stored.noisy("mb_logprobs", 6.0),
        stored.noisy("mb_advantage"),
        mask,
        SETTINGS["cliprange"],
        SETTINGS["cliprange"],
    )
    close(losses, stored["pg_loss_max"] * mask)
    assert torch.equal(clipped, (stored["pg_losses2"] > stored["pg_losses"]) * mask)
    close(ppo_math.masked_mean(losses, mask), torch.tensor(update["loss"]))


def test_trls_first_ratio_is_1_but_for_rounding() -> None:
    first = Stored(K1["updates"][0])
    close(first["new_logprobs"], first["mb_logprobs"])


def test_the_stored_updates_clip_some_tokens_and_not_others() -> None:
    last = Stored(K1["updates"][-1])
    share = ppo_math.masked_mean((last["pg_losses2"] > last["pg_losses"]).float(), last["mask"])
    assert 0 < share < 1
