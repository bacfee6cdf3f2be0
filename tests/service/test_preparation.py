"""Preparing what parts need that run by themselves: once, again, and with a key that opens the service."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from service import preparation, settings
from service.errors import SettingsError
from service.settings import Settings, get_settings
from tests.engine import free_port
from tests.service.conftest import Rows, wait_until

KEY = "rk-" + "5f" * 32


@pytest.fixture
def ready(database: Settings, tiny_model: Path) -> Settings:
    """A database without rows, a model, and a key."""
    return database.model_copy(update={"model": str(tiny_model), "key": SecretStr(KEY)})


@pytest.mark.database
def test_it_makes_the_first_live_policy_and_the_first_operator_and_again_nothing(
    ready: Settings, rows: Rows, tiny_model: Path
) -> None:
    for _ in range(2):
        preparation.prepare(ready)
    assert rows("SELECT live FROM deployment") == [("policy-000000",)]
    assert rows("SELECT path FROM policies") == [(str(tiny_model),)]
    assert rows("SELECT account, role, hint FROM keys") == [("operator", "operator", KEY[:9])]


@pytest.mark.database
def test_a_key_that_was_revoked_stays_so(ready: Settings, rows: Rows) -> None:
    preparation.prepare(ready)
    rows("UPDATE keys SET revoked_at = now()")
    preparation.prepare(ready)
    assert rows("SELECT count(*), count(revoked_at) FROM keys") == [(1, 1)]


@pytest.mark.database
@pytest.mark.parametrize("key", ["swordfish", "rk-short", "sk-" + "5f" * 32])
def test_a_key_that_could_be_guessed_is_refused_before_anything_is_done(
    ready: Settings, rows: Rows, key: str
) -> None:
    with pytest.raises(SettingsError, match=r"RATCHET_KEY: .*openssl rand") as caught:
        preparation.prepare(ready.model_copy(update={"key": SecretStr(key)}))
    assert key not in str(caught.value)
    assert rows("SELECT count(*) FROM policies") == [(0,)]


def test_it_needs_a_database_of_its_own() -> None:
    with pytest.raises(SettingsError, match="DATABASE_URL"):
        preparation.prepare(Settings())


def test_secrets_are_read_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "SECRETS", tmp_path)
    (tmp_path / "database_url").write_text("postgresql://a:b@c/d\n")
    (tmp_path / "ratchet_key").write_text(KEY + "\n")
    (tmp_path / "grafana_password").write_text("not ours")
    found = get_settings()
    assert found.database_url is not None
    assert found.key is not None
    assert found.database_url.get_secret_value() == "postgresql://a:b@c/d"
    assert found.key.get_secret_value() == KEY


@pytest.mark.database
def test_the_key_opens_a_service_that_others_can_reach(ready: Settings, tiny_model: Path) -> None:
    """`ratchet prepare`, then `python -m service`, as containers run them. On loopback, but keys are as elsewhere."""
    assert ready.database_url is not None
    port = free_port()
    environment = os.environ | {
        "DATABASE_URL": ready.database_url.get_secret_value(),
        "RATCHET_MODEL": str(tiny_model),
        "RATCHET_KEY": KEY,
        "RATCHET_REQUIRE_KEYS": "true",
        "RATCHET_PORT": str(port),
        "RATCHET_ENGINE_URLS": json.dumps([f"http://127.0.0.1:{free_port()}"]),
    }
    subprocess.run([sys.executable, "-m", "service.cli", "prepare"], env=environment, check=True, timeout=300)
    service = subprocess.Popen([sys.executable, "-m", "service"], env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until(lambda: _answers(client))
            assert client.get("/metrics").status_code == 401
            assert client.get("/metrics", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    finally:
        service.send_signal(signal.SIGTERM)
        service.wait(120)


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


def test_an_engine_by_itself_listens_where_the_settings_say(tmp_path: Path, tiny_model: Path) -> None:
    """A stand-in for vLLM tells how it was called."""
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(
        "import json, os, sys\nprint(json.dumps([sys.argv, os.environ['VLLM_ALLOW_RUNTIME_LORA_UPDATING']]))"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}:{root}",
        "RATCHET_MODEL": str(tiny_model),
        "RATCHET_ENGINE_HOST": "0.0.0.0",
        "RATCHET_ENGINE_PORT": "9001",
    }
    command = [sys.executable, "-m", "service.cli", "engine"]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300
    )
    arguments, allowed = json.loads(done.stdout)
    assert allowed == "1"
    for name, value in (("--host", "0.0.0.0"), ("--port", "9001"), ("--model", str(tiny_model))):
        assert arguments[arguments.index(name) + 1] == value
