"""Makes the fleet agree with the database, beside the requests: follows the pointer, has replicas seen to, moves on what is ready.

How a replica is seen to is the delivery's matter. Only the leader, who holds a PostgreSQL advisory lock, refuses a challenger and lets
the referee look at the votes. Should it lose the lock without noticing, the number of its term, which each of its transactions
compares, keeps it from doing more. Woken by channel `deployment`, else once a second.
"""

import asyncio
import logging

import psycopg
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from service import duels, metrics, policies, replicas
from service.database import database_url
from service.delivery import Delivery, SeeTo
from service.fleet import Fleet, Replica
from service.policies import CHANNEL
from service.referee import Referee
from service.settings import Settings

log = logging.getLogger("ratchet.reconciler")

POLL_SECONDS = 1.0
BUSY_SECONDS = 0.1
"""Between two looks while a replica is being seen to."""
LEADER_LOCK = 0x5A7C4E7


class Reconciler:
    """One per service process. `run` never returns."""

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        delivery: Delivery,
        referee: Referee,
        sessions: async_sessionmaker[AsyncSession],
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._delivery = delivery
        self._referee = referee
        self._sessions = sessions
        url = database_url(settings).set(drivername="postgresql")
        self._conninfo = url.render_as_string(hide_password=False)
        self._under_way: dict[Replica, asyncio.Task[None]] = {}
        """Each replica is seen to by itself: one that hangs keeps nobody else waiting."""

    async def run(self) -> None:
        """Reconcile for ever; a fault is logged and counted, and the next second tries again."""
        try:
            while True:
                try:
                    await self._run_connected()
                except Exception as error:
                    metrics.RECONCILE_ERRORS.inc()
                    kind = type(error).__name__
                    log.warning("reconciling failed, trying again: %s: %s", kind, _line(error))
                    await asyncio.sleep(POLL_SECONDS)
        finally:
            for task in self._under_way.values():
                task.cancel()

    async def _run_connected(self) -> None:
        """One connection both listens and holds the leader's lock, so that losing it loses both."""
        async with await psycopg.AsyncConnection.connect(
            self._conninfo, autocommit=True, connect_timeout=5
        ) as connection:
            await connection.execute(f"LISTEN {CHANNEL}")
            term: int | None = None
            while True:
                if term is None and await _try_to_lead(connection):
                    async with self._sessions.begin() as session:
                        term = await policies.begin_term(session)
                    log.info("this process leads, term %d", term)
                await self.tick(term)
                seconds = BUSY_SECONDS if self._under_way else POLL_SECONDS
                async for _ in connection.notifies(timeout=seconds, stop_after=1):
                    pass

    async def tick(self, term: int | None) -> None:
        """Look at every replica and bring it one step nearer to what the database wants. term: the leader's, None for others."""
        num_followed = self._fleet.num_followed
        async with self._sessions() as session:
            deployment, wanted = await policies.wanted(session)
            running = await duels.read_open(session)
            addresses = await replicas.read(session, self._settings.replica_urls)
        # Where an operator's change was followed meanwhile, this may be older; the next tick reads it.
        if self._fleet.num_followed == num_followed:
            self._fleet.follow(addresses)
        self._fleet.point(deployment)
        self._fleet.duel = duels.as_match(running) if running is not None else None
        see_to = self._delivery.plan(deployment, wanted, term)
        if see_to is not None:
            self._begin(see_to)
        await self._collect()
        if term is not None:
            ready = await self._ready(deployment.challenger, term)
            moved = await self._referee.look(ready, term) if ready or running else None
            if moved is not None:
                self._fleet.point(moved)

    def _begin(self, see_to: SeeTo) -> None:
        """See to every replica that is not being seen to."""
        for replica in self._fleet.replicas:
            if replica not in self._under_way:
                self._under_way[replica] = asyncio.create_task(see_to(replica))

    async def _collect(self) -> None:
        """Wait a while for them; whoever takes longer goes on meanwhile. Raises what one of them raised."""
        if not self._under_way:
            return
        done, _ = await asyncio.wait(self._under_way.values(), timeout=POLL_SECONDS)
        self._under_way = {replica: task for replica, task in self._under_way.items() if task not in done}
        errors = [error for task in done if (error := task.exception()) is not None]
        if errors:
            raise errors[0]

    async def _ready(self, challenger: str | None, term: int) -> str | None:
        """The challenger once it can be put to votes; where something is against it, it is refused."""
        if challenger is None:
            return None
        objection = self._delivery.objection(challenger)
        if objection is not None:
            async with self._sessions.begin() as session:
                await policies.lock_as_leader(session, term)
                await policies.refuse(session, challenger, objection)
            metrics.SWAPS.labels("refused").inc()
            return None
        return challenger if self._delivery.is_ready(challenger) else None


async def _try_to_lead(connection: psycopg.AsyncConnection) -> bool:
    row = await (await connection.execute("SELECT pg_try_advisory_lock(%s)", (LEADER_LOCK,))).fetchone()
    return bool(row and row[0])


def _line(error: Exception) -> str:
    """The first line only: SQLAlchemy's second one would show values."""
    return str(error).split("\n", 1)[0][:300]
