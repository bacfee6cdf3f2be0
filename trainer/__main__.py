"""The trainer's process: `python -m trainer`. A clock looks for a reason to start a cycle; one trainer at a time leads.

`accelerate launch -m trainer` starts several processes, one to a GPU: the first is the trainer, and the others take part in its PPO.

Leadership is a PostgreSQL advisory lock on a connection of its own: it is gone when the process is, so a second trainer takes over.
"""

import logging
import os
import signal
import sys
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import IO, cast

import torch
from apscheduler.schedulers.blocking import BlockingScheduler
from rich.console import Console
from sqlalchemy import Engine, func, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service import logs
from service.database import check_connection, sync_engine, sync_sessions
from service.errors import SettingsError
from service.settings import Settings, get_settings
from service.tables import Cycle, Vote
from trainer import followers, snapshot
from trainer.cycle import run_cycle
from trainer.passes import memory
from trainer.team import ALONE, Parted, Team

LOCK = 7_203_001
"""Number of the advisory lock that the leading trainer holds."""


def find_trigger(session: Session, settings: Settings, now: datetime) -> str | None:
    """Why a cycle should start now: `votes`, `clock`, or None."""
    since = session.scalar(select(func.max(Cycle.created_at)))
    new = select(func.count()).select_from(Vote)
    num_new = session.scalar(new if since is None else new.where(Vote.created_at > since)) or 0
    if num_new >= settings.cycle_votes:
        return "votes"
    begun = since or session.scalar(select(func.min(Vote.created_at)))
    due = begun is not None and now - begun >= timedelta(hours=settings.cycle_hours)
    return "clock" if due and num_new >= settings.cycle_min_votes else None


def tick(
    settings: Settings,
    engine: Engine,
    sessions: sessionmaker[Session],
    console: Console,
    team: Team = ALONE,
) -> None:
    """One look: takes up an open cycle, or starts one that is due, where this trainer leads.

    Ends the process where its followers and it are no longer at the same point of a cycle: the launcher then ends all.
    """
    try:
        with engine.connect() as lock:
            if not lock.scalar(text("SELECT pg_try_advisory_lock(:number)"), {"number": LOCK}):
                return
            lock.commit()
            try:
                cycle_id = _find_or_start(settings, sessions)
                if cycle_id is not None:
                    run_cycle(settings, sessions, cycle_id, console, team)
                    memory.give_back()  # the next cycle may be hours away
                else:
                    _scrub(settings, sessions)
            finally:
                lock.execute(text("SELECT pg_advisory_unlock(:number)"), {"number": LOCK})
                lock.commit()
    except OperationalError as error:  # the database is away: the next tick tries again
        console.print(f"The database cannot be reached ({type(error.orig).__name__}); trying again.")
    except Parted as error:
        console.print(str(error))
    if not team.in_step:
        console.print("The training processes are out of step, and end: start them again.")
        os._exit(1)  # a scheduler's thread cannot end the process otherwise


def _find_or_start(settings: Settings, sessions: sessionmaker[Session]) -> int | None:
    with sessions.begin() as session:
        cycle_id = session.scalar(
            select(Cycle.id).where(Cycle.ended_at.is_(None)).order_by(Cycle.id).limit(1)
        )
        if cycle_id is not None:
            return cycle_id
        trigger = find_trigger(session, settings, datetime.now(UTC))
        if trigger is None:
            return None
        cycle = Cycle(trigger=trigger, stage="requested")
        session.add(cycle)
        session.flush()
        return cycle.id


def _scrub(settings: Settings, sessions: sessionmaker[Session]) -> None:
    """No cycle is open: what users had removed goes from the snapshots too."""
    with sessions.begin() as session:
        snapshot.scrub(session, settings.state / "cycles")


def main() -> None:
    """Runs until asked to stop."""
    team = Team.join()
    try:
        settings = get_settings()
        if team.leads:
            check_connection(settings)
    except SettingsError as error:
        sys.exit(f"ratchet: {error.message}")
    memory.keep_freed()
    torch.set_num_threads(settings.threads or max(1, ((os.cpu_count() or 1) - 1) // team.on_machine))
    if not team.leads:
        followers.follow(team)
        return
    engine = sync_engine(settings)
    console = make_console(settings)
    logging.getLogger("apscheduler").setLevel(logging.ERROR)  # ticks skipped while a cycle runs are no news
    scheduler = BlockingScheduler()
    scheduler.add_job(
        tick,
        "interval",
        (settings, engine, sync_sessions(engine), console, team),
        seconds=settings.tick_seconds,
        next_run_time=datetime.now(UTC),
        max_instances=1,
        coalesce=True,
        misfire_grace_time=None,
    )
    signal.signal(signal.SIGTERM, _stop)
    console.print(f"The trainer looks for new votes every {settings.tick_seconds:g} s.")
    scheduler.start()


def make_console(settings: Settings) -> Console:
    """Where the trainer says what it does: standard output, or, in JSON, the log, a line of it for each line."""
    if settings.log_format == "text":
        return Console(width=160, highlight=False)
    logs.start(settings.log_format)
    return Console(file=cast(IO[str], logs.LineWriter("ratchet.trainer")), width=160, highlight=False)


def _stop(number: int, frame: FrameType | None) -> None:
    """A cycle that is cut off here is taken up again from its snapshot, so there is nothing to wait for."""
    os._exit(0)


if __name__ == "__main__":
    main()
