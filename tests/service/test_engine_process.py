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


def test_the_engine_is_never_reachable_from_other_machines() -> None:
    command = engine_process.engine_command(Settings(host="0.0.0.0"), Path("m"))
    assert option(command, "--host") == "127.0.0.1"


def test_a_rank_that_vllm_does_not_know_becomes_the_next_larger() -> None:
    command = engine_process.engine_command(Settings(max_lora_rank=33), Path("m"))
    assert option(command, "--max-lora-rank") == "64"


def test_the_gpu_build_compiles_and_the_cpu_build_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_gpu in (True, False):
        monkeypatch.setattr(engine_process, "has_gpu_build", lambda has_gpu=has_gpu: has_gpu)
        command = engine_process.engine_command(Settings(), Path("m"))
        assert ("--enforce-eager" not in command) == has_gpu
