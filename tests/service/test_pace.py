"""How many tokens an engine is asked to send together."""

import pytest

from service.pace import MOST_TOKENS, Pace


def test_tokens_come_one_by_one_until_it_is_known_how_fast_they_come() -> None:
    pace = Pace()
    assert pace.tokens_in(1.0) == 1
    pace.note(1, 0.5)
    assert pace.tokens_in(1.0) == 1, "the time of one token is not that between two"


@pytest.mark.parametrize(
    ("tokens_per_second", "expected"), [(4, 1), (30, 1), (60, 2), (128, 5), (250, 10), (10_000, MOST_TOKENS)]
)
def test_a_chunk_has_as_many_as_come_in_that_time(tokens_per_second: float, expected: int) -> None:
    pace = Pace()
    pace.note(65, 64 / tokens_per_second)
    assert pace.tokens_in(0.04) == expected


def test_what_came_at_once_makes_no_endless_chunk() -> None:
    pace = Pace()
    pace.note(64, 0.0)
    assert pace.tokens_in(0.04) == MOST_TOKENS


def test_the_last_streams_count_most() -> None:
    pace = Pace()
    pace.note(101, 0.4)  # 250 a second
    for _ in range(5):
        pace.note(101, 4.0)  # 25
    assert 2 <= pace.tokens_in(0.04) <= 3
    for _ in range(50):
        pace.note(101, 4.0)
    assert pace.tokens_in(0.04) == 1
