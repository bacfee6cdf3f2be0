"""What people said of replies, as training takes it: pairs with a weight, and replies that were called bad without another beside;
and what else they asked, which a policy can be trained on as well once a reward model tells replies apart.

A ranking of K replies is K (K - 1) / 2 pairs that weigh as much as one vote together (arXiv:2203.02155, section 3.5). A voter who
gave many counts no more than `votes_per_user`. Users are held out, and accuracy on their votes is that of a model
which has seen neither them nor their prompts.
"""

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from trainer.models import Roles
from trainer.snapshot import Feedback

FEWEST_USERS = 5
"""Below it nobody is held out: what is left would say little about anybody."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a judgement comes from."""

    group: str
    """The prompt's identity."""
    user: str = ""
    cohort: str = "vote"
    """`vote`, `ranking`, `demonstration` or `import`: accuracy is reported for each."""
    policies: tuple[str | None, ...] = ()
    """Of the replies, where one of ours wrote them."""
    weight: float = 1.0
    """Of the whole judgement, however many pairs it gives."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replies to one prompt as token ids, and how they were judged."""

    prompt: list[int]
    first: list[int]
    second: list[int]
    label: float
    """Probability that the first is better: 1.0, 0.0, or 0.5 for a tie."""
    source: Source
    weight: float = 1.0

    @property
    def decided(self) -> bool:
        """Whether one of the two was preferred."""
        return self.label != 0.5


@dataclass(frozen=True, slots=True)
class Dislike:
    """A reply of which all that is known is that it was bad: worse than the anchor's usual ones."""

    prompt: list[int]
    reply: list[int]
    source: Source
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Preferences:
    """Everything that a reward model is fit to, and what else was asked, for a policy to be trained on."""

    pairs: list[Pair]
    dislikes: list[Dislike]
    unjudged: list[list[int]] = field(default_factory=list)
    """Prompts that were answered, and no answer judged."""

    @property
    def decided(self) -> list[Pair]:
        """Pairs of which one reply was preferred."""
        return [pair for pair in self.pairs if pair.decided]

    @property
    def everything(self) -> list[Pair | Dislike]:
        """The pairs, then the dislikes."""
        return [*self.pairs, *self.dislikes]

    @property
    def sources(self) -> list[Source]:
        """Of each pair, then of each dislike."""
        return [each.source for each in self.everything]

    @property
    def prompts(self) -> list[list[int]]:
        """Of each pair and dislike, so that one which was judged often comes often; then the unjudged ones."""
        return [*(each.prompt for each in self.everything), *self.unjudged]

    def where(self, keep: Callable[[Source], bool]) -> "Preferences":
        """Those judgements whose source is kept."""
        return Preferences(
            [pair for pair in self.pairs if keep(pair.source)],
            [dislike for dislike in self.dislikes if keep(dislike.source)],
        )


@dataclass(frozen=True, slots=True)
class Split:
    """What is trained on, and what is not."""

    train: Preferences
    """All that is not held out."""
    unlike: Preferences
    """Of these, what shares no prompt with what is held out: for a model whose held-out accuracy is to be reported."""
    held_out: Preferences
    by: str
    """`user and prompt`; `user` where all ask the same, `prompt` where there are too few users to hold any out."""


@dataclass(frozen=True, slots=True)
class Demonstrated:
    """A reply that a person wrote, as token ids."""

    prompt: list[int]
    reply: list[int]
    source: Source


@dataclass(frozen=True, slots=True)
class Lesson:
    """A snapshot as token ids."""

    preferences: Preferences
    demonstrations: list[Demonstrated]
    too_long: int
    """Left out, since prompt and reply, or a prompt alone, are longer than the model's context."""


def read(roles: Roles, feedback: Sequence[Feedback], votes_per_user: int) -> Lesson:
    """A snapshot as token ids; a correction is a demonstration, and better than what it corrects."""
    counts = Counter(row.user for row in feedback if row.kind in ("vote", "ranking") or len(row.replies) > 1)
    preferences, demonstrations, too_long = Preferences([], []), list[Demonstrated](), 0
    for row in feedback:
        prompt = roles.prompt_ids(row.messages)
        replies = [roles.reply_ids(text) for text in row.replies]
        if len(prompt) + max(map(len, replies), default=1) > roles.context_tokens:
            too_long += 1
            continue
        if row.kind == "prompt":
            preferences.unjudged.append(prompt)
            continue
        source = Source(
            group=sha256(json.dumps(prompt).encode()).hexdigest(),
            user=row.user,
            cohort="import" if row.imported else row.kind,
            policies=tuple(row.policies),
            weight=min(1.0, votes_per_user / max(1, counts[row.user])),
        )
        if row.kind == "demonstration":
            demonstrations.append(Demonstrated(prompt, replies[0], source))
        if row.ranks is None:
            preferences.dislikes.extend(disliked(prompt, replies, source))
        else:
            preferences.pairs.extend(from_ranks(prompt, replies, row.ranks, source))
    return Lesson(preferences, demonstrations, too_long)


def from_ranks(
    prompt: list[int], replies: Sequence[list[int]], ranks: Sequence[int], source: Source
) -> list[Pair]:
    """All pairs of a ranking (1 is best, equal ranks are ties), which weigh as much as one vote together."""
    indices = list(itertools.combinations(range(len(replies)), 2))
    return [
        Pair(
            prompt,
            replies[one],
            replies[two],
            0.5 if ranks[one] == ranks[two] else float(ranks[one] < ranks[two]),
            source,
            source.weight / len(indices),
        )
        for one, two in indices
    ]


def disliked(prompt: list[int], replies: Sequence[list[int]], source: Source) -> list[Dislike]:
    """`neither`: all of them are bad. Together they weigh as much as one vote."""
    return [Dislike(prompt, reply, source, source.weight / len(replies)) for reply in replies]


def split(preferences: Preferences, share: float, seed: int) -> Split:
    """Hold out users until `share` of the judgements are theirs.

    With fewer than `FEWEST_USERS` users, hold out prompts alone.
    """
    users = {source.user for source in preferences.sources}
    if len(users) < FEWEST_USERS:
        held = _draw({source.group for source in preferences.sources}, lambda group: 1.0, share, seed)
        train = preferences.where(lambda source: source.group not in held)
        return Split(train, train, preferences.where(lambda source: source.group in held), by="prompt")
    given = Counter(source.user for source in preferences.sources)
    held = _draw(users, lambda user: float(given[user]), share, seed)
    held_out = preferences.where(lambda source: source.user in held)
    seen = {source.group for source in held_out.sources}
    train = preferences.where(lambda source: source.user not in held)
    unlike = train.where(lambda source: source.group not in seen)
    if not unlike.decided:  # everybody asks the same
        return Split(train, train, held_out, by="user")
    return Split(train, unlike, held_out, by="user and prompt")


def _draw(names: set[str], size: Callable[[str], float], share: float, seed: int) -> set[str]:
    """Names drawn one by one until they are at least `share` of the whole size, but not more than half of it."""
    order = sorted(names)
    random.Random(seed).shuffle(order)
    whole = sum(map(size, order))
    drawn: set[str] = set()
    total = 0.0
    for name in order:
        if total >= share * whole - 1e-9:
            break
        if total + size(name) <= whole / 2:
            drawn.add(name)
            total += size(name)
    return drawn
