"""`make bench-worse`: a policy that was trained to be worse, and what stops it.

The trainer learns from votes that were all turned round, and keeps what these like best. Then it is tried whether such a policy
gets past the gate, which knows the votes as they were given; with the gate off, past its trial by the users' votes; and how long
it stays live where an operator forces it. Real engine, service and database; simulated users vote, by a taste and with noise, as in
`make demo`.

Prints tables in Markdown; writes `results/worse.json`.

    python -m tests.benchmarks.worse [--taste warm] [--seed 0] [--votes 240]
"""

import argparse
import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import aiohttp
from rich.console import Console

from service.policies import BASE
from tests.benchmarks.durability_parts import fresh_settings, running, wait_until_answering
from tests.benchmarks.gateway_report import Goal, goals_report, table
from tests.benchmarks.learning import ROOT, make_starter
from tests.benchmarks.learning_methods import VOTES_PER_USER
from tests.benchmarks.learning_users import Judged, SimulatedVote, draw_votes, judge
from tests.benchmarks.swap_ways import Operator
from tests.benchmarks.tables import write_results
from trainer import gate, ppo, ppo_run, preferences, reward_model
from trainer.demo_client import Client, Tally
from trainer.features import ask_consensus
from trainer.guard import load_guards
from trainer.iterations import load_average
from trainer.learning import anchor_features, sample_probes
from trainer.models import Roles
from trainer.preferences import Split
from trainer.publish import Lineage, publish
from trainer.rollouts import Sampler
from trainer.simulated_users import make_users
from trainer.tastes import Taste, find_taste

NUM_USERS = 8
READY_SECONDS = 120.0
MOST_SECONDS = 1800.0
"""For the users to decide in."""
POLL_SECONDS = 0.2
ERR = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Worse:
    """What training made of the contrary of every vote."""

    folders: list[Path]
    """The same policy under two names: what was rejected is never proposed again."""
    judged: Judged
    starter: Judged
    verdict: gate.Verdict


@dataclass(frozen=True, slots=True)
class Stop:
    """How the users' votes stopped it."""

    what: str
    policy: str
    votes: int
    """All that were given meanwhile; a part of the comparisons is of the duel."""
    seconds: float
    """From when it was proposed, or had gone live, until live was as before."""
    duel: dict[str, Any]


def main() -> None:
    """Run it all."""
    options = _options()
    taste = find_taste(options.taste)
    starter = make_starter(options.state)
    with tempfile.TemporaryDirectory(prefix="ratchet-worse-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL may run as somebody else
        ERR.print("training on the contrary of every vote")
        worse = _train(starter, taste, options.votes, options.seed, folder)
        ERR.print("starting PostgreSQL, engine and service")
        stops = asyncio.run(_put_to_votes(worse, starter, taste, options.seed, folder / "state"))
    print(_report(worse, stops))
    print()
    print(goals_report(_goals(worse, stops)))
    write_results(
        "worse",
        {
            "options": {"taste": options.taste, "seed": options.seed, "votes": options.votes},
            "policy": asdict(worse.judged),
            "starter": asdict(worse.starter),
            "gate": worse.verdict.as_dict(),
            "stops": [asdict(stop) for stop in stops],
        },
    )


def _train(starter: Path, taste: Taste, num_votes: int, seed: int, folder: Path) -> Worse:
    roles = Roles.load(starter, rank=16)
    votes = draw_votes(roles, taste, num_votes, seed)
    settings, policy = reward_model.RewardSettings(), ppo.PPOSettings()
    given = _split(roles, votes, settings.held_out, seed)
    contrary = _split(roles, [vote.flipped() for vote in votes], settings.held_out, seed)
    prompts = [pair.prompt for pair in given.train.pairs]
    sampler = Sampler(roles.end_ids, policy.max_tokens, context_tokens=roles.context_tokens)
    served = replace(sampler, min_p=0.02)
    everything = [*given.train.prompts, *given.held_out.prompts]
    roles.consensus = ask_consensus(roles, sampler, everything, seed)
    own = anchor_features(roles, sampler, prompts, seed)

    def fit(split: Split) -> tuple[reward_model.Head, reward_model.Head]:
        ensemble = reward_model.fit(roles, split.train, own, settings, settings.members, seed)
        return ensemble, reward_model.fit(roles, split.held_out, own, settings, 1, seed)

    ensemble, liked = fit(contrary)
    _, true_judge = fit(given)
    shown = [pair.prompt for pair in given.held_out.pairs]
    examination = gate.Examination(
        roles, true_judge, served, shown, given.held_out.pairs, load_guards(None, starter), seed
    )
    before = judge(roles, taste, seed, draw=0)
    training = ppo.PPO(roles, ensemble, liked, prompts, policy, seed)
    checkpoints = folder / "checkpoints"
    outcome = ppo_run.train(training, checkpoints, lambda _: None)
    if not outcome.kept:
        raise RuntimeError(
            "Training on the contrary votes kept none of its iterations: there is nothing to examine."
        )
    roles.load_policy_state(load_average(checkpoints, outcome.kept))
    chosen_length = gate.mean_chosen_length([*given.train.pairs, *given.held_out.pairs])
    verdict = examination.compare(examination.ask(), chosen_length, policy.kl_budget)
    probes = sample_probes(roles, sampler, prompts, seed)
    folders = [
        publish(roles, probes, _lineage(f"policy-{number:06d}", starter, seed), folder / "policies")
        for number in (1, 2)
    ]
    return Worse(folders, judge(roles, taste, seed, draw=1), before, verdict)


def _split(roles: Roles, votes: list[SimulatedVote], held_out: float, seed: int) -> Split:
    feedback = [vote.as_feedback(number) for number, vote in enumerate(votes)]
    return preferences.split(preferences.read(roles, feedback, VOTES_PER_USER).preferences, held_out, seed)


def _lineage(name: str, starter: Path, seed: int) -> Lineage:
    return Lineage(name, BASE, BASE, str(starter), 0, "", seed, {}, {})


async def _put_to_votes(worse: Worse, starter: Path, taste: Taste, seed: int, state: Path) -> list[Stop]:
    """On trial, and then, forced live, watched."""
    settings = fresh_settings(state, starter)
    url = f"http://127.0.0.1:{settings.port}"
    with running(settings, ["engine", "service"]):
        if await asyncio.to_thread(wait_until_answering, f"{url}/readyz", READY_SECONDS) == float("inf"):
            raise RuntimeError(f"the service is not ready after {READY_SECONDS:g} s; logs are in {state}")
        async with aiohttp.ClientSession(base_url=url) as http:
            users = _Users(http, taste, seed)
            operator = Operator(settings, worse.folders, http)
            ERR.print("on trial")
            stops = [await _trial(users, operator)]
            ERR.print("forced live")
            stops.append(await _watch(users, operator))
    return stops


class _Users:
    """Eight people who vote as long as something is undecided."""

    def __init__(self, http: aiohttp.ClientSession, taste: Taste, seed: int) -> None:
        self.client = Client(http, Tally())
        self._users = make_users(NUM_USERS, taste, self.client, seed)

    async def duel(self, policy: str, kind: str) -> dict[str, Any]:
        """The newest duel of a policy; empty where there is none yet."""
        duels = await self.client.operate("GET", "/operator/duels")
        return next((duel for duel in duels if (duel["challenger"], duel["kind"]) == (policy, kind)), {})

    async def vote_until(self, decided: Callable[[], Awaitable[bool]]) -> tuple[int, float]:
        """Votes given, and seconds. Raises TimeoutError."""
        began, stop, given = perf_counter(), asyncio.Event(), 0

        async def vote(number: int) -> None:
            nonlocal given
            while not stop.is_set():
                # Not `+= await`, which would forget what others add meanwhile.
                has_voted = await self._users[number].vote_once()
                given += has_voted

        async with asyncio.timeout(MOST_SECONDS), asyncio.TaskGroup() as voting:
            for number in range(NUM_USERS):
                voting.create_task(vote(number))
            while not await decided():
                await asyncio.sleep(POLL_SECONDS)
            seconds = perf_counter() - began
            stop.set()
        return given, seconds


async def _trial(users: _Users, operator: Operator) -> Stop:
    policy = await operator.propose()

    async def decided() -> bool:
        return (await users.duel(policy, "trial")).get("ended_at") is not None

    votes, seconds = await users.vote_until(decided)
    return Stop("trial", policy, votes, seconds, await users.duel(policy, "trial"))


async def _watch(users: _Users, operator: Operator) -> Stop:
    policy = (await operator.promote()).new

    async def decided() -> bool:
        return bool((await users.client.read_deployment())["live"] != policy)

    votes, seconds = await users.vote_until(decided)
    return Stop("forced live, watched", policy, votes, seconds, await users.duel(policy, "watch"))


def _report(worse: Worse, stops: list[Stop]) -> str:
    rows = [
        ["win rate against the starter", f"{worse.judged.beats(worse.starter):.3f}"],
        ["correct, starter -> it", f"{worse.starter.correct:.3f} -> {worse.judged.correct:.3f}"],
        ["KL to the starter, nats a reply", f"{worse.judged.kl:.2f}"],
    ]
    checks = [
        [
            check.name,
            f"{check.value:.3f}",
            f"{check.threshold:.3f}",
            "passed" if check.passed else "**failed**",
        ]
        for check in worse.verdict.checks
    ]
    ends = [
        [
            stop.what,
            stop.duel.get("outcome") or "running",
            str(stop.votes),
            "/".join(str(stop.duel.get("metrics", {}).get(name)) for name in ("wins", "losses", "ties")),
            f"{stop.seconds:.0f}",
            stop.duel.get("reason") or "",
        ]
        for stop in stops
    ]
    return "\n\n".join(
        [
            "### The policy",
            table(["", ""], rows),
            "### The gate",
            table(["check", "value", "threshold", ""], checks),
            "### The users, with the gate off",
            table(["", "outcome", "votes", "of the duel: wins/losses/ties", "s", "why"], ends),
        ]
    )


def _goals(worse: Worse, stops: list[Stop]) -> list[Goal]:
    passed = [check.name for check in worse.verdict.checks if not check.passed]
    return [
        Goal("the gate refuses it", "yes", ", ".join(passed) or "passed", bool(passed)),
        *(
            Goal(
                f"{stop.what}: taken back by votes",
                "worse",
                str(stop.duel.get("outcome")),
                stop.duel.get("outcome") == "worse",
            )
            for stop in stops
        ),
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.worse")
    parser.add_argument("--taste", default="warm", help="warm, brief, thorough, or module:function")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--votes", type=int, default=240, help="that it learns the contrary of")
    parser.add_argument(
        "--state", type=Path, default=ROOT / "state" / "bench-learning", help="for the starter"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
