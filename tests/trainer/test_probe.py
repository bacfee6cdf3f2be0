"""The probe's tolerance: what it is made of, and that a real engine stays within it with the right weights alone."""

from pathlib import Path

import aiohttp
import pytest
import torch

from service.engine import VllmEngine
from service.errors import PolicyRefused
from service.fleet import Replica
from service.policies import BASE, Manifest, read_folder
from tests.tiny_model import make_model
from trainer import probe
from trainer.models import Roles
from trainer.probe import Noise
from trainer.publish import Lineage, publish
from trainer.rollouts import Rollout

PROMPTS = ["what colour is a lemon?", "where does a frog live?", "name three fruits", "and a cat?", "why?"]


def changed(base: Path, scale: float) -> Roles:
    """A policy that differs from the base by chance."""
    torch.manual_seed(0)
    roles = Roles.load(base, rank=8)
    with torch.no_grad():
        for name, parameter in roles.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    return roles


def rollouts(roles: Roles) -> list[Rollout]:
    """Replies of some length; whose they are does not matter."""
    torch.manual_seed(1)
    size = roles.model.config.get_text_config().vocab_size
    return [
        Rollout(
            roles.prompt_ids([{"role": "user", "content": text}]),
            torch.randint(5, size, (20,)).tolist(),
            [0.0] * 20,
            True,
        )
        for text in PROMPTS
    ]


def lineage(name: str) -> Lineage:
    return Lineage(
        name=name,
        parent=BASE,
        anchor=BASE,
        base="base",
        cycle=1,
        snapshot="ab",
        seed=0,
        settings={},
        metrics={},
    )


def test_the_tolerance_is_what_rounding_does_on_both_sides_and_chance() -> None:
    noise = Noise("bfloat16", 2**-8, 8, mean=0.02, deviation=0.005, distance=1.0)
    assert probe.tolerance(noise) == pytest.approx(2 * (0.02 + 4 * 0.005))
    assert probe.tolerance(Noise("bfloat16", 2**-8, 8, 0.0, 0.0, 1.0)) == 2**-8


def test_noise_is_measured_alike_every_time_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    roles = changed(make_model(tmp_path), scale=0.3)
    probed = probe.choose(rollouts(roles))
    before = probe.make_probes(roles, probed)
    first, second = (probe.measure_noise(roles, probed) for _ in range(2))
    assert first == second
    assert probe.make_probes(roles, probed) == before
    assert (first.dtype, first.unit_roundoff) == ("bfloat16", 2**-8)
    assert first.deviation > 0
    assert 0 < first.mean < first.distance


def test_noise_grows_with_the_roundoff_of_the_engines_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = changed(make_model(tmp_path), scale=0.3)
    probed = probe.choose(rollouts(roles))
    coarse = probe.measure_noise(roles, probed)
    monkeypatch.setattr(probe, "ENGINE_DTYPE", torch.float16)  # three more bits: an eighth of the roundoff
    fine = probe.measure_noise(roles, probed)
    assert fine.mean == pytest.approx(coarse.mean / 8, rel=0.3)


@pytest.mark.engine
async def test_a_real_engine_is_within_the_tolerance_with_the_right_weights_and_not_with_the_bases(
    vllm: str, tiny_model: Path, tmp_path: Path
) -> None:
    roles = changed(tiny_model, scale=0.1)
    folder = publish(roles, rollouts(roles), lineage("policy-000051"), tmp_path)
    manifest: Manifest = read_folder(folder.name, folder, tiny_model)
    async with aiohttp.ClientSession() as session:
        engine = VllmEngine(vllm, session)
        await engine.load(folder.name, str(folder))
        replica = Replica(vllm, engine)
        gap = await replica.probe_gap(folder.name, manifest)
        stale = await replica.probe_gap(BASE, manifest)
        print(f"gap {gap:.4f}, allowed {manifest.probe_tolerance:.4f}, with the base's weights {stale:.4f}")
        await replica.verify(folder.name, manifest)
        with pytest.raises(PolicyRefused, match="differ"):
            await replica.verify(BASE, manifest)
        await engine.unload(folder.name)
    assert gap > manifest.probe_tolerance / 20  # the tolerance is of the noise's size, not merely large
