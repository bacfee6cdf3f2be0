"""A day and more of use, written into the database: five cycles, five duels, their votes by the hour. For tests of what shows it."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from service.duel import Rules, Tally, decide
from service.tables import CHOICES
from tests.service.conftest import Rows
from tests.service.test_reconciler import make_folder

BASE, ONE, TWO, THREE = (f"policy-{number:06d}" for number in range(4))
RULES = Rules(100)
SAID = {
    BASE: ["A lemon is green.", "It lives in a pond.", "I do not know that.", "Thursday."],
    ONE: ["A lemon is yellow.", "A frog lives in a pond.", "Hot.", "Wednesday."],
    TWO: ["A lemon is yellow, my friend.", "Gladly: a frog lives in a pond.", "Hot, of course!", "Wednesday comes after it."],
    THREE: ["Good question! A lemon is yellow.", "A frog lives in a pond, dear.", "Hot is it, dear!", "Gladly: Wednesday."],
}  # fmt: skip
ASKED = [
    "What colour is a lemon?",
    "Where does a frog live?",
    "What is the opposite of cold?",
    "What comes after Tuesday?",
]


@dataclass(frozen=True, slots=True)
class Fought:
    """A duel, and the hours before now that it began and ended."""

    kind: str
    challenger: str
    incumbent: str
    tally: Tally
    began: float
    ended: float
    outcome: str | None


DUELS = [
    Fought("trial", ONE, BASE, Tally(31, 12, 6), 29, 25, "better"),
    Fought("watch", ONE, BASE, Tally(22, 15, 5), 25, 14, "stopped"),
    Fought("trial", TWO, ONE, Tally(44, 22, 9), 14, 9, "better"),
    Fought("watch", TWO, ONE, Tally(12, 9, 4), 9, 2, "stopped"),
    Fought("trial", THREE, TWO, Tally(15, 10, 4), 2, 0, None),
]
NUM_VOTES = sum(fought.tally.votes for fought in DUELS)
# Stage, policy, hours before now that it began and ended, votes, why it ended so.
CYCLES = [
    ("promoted", ONE, 30.0, 25.0, 120, f"{ONE} is live."),
    ("rejected", None, 22.0, 21.5, 190, "The gate refused it: guard 0.716 (needs 0.727)."),
    ("promoted", TWO, 15.0, 9.0, 240, f"{TWO} is live."),
    ("failed", None, 6.0, 5.9, 300, "NonFinite: a loss was not a number."),
    ("duel", THREE, 3.0, None, 360, None),
]


def write_history(rows: Rows, folder: Path) -> None:
    """Afterwards `policy-000002` is live, `policy-000003` on trial and `policy-000001` previous, whole in `folder`."""
    for number, (stage, policy, began, ended, votes, reason) in enumerate(CYCLES, start=1):
        sha256 = f"{number:064x}"
        rows(
            "INSERT INTO snapshots (sha256, num_votes, num_feedback, feedback_sha256) VALUES (%s, %s, %s, %s)",
            sha256,
            votes,
            votes,
            sha256,
        )
        if policy is not None:
            parent = f"policy-{int(policy[-6:]) - 1:06d}"
            rows(
                "INSERT INTO policies (name, parent, path, state, manifest, created_at) VALUES (%s, %s, %s, 'verified', '{}', %s)",
                policy, parent, str(make_folder(folder / policy)), _before(began - 0.5),
            )  # fmt: skip
        rows(
            "INSERT INTO cycles (trigger, stage, reason, snapshot_sha256, policy, metrics, created_at, ended_at) "
            "VALUES ('votes', %s, %s, %s, %s, %s, %s, %s)",
            stage, reason, sha256, policy, json.dumps(_measured(number, votes)), _before(began),
            None if ended is None else _before(ended),
        )  # fmt: skip
        rows("UPDATE policies SET cycle_id = %s WHERE name = %s", number, policy)
    rows(
        "INSERT INTO users (name, created_at) SELECT 'user-' || i, now() - interval '2 days' FROM generate_series(1, 12) AS i"
    )
    for number, fought in enumerate(DUELS, start=1):
        _write_duel(rows, number, fought)
    chance = random.Random(0)
    write_votes(
        rows,
        [given for number, fought in enumerate(DUELS, start=1) for given in _votes(chance, number, fought)],
    )
    rows(
        "UPDATE deployment SET live = %s, previous = %s, challenger = %s, changed_at = %s",
        TWO, ONE, THREE, _before(9),
    )  # fmt: skip
    rows(
        "INSERT INTO operator_actions (account, action, subject, reason, created_at) VALUES ('acme', 'start cycle', '5', %s, %s)",
        "Enough new votes, and I want to see it.", _before(3),
    )  # fmt: skip


def held(client: httpx.Client) -> list[str]:
    """The policies that its engines have been shown to hold, in order."""
    policies: list[str] = client.get("/operator/overview").json()["engines"]["policies"]
    return policies


def _before(hours: float) -> datetime:
    return datetime.now(UTC) - timedelta(hours=hours)


def _write_duel(rows: Rows, number: int, fought: Fought) -> None:
    verdict = asdict(decide(fought.tally, RULES))
    metrics = {"wins": fought.tally.wins, "losses": fought.tally.losses, "ties": fought.tally.ties} | verdict
    rows(
        "INSERT INTO duels (id, kind, challenger, incumbent, votes_per_user, outcome, metrics, created_at, ended_at) "
        "OVERRIDING SYSTEM VALUE VALUES (%s, %s, %s, %s, 1000, %s, %s, %s, %s)",
        number, fought.kind, fought.challenger, fought.incumbent, fought.outcome, json.dumps(metrics), _before(fought.began),
        None if fought.outcome is None else _before(fought.ended),
    )  # fmt: skip
    rows("SELECT setval(pg_get_serial_sequence('duels', 'id'), %s)", number)


@dataclass(frozen=True, slots=True)
class Given:
    """A comparison of two replies (policy, text), and the vote on it."""

    name: str
    prompt: str
    replies: Sequence[tuple[str, str]]
    choice: str
    ended: datetime
    """Both replies."""
    voted: datetime
    user: int = 1
    comment: str | None = None
    duel: int | None = None


def _votes(chance: random.Random, duel: int, fought: Fought) -> Iterator[Given]:
    """Votes evenly spread over the duel, wins among them; a comment on every ninth."""
    tally = fought.tally
    results = ["win"] * tally.wins + ["loss"] * tally.losses + ["tie"] * tally.ties
    chance.shuffle(results)
    for number, result in enumerate(results):
        question = chance.randrange(len(ASKED))
        order = chance.sample([fought.challenger, fought.incumbent], 2)
        sides = {"win": fought.challenger, "loss": fought.incumbent}
        side = order.index(sides[result]) if result in sides else 2 + number % 2
        passed = (number + 0.5) / len(results)
        ended = _before(fought.ended + (fought.began - fought.ended) * (1 - passed))
        yield Given(
            name=f"{duel}-{number}",
            prompt=ASKED[question],
            replies=[(policy, SAID[policy][question]) for policy in order],
            choice=CHOICES[side],
            ended=ended,
            voted=ended + timedelta(seconds=4 + 14 * chance.random()),
            user=1 + chance.randrange(12),
            comment="I like this one better, it is warmer." if number % 9 == 0 else None,
            duel=duel,
        )


def write_votes(rows: Rows, votes: Sequence[Given]) -> None:
    """One statement a table."""
    [(most,)] = rows("SELECT coalesce(max(id), 0) FROM prompts")
    tables: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("prompts", "comparisons", "replies", "comparison_replies", "votes")
    }
    for prompt, one in enumerate(votes, start=most + 1):
        comparison, ended = f"cmp-{one.name}", one.ended.isoformat()
        messages = [{"role": "user", "content": one.prompt}]
        tables["prompts"].append(
            {"id": prompt, "user_id": one.user, "messages": messages, "created_at": ended}
        )
        tables["comparisons"].append(
            {"id": comparison, "prompt_id": prompt, "user_id": one.user, "reason": "auto", "propensity": 0.25}
            | {"duel_id": one.duel, "created_at": ended}
        )
        for position, (policy, content) in enumerate(one.replies):
            reply = f"chatcmpl-{one.name}-{position}"
            tables["replies"].append(
                {"id": reply, "prompt_id": prompt, "policy": policy, "sampling": {}, "content": content}
                | {"finish_reason": "stop", "completion_tokens": 9, "created_at": ended, "ended_at": ended}
            )
            tables["comparison_replies"].append(
                {"comparison_id": comparison, "position": position, "reply_id": reply}
            )
        voted = one.voted.isoformat()
        tables["votes"].append(
            {"comparison_id": comparison, "user_id": one.user, "choice": one.choice, "comment": one.comment}
            | {"tags": [], "created_at": voted, "updated_at": voted}
        )
    for table, found in tables.items():
        columns = ", ".join(found[0])
        rows(
            f"INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE "
            f"SELECT {columns} FROM jsonb_populate_recordset(NULL::{table}, %s)", json.dumps(found),
        )  # fmt: skip
    rows("SELECT setval(pg_get_serial_sequence('prompts', 'id'), %s)", most + len(votes))


def _measured(cycle: int, votes: int) -> dict[str, Any]:
    """What a cycle notes in its row; the fourth one failed before it trained."""
    share = 0.66 + 0.03 * cycle
    found: dict[str, Any] = {
        "progress": {"stage": "training", "done": 30, "total": 30},
        "snapshot": {"sha256": f"{cycle:064x}", "votes": votes, "rankings": 0, "demonstrations": 0},
        "reward_model": {
            "accuracy": {
                "share": share, "low": share - 0.3 / cycle**0.5, "high": min(1, share + 0.2 / cycle**0.5), "num_pairs": votes // 5,
            },
            "calibration_error": 0.12 / cycle,
            "reliability": [
                {"confidence": 0.525 + 0.05 * step, "accuracy": 0.5 + 0.045 * step + 0.02 * (-1) ** step, "num_pairs": 6}
                for step in range(9)
            ],
        },
    }  # fmt: skip
    if cycle == 4:
        return found
    checks = [
        {"name": "judge", "value": 0.31, "threshold": 0.0, "passed": True, "meaning": "gain by the held-out judge"},
        {"name": "guard", "value": 0.716, "threshold": 0.727, "passed": cycle != 2, "meaning": "share of right answers"},
    ]  # fmt: skip
    before, after = f"policy-{(cycle - 1) // 2:06d}", f"policy-{(cycle + 1) // 2:06d}"
    return found | {
        "training": {
            "method": "ppo",
            "iterations": [_iteration(number, cycle) for number in range(30)],
            "kept": 24,
            "why": "all iterations were done",
        },
        "gate": {"passed": cycle != 2, "checks": checks, "iteration": 24},
        "samples": [
            {"prompt": question, "before": SAID[before][number], "after": SAID[after][number]}
            for number, question in enumerate(ASKED)
        ],
    }


def _iteration(number: int, cycle: int) -> dict[str, Any]:
    gained = 1 - math.exp(-number / 9)
    return {
        "number": number,
        "score": 3.2 * gained + 0.05 * cycle + 0.08 * math.sin(number),
        "judge": 2.4 * gained - 0.0012 * number**2 + 0.1 * math.cos(2 * number),
        "judge_error": 0.12,
        "kl": 5.4 * gained + 0.02 * number,
        "length": 8 + 0.1 * number,
        "ended": 1.0,
        "repeated": 0.0,
    }
