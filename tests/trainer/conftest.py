"""Fixtures for the tests of the trainer."""

import pytest
import torch


@pytest.fixture
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16, where a machine has it, would hide a difference in its rounding."""
    monkeypatch.setattr("trainer.models.compute_dtype", lambda _: torch.float32)
