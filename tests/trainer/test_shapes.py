"""Round sizes: nothing wanted is left out, and little is added."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.passes.shapes import PLACES, choose_places, round_up


@given(st.integers(0, 1000), st.integers(1, 100))
def test_a_number_is_rounded_up_to_the_next_multiple(number: int, step: int) -> None:
    rounded = round_up(number, step)
    assert rounded % step == 0
    assert number <= rounded < number + step


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_places_are_the_wanted_ones_and_then_some_others(wanted: list[bool]) -> None:
    places = choose_places(torch.tensor(wanted)).tolist()
    number = sum(wanted)
    assert places[:number] == [index for index, each in enumerate(wanted) if each]
    assert len(set(places)) == len(places) == min(round_up(number, PLACES), len(wanted))
