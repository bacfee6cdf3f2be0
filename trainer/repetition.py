"""Whether a reply says the same thing twice: what a policy that fools its reward model soon does."""

import re

RUN = 4
"""Words in a run."""
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def repeats(text: str) -> bool:
    """Whether a sentence, or any run of four words, comes twice."""
    text = text.lower().strip()
    sentences = SENTENCE_END.split(text)
    words = re.findall(r"[\w'-]+", text)
    runs = [tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)]
    return len(set(sentences)) < len(sentences) or len(set(runs)) < len(runs)
