"""One seed of the demo against one loop: evaluate, then vote, train and evaluate again, cycle by cycle.

Used by `simulate.py`.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import aiohttp

from service.policies import BASE
from trainer.demo_client import TIMEOUT_SECONDS, Client, DemoError, Reply, Tally
from trainer.demo_loop import Loop
from trainer.demo_scores import Rejected, Row, Score, score
from trainer.demo_screen import Screen, describe_cycle, describe_end
from trainer.simulated_users import SimulatedUser, draw_evaluation, evaluate, give_votes, make_users
from trainer.tastes import Taste

NUM_USERS = 8
NUM_GENTLE = 2
"""Users that chat while a cycle trains: few, as the machine's two cores are training."""
GENTLE_PAUSE_SECONDS = 4.0
FOLLOW_SECONDS = 1.0
BEGIN_SECONDS = 120.0
"""Within which a cycle must have begun once its votes are there."""
CYCLE_SECONDS = 3600.0
SEEDS_APART = 1_000_000
"""Between the sampling seeds of two policies' evaluations: more than an evaluation has questions."""
MOST_POLICIES = 1_000
"""In a run of one seed."""
ASKED_AT_ONCE = 16
"""Questions of an evaluation."""
ENDED = ("promoted", "rejected", "failed")


@dataclass(frozen=True, slots=True)
class Plan:
    """What one demo does, the same for each seed."""

    taste_name: str
    taste: Taste
    num_votes: int
    num_cycles: int
    num_questions: int
    asks_for_cycles: bool
    """Whether cycles are asked for; a loop of our own starts them by itself, by the number of votes."""

    @property
    def votes_per_cycle(self) -> int:
        return self.num_votes // self.num_cycles


@dataclass
class SeedRun:
    """One seed against one loop."""

    plan: Plan
    seed: int
    client: Client
    check_loop: Callable[[], None]
    screen: Screen
    rows: list[Row] = field(default_factory=list)
    starter: list[Reply | None] | None = None
    """The starter's replies to the evaluation's questions, once they are there."""
    last: list[Reply | None] | None = None
    """Those of the policy that was evaluated last."""

    def __post_init__(self) -> None:
        self.users = make_users(NUM_USERS, self.plan.taste, self.client, self.seed)
        self.questions = draw_evaluation(self.plan.num_questions, self.seed)

    async def play(self) -> tuple[Row, ...]:
        """From the starter to the last cycle. Raises DemoError, PartEnded."""
        live = (await self.client.read_deployment())["live"]
        for policy in dict.fromkeys((BASE, live)):
            await self._evaluate(policy, None)
        for number in range(1, self.plan.num_cycles + 1):
            cycles = await self.client.operate("GET", "/operator/cycles")
            last_id = cycles[0]["id"] if cycles else 0
            await self._vote(number)
            cycle = await self._train(last_id)
            if cycle["stage"] == "promoted":
                await self._evaluate(cycle["policy"], self.last)
            else:
                self.rows.append(Rejected(cycle["id"], cycle["stage"], cycle["reason"] or "no reason given"))
        return tuple(self.rows)

    async def _evaluate(self, policy: str, before: list[Reply | None] | None) -> None:
        """before: replies of the policy that it has just taken the place of, if it has."""
        with self.screen.bar(f"evaluating {policy}", len(self.questions)) as step:
            number = 1 + int(policy.rpartition("-")[2]) + self.seed * MOST_POLICIES
            seed = number * SEEDS_APART
            replies = await evaluate(self.client, policy, self.questions, seed, ASKED_AT_ONCE, step)
        if all(reply is None for reply in replies):
            raise DemoError(f"{policy} answered none of the evaluation's questions.")
        row = score(policy, self.questions, replies, self.plan.taste, self.starter, before)
        self.starter, self.last = self.starter or replies, replies
        self.rows.append(row)
        self.screen.say(f"  {policy}: {_line(row)}")

    async def _vote(self, number: int) -> None:
        title = f"votes, round {number} of {self.plan.num_cycles}"
        with self.screen.bar(title, self.plan.votes_per_cycle) as step:
            await give_votes(self.users, self.plan.votes_per_cycle, step)

    async def _train(self, last_id: int) -> dict[str, Any]:
        """Follow one cycle to its end while users chat; all of them, without pauses, as the swap comes."""
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as chatting:

            def chat(users: Sequence[SimulatedUser], pause_seconds: float) -> None:
                for user in users:
                    chatting.create_task(user.chat_until(stop, pause_seconds))

            chat(self.users[:NUM_GENTLE], GENTLE_PAUSE_SECONDS)
            began = time.monotonic()
            cycle_id = await self._begin_cycle(last_id)
            cycle = await self._follow(cycle_id, lambda: chat(self.users[NUM_GENTLE:], 0.0))
            seconds = time.monotonic() - began
            stop.set()
        if cycle["stage"] == "promoted":
            deployment = await self.client.read_deployment()
            self.client.tally.note_swap(datetime.fromisoformat(deployment["changed_at"]))
        for line in describe_end(cycle, seconds):
            self.screen.say(f"  {line}")
        return cycle

    async def _begin_cycle(self, last_id: int) -> int:
        """The id of the cycle that trains on the votes just given. Raises DemoError."""
        deadline = time.monotonic() + BEGIN_SECONDS
        while time.monotonic() < deadline:
            self.check_loop()
            if self.plan.asks_for_cycles:
                cycle = await self.client.operate("POST", "/operator/cycles", allow=409)
                if cycle is not None:
                    return int(cycle["id"])
                deadline = time.monotonic() + BEGIN_SECONDS  # another one runs: wait for its end
            else:
                cycles = await self.client.operate("GET", "/operator/cycles")
                if cycles and cycles[0]["id"] > last_id:
                    return int(cycles[0]["id"])
            await asyncio.sleep(FOLLOW_SECONDS)
        raise DemoError(f"No cycle began within {BEGIN_SECONDS:.0f} s of its votes.")

    async def _follow(self, cycle_id: int, on_swap: Callable[[], None]) -> dict[str, Any]:
        """Show a cycle until it has ended. Raises DemoError."""
        deadline = time.monotonic() + CYCLE_SECONDS
        swapping = False
        with self.screen.line() as show:
            while time.monotonic() < deadline:
                self.check_loop()
                cycle: dict[str, Any] = await self.client.operate("GET", f"/operator/cycles/{cycle_id}")
                show(cycle["stage"], describe_cycle(cycle))
                if cycle["stage"] in ENDED:
                    return cycle
                if not swapping and _swap_comes(cycle):
                    swapping = True
                    on_swap()
                await asyncio.sleep(FOLLOW_SECONDS)
        raise DemoError(f"Cycle {cycle_id} did not end within {CYCLE_SECONDS:.0f} s.")


async def play(plan: Plan, seed: int, loop: Loop, tally: Tally, screen: Screen) -> tuple[Row, ...]:
    """One seed's run, with connections of its own."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    async with aiohttp.ClientSession(base_url=loop.url, timeout=timeout) as session:
        return await SeedRun(plan, seed, Client(session, tally), loop.check, screen).play()


def _swap_comes(cycle: dict[str, Any]) -> bool:
    """Whether a swap is at most some seconds away: a policy has passed the gate."""
    return cycle["stage"] == "swap" or bool(cycle["metrics"].get("gate", {}).get("passed"))


def _line(row: Score) -> str:
    won = f", win rate {row.win_rate}" if row.win_rate else ""
    return f"taste {row.taste:+.3f}, correct {row.correct:.3f}, repeated or cut off {row.spoilt:.3f}{won}"
