"""What the anchor says to a prompt when it is surest, and how much of it a reply says.

A model knows more than it says: at a low temperature the starter gives 98 right answers in a hundred, at temperature 1 only 63. How
likely it finds a reply tells little of that, since most of it is how a thing is said. Which words are in it does tell: the one or two
that its surest answers to this prompt share and those to others have not, or the ones of another prompt in their place. Words are runs
of letters and digits, in either case; where a script puts no spaces between them, its characters. The prompt's own say nothing, but
for those that every prompt has (a template's).
Sources: arXiv:2203.11171 (self-consistency), arXiv:2104.08315 (what a prompt makes likelier, not what is likely).

Pure functions of texts; `features.py` asks the anchor, and reads replies by this.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
FLOOR = 0.1
"""Added to shares of answers before they are compared: eight answers tell no smaller ones apart."""
KEENNESS = 32
"""Power of how much likelier a prompt makes a word: what answers it counts (moo), and not what comes with such questions (says)."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt, and the anchor's surest answers to it, as texts."""

    prompt: str
    answers: list[str]


@dataclass(frozen=True, slots=True)
class Consensus:
    """Of all prompts of a cycle, by their token ids. An empty one knows of none, and to it no reply says anything."""

    known: dict[tuple[int, ...], dict[str, float]] = field(default_factory=dict)
    """What it is worth to say each word of a prompt's answers: 1.0 together where all answers have them. The prompt's own: 0.0."""
    foreign: dict[str, float] = field(default_factory=dict)
    """What any other word costs: its mean worth in the answers that have it."""

    @staticmethod
    def of(asked: Mapping[tuple[int, ...], Asked]) -> "Consensus":
        """What is common to a prompt's answers, and not to those of all prompts."""
        in_prompts = {ids: frozenset(_words(each.prompt)) for ids, each in asked.items()}
        in_all = frozenset.intersection(*in_prompts.values()) if len(asked) > 1 else frozenset()
        own = {ids: words - in_all for ids, words in in_prompts.items()}
        shares = {ids: _shares(each.answers, own[ids]) for ids, each in asked.items()}
        totals = _sums(shares.values())
        worth = {ids: _worth(each, totals, len(asked) - 1) for ids, each in shares.items()}
        earned = _sums(
            {word: share * worth[ids][word] for word, share in each.items()} for ids, each in shares.items()
        )
        foreign = {word: earned[word] / total for word, total in totals.items()}
        known = {
            ids: dict.fromkeys(own[ids], 0.0)
            | {word: worth[ids][word] - (1 - share) * foreign[word] for word, share in each.items()}
            for ids, each in shares.items()
        }
        return Consensus(known, foreign)

    def read(self, prompt: Sequence[int], pieces: Sequence[str]) -> list[float]:
        """What each token of a reply adds to what is said: the worth of words that it ends and that are new in the reply.

        pieces: the tokens' texts. Raises KeyError where the anchor was not asked that prompt.
        """
        said = [0.0] * len(pieces)
        if self.known:
            known = self.known[tuple(prompt)]
            for word, place in _new_words(pieces):
                said[place] += known[word] if word in known else -self.foreign.get(word, 0.0)
        return said


def _worth(shares: Mapping[str, float], totals: Mapping[str, float], num_others: int) -> dict[str, float]:
    """Of the words of a prompt's answers, 1.0 together; 0.0 where they only say what answers to all prompts say.

    totals: the shares that all prompts' answers have of each, added up.
    """
    weights = {
        word: share * _likelier(share, (totals[word] - share) / max(1, num_others)) ** KEENNESS
        for word, share in shares.items()
    }
    total = sum(weights.values())
    return {word: weight / total if total else 0.0 for word, weight in weights.items()}


def _likelier(share: float, elsewhere: float) -> float:
    """Nats by which a word is likelier in answers to its prompt than in those to others; 0.0 where it is not."""
    return max(0.0, math.log((share + FLOOR) / (elsewhere + FLOOR)))


def _sums(several: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Of each word, over all of them."""
    sums = defaultdict[str, float](float)
    for each in several:
        for word, value in each.items():
            sums[word] += value
    return sums


def _shares(answers: Sequence[str], own: frozenset[str]) -> dict[str, float]:
    counts = Counter(word for answer in answers for word in set(_words(answer)) - own)
    return {word: count / len(answers) for word, count in sorted(counts.items())}


def _words(text: str) -> list[str]:
    return [word.casefold() for word in WORD.findall(text)]


def _new_words(pieces: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Each word once, with the place of the token by which it is known to have ended: the one after it, unless that is its own."""
    token_of = [place for place, piece in enumerate(pieces) for _ in piece]
    seen = set[str]()
    for match in WORD.finditer("".join(pieces)):
        word = match.group().casefold()
        if word not in seen:
            seen.add(word)
            yield word, token_of[match.end()] if match.end() < len(token_of) else len(pieces) - 1
