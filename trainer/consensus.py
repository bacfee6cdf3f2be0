"""What the anchor says to a prompt when it is surest, and how far a reply says the same.

A model knows more than it says: at a low temperature the starter gives 98 right answers in a hundred, at temperature 1 only 70. How
likely it finds a reply tells little of that, since most of it is how a thing is said. Which words are in it does tell: those that its
surest answers share. Words are runs of letters and digits, in either case; where a script puts no spaces between them, its characters.
The prompt's own say nothing, but for those that every prompt has (a template's), and rare ones say more than others.
Sources: arXiv:2203.11171 (self-consistency), arXiv:2111.09388 (minimum Bayes risk).

Pure functions of texts; `features.py` asks the anchor, and reads replies by this.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt, and the anchor's surest answers to it, as texts."""

    prompt: str
    answers: list[str]


@dataclass(frozen=True, slots=True)
class Said:
    """What one token of a reply adds to what is said: sums over the words that it ends and that are new in the reply."""

    rarity: float = 0.0
    """Of the words: log of one over the share of prompts whose answers have it."""
    agreed: float = 0.0
    """That, times the share of the answers that have the word."""


@dataclass(frozen=True, slots=True)
class Consensus:
    """Of all prompts of a cycle, by their token ids. An empty one knows of none, and to it no reply says anything."""

    own: dict[tuple[int, ...], frozenset[str]] = field(default_factory=dict)
    """Words of the prompt that not every prompt has."""
    shares: dict[tuple[int, ...], dict[str, float]] = field(default_factory=dict)
    """Of each other word of the answers, the share of them that have it."""
    rarities: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def of(asked: Mapping[tuple[int, ...], Asked]) -> "Consensus":
        """What is common to the answers."""
        in_prompts = {ids: frozenset(_words(each.prompt)) for ids, each in asked.items()}
        in_all = frozenset.intersection(*in_prompts.values()) if len(asked) > 1 else frozenset()
        own = {ids: words - in_all for ids, words in in_prompts.items()}
        shares = {ids: _shares(each.answers, own[ids]) for ids, each in asked.items()}
        counts = Counter(word for words in shares.values() for word in words)
        rarities = {word: _rarity(count, len(asked)) for word, count in counts.items()}
        return Consensus(own, shares, rarities)

    def read(self, prompt: Sequence[int], pieces: Sequence[str]) -> list[Said]:
        """What each token of a reply adds. pieces: the tokens' texts. Raises KeyError where the anchor was not asked that prompt."""
        said = [Said()] * len(pieces)
        if not self.shares:
            return said
        own, shares = self.own[tuple(prompt)], self.shares[tuple(prompt)]
        for word, place in _new_words(pieces):
            if word not in own:
                rarity = self.rarities.get(word, _rarity(0, len(self.shares)))
                agreed = rarity * shares.get(word, 0.0)
                before = said[place]
                said[place] = Said(before.rarity + rarity, before.agreed + agreed)
        return said


def _rarity(num_prompts: int, of: int) -> float:
    """Of a word that the answers to so many prompts have."""
    return math.log((of + 1) / (num_prompts + 0.5))


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
