"""Whether a reply says the same thing twice: what a policy that fools its reward model soon does."""

import re

RUN = 4
"""Words in a run."""


def repeats(text: str) -> bool:
    """Whether any run of four words comes twice."""
    words = re.findall(r"[\w'-]+", text.lower())
    runs = [tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)]
    return len(set(runs)) < len(runs)
