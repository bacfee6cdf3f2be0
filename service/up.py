"""`ratchet up`: checks, starts everything on one machine, says when it is ready, and ends it all together.

The order: base model; engine, which is slow; meanwhile PostgreSQL, migrations, the service; the trainer last.
"""

import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from service import embedded, preflight
from service.engine_process import STOP_SECONDS, TYPICAL_START_SECONDS, engine_command, engine_environment
from service.errors import SettingsError
from service.preparation import prepare_database, prepare_model
from service.processes import Interrupted, Part, PartEnded, Runner, end_leftovers, log_path
from service.settings import Settings

STATUS_SETTINGS = 2
"""Exit status for a setting that is wrong; nothing was started, or all of it was ended again."""
STATUS_PART_ENDED = 1
TRAINER_NICENESS = "10"
"""Users' answers come before training: the trainer yields the cores."""
ASK_SECONDS = 0.25


def up(settings: Settings) -> int:
    """Run until asked to stop or a part ends. Returns the exit status; no process is left in any case."""
    console = Console(highlight=False)
    try:
        preflight.make_state(settings)
        with preflight.only_run(settings):
            _end_leftovers(settings, console)
            preflight.check(settings)
            return _run(settings, console)
    except SettingsError as error:
        print(f"ratchet: {error.message}", file=sys.stderr)
        return STATUS_SETTINGS


def _end_leftovers(settings: Settings, console: Console) -> None:
    for name in end_leftovers(settings.state):
        console.print(f"Ended {name}, left over from a run that was killed.")
    if settings.database_url is None:
        embedded.end_leftovers(embedded.data_folder(settings))


def _run(settings: Settings, console: Console) -> int:
    runner = Runner(settings.state)
    status = 0
    with _stopping_on_signals(runner):
        try:
            _start(settings, runner, console)
            while True:
                runner.wait_for(lambda: False, every_seconds=0.5)
        except Interrupted:
            console.print("Stopping.")
        except PartEnded as end:
            console.print(end.message, markup=False, soft_wrap=True)
            status = STATUS_PART_ENDED
        finally:
            runner.stop()
    console.print("Stopped; no process is left.")
    return status


@contextmanager
def _stopping_on_signals(runner: Runner) -> Iterator[None]:
    """Handlers that only take note, so that no signal falls between starting a process and knowing it."""
    handled = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.getsignal(number) for number in handled}
    for number in handled:
        if before[number] != signal.SIG_IGN or number == signal.SIGINT:  # nohup stays nohup
            signal.signal(number, lambda *_: runner.request_stop())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(settings: Settings, runner: Runner, console: Console) -> None:
    began = time.monotonic()
    with _step(console, "model"):
        model = prepare_model(settings, runner.run)
    engine_began = time.monotonic()
    if not settings.engine_urls:
        runner.start(_engine(settings, model))
    if settings.database_url is None:
        with _step(console, "PostgreSQL"):
            _start_database(settings, runner)
    with _step(console, "migrations"):
        prepare_database(settings, model)
    # Longer than it lets replies under way take to end.
    runner.start(
        Part("service", [sys.executable, "-m", "service"], stop_seconds=settings.shutdown_seconds + 5)
    )
    _wait_until_ready(settings, runner, console, engine_began)
    runner.start(Part("trainer", ["nice", "-n", TRAINER_NICENESS, sys.executable, "-m", "trainer"]))
    runner.check()
    _announce(settings, console, time.monotonic() - began)


@contextmanager
def _step(console: Console, title: str) -> Iterator[None]:
    """Shows that something is being done, and then how long it took."""
    began = time.monotonic()
    with console.status(title):
        yield
    _report(console, title, time.monotonic() - began)


def _report(console: Console, title: str, seconds: float) -> None:
    console.print(f"  {title:<28} {seconds:6.1f} s")


def _engine(settings: Settings, model: Path) -> Part:
    return Part(
        "engine",
        engine_command(settings, model),
        engine_environment(settings, model),
        stop_seconds=STOP_SECONDS,
    )


def _start_database(settings: Settings, runner: Runner) -> None:
    embedded.prepare(settings)
    command = embedded.command(settings)
    # Its own folder, as the account that runs it may not be able to stand in ours.
    runner.start(Part("postgres", command, stop_signal=signal.SIGINT, stop_seconds=30, folder="/"))

    def still_there() -> bool:
        runner.check()
        return True

    embedded.wait_until_ready(settings, still_there)


def _wait_until_ready(settings: Settings, runner: Runner, console: Console, began: float) -> None:
    """Wait for /readyz with a bar: the time so far against what a small model takes."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("engine and service", total=TYPICAL_START_SECONDS)

        def is_ready() -> bool:
            progress.update(task, completed=min(time.monotonic() - began, TYPICAL_START_SECONDS))
            return _answers(f"{address(settings)}/readyz")

        runner.wait_for(is_ready, ASK_SECONDS)
    _report(console, "engine and service", time.monotonic() - began)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def address(settings: Settings) -> str:
    """Where the service answers, for somebody on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    return f"http://{f'[{host}]' if ':' in host and host[0] != '[' else host}:{settings.port}"


def _announce(settings: Settings, console: Console, seconds: float) -> None:
    url = address(settings)
    json_header = "-H 'content-type: application/json'"
    lines = [
        "",
        f"Ready after {seconds:.0f} s: {url}   (Ctrl-C stops everything)",
        "",
        "Chat:",
        f"  curl {url}/v1/chat/completions {json_header} \\",
        """    -d '{"model": "ratchet", "messages": [{"role": "user", "content": "hello"}]}'""",
        "Two answers to choose from:",
        f"  curl {url}/v1/chat/completions {json_header} \\",
        """    -d '{"model": "ratchet", "user": "me", "comparison": "always", "messages": """
        """[{"role": "user", "content": "hello"}]}'""",
        "Vote for the first, by the comparison's id:",
        f"  curl -X PUT {url}/v1/comparisons/cmp-.../vote {json_header} \\",
        """    -d '{"choice": "first", "user": "me"}'""",
        f"Logs: {log_path(settings.state, '*')}",
    ]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
