"""Fixtures for the tests of the trainer."""

import pytest
import torch

from tests.trainer.tiny_cycle import open_gate


@pytest.fixture
def _open_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    open_gate(monkeypatch)


@pytest.fixture
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16, where a machine has it, would hide a difference in its rounding."""
    monkeypatch.setattr("trainer.models.compute_dtype", lambda _: torch.float32)


@pytest.fixture
def _in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a machine is slow with it, and float32 would have nothing to round."""
    monkeypatch.setattr("trainer.models.compute_dtype", lambda _: torch.bfloat16)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Models this tiny are no faster with more, and two threads wait for each other by spinning where other tests run beside."""
    torch.set_num_threads(1)
