"""Which folders are taken for a model that can chat."""

import json
import shutil
from pathlib import Path

import pytest

from service.base_model import folder_of
from service.errors import SettingsError
from service.settings import Settings
from tests.tiny_model import make_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def test_a_whole_model_folder_is_taken(model: Path) -> None:
    assert folder_of(Settings(model=str(model))) == model


def test_the_starter_lies_in_the_state_folder(tmp_path: Path) -> None:
    assert folder_of(Settings(state=tmp_path)) == tmp_path / "starter"


def test_a_template_in_the_tokenizers_config_is_found_too(model: Path) -> None:
    config = json.loads((model / "tokenizer_config.json").read_text())
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    assert folder_of(Settings(model=str(model))) == model


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("config.json", "no config.json"),
        ("*.safetensors", "no weights"),
        ("tokenizer*", "no tokenizer"),
        ("chat_template.jinja", "no chat template"),
    ],
)
def test_a_folder_that_lacks_a_piece_is_refused_with_what_it_lacks(
    model: Path, pattern: str, reason: str
) -> None:
    for path in model.glob(pattern):
        path.unlink()
    with pytest.raises(SettingsError, match=rf"^RATCHET_MODEL: {model} .*{reason}"):
        folder_of(Settings(model=str(model)))


@pytest.mark.parametrize("config", ["{", "[]", '{"architectures": ["BertForMaskedLM"]}', "{}"])
def test_another_kind_of_model_is_refused(model: Path, config: str) -> None:
    (model / "config.json").write_text(config)
    with pytest.raises(SettingsError, match=rf"^RATCHET_MODEL: {model} is not a"):
        folder_of(Settings(model=str(model)))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~/nowhere"])
def test_a_path_that_is_not_there_is_not_looked_for_elsewhere(name: str) -> None:
    with pytest.raises(SettingsError, match=r"^RATCHET_MODEL: .*nowhere.* is not a folder"):
        folder_of(Settings(model=name))


def test_an_id_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        SettingsError, match=r"^RATCHET_MODEL: no/such-model .* Hugging Face \(OSError: gone\)"
    ):
        folder_of(Settings(model="no/such-model"))


def fail(*_: object, **__: object) -> str:
    raise OSError("gone")
