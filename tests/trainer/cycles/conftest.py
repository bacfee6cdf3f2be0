"""Fixtures of the tests of whole cycles."""

from pathlib import Path

import pytest
from sqlalchemy.orm import Session, sessionmaker

from service.database import sync_engine, sync_sessions
from service.policies import ensure_base
from service.settings import Settings
from tests.tiny_model import make_model
from trainer import gate


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few answers show how a cycle goes; and drawing charts takes a third of it."""
    monkeypatch.setattr(gate, "NUM_ANSWERS", 32)
    if "_with_charts" not in request.fixturenames:
        monkeypatch.setattr("trainer.report._plot", lambda *_: "")


@pytest.fixture
def _with_charts() -> None:
    """Asked for by the test that looks at the report."""


@pytest.fixture
def settings(database: Settings) -> Settings:
    small = {"ppo_iterations": 3, "ppo_rollouts": 8, "max_reply_tokens": 8, "lora_rank": 4}
    return database.model_copy(update=small)


@pytest.fixture
def full(settings: Settings) -> Settings:
    """All weights are trained."""
    return settings.model_copy(update={"tuning": "full", "delivery": "merged"})


@pytest.fixture
def sessions(settings: Settings, base: Path) -> sessionmaker[Session]:
    made = sync_sessions(sync_engine(settings))
    with made.begin() as session:
        ensure_base(session, str(base))
    return made
