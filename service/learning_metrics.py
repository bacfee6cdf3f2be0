"""What the database knows of learning, brought into `metrics.py` when Prometheus asks: the newest cycle, the last duels.

The trainer is a process of its own that may be away; what it measured stands in the cycle's row.
"""

import asyncio
import logging
import math
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from service import metrics
from service.tables import DUEL_KINDS, Cycle, Duel

log = logging.getLogger("ratchet.metrics")
READ_SECONDS = 5.0
"""Prometheus waits ten; all that this process knows itself is told even where the database does not answer."""


async def refresh(sessions: async_sessionmaker[AsyncSession]) -> None:
    """Read it all anew. Where the database does not answer, the last values stay, and `ratchet_database_up` says so."""
    try:
        async with asyncio.timeout(READ_SECONDS), sessions() as session:
            await _read_cycle(session)
            for kind in DUEL_KINDS:
                await _read_duel(session, kind)
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        metrics.DATABASE_UP.set(0)
        log.warning("no metrics from the database: %s", type(error).__name__)
    else:
        metrics.DATABASE_UP.set(1)


async def _read_cycle(session: AsyncSession) -> None:
    seconds = func.extract("epoch", func.coalesce(Cycle.ended_at, func.clock_timestamp()) - Cycle.created_at)
    query = select(Cycle.stage, Cycle.metrics, seconds).order_by(Cycle.id.desc()).limit(1)
    row = (await session.execute(query)).first()
    if row is None:
        return
    stage, measured, lasted = row
    metrics.show_stage(stage)
    metrics.CYCLE_SECONDS.set(float(lasted))
    metrics.REWARD_MODEL_ACCURACY.set(_number(measured, "reward_model", "accuracy", "share"))
    iterations = measured.get("training", {}).get("iterations") or [{}]
    metrics.KL.set(_number(iterations[-1], "kl"))
    metrics.JUDGE.set(_number(iterations[-1], "judge"))


async def _read_duel(session: AsyncSession, kind: str) -> None:
    query = select(Duel.metrics, Duel.ended_at).where(Duel.kind == kind).order_by(Duel.id.desc()).limit(1)
    row = (await session.execute(query)).first()
    if row is None:
        return
    counted, ended_at = row
    metrics.DUEL_RUNNING.labels(kind).set(ended_at is None)
    for result, name in (("win", "wins"), ("loss", "losses"), ("tie", "ties")):
        metrics.DUEL_VOTES.labels(kind, result).set(counted.get(name, 0))
    for that in ("better", "worse"):
        metrics.DUEL_EVIDENCE.labels(kind, that).set(_number(counted, f"evidence_{that}"))


def _number(values: dict[str, Any], *path: str) -> float:
    """What lies there; NaN, which Prometheus shows as no value, where it was not measured (yet)."""
    found: Any = values
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return float(found) if isinstance(found, int | float) else math.nan
