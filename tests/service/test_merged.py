"""Merged delivery with a real vLLM: its weights are exchanged while it serves, and what it then computes is what was trained."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from service.policies import read_folder
from tests.engine import running_engine
from tests.service.conftest import Rows, Serve, publish, wait_until
from tests.service.test_merged_delivery import POINTER, chatting, held
from tests.tiny_model import make_model, make_policy
from tests.trainer import tiny_ppo
from trainer import ppo_run
from trainer.learning import sample_probes
from trainer.models import Origin
from trainer.publish import Lineage
from trainer.publish import publish as write_policy
from trainer.whole import load_roles

pytestmark = [pytest.mark.database, pytest.mark.engine]
WHOLE = "merged/model.safetensors"
BASE, FIRST, SECOND = (f"policy-{number:06d}" for number in range(3))


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[str]:
    with running_engine(tiny_model, tiny_model.parent / "merged.log", "merged") as url:
        yield url


def make_other_weights(folder: Path, donor: Path) -> Path:
    """A policy's folder with another one's whole model in it, and sha256 that are right."""
    shutil.copy(donor / WHOLE, folder / WHOLE)
    manifests = [json.loads((each / "manifest.json").read_text()) for each in (folder, donor)]
    manifests[0]["files"][WHOLE] = manifests[1]["files"][WHOLE]
    (folder / "manifest.json").write_text(json.dumps(manifests[0]))
    return folder


def test_whole_models_are_exchanged_under_load_and_each_gives_its_probe(
    serve: Serve,
    rows: Rows,
    tmp_path: Path,
    tiny_model: Path,
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.fleet.HOLD_SECONDS", 60.0)
    rows("UPDATE policies SET path = %s", str(tiny_model))
    client = serve(url=engine, delivery="merged")
    policies = {
        name: make_policy(tmp_path / name, tiny_model, seed=seed, merged=True)
        for seed, name in enumerate((FIRST, SECOND))
    }
    with chatting(client) as answers:
        publish(rows, FIRST, policies[FIRST])
        wait_until(lambda: rows(POINTER) == [(FIRST, BASE, None)])
        wait_until(lambda: held(client) == [FIRST])
        # Another policy's weights under its name: whole, finite, of the right shapes, and not what was trained.
        other = make_other_weights(policies[SECOND], policies[FIRST])
        assert read_folder(SECOND, other, tiny_model, merged=True).name == SECOND
        publish(rows, SECOND, other, parent=FIRST)
        wait_until(lambda: rows("SELECT state FROM policies WHERE name = %s", SECOND) == [("refused",)])
        [(said,)] = rows("SELECT reason FROM policies WHERE name = %s", SECOND)
        assert "log-probabilities differ from the manifest's" in said
        wait_until(lambda: held(client) == [FIRST])
        client.post("/operator/rollback").raise_for_status()
        wait_until(lambda: held(client) == [BASE])
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["x-ratchet-policy"] for answer in answers} == {BASE, FIRST}
    assert rows("SELECT count(*) FROM replies WHERE finish_reason NOT IN ('stop', 'length')") == [(0,)]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose embeddings are tied, or not."""
    return make_model(tmp_path_factory.mktemp("base") / "model", tied=request.param)


@pytest.fixture(scope="module")
def engine_of_base(base: Path) -> Iterator[str]:
    with running_engine(base, base.parent / "merged.log", "merged") as url:
        yield url


def train_all_weights(base: Path, folder: Path) -> Path:
    """By PPO, to a policy that is far from the base. Returns its folder."""
    torch.manual_seed(0)
    roles = load_roles(Origin(base, 4, tuning="full"))
    settings = replace(tiny_ppo.SETTINGS, iterations=6, warmup=1, learning_rate_times_width=0.5)
    run = tiny_ppo.start(roles, settings)
    ppo_run.train(run, folder / "checkpoints", lambda _: None)
    probes = sample_probes(roles, run.sampler, list(run.prompts), seed=0)
    lineage = Lineage(FIRST, BASE, BASE, str(base), 1, "", 0, {}, {})
    return write_policy(roles, probes, lineage, folder / "policies")


def test_a_policy_whose_every_weight_was_trained_gives_its_probe(
    serve: Serve, rows: Rows, tmp_path: Path, base: Path, engine_of_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.fleet.HOLD_SECONDS", 60.0)
    folder = train_all_weights(base, tmp_path)
    moved = [
        abs(own - before)
        for probe in read_folder(FIRST, folder, base, merged=True).probe
        for own, before in zip(probe.logprobs, probe.base_logprobs, strict=True)
        if own is not None and before is not None
    ]
    assert sum(moved) / len(moved) > 0.1, "stale weights would give the probe as well"

    rows("UPDATE policies SET path = %s", str(base))
    client = serve(url=engine_of_base, delivery="merged")
    publish(rows, FIRST, folder)
    wait_until(lambda: rows(POINTER) == [(FIRST, BASE, None)])
    wait_until(lambda: held(client) == [FIRST])
