"""Any model: each family of bases goes through the whole cycle, with tied embeddings or not, with a pad token or without one."""

from itertools import compress
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from service.policies import MERGED, read_folder
from tests.tiny_model import make_family, read_logprobs
from tests.trainer.tiny_cycle import NAME, RANK, VOTES, learn_and_publish
from trainer.batches import Batch
from trainer.models import BASE_MODEL, Origin, Roles
from trainer.whole import load_roles

TIED_AND_PADDED = pytest.mark.parametrize(
    ("tied", "padded"), [(True, True), (False, False)], ids=["tied, padded", "neither"]
)
EVERY_FAMILY = pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2"]
)


@pytest.mark.usefixtures("_open_gate", "_exact")
@TIED_AND_PADDED
@EVERY_FAMILY
def test_a_base_of_any_family_goes_through_the_whole_cycle(
    family: str, tied: bool, padded: bool, tmp_path: Path
) -> None:
    base = make_family(tmp_path / "base", family, tied=tied, padded=padded)
    torch.manual_seed(0)
    roles = Roles.load(base, RANK)
    assert (roles.model.get_input_embeddings().weight is roles.model.get_output_embeddings().weight) == tied
    assert (roles.tokenizer.pad_token is not None) == padded
    prompt = roles.prompt_ids(VOTES[0].messages)
    batch = Batch.collate(
        [(prompt, roles.reply_ids(text)) for text in VOTES[0].replies], roles.pad_id, roles.device
    )
    anchor = roles.read(batch).logprobs
    assert torch.equal(roles.logprobs(batch), anchor), "a new adapter changes something"

    published = learn_and_publish(roles, tmp_path)

    assert torch.equal(roles.read(batch).logprobs, anchor), "the anchor moved"
    again = Roles.load(base, RANK, published)
    policy = again.logprobs(batch).detach()
    assert (policy - anchor).abs().max() > 0.05
    assert torch.equal(policy, roles.logprobs(batch))
    whole = AutoModelForCausalLM.from_pretrained(
        published / MERGED, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for probe in read_folder(NAME, published, base, merged=True).probe:
        told = [logprob is not None for logprob in probe.logprobs]
        expected = pytest.approx(list(compress(probe.logprobs, told)), abs=1e-4)
        for model in (again.model, whole):
            assert list(compress(read_logprobs(model, probe.token_ids), told)) == expected


@pytest.mark.usefixtures("_open_gate", "_exact")
@EVERY_FAMILY
def test_so_it_does_with_an_adapter_on_the_last_layers_alone(family: str, tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", family)
    torch.manual_seed(0)
    roles = Roles.load(base, RANK, layers=0.5)
    batch = roles.batch([(roles.prompt_ids(VOTES[0].messages), roles.reply_ids("a lemon is yellow"))])
    anchor = roles.read(batch)
    assert anchor.lower is not None

    published = learn_and_publish(roles, tmp_path)

    policy = Roles.load(base, RANK, published).logprobs(batch)
    assert (policy - anchor.logprobs).abs().max() > 0.05
    assert torch.equal(policy, roles.logprobs(batch, lower=anchor.lower))
    for probe in read_folder(NAME, published, base, merged=True).probe:  # which the service looks at, too
        told = [logprob is not None for logprob in probe.logprobs]
        expected = pytest.approx(list(compress(probe.logprobs, told)), abs=1e-4)
        assert list(compress(read_logprobs(roles.model, probe.token_ids), told)) == expected


@pytest.mark.usefixtures("_open_gate", "_exact")
@TIED_AND_PADDED
@EVERY_FAMILY
def test_so_it_does_with_all_its_weights_trained(
    family: str, tied: bool, padded: bool, tmp_path: Path
) -> None:
    base = make_family(tmp_path / "base", family, tied=tied, padded=padded)
    torch.manual_seed(0)
    roles = load_roles(Origin(base, RANK, tuning="full"))
    batch = roles.batch([(roles.prompt_ids(VOTES[0].messages), roles.reply_ids("a lemon is yellow"))])
    anchor = roles.read(batch).logprobs

    published = learn_and_publish(roles, tmp_path)

    assert torch.equal(roles.read(batch).logprobs, anchor), "the anchor moved"
    manifest = read_folder(NAME, published, base, merged=True)
    assert not any(name.startswith("adapter") for name in manifest.files)
    again = load_roles(Origin(base, RANK, published, published, "full"))
    policy = again.logprobs(batch).detach()
    assert (policy - anchor).abs().max() > 0.05
    assert torch.equal(policy, roles.logprobs(batch))
    assert torch.equal(policy, again.read(batch).logprobs)
    assert torch.equal(anchor, again.logprobs(batch, role=BASE_MODEL))
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        for folder in (published / MERGED, base)
    ]
    for probe in manifest.probe:
        told = [logprob is not None for logprob in probe.logprobs]
        for model, wanted in zip(models, (probe.logprobs, probe.base_logprobs), strict=True):
            own = compress(read_logprobs(model, probe.token_ids), told)
            assert list(own) == pytest.approx(list(compress(wanted, told)), abs=1e-4)
