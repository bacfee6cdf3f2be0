"""The roles over bases of every family: log-probabilities are what the model itself computes, however batches are padded."""

from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_model import FAMILIES, SPECIAL, make_family, read_logprobs
from trainer.batches import Batch
from trainer.models import POLICY, REFERENCE, Roles, compute_dtype
from trainer.publish import save_adapter
from trainer.rollouts import Sampler

QUESTIONS = ("lemon?", "What colour is a lemon, and what is a lemon?")
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
TIED_OR_NOT = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])

pytestmark = pytest.mark.usefixtures("_exact")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, torch.bfloat16),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, torch.float32),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({"cpu_name": "Neoverse V1", "bf16": True}, torch.bfloat16),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, torch.float32),
    ],
    ids=["AVX-512 of AMD", "AVX-512 of Intel", "AMX", "ARM", "none"],
)
def test_a_cpu_computes_in_bfloat16_where_that_is_faster(
    capabilities: dict[str, str | bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert compute_dtype.__wrapped__(torch.device("cpu")) is expected


def load_trained(base: Path) -> Roles:
    """With a policy that is not the anchor."""
    torch.manual_seed(0)
    roles = Roles.load(base, rank=4)
    with torch.no_grad():
        for weights in roles.policy_parameters():
            nn.init.normal_(weights, std=0.1)
    return roles


def prompts_of(roles: Roles) -> list[list[int]]:
    return [roles.prompt_ids([{"role": "user", "content": text}]) for text in QUESTIONS]


@EVERY_FAMILY
@TIED_OR_NOT
@torch.no_grad()
def test_the_trainers_logprobs_are_the_models_own(family: str, tied: bool, tmp_path: Path) -> None:
    roles = load_trained(make_family(tmp_path, family, tied=tied))
    # Attention written out is what a family's paper says; faster kinds may leave something out.
    anchor = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    replies = [roles.reply_ids(text) for text in ("a lemon is yellow, yes", "no")]
    pairs = [(prompt, reply) for prompt in prompts_of(roles) for reply in replies]
    batch = Batch.collate(pairs, roles.pad_id, roles.device)
    for model, found in ((anchor, roles.read(batch).logprobs), (roles.model, roles.logprobs(batch))):
        own = [read_logprobs(model, prompt + reply)[len(prompt) :] for prompt, reply in pairs]
        assert found[batch.reply_mask.bool()].tolist() == pytest.approx(list(chain(*own)), abs=1e-4)
        assert not found[~batch.reply_mask.bool()].any()
    assert (roles.read(batch).logprobs - roles.logprobs(batch)).abs().max() > 0.05


def test_an_anchor_of_its_own_is_the_reference_and_stays_as_it_is(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "llama")
    anchor = load_trained(base)
    save_adapter(anchor, tmp_path / "anchor")
    roles = Roles.load(base, 8, None, tmp_path / "anchor")
    batch = Batch.collate([(prompts_of(roles)[0], roles.reply_ids("a lemon is yellow"))], 0, roles.device)
    of_base = anchor.read(batch)
    assert torch.equal(roles.read(batch).logprobs, anchor.logprobs(batch))
    assert torch.equal(roles.logprobs(batch), of_base.logprobs)  # a new adapter changes nothing yet
    assert (roles.read(batch).states - of_base.states).abs().max() > 0.05

    before = roles.read(batch).logprobs
    optimizer = torch.optim.SGD(roles.policy_parameters(), lr=0.1)
    roles.logprobs(batch).sum().backward()
    assert {name for name, weights in roles.model.named_parameters() if weights.grad is not None} == set(
        roles.policy_state()
    )
    optimizer.step()
    assert not torch.equal(roles.logprobs(batch), of_base.logprobs)
    assert torch.equal(roles.read(batch).logprobs, before)

    own = Roles.load(base, 4, tmp_path / "anchor", tmp_path / "anchor")  # live is the anchor
    assert torch.equal(own.read(batch).logprobs, own.logprobs(batch))
    with own.acting_as(REFERENCE), pytest.raises(ZeroDivisionError):
        _ = 1 / 0
    assert all(weights.requires_grad for weights in own.policy_parameters())


@EVERY_FAMILY
@torch.no_grad()
def test_the_samplers_logprobs_are_the_trainers(family: str, tmp_path: Path) -> None:
    roles = load_trained(make_family(tmp_path, family))
    one_in_eight = tuple(range(0, 280, 8))
    with roles.acting_as(POLICY):
        rollouts = Sampler(one_in_eight, max_tokens=12).sample(
            roles.model, prompts_of(roles) * 32, torch.Generator().manual_seed(0)
        )
    lengths = {len(rollout.reply_ids) for rollout in rollouts}
    assert len(lengths) > 3, "rows leave the batch at different times"
    batch = Batch.collate([(r.prompt_ids, r.reply_ids) for r in rollouts], roles.pad_id, roles.device)
    sampled = chain.from_iterable(rollout.logprobs for rollout in rollouts)
    assert roles.logprobs(batch)[batch.reply_mask.bool()].tolist() == pytest.approx(list(sampled), abs=1e-4)


@EVERY_FAMILY
def test_a_finished_reply_ends_as_the_chat_template_ends_one(family: str, tmp_path: Path) -> None:
    roles = Roles.load(make_family(tmp_path, family), rank=4)
    said = [{"role": "user", "content": "lemon?"}, {"role": "assistant", "content": "yes"}]
    whole = roles.tokenizer.apply_chat_template(said, return_dict=False)
    assert roles.prompt_ids(said[:1]) + roles.reply_ids("yes") == whole
    assert roles.reply_ids("yes")[-1] == SPECIAL.index("<|end|>")


def test_a_template_that_ends_no_reply_leaves_it_to_the_tokenizer(tmp_path: Path) -> None:
    roles = Roles.load(make_family(tmp_path, "llama"), rank=4)
    roles.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    assert roles.reply_ids("yes")[-1] == roles.tokenizer.eos_token_id


def test_a_pad_token_that_the_model_has_no_embedding_for_does_no_harm(tmp_path: Path) -> None:
    make_family(tmp_path, "llama", padded=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "<|late|>"})
    tokenizer.save_pretrained(tmp_path)
    roles = Roles.load(tmp_path, rank=4)
    batch = Batch.collate([([5, 6], [7, 8, 1]), ([5], [9, 1])], roles.pad_id, roles.device)
    assert roles.read(batch).logprobs.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_reply_is_cut_off_where_the_models_context_ends(family: str, tmp_path: Path) -> None:
    roles = Roles.load(make_family(tmp_path, family), rank=4)
    sampler = Sampler(roles.end_ids, max_tokens=12, context_tokens=roles.context_tokens)
    room = [2, 5, 40]
    prompts = [[7] * (roles.context_tokens - tokens) for tokens in room]
    with roles.acting_as(POLICY):
        rollouts = sampler.sample(roles.model, prompts, torch.Generator().manual_seed(0))
    assert [len(rollout.reply_ids) for rollout in rollouts] == [2, 5, 12]
    assert not any(rollout.ended for rollout in rollouts)


@EVERY_FAMILY
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_are_those_of_cross_entropy(family: str, temperature: float, tmp_path: Path) -> None:
    roles = load_trained(make_family(tmp_path, family))
    prompt, reply = prompts_of(roles)[0], roles.reply_ids("a lemon is yellow")
    roles.logprobs(roles.batch([(prompt, reply)]), temperature).sum().backward()  # type: ignore[no-untyped-call]
    found = [weights.grad.clone() for weights in roles.policy_parameters() if weights.grad is not None]
    roles.zero_grad()
    logits = roles.model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
    (-nn.functional.cross_entropy(logits / temperature, torch.tensor(reply), reduction="sum")).backward()
    wanted = [weights.grad for weights in roles.policy_parameters()]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
