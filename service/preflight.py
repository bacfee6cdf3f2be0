"""What is checked before `ratchet up` starts anything. Every failure is one line that names the setting."""

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from service.database import check_connection
from service.errors import SettingsError
from service.settings import Settings

FREE_GIB = 4.0
"""Least free disk space: the starter, the database, some cycles and policies of a small model."""
LOCK = "lock"


def make_state(settings: Settings) -> None:
    """Make the state folder, closed to others. Raises SettingsError where that cannot be."""
    try:
        settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        (settings.state / "logs").mkdir(exist_ok=True)
    except OSError as error:
        raise SettingsError(f"RATCHET_STATE: {settings.state} cannot be made or written ({error}).") from None


@contextmanager
def only_run(settings: Settings) -> Iterator[None]:
    """Hold the state folder for this process; the kernel lets go when it ends, however it ends."""
    with (settings.state / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise SettingsError(
                f"RATCHET_STATE: another `ratchet up` (pid {holder}) already runs on {settings.state}."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def check(settings: Settings) -> None:
    """Raises SettingsError for the first thing that would keep a part from starting."""
    check_rank(settings)
    check_disk(settings)
    check_ports(settings)
    if settings.database_url is not None:
        check_connection(settings)


def check_rank(settings: Settings) -> None:
    if settings.lora_rank > settings.max_lora_rank:
        raise SettingsError(
            f"RATCHET_LORA_RANK: {settings.lora_rank} is more than the engine takes, "
            f"{settings.max_lora_rank} (RATCHET_MAX_LORA_RANK)."
        )


def check_disk(settings: Settings) -> None:
    free_gib = shutil.disk_usage(settings.state).free / 2**30
    if free_gib < FREE_GIB:
        raise SettingsError(
            f"RATCHET_STATE: {settings.state} has {free_gib:.1f} GiB of free disk, {FREE_GIB:.0f} are needed."
        )


def check_ports(settings: Settings) -> None:
    """Raises SettingsError for a port that is taken, or given twice."""
    taken: dict[int, str] = {}
    for name, host, port in _ports(settings):
        if port in taken:
            raise SettingsError(f"{name}: port {port} is also {taken[port]}'s.")
        taken[port] = name
        _check_port(name, host, port)


def _ports(settings: Settings) -> Iterator[tuple[str, str, int]]:
    """Setting, address and port of everything that we shall listen on."""
    yield "RATCHET_PORT", settings.host, settings.port
    if not settings.engine_urls:
        yield "RATCHET_ENGINE_PORT", "127.0.0.1", settings.engine_port
    if settings.database_url is None:
        yield "RATCHET_DATABASE_PORT", "127.0.0.1", settings.database_port


def _check_port(name: str, host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            raise SettingsError(f"{name}: this user may not listen on port {port}.") from None
        except socket.gaierror:
            raise SettingsError(f"RATCHET_HOST: {host} is not an address of this machine.") from None
        except OSError as error:
            if _somebody_listens(port):
                raise SettingsError(f"{name}: port {port} of {host} is in use{_holder(port)}.") from None
            raise SettingsError(f"RATCHET_HOST: cannot listen on {host} ({error.strerror}).") from None


def _somebody_listens(port: int) -> bool:
    return any(each.laddr and each.laddr.port == port for each in psutil.net_connections("tcp"))


def _holder(port: int) -> str:
    """Who listens on a port, where we may know."""
    for each in psutil.net_connections("tcp"):
        if each.laddr and each.laddr.port == port and each.pid:
            return f" by {psutil.Process(each.pid).name()} (pid {each.pid})"
    return ""
