"""Fuzzes a running service from its own OpenAPI document with schemathesis, and counts. Used by `test_fuzz.py`.

All of schemathesis' checks hold: no 5xx; status codes, content types, headers and bodies as documented; what the document allows is
taken, what it forbids is refused; what was deleted is gone; no key, no answer. Two let go: of requests that break a rule between
fields, and of histories.
"""

import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import schemathesis
from schemathesis import hooks
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema
from schemathesis.engine.recorder import CheckNode, ScenarioRecorder
from schemathesis.generation.meta import TestPhase

from tests.service.spoilt_files import spoilt_files

RULES_BETWEEN_FIELDS = {
    "expired",
    "import_empty",
    "import_refused",
    "last_message_not_user",
    "messages_or_corrects",
    "needs_conversation",
    "needs_logprobs",
    "needs_stream",
    "no_comparison",
    "only_for_pairs",
    "wrong_number_of_ranks",
}
"""Codes of errors that a document of one field at a time cannot foretell."""
REFUSALS = [400, 401, 403, 404, 405, 409, 413, 415, 422, 429]
"""Statuses that a wrong request may be answered with; schemathesis' own list lacks 413, for one that is too large besides."""
FILE_TYPES = ("application/jsonl", "application/vnd.apache.parquet")


@dataclass
class Report:
    """What came of it."""

    cases: int = 0
    checks: int = 0
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By operation and status."""
    failures: dict[str, str] = field(default_factory=dict)
    """One for each operation, check and kind: how to do it again."""
    seconds: float = 0.0

    def operations(self) -> set[str]:
        return {operation for operation, _ in self.answers}

    def succeeded(self) -> set[str]:
        """Operations that were answered 2xx."""
        return {operation for operation, status in self.answers if 200 <= status < 300}

    def summary(self) -> str:
        """One line."""
        by_class = Counter({f"{status}xx": 0 for status in (2, 4, 5)})
        for (_, status), number in self.answers.items():
            by_class[f"{status // 100}xx"] += number
        statuses = ", ".join(f"{number:,} {name}" for name, number in sorted(by_class.items()))
        return (
            f"{self.cases:,} cases, {self.checks:,} checks, {len(self.failures)} failures, {self.seconds:.0f} s; "
            f"answers: {statuses}"
        )

    def __add__(self, other: "Report") -> "Report":
        return Report(
            self.cases + other.cases,
            self.checks + other.checks,
            self.answers + other.answers,
            self.failures | other.failures,
            self.seconds + other.seconds,
        )


def take_files(exports: Sequence[bytes]) -> None:
    """From now on, what is imported are these files with something changed."""
    for media_type in FILE_TYPES:
        schemathesis.openapi.media_type(media_type, spoilt_files(exports))
        schemathesis.serializer(media_type)(lambda _, content: {"data": content})


class Memory:
    """Ids that answers gave, with the user they are of: every second case of a call that takes one gets one.

    By itself schemathesis gets there too rarely: a vote needs a comparison of just two replies, shown to the same user.
    """

    def __init__(self, seed: int) -> None:
        self._chance = Random(seed)
        self._known: dict[str, deque[tuple[str, str | None]]] = defaultdict(lambda: deque(maxlen=5))

    def learn(self, case: schemathesis.Case, answer: object) -> None:
        if not isinstance(case.body, dict) or not isinstance(answer, dict) or "id" not in answer:
            return
        user = case.body.get("user")
        kind = {"cmp": "comparison_id", "conv": "conversation_id", "dem": "demonstration_id"}
        if name := kind.get(str(answer["id"]).split("-")[0]):
            self._known[name].append((answer["id"], user))
        for reply in answer.get("choices", answer.get("replies", ())):
            self._known["corrects"].append((reply["reply_id"], user))

    def use(self, case: schemathesis.Case) -> None:
        """Put what is known into a case that is right otherwise."""
        if case.meta is None or not case.meta.generation.mode.is_positive or self._chance.random() < 0.5:
            return
        if case.meta.phase.name is TestPhase.STATEFUL:  # follows the links between calls by itself
            return
        for name in case.path_parameters.keys() & self._known.keys():
            case.path_parameters[name] = self._of_user(name, case)
        if isinstance(case.body, dict) and case.body.get("corrects") and self._known["corrects"]:
            case.body["corrects"] = self._of_user("corrects", case)
            case.body.pop("messages", None)
        if isinstance(case.body, dict) and case.body.get("conversation") and self._known["conversation_id"]:
            case.body["conversation"] = self._of_user("conversation_id", case)

    def _of_user(self, name: str, case: schemathesis.Case) -> str:
        """One of those known; the case then is that user's."""
        id_, user = self._chance.choice(self._known[name])
        place = case.body if isinstance(case.body, dict) else case.query
        place.pop("user", None)
        if user is not None:
            place["user"] = user
        return id_


def fuzz(
    url: str, *, cases: int, seed: int, key: str | None = None, spared: frozenset[int] = frozenset()
) -> Report:
    """At least so many cases: rounds of all phases, each with a seed of its own. `spared`: ids of keys not to revoke."""
    report = Report()
    began = time.monotonic()
    number = 0
    while report.cases < cases:
        for event in _round(url, _config(cases, seed + number, key), spared):
            if isinstance(event, events.ScenarioFinished):
                _count(event.recorder, report)
            elif isinstance(event, events.NonFatalError | events.FatalError):
                report.failures[str(event)] = repr(event)
        number += 1
    report.seconds = time.monotonic() - began
    return report


def _config(cases: int, seed: int, key: str | None) -> SchemathesisConfig:
    """Few cases: without the phase that tries every border of every field (1,100 cases in itself)."""
    config: dict[str, Any] = {
        "seed": seed,
        "generation": {"max-examples": max(3, min(200, cases // 30)), "database": "none"},
        "continue-on-failure": True,
        "output": {"sanitization": {"enabled": False}},
        "request-timeout": 300,
        "phases": {"coverage": {"enabled": cases >= 1000}},
        "checks": {"negative_data_rejection": {"expected-statuses": REFUSALS}},
    }
    return SchemathesisConfig.from_dict(
        config | ({"headers": {"Authorization": f"Bearer {key}"}} if key else {})
    )


def _round(url: str, config: SchemathesisConfig, spared: frozenset[int]) -> Iterator[events.EngineEvent]:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", config=config)
    memory = Memory(config.seed)

    def before_call(_: object, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
        memory.use(case)

    def after_call(_: object, case: schemathesis.Case, response: schemathesis.Response) -> None:
        if response.status_code in (200, 201) and response.headers["content-type"] == ["application/json"]:
            memory.learn(case, response.json())

    @schema.hook
    def filter_case(_: object, case: schemathesis.Case) -> bool:
        return str(case.path_parameters.get("key_id")) not in {str(id_) for id_ in spared}

    @schema.hook
    def filter_failure(
        _: object, failure: Exception, case: schemathesis.Case, response: schemathesis.Response
    ) -> bool:
        kind = type(failure).__name__
        if kind == "UseAfterFree":
            return not case.operation.label.endswith("/history")  # what was taken back stays on record
        if kind == "RejectedPositiveData":
            return response.json()["error"]["code"] not in RULES_BETWEEN_FIELDS
        return True

    everywhere = (before_call, after_call)  # schemathesis takes these for all schemas only
    for hook in everywhere:
        schemathesis.hook(hook)
    try:
        yield from from_schema(schema).execute()
    finally:
        for hook in everywhere:
            hooks.unregister(hook)


def _count(recorder: ScenarioRecorder, report: Report) -> None:
    report.cases += len(recorder.interactions)
    for case_id, interaction in recorder.interactions.items():
        label = recorder.cases[case_id].value.operation.label if case_id in recorder.cases else recorder.label
        if interaction.response is not None:
            report.answers[label, interaction.response.status_code] += 1
        for check in recorder.checks.get(case_id, ()):
            report.checks += 1
            _note(label, check, report)


def _note(operation: str, check: CheckNode, report: Report) -> None:
    if check.failure_info is not None:
        failure = check.failure_info.failure
        report.failures.setdefault(
            f"{operation}: {check.name}: {failure.title}",
            f"{failure.message}\n{check.failure_info.code_sample}",
        )
