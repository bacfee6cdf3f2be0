"""How the demo scores policies by their replies to the same questions, and the tables that it prints.

Arithmetic and text only; nothing here asks anything. Used by `simulate.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.table import Table

from trainer import world
from trainer.demo_client import Reply
from trainer.repetition import repeats
from trainer.tastes import Taste

Z_95 = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""
SAME_SCORE = 1e-9


@dataclass(frozen=True, slots=True)
class Share:
    """A share with its 95 % interval."""

    value: float
    low: float
    high: float
    num: int
    """Of how many."""

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True)
class Gain:
    """A mean difference and half of its 95 % interval."""

    value: float
    half: float

    @property
    def is_fall(self) -> bool:
        """Whether it is below zero by more than its interval."""
        return self.value < -self.half

    def __str__(self) -> str:
        return f"{self.value:+.3f} ± {self.half:.3f}"


@dataclass(frozen=True, slots=True)
class Score:
    """How one policy did."""

    policy: str
    num_replies: int
    taste: float
    """Mean of the taste over all replies."""
    correct: float
    """Share of right ones among replies to questions that have an answer."""
    spoilt: float
    """Share of replies that repeat themselves or were cut off."""
    win_rate: Share | None
    """Against the starter, by the taste, on the same questions; None for the starter itself."""
    gain: Gain | None
    """Of the taste against the policy that was live before, on the same questions; None for the starter."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A cycle that made no policy live."""

    cycle_id: int
    stage: str
    reason: str


Row = Score | Rejected


@dataclass(frozen=True, slots=True)
class SeedResult:
    """One seed's run: its table, and what it took."""

    seed: int
    num_votes: int
    rows: tuple[Row, ...]
    """The starter first, then each cycle's policy, or why there is none."""
    minutes: float

    @property
    def scores(self) -> list[Score]:
        return [row for row in self.rows if isinstance(row, Score)]


def score(
    policy: str,
    questions: Sequence[world.Question],
    replies: Sequence[Reply | None],
    taste: Taste,
    starter: Sequence[Reply | None] | None,
    before: Sequence[Reply | None] | None,
) -> Score:
    """Score a policy's replies, one a question; `starter`: the starter's to the same ones, `before`: those of the policy that was live
    until then. Skips failed ones.

    Raises ValueError where every request failed.
    """
    pairs = [
        (question, reply) for question, reply in zip(questions, replies, strict=True) if reply is not None
    ]
    if not pairs:
        raise ValueError(f"{policy} gave no reply at all.")
    verdicts = [world.is_correct(question, reply.text) for question, reply in pairs]
    judged = [verdict for verdict in verdicts if verdict is not None]
    to_starter = _differences(questions, replies, starter, taste)
    to_before = _differences(questions, replies, before, taste)
    return Score(
        policy=policy,
        num_replies=len(pairs),
        taste=sum(taste(question.messages, reply.text) for question, reply in pairs) / len(pairs),
        correct=sum(judged) / len(judged) if judged else math.nan,
        spoilt=sum(is_spoilt(reply) for _, reply in pairs) / len(pairs),
        win_rate=win_rate(to_starter) if to_starter else None,
        gain=gain(to_before) if to_before else None,
    )


def is_spoilt(reply: Reply) -> bool:
    """Whether a reply says something twice, or did not come to its own end."""
    return reply.finish_reason != "stop" or repeats(reply.text)


def _differences(
    questions: Sequence[world.Question],
    replies: Sequence[Reply | None],
    others: Sequence[Reply | None] | None,
    taste: Taste,
) -> list[float]:
    """Of the taste, question by question, where both replied."""
    if others is None:
        return []
    return [
        taste(question.messages, mine.text) - taste(question.messages, other.text)
        for question, mine, other in zip(questions, replies, others, strict=True)
        if mine is not None and other is not None
    ]


def win_rate(differences: Sequence[float]) -> Share:
    """Share of positive differences, with equal ones as half a win, and Wilson's interval.

    Halves make the true variance smaller than the binomial one, so the interval errs to the wide side.
    Source: Wilson, JASA 22 (1927).
    """
    wins = sum(0.5 if abs(value) < SAME_SCORE else float(value > 0) for value in differences)
    return _wilson(wins / len(differences), len(differences))


def _wilson(share: float, num: int) -> Share:
    scale = 1 + Z_95**2 / num
    middle = (share + Z_95**2 / (2 * num)) / scale
    half = Z_95 / scale * math.sqrt(share * (1 - share) / num + Z_95**2 / (4 * num**2))
    return Share(share, middle - half, middle + half, num)


def gain(differences: Sequence[float]) -> Gain:
    """Mean difference with its normal interval; one difference alone says nothing."""
    num, mean = len(differences), sum(differences) / len(differences)
    if num < 2:
        return Gain(mean, math.inf)
    variance = sum((value - mean) ** 2 for value in differences) / (num - 1)
    return Gain(mean, Z_95 * math.sqrt(variance / num))


POLICY_COLUMNS = (
    "policy",
    "replies",
    "taste",
    "correct",
    "repeated or cut off",
    "win rate [95 %]",
    "taste, against the one before",
)
SEED_COLUMNS = (
    "seed",
    "votes",
    "live policy",
    "win rate [95 %]",
    "correct: starter -> live",
    "repeated or cut off: starter -> live",
    "minutes",
)


def policy_rows(result: SeedResult) -> list[list[str]]:
    """Of the table of one seed, policy by policy."""
    return [_policy_row(row) for row in result.rows]


def _policy_row(row: Row) -> list[str]:
    if isinstance(row, Rejected):
        return [f"cycle {row.cycle_id} {row.stage}", "", "", "", "", row.reason, ""]
    return [
        row.policy,
        str(row.num_replies),
        f"{row.taste:+.3f}",
        f"{row.correct:.3f}",
        f"{row.spoilt:.4f}",
        "(the starter)" if row.win_rate is None else str(row.win_rate),
        "" if row.gain is None else str(row.gain),
    ]


def seed_rows(results: Sequence[SeedResult]) -> list[list[str]]:
    """Of the summary, seed by seed and all together: the starter against what is live in the end."""
    rows = []
    for result in results:
        starter, live = result.scores[0], result.scores[-1]
        rows.append(
            [
                str(result.seed),
                str(result.num_votes),
                live.policy,
                "nothing was promoted" if live.win_rate is None else str(live.win_rate),
                f"{starter.correct:.3f} -> {live.correct:.3f}",
                f"{starter.spoilt:.4f} -> {live.spoilt:.4f}",
                f"{result.minutes:.1f}",
            ]
        )
    return rows if len(rows) < 2 else [*rows, _row_of_all(results)]


def _row_of_all(results: Sequence[SeedResult]) -> list[str]:
    """Each seed asks questions of its own, so that together they see what is too rare for one. Where nothing was promoted the starter
    stays, and wins half.
    """
    starters = [result.scores[0] for result in results]
    lives = [result.scores[-1] for result in results]
    nothing = Share(0.5, 0.5, 0.5, lives[0].num_replies)
    wins = [live.win_rate or nothing for live in lives]
    return [
        "all",
        str(sum(result.num_votes for result in results)),
        "",
        str(_wilson(fmean(each.value for each in wins), sum(each.num for each in wins))),
        f"{fmean(each.correct for each in starters):.3f} -> {fmean(each.correct for each in lives):.3f}",
        f"{fmean(each.spoilt for each in starters):.4f} -> {fmean(each.spoilt for each in lives):.4f}",
        f"{sum(result.minutes for result in results):.1f}",
    ]


def as_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """For the terminal."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table


def as_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """For a page."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
