"""Simulated users: they draw questions of the starter's world, chat, and vote by a taste of their own.

Training never imports this file (a test sees to it). Used by `simulate.py`.
"""

import asyncio
import itertools
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from trainer import tastes, world
from trainer.demo_client import Client, Reply
from trainer.tastes import Taste

FAILED_PAUSE_SECONDS = 1.0
"""What a user waits after a failure before asking again."""
EVALUATION_SEED = 999
"""Seed 0's questions, which every policy of that seed is evaluated on; others have their own."""


@dataclass(slots=True)
class SimulatedUser:
    """One user with a name, a taste, and chance of its own."""

    name: str
    taste: Taste
    client: Client
    rng: random.Random

    async def vote_once(self) -> bool:
        """Ask for two replies and choose. Whether a vote came of it."""
        messages = world.draw_question(self.rng).messages
        answer = await self.client.chat(messages, user=self.name, comparison="always")
        if answer is None or answer.comparison_id is None:
            await asyncio.sleep(FAILED_PAUSE_SECONDS)
            return False
        first, second = (reply.text for reply in answer.replies)
        choice = tastes.vote(self.taste, messages, first, second, self.rng)
        return await self.client.vote(answer.comparison_id, choice, user=self.name)

    async def chat_until(self, stop: asyncio.Event, pause_seconds: float) -> None:
        """Ask for plain replies, with pauses, until told to stop; the request under way is ended first."""
        while not stop.is_set():
            await self.client.chat(world.draw_question(self.rng).messages, user=self.name)
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause_seconds * self.rng.uniform(0.7, 1.3))


def make_users(num_users: int, taste: Taste, client: Client, seed: int) -> list[SimulatedUser]:
    """Users with names and chances of their own; the same ones for the same seed."""
    names = [f"simulated-{number}" for number in range(num_users)]
    return [SimulatedUser(name, taste, client, random.Random(f"{seed} {name}")) for name in names]


async def give_votes(users: Sequence[SimulatedUser], num_votes: int, on_vote: Callable[[], None]) -> None:
    """All users at once, until exactly so many votes are stored."""
    missing = num_votes

    async def vote_on(user: SimulatedUser) -> None:
        nonlocal missing
        while missing > 0:
            missing -= 1  # taken before the wait, so that users together never give one too many
            if await user.vote_once():
                on_vote()
            else:
                missing += 1

    await _all(vote_on(user) for user in users)


def draw_evaluation(num_questions: int, seed: int = 0) -> list[world.Question]:
    """The questions that policies are compared on: the same ones for the same seed."""
    rng = random.Random(EVALUATION_SEED + seed)
    return [world.draw_question(rng) for _ in range(num_questions)]


async def evaluate(
    client: Client,
    policy: str,
    questions: Sequence[world.Question],
    seed: int,
    at_once: int,
    on_reply: Callable[[], None],
) -> list[Reply | None]:
    """One plain reply of a policy to each question, at temperature 1; None where the request failed."""
    replies: list[Reply | None] = [None] * len(questions)
    numbers = itertools.count()

    async def ask_on() -> None:
        while (number := next(numbers)) < len(questions):
            answer = await client.chat(
                questions[number].messages, user="evaluator", model=policy, seed=seed + number
            )
            replies[number] = answer.replies[0] if answer else None
            on_reply()

    await _all(ask_on() for _ in range(at_once))
    return replies


async def _all(works: Iterable[Coroutine[None, None, None]]) -> None:
    """Run to the end of all; the first fault ends the others too and is raised, in an ExceptionGroup."""
    async with asyncio.TaskGroup() as group:
        for work in works:
            group.create_task(work)
