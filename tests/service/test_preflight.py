"""What `ratchet up` refuses before it starts anything."""

import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from service import preflight
from service.errors import SettingsError
from service.settings import Settings
from tests.engine import free_port


def settings_with(state: Path, **changes: object) -> Settings:
    ports = {"port": free_port(), "engine_port": free_port(), "database_port": free_port()}
    return Settings.model_validate({"state": state, **ports, **changes})


@pytest.mark.parametrize("name", ["port", "engine_port", "database_port"])
def test_a_port_in_use_names_its_setting_and_who_holds_it(tmp_path: Path, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        settings = settings_with(tmp_path, **{name: holder.getsockname()[1]})
        with pytest.raises(
            SettingsError, match=f"^RATCHET_{name.upper()}: port .* in use by .*{os.getpid()}"
        ):
            preflight.check(settings)


def test_one_port_for_two_parts_is_refused(tmp_path: Path) -> None:
    port = free_port()
    with pytest.raises(SettingsError, match=r"RATCHET_ENGINE_PORT: port .* is also RATCHET_PORT's"):
        preflight.check(settings_with(tmp_path, port=port, engine_port=port))


def test_ports_of_parts_that_run_elsewhere_do_not_matter(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        preflight.check_ports(
            settings_with(
                tmp_path,
                engine_port=port,
                engine_urls=("http://127.0.0.1:1",),
                database_port=port,
                database_url="postgresql://me@127.0.0.1/x",
            )
        )


def test_an_address_of_another_machine_names_the_host(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"RATCHET_HOST: .*192\.0\.2\.1"):
        preflight.check(settings_with(tmp_path, host="192.0.2.1"))


def test_a_full_disk_names_the_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10 << 30, 9 << 30, 1 << 30))
    with pytest.raises(SettingsError, match=r"RATCHET_STATE: .* has 1\.0 GiB of free disk, 4 are needed"):
        preflight.check(settings_with(tmp_path))


def test_an_adapter_rank_above_the_engines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"RATCHET_LORA_RANK: 64 is more .* 32 \(RATCHET_MAX_LORA_RANK\)"):
        preflight.check(settings_with(tmp_path, lora_rank=64))


def test_a_state_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"RATCHET_STATE: .* cannot be made"):
        preflight.make_state(settings_with(tmp_path / "file" / "state"))


def test_a_second_run_on_the_same_state_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    settings = settings_with(tmp_path)
    expected = rf"RATCHET_STATE: another `ratchet up` \(pid {os.getpid()}\)"
    with (
        preflight.only_run(settings),
        pytest.raises(SettingsError, match=expected),
        preflight.only_run(settings),
    ):
        pass
    with preflight.only_run(settings):
        pass


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RATCHET_PRT": "1"}, "RATCHET_PRT"),
        ({"RATCHET_PORT": "99999"}, "RATCHET_PORT"),
        ({"RATCHET_MODEL": "/nowhere"}, "RATCHET_MODEL"),
        ({"DATABASE_URL": "mysql://me@127.0.0.1/x"}, "DATABASE_URL"),
        ({"DATABASE_URL": "postgresql://me:geheim@127.0.0.1:1/x"}, "DATABASE_URL"),
    ],
)
def test_the_command_ends_with_one_line_and_status_2(
    tmp_path: Path, environment: dict[str, str], named: str
) -> None:
    ports = {f"RATCHET_{name}PORT": str(free_port()) for name in ("", "ENGINE_", "DATABASE_")}
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", "up"],
        env={**os.environ, **ports, "RATCHET_STATE": str(tmp_path / "state"), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert line.startswith(f"ratchet: {named}")
    assert "geheim" not in line
    assert done.stdout == ""
    assert not (tmp_path / "state" / "postgres").exists()
