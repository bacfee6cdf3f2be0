"""Rollouts by engines: faults and users with fakes; and the real vLLM, whose replies must be those of the policy that is trained."""

import asyncio
import io
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from rich.console import Console

from service.database import sync_engine, sync_sessions
from service.engine import Completion, Engine
from service.policies import BASE, ensure_base
from service.settings import Settings
from service.tables import Cycle, ReplicaRow
from tests.service.fake_engine import FakeEngine
from tests.service.http_engine import HttpEngine, running_http_engine
from tests.tiny_model import make_model
from tests.trainer.cycles.acts import accept_challengers, add_votes, request_cycle
from tests.trainer.tiny_ppo import SETTINGS, start
from trainer import fleet_rollouts, ppo_math, ppo_run
from trainer.cycle import run_cycle
from trainer.fleet_rollouts import FleetSampler
from trainer.iterations import GapTooWide, Iteration
from trainer.microbatch import sampled_logprobs
from trainer.models import Roles
from trainer.publish import save_adapter
from trainer.rollouts import Rollout, Sampler

END = 1
SAMPLER = Sampler((END,), max_tokens=4, context_tokens=200)
PROMPTS = [[10 + number, 20] for number in range(60)]
REPLIES = [Rollout(prompt, [*prompt, END], [-1.0] * 3, ended=True) for prompt in PROMPTS]
"""What the fakes say."""
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Roles:
    return Roles.load(make_model(tmp_path_factory.mktemp("base")), rank=4)


@dataclass
class Looking(FakeEngine):
    """Looks at what it is given to load."""

    loaded: dict[str, set[str]] = field(default_factory=dict)

    async def load(self, policy: str, path: str) -> None:
        self.loaded[policy] = {file.name for file in Path(path).iterdir()}
        await super().load(policy, path)


@dataclass
class Cycling:
    """A cycle that asks these engines, and what it told people."""

    folder: Path
    engines: Sequence[FakeEngine]
    idle_seconds: float = math.inf
    """Since a user last asked."""
    said: list[str] = field(default_factory=list)

    def sample(self, roles: Roles, prompts: Sequence[list[int]] = PROMPTS) -> list[Rollout | None]:
        known = {engine.url: engine for engine in self.engines}

        def connect(url: str, _: aiohttp.ClientSession) -> Engine:
            return known[url]

        self.folder.mkdir(exist_ok=True)
        sampler = FleetSampler(
            lambda: list(known), lambda: self.idle_seconds, self.folder, self.said.append, connect
        )
        return sampler.sample(roles, prompts, SAMPLER)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "000007"


def test_each_prompt_gets_its_reply_in_order_whichever_replica_gives_it(roles: Roles, folder: Path) -> None:
    engines = [FakeEngine("a", pause_seconds=0.002), FakeEngine("b", pause_seconds=0.005)]
    cycling = Cycling(folder, engines)
    assert cycling.sample(roles) == REPLIES
    assert sorted(engines[0].completed + engines[1].completed) == PROMPTS
    assert min(len(engine.completed) for engine in engines) > 5
    assert engines[0].priorities == {10}
    assert cycling.said == []


def test_a_reply_that_was_cut_off_has_not_ended(roles: Roles, folder: Path) -> None:
    [cut] = Cycling(folder, [FakeEngine()]).sample(roles, [[5, 6, 7, 8, 9]])
    assert cut == Rollout([5, 6, 7, 8, 9], [5, 6, 7, 8], [-1.0] * 4, ended=False)


def test_every_iteration_has_an_adapter_of_its_own_name_which_is_gone_afterwards(
    roles: Roles, folder: Path
) -> None:
    engine = Looking()
    cycling = Cycling(folder, [engine])
    for _ in range(2):
        cycling.sample(roles)
    assert len(engine.loaded) == 2
    assert all(files == ADAPTER_FILES for files in engine.loaded.values())
    assert not any(name.startswith("policy-") for name in engine.loaded)
    assert engine.held == {BASE}
    assert list(folder.iterdir()) == []


def test_what_a_killed_run_left_is_unloaded_and_policies_stay(roles: Roles, folder: Path) -> None:
    engine = FakeEngine(held={BASE, "policy-000003", "rollouts-000007-0123"})
    (folder / "rollouts-000007-0123").mkdir(parents=True)
    (folder / "snapshot.jsonl").touch()
    Cycling(folder, [engine]).sample(roles)
    assert engine.held == {BASE, "policy-000003"}
    assert [path.name for path in folder.iterdir()] == ["snapshot.jsonl"]


def test_a_replica_that_fails_is_left_out_and_another_answers_for_it(roles: Roles, folder: Path) -> None:
    failing, sound = FakeEngine("failing", completes=7), FakeEngine("sound")
    cycling = Cycling(folder, [failing, sound])
    assert cycling.sample(roles) == REPLIES
    assert sorted(failing.completed + sound.completed) == PROMPTS, "one was lost, or answered twice"
    assert len(failing.completed) == 7
    assert cycling.said == [
        "0 of 60 rollouts are sampled by the trainer itself (failing: The engine did not answer.)"
    ]


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (FakeEngine(alive=False), "The engine did not answer."),
        (FakeEngine(hangs=True, hang_seconds=0.01), "The engine did not answer."),
        (FakeEngine(completes=0), "The engine did not answer."),
    ],
    ids=["dead", "gives no tokens", "dies with the first"],
)
def test_without_a_replica_that_answers_all_is_left_to_the_trainer(
    broken: FakeEngine, why: str, roles: Roles, folder: Path
) -> None:
    cycling = Cycling(folder, [broken])
    assert cycling.sample(roles) == [None] * 60
    assert cycling.said == [f"60 of 60 rollouts are sampled by the trainer itself (fake: {why})"]
    assert list(folder.iterdir()) == []


def test_what_was_answered_before_the_last_replica_died_is_kept(roles: Roles, folder: Path) -> None:
    engine = FakeEngine(completes=20)
    found = Cycling(folder, [engine]).sample(roles)
    assert found == [reply if reply.prompt_ids in engine.completed else None for reply in REPLIES]
    assert found.count(None) == 40


def test_a_replica_that_cannot_load_the_adapter_is_left_out(roles: Roles, folder: Path) -> None:
    class Refusing(set[str]):
        def __contains__(self, _: object) -> bool:
            return True

    refusing, sound = FakeEngine("refusing", cannot_load=Refusing()), FakeEngine("sound")
    cycling = Cycling(folder, [refusing, sound])
    assert cycling.sample(roles) == REPLIES
    assert refusing.completed == []
    assert "refusing: the engine could not load it" in cycling.said[0]


@pytest.fixture
def http_engine() -> Iterator[HttpEngine]:
    with running_http_engine() as engine:
        yield engine


def completion(**changes: Any) -> str:
    """vLLM's answer to token ids, but for what differs."""
    choice = {"finish_reason": "stop", "token_ids": [5, END], "logprobs": {"token_logprobs": [-1.0, -1.0]}}
    return json.dumps({"choices": [choice | changes]})


MODELS, COMPLETIONS = "/v1/models", "/v1/completions"


@pytest.mark.parametrize(
    ("path", "text", "why"),
    [
        (MODELS, "<html>Welcome</html>", "/v1/models is not what vLLM answers: JSON is malformed"),
        (MODELS, '{"data": []}', "/v1/models is not what vLLM answers: Expected `array` of length >= 1"),
        (COMPLETIONS, "<html>Welcome</html>", "/v1/completions is not what vLLM answers: JSON is malformed"),
        (COMPLETIONS, '{"choices": []}', "Expected `array` of length >= 1 - at `$.choices`"),
        (
            COMPLETIONS,
            completion(token_ids=None),
            "Expected `array`, got `null` - at `$.choices[0].token_ids`",
        ),
        (COMPLETIONS, completion(token_ids=[]), "gave 0 tokens, and log-probabilities of 2"),
        (COMPLETIONS, completion(token_ids=[5, 6, END]), "gave 3 tokens, and log-probabilities of 2"),
        (
            COMPLETIONS,
            completion(logprobs=None),
            "Expected `object`, got `null` - at `$.choices[0].logprobs`",
        ),
        (COMPLETIONS, completion(logprobs={"token_logprobs": [None, -1.0]}), "Expected `float`, got `null`"),
        (COMPLETIONS, completion(finish_reason="abort"), "stopped before the answer was whole"),
    ],
)
def test_a_replica_whose_answers_are_not_vllms_is_left_out(
    path: str, text: str, why: str, http_engine: HttpEngine, roles: Roles, folder: Path
) -> None:
    http_engine.says[path] = text
    found, said = ask_over_http(http_engine, roles, folder)
    assert found == [None] * 3
    assert why in said[0]


def test_an_engine_is_asked_for_replies_of_the_whole_distribution_whatever_its_own_defaults(
    http_engine: HttpEngine, roles: Roles, folder: Path
) -> None:
    found, said = ask_over_http(http_engine, roles, folder)
    assert found == [None] * 3
    assert "missing required field `finish_reason`" in said[0]  # it is too old to give token ids
    *_, body = http_engine.completions
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert body | neutral == body


def ask_over_http(engine: HttpEngine, roles: Roles, folder: Path) -> tuple[list[Rollout | None], list[str]]:
    """What it replies to three prompts, and what people are told."""
    folder.mkdir()
    said: list[str] = []
    fleet = FleetSampler(lambda: [engine.url], lambda: math.inf, folder, said.append)
    return fleet.sample(roles, PROMPTS[:3], SAMPLER), said


def test_no_replica_at_all_leaves_all_to_the_trainer(roles: Roles, folder: Path) -> None:
    cycling = Cycling(folder, [])
    assert cycling.sample(roles) == [None] * 60
    assert "no engine had the room or the time" in cycling.said[0]


def test_a_prompt_that_engines_have_no_room_for_is_left_to_the_trainer(roles: Roles, folder: Path) -> None:
    most = SAMPLER.context_tokens - SAMPLER.max_tokens
    prompts = [[7] * most, [7] * (most + 1), [7] * SAMPLER.context_tokens, [7] * 600]
    sampler = replace(SAMPLER, context_tokens=1000)  # the fake's is 512
    engine = FakeEngine()
    fleet = FleetSampler(lambda: ["fake"], lambda: math.inf, folder, lambda _: None, lambda *_: engine)
    folder.mkdir()
    found = fleet.sample(roles, prompts, sampler)
    assert [reply is not None for reply in found] == [True, True, True, False]
    assert fleet.sample(roles, prompts[2:3], SAMPLER) == [None], "its own context is full"


def leap(seconds: float) -> None:
    """The running loop's clock goes on from so much later: no time passes, so that no stall can be taken for it."""
    loop = asyncio.get_running_loop()
    clock = loop.time
    vars(loop)["time"] = lambda: clock() + seconds


def test_what_takes_too_long_is_aborted_and_left_to_the_trainer(roles: Roles, folder: Path) -> None:
    class Hanging(FakeEngine):
        """Works, until it is asked for replies."""

        async def complete_one(self, policy: str) -> None:
            self.hangs = True

    class Quick(FakeEngine):
        async def complete(self, *arguments: Any, **named: Any) -> Completion:
            completion = await super().complete(*arguments, **named)
            if len(self.completed) + hanging.completing == 60:
                leap(fleet_rollouts.PATIENCE_SECONDS)
            return completion

    quick, hanging = Quick("quick"), Hanging("hanging")
    found = Cycling(folder, [quick, hanging]).sample(roles)
    assert len(quick.completed) == 60 - found.count(None) > 20
    assert found.count(None) == hanging.most_completing > 0
    assert (hanging.completing, hanging.held) == (0, {BASE})


def test_a_replica_that_is_not_ready_in_time_is_left_out(roles: Roles, folder: Path) -> None:
    class Hanging(FakeEngine):
        async def load(self, policy: str, path: str) -> None:
            while policy not in sound.held:
                await asyncio.sleep(0)
            leap(fleet_rollouts.PREPARE_SECONDS)
            await asyncio.Event().wait()

    hanging, sound = Hanging("hanging"), FakeEngine("sound")
    cycling = Cycling(folder, [hanging, sound])
    assert cycling.sample(roles) == REPLIES
    assert hanging.completed == []
    assert "hanging: It was not ready within 30 s." in cycling.said[0]


def test_an_error_of_our_own_ends_it_at_once_and_leaves_no_adapter_behind(roles: Roles, folder: Path) -> None:
    class Mistaken(FakeEngine):
        async def complete(self, *arguments: Any, **named: Any) -> Completion:
            if self.completing == 3:
                raise TypeError("a mistake")
            return await super().complete(*arguments, **named)

    engine = Mistaken(pause_seconds=600)
    with pytest.raises(TypeError, match="a mistake"):
        Cycling(folder, [engine]).sample(roles)
    assert (engine.completing, engine.held) == (0, {BASE})
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("idle_seconds", "most"), [(31.0, fleet_rollouts.AT_ONCE), (29.0, 1)])
def test_while_there_are_users_an_engine_is_asked_for_little_at_once(
    idle_seconds: float, most: int, roles: Roles, folder: Path
) -> None:
    engines = [FakeEngine(url, pause_seconds=0.01) for url in "ab"]
    assert Cycling(folder, engines, idle_seconds).sample(roles, PROMPTS * 2) == REPLIES * 2
    assert [engine.most_completing for engine in engines] == [most, most]


def test_users_who_come_make_it_less_and_once_they_are_gone_it_is_more_again(
    roles: Roles, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_rollouts, "LOOK_SECONDS", 0.005)
    begun: list[tuple[int, int]] = []

    class Visited(FakeEngine):
        """Has users from its 40th reply to its 100th."""

        async def complete(self, *arguments: Any, **named: Any) -> Completion:
            cycling.idle_seconds = 3.0 if 40 <= len(self.completed) < 100 else 60.0
            begun.append((len(self.completed), self.completing + 1))
            return await super().complete(*arguments, **named)

    cycling = Cycling(folder, [Visited(pause_seconds=0.02)])
    assert cycling.sample(roles, PROMPTS * 4) == REPLIES * 4

    def most(first: int, last: int) -> int:
        return max(at_once for completed, at_once in begun if first <= completed < last)

    assert most(0, 40) == most(102, 240) == fleet_rollouts.AT_ONCE
    assert most(80, 100) == 1


def make_policy(roles: Roles) -> None:
    """Weights that are far from those of the base."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weights in roles.policy_parameters():
            weights.add_(0.1 * torch.randn(weights.shape, generator=generator))


@pytest.mark.engine
def test_the_real_engine_gives_replies_of_the_policy_that_is_trained(
    vllm: str, tiny_model: Path, folder: Path
) -> None:
    roles = Roles.load(tiny_model, rank=4)
    make_policy(roles)
    folder.mkdir()
    said: list[str] = []
    sampler = Sampler((*roles.end_ids, 60, 61, 62, 63), max_tokens=24)  # it hardly ever ends by itself
    rollouts = [
        rollout
        for rollout in FleetSampler(lambda: [vllm], lambda: math.inf, folder, said.append).sample(
            roles, PROMPTS, sampler
        )
        if rollout is not None
    ]
    assert said == []
    assert [rollout.prompt_ids for rollout in rollouts] == PROMPTS
    assert len({tuple(rollout.reply_ids) for rollout in rollouts}) > 50
    ended = [rollout for rollout in rollouts if rollout.ended]
    assert 0 < len(ended) < 60
    for rollout in rollouts:
        *before, last = [token in sampler.end_ids for token in rollout.reply_ids]
        assert not any(before)
        assert last == rollout.ended == (len(rollout.reply_ids) < 24 or last)
    batch = roles.batch([(rollout.prompt_ids, rollout.reply_ids) for rollout in rollouts])
    sampled = sampled_logprobs(batch, rollouts)
    with torch.no_grad():
        policy, base = roles.logprobs(batch), roles.read(batch).logprobs
    assert mean_gap(policy, sampled, batch.reply_mask) < SETTINGS.most_gap / 2
    assert mean_gap(base, sampled, batch.reply_mask) > 3 * SETTINGS.most_gap


def mean_gap(logprobs: torch.Tensor, sampled: torch.Tensor, mask: torch.Tensor) -> float:
    return ppo_math.masked_mean(ppo_math.gaps(logprobs, sampled, mask), mask).item()


@pytest.mark.engine
def test_an_engine_that_goes_on_with_stale_weights_ends_the_run(
    vllm: str, tiny_model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each adapter's folder has the weights of the first: the load is answered, and nothing says that it did nothing."""
    roles = Roles.load(tiny_model, rank=4)
    save_adapter(roles, tmp_path / "first")
    monkeypatch.setattr(
        fleet_rollouts, "save_adapter", lambda _, path: shutil.copytree(tmp_path / "first", path)
    )
    folder.mkdir()
    run = start(roles)
    run.fleet = FleetSampler(lambda: [vllm], lambda: math.inf, folder, pytest.fail)
    seen: list[Iteration] = []
    with pytest.raises(GapTooWide, match="were not drawn from the policy that is trained"):
        ppo_run.train(run, tmp_path / "checkpoints", seen.append)
    assert 2 <= len(seen) <= 5  # the first one's steps are of size 0
    assert all(iteration.gap <= SETTINGS.most_gap for iteration in seen)


def count_sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many replies the trainer samples, each time that it does."""
    numbers: list[int] = []
    sample = Sampler.sample

    def counting(self: Sampler, model: Any, prompts: Any, generator: torch.Generator) -> list[Rollout]:
        numbers.append(len(prompts))
        return sample(self, model, prompts, generator)

    monkeypatch.setattr(Sampler, "sample", counting)
    return numbers


@pytest.mark.engine
@pytest.mark.database
@pytest.mark.usefixtures("_open_gate")
def test_a_whole_cycle_learns_from_replies_of_the_real_engine(
    vllm: str, tiny_model: Path, database: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.report._plot", lambda *_: "")
    sampled_here = count_sampled(monkeypatch)
    settings = database.model_copy(
        update={
            "rollouts": "fleet",
            "engine_urls": (vllm, "http://127.0.0.1:9"),
            "ppo_iterations": 4,
            "ppo_rollouts": 48,
            "max_reply_tokens": 8,
            "lora_rank": 4,
        }
    )
    sessions = sync_sessions(sync_engine(settings))
    with sessions.begin() as session:
        ensure_base(session, str(tiny_model))
        session.add(ReplicaRow(url="http://127.0.0.1:9", state="draining"))  # not asked: it would be told of
    add_votes(sessions, 40)
    console = Console(file=io.StringIO(), width=200)
    service = accept_challengers(sessions)
    cycle_id = request_cycle(sessions)
    run_cycle(settings, sessions, cycle_id, console)
    service.join()
    with sessions() as session:
        ended = session.get_one(Cycle, cycle_id)
    assert (ended.stage, ended.reason) == ("promoted", "policy-000001 is live.")
    iterations = ended.metrics["training"]["iterations"]
    assert [iteration["number"] for iteration in iterations] == [0, 1, 2, 3]
    assert all(0 < iteration["gap"] < SETTINGS.most_gap for iteration in iterations)
    assert "by the trainer itself" not in console.file.getvalue()
    assert 48 not in sampled_here, "the trainer sampled an iteration's replies"
    assert not list((settings.state / "cycles" / "000001").glob("rollouts-*"))
