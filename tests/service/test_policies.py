"""The registry: folders that are whole, and a pointer that only valid moves change."""

import json
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from service import database as db
from service.errors import PolicyRefused, SettingsError
from service.policies import BASE, ensure_base, read_folder
from service.settings import Settings
from tests.adapters import write_policy

NAME = "policy-000001"
PROBE = [{"token_ids": [1, 2], "logprobs": [None, -1.0], "base_logprobs": [None, -2.0]}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_policy(tmp_path / NAME, probe=PROBE)


def test_a_whole_folder_is_read(folder: Path) -> None:
    assert read_folder(NAME, folder).probe[0].logprobs == [None, -1.0]


def change(folder: Path, **fields: object) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: (folder / "READY").unlink(), "READY"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest cannot be read"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest cannot be read"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"weight"), "sha256 differs"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "sha256 differs"),
        (lambda folder: change(folder, name="policy-000002"), "policy-000002"),
        (lambda folder: change(folder, files={}), "no sha256"),
        (lambda folder: change(folder, probe=[]), "manifest cannot be read"),
        (lambda folder: change(folder, probe_tolerance=float("nan")), "manifest cannot be read"),
    ],
)
def test_a_harmed_folder_is_refused_with_the_reason(folder: Path, harm: object, reason: str) -> None:
    harm(folder)  # type: ignore[operator]
    with pytest.raises(PolicyRefused, match=reason):
        read_folder(NAME, folder)


@pytest.mark.database
def test_the_base_is_made_live_once_and_another_model_is_refused(database: Settings) -> None:
    with Session(db.sync_engine(database)) as session:
        ensure_base(session, "models/a")
        ensure_base(session, "models/a")
        with pytest.raises(SettingsError, match=r"RATCHET_MODEL.*models/a, not models/b"):
            ensure_base(session, "models/b")
        assert session.execute(text("SELECT live, previous, challenger FROM deployment")).one() == (
            BASE,
            None,
            None,
        )
