"""The engine's command line and environment."""

from pathlib import Path

import pytest

from service import engine_process
from service.settings import Settings


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_command_takes_what_the_settings_say() -> None:
    settings = Settings(engine_port=9000, engine_max_adapters=5, max_lora_rank=16, max_model_tokens=700)
    command = engine_process.engine_command(settings, Path("/models/a"))
    assert option(command, "--model") == "/models/a"
    assert option(command, "--port") == "9000"
    assert option(command, "--max-loras") == option(command, "--max-cpu-loras") == "5"
    assert option(command, "--max-lora-rank") == "16"
    assert option(command, "--max-model-len") == "700"


def test_an_engine_that_also_samples_for_the_trainer_has_room_for_one_adapter_more() -> None:
    command = engine_process.engine_command(Settings(engine_max_adapters=5, rollouts="fleet"), Path("m"))
    assert option(command, "--max-loras") == option(command, "--max-cpu-loras") == "6"
    assert option(command, "--scheduling-policy") == "priority"  # without it vLLM refuses their priority


def test_the_engine_is_never_reachable_from_other_machines() -> None:
    command = engine_process.engine_command(Settings(host="0.0.0.0"), Path("m"))
    assert option(command, "--host") == "127.0.0.1"


def test_a_rank_that_vllm_does_not_know_becomes_the_next_larger() -> None:
    command = engine_process.engine_command(Settings(max_lora_rank=33), Path("m"))
    assert option(command, "--max-lora-rank") == "64"


def test_an_engine_takes_adapters_or_whole_models() -> None:
    for delivery, opened, closed in (
        ("adapter", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_SERVER_DEV_MODE"),
        ("merged", "VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
    ):
        settings = Settings(delivery=delivery)
        assert ("--enable-lora" in engine_process.engine_command(settings, Path("m"))) == (
            delivery == "adapter"
        )
        environment = engine_process.engine_environment(settings, Path("m"))
        assert environment[opened] == "1"
        assert closed not in environment


@pytest.mark.parametrize("has_gpu", [True, False])
def test_the_gpu_build_compiles_and_the_cpu_build_does_not(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool
) -> None:
    monkeypatch.setattr(engine_process, "has_gpu_build", lambda: has_gpu)
    command = engine_process.engine_command(Settings(), Path("m"))
    assert ("--enforce-eager" not in command) == has_gpu
    assert ("--distributed-executor-backend" not in command) == has_gpu
    assert ("vllm.entrypoints.openai.api_server" in command) == has_gpu  # else by way of `cpu_engine`
    assert (
        "TORCH_COMPILE_DISABLE" not in engine_process.engine_environment(Settings(), Path("m"))
    ) == has_gpu


@pytest.mark.parametrize(
    ("has_gpu", "cpu", "dtype"),
    [
        (True, "flags : avx2", "bfloat16"),
        (False, "flags : avx2 avx512_bf16 fma", "bfloat16"),
        (False, "Features : fp bf16", "bfloat16"),
        (False, "flags : avx2 avx512f", "float32"),
    ],
)
def test_it_computes_in_bfloat16_where_the_device_does(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, cpu: str, dtype: str
) -> None:
    monkeypatch.setattr(engine_process, "has_gpu_build", lambda: has_gpu)
    monkeypatch.setattr(Path, "read_text", lambda _: cpu)
    assert option(engine_process.engine_command(Settings(), Path("m")), "--dtype") == dtype


@pytest.mark.parametrize(("mib", "own", "threads"), [(32, None, "1"), (33, None, None), (32, "2", "2")])
def test_a_small_model_gets_one_thread_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mib: int, own: str | None, threads: str | None
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    with (tmp_path / "model.safetensors").open("wb") as weights:
        weights.truncate(mib << 20)
    assert engine_process.engine_environment(Settings(), tmp_path).get("OMP_NUM_THREADS") == threads
