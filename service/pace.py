"""How many tokens an engine is asked to send together. Used by `engine.py`.

vLLM takes with each request how many tokens a chunk of its stream shall have (`stream_interval`; the first token and the end come
at once whatever it is). What people can read follows from the time between chunks: so a fast stream gets large ones.
"""

MOST_TOKENS = 16
"""Of one chunk. A stream that has become slower than those before it must not stutter."""
WEIGHT = 0.1
"""Of the newest stream in the running mean."""


class Pace:
    """How fast the streams of one engine ran lately."""

    def __init__(self) -> None:
        self._token_seconds: float | None = None
        """Of one stream; None where none has been seen."""

    def note(self, num_tokens: int, seconds: float) -> None:
        """One stream gave so many tokens, the first of them at the beginning of this time."""
        if num_tokens < 2:
            return
        newest = seconds / (num_tokens - 1)
        before = newest if self._token_seconds is None else self._token_seconds
        self._token_seconds = before + WEIGHT * (newest - before)

    def tokens_in(self, seconds: float) -> int:
        """How many a stream gives in this time, from 1 to `MOST_TOKENS`; 1 where it is not known."""
        if self._token_seconds is None:
            return 1
        return max(1, round(min(MOST_TOKENS, seconds / max(self._token_seconds, 1e-9))))
