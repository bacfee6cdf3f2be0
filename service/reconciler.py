"""Makes every replica agree with the database: loads, verifies, swaps, unloads. Runs beside the requests.

Every service process loads and verifies for itself (both can be repeated safely); only the leader, who holds
a PostgreSQL advisory lock, refuses a challenger, lets the referee look at the votes, and unloads. Should it lose the lock without
noticing, the number of its term, which each of its transactions compares, keeps it from doing more. Woken by channel `deployment`,
else once a second.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

import psycopg
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from service import duels, metrics, policies, replicas
from service.database import database_url
from service.errors import EngineUnavailable, PolicyRefused
from service.exchanger import Exchanger, share_out
from service.fleet import Fleet, Replica
from service.policies import CHANNEL, Manifest, Wanted
from service.referee import Referee
from service.settings import Settings
from service.tables import Deployment

log = logging.getLogger("ratchet.reconciler")

POLL_SECONDS = 1.0
BUSY_SECONDS = 0.1
"""Between two looks while a replica is being seen to."""
RETRY_SECONDS = 30.0
"""A wanted policy that a replica refused is tried again after this long (the disk may be back)."""
LEADER_LOCK = 0x5A7C4E7
ONE_REPLICA = "with merged delivery a trial needs two replicas: add one, or set RATCHET_DUEL_VOTES=0"
OURS = re.compile(r"policy-\d{6}")
"""Names that the reconciler may unload; the trainer loads others for its rollouts."""


class Reconciler:
    """One per service process. `run` never returns."""

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        referee: Referee,
        sessions: async_sessionmaker[AsyncSession],
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._referee = referee
        self._sessions = sessions
        url = database_url(settings).set(drivername="postgresql")
        self._conninfo = url.render_as_string(hide_password=False)
        self._manifests: dict[str, Manifest] = {}
        self._retry_at: dict[tuple[str, str], float] = {}
        self._exchanger = Exchanger(self._manifest) if settings.delivery == "merged" else None
        self._last_term: int | None = None
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
        async with self._sessions() as session:
            deployment, wanted = await policies.wanted(session)
            running = await duels.read_open(session)
            addresses = await replicas.read(session, self._settings.replica_urls)
        self._fleet.follow(addresses)
        self._fleet.point(deployment)
        self._fleet.duel = duels.as_match(running) if running is not None else None
        if self._exchanger is None:
            await self._see_to_all(lambda replica: self._agree(replica, wanted, term))
        elif term is not None:
            shares = self._share_out(deployment, wanted)
            await self._see_to_all(lambda replica: self._exchange(replica, shares.get(replica.url)))
            self._last_term = term
        elif deployment.leader_term != self._last_term:
            self._fleet.retire()  # nobody else led since where it is the same: the lock's connection was lost
        if term is not None:
            verified = await self._verified(deployment.challenger, term)
            moved = await self._referee.look(verified, term) if verified or running else None
            if moved is not None:
                self._fleet.point(moved)

    async def _see_to_all(self, see_to: Callable[[Replica], Coroutine[None, None, None]]) -> None:
        """See to every replica that is not being seen to; whoever takes longer goes on meanwhile. Raises what one of them raised."""
        for replica in self._fleet.replicas:
            if replica not in self._under_way:
                self._under_way[replica] = asyncio.create_task(see_to(replica))
        if not self._under_way:
            return
        done, _ = await asyncio.wait(self._under_way.values(), timeout=POLL_SECONDS)
        self._under_way = {replica: task for replica, task in self._under_way.items() if task not in done}
        errors = [error for task in done if (error := task.exception()) is not None]
        if errors:
            raise errors[0]

    async def _agree(self, replica: Replica, wanted: list[Wanted], term: int | None) -> None:
        """Load and verify what is missing on one replica; the leader also unloads what nobody wants."""
        try:
            held = await replica.look()
            unwanted = {name for name in held if OURS.fullmatch(name)} - _names(wanted)
            if unwanted and term is not None:
                await self._unload(replica, unwanted, term)
            for policy in wanted:
                if policy.name not in replica.verified:
                    await self._bring(replica, policy)
        except EngineUnavailable as error:
            _give_up(replica, error)

    def _share_out(self, deployment: Deployment, wanted: list[Wanted]) -> dict[str, Wanted]:
        """Merged delivery: what each replica that can be given weights should hold."""
        by_name = {policy.name: policy for policy in wanted}
        able = [replica for replica in self._fleet.replicas if replica.healthy]
        compared = deployment.challenger
        if compared is None and self._fleet.duel is not None:
            compared = deployment.previous
        if compared is not None and any(compared in replica.refused for replica in able):
            compared = None
        if len(able) == 1 and compared == deployment.challenger and self._settings.duel_votes == 0:
            return {able[0].url: by_name[compared or deployment.live]}
        held = {replica.url: next(iter(replica.verified), None) for replica in able}
        return {url: by_name[name] for url, name in share_out(held, deployment.live, compared).items()}

    async def _exchange(self, replica: Replica, target: Wanted | None) -> None:
        """Merged delivery: look at one replica, and have it hold the target. Without one it has not been looked at yet."""
        assert self._exchanger is not None
        try:
            await replica.look()
            if target is not None and not self._is_put_off(replica, target):
                await self._exchanger.agree(replica, target)
        except PolicyRefused as error:
            assert target is not None
            self._note_refused(replica, target, error)
        except EngineUnavailable as error:
            _give_up(replica, error)

    async def _unload(self, replica: Replica, unwanted: set[str], term: int) -> None:
        """Unload what still is unwanted: it may have been a while since the database was asked. Raises LeadLost."""
        async with self._sessions.begin() as session:
            await policies.lock_as_leader(session, term)
            _, wanted = await policies.wanted(session)
        for name in sorted(unwanted - _names(wanted)):
            if not replica.running[name]:
                replica.verified.discard(name)  # first, so that nothing is routed to it any more
                await replica.engine.unload(name)
                log.info("%s unloaded from %s", name, replica.url)

    async def _bring(self, replica: Replica, policy: Wanted) -> None:
        """Load and verify one policy on one replica, noting why it was refused."""
        if self._is_put_off(replica, policy):
            return
        started = time.monotonic()
        try:
            manifest = await self._manifest(policy)
            await replica.engine.load(policy.name, policy.path)
            await replica.verify(policy.name, manifest)
        except PolicyRefused as error:
            self._note_refused(replica, policy, error)
        else:
            metrics.LOAD_SECONDS.observe(time.monotonic() - started)
            log.info("%s loaded and verified on %s", policy.name, replica.url)

    def _is_put_off(self, replica: Replica, policy: Wanted) -> bool:
        """Whether it was refused there a moment ago."""
        return policy.name in replica.refused and time.monotonic() < self._retry_at[replica.url, policy.name]

    def _note_refused(self, replica: Replica, policy: Wanted, error: PolicyRefused) -> None:
        log.error("%s refused on %s: %s", policy.name, replica.url, error.message)
        replica.refused[policy.name] = error.message
        self._retry_at[replica.url, policy.name] = time.monotonic() + RETRY_SECONDS

    async def _manifest(self, policy: Wanted) -> Manifest:
        """The folder's manifest; its files are hashed and looked into once in a process, off the loop."""
        if policy.name not in self._manifests:
            self._manifests[policy.name] = await asyncio.to_thread(
                policies.read_folder,
                policy.name,
                Path(policy.path),
                Path(policy.base),
                merged=self._exchanger is not None,
            )
        return self._manifests[policy.name]

    async def _verified(self, challenger: str | None, term: int) -> str | None:
        """The challenger once every replica that serves has verified it (merged: the one that is its); refuses it where one of them
        cannot."""
        if challenger is None:
            return None
        serving = self._fleet.serving()
        reasons = [replica.refused[challenger] for replica in serving if challenger in replica.refused]
        if self._exchanger is not None and self._settings.duel_votes and len(self._fleet.replicas) == 1:
            reasons = [ONE_REPLICA]
        if reasons:
            async with self._sessions.begin() as session:
                await policies.lock_as_leader(session, term)
                await policies.refuse(session, challenger, reasons[0])
            metrics.SWAPS.labels("refused").inc()
            return None
        needed = any if self._exchanger is not None else all
        held = [challenger in each.verified for each in serving]
        return challenger if held and needed(held) else None


def _give_up(replica: Replica, error: EngineUnavailable) -> None:
    if replica.healthy:
        log.warning("replica %s is not healthy: %s", replica.url, error.message)
    replica.fail()


async def _try_to_lead(connection: psycopg.AsyncConnection) -> bool:
    row = await (await connection.execute("SELECT pg_try_advisory_lock(%s)", (LEADER_LOCK,))).fetchone()
    return bool(row and row[0])


def _names(wanted: list[Wanted]) -> set[str]:
    return {policy.name for policy in wanted}


def _line(error: Exception) -> str:
    """The first line only: SQLAlchemy's second one would show values."""
    return str(error).split("\n", 1)[0][:300]
