"""Settings are read, refused with the variable's name, and all written down."""

from pathlib import Path

import pytest

from service.errors import SettingsError
from service.settings import Settings, get_settings

README = Path(__file__).parents[2] / "README.md"
OTHERS = {"database_url": "DATABASE_URL", "otlp_endpoint": "OTEL_EXPORTER_OTLP_ENDPOINT"}


def test_every_setting_stands_in_the_readme_with_its_default() -> None:
    text = README.read_text()
    for name in Settings.model_fields:
        variable = OTHERS.get(name, f"RATCHET_{name.upper()}")
        assert f"| `{variable}` |" in text, f"{variable} is not in the README's table"


def test_a_name_that_is_no_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_PORTT", "8000")
    with pytest.raises(SettingsError, match="RATCHET_PORTT is not a setting"):
        get_settings()


def test_rollouts_by_engines_that_take_no_adapters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_ROLLOUTS", "fleet")
    assert get_settings().rollouts == "fleet"
    get_settings.cache_clear()
    monkeypatch.setenv("RATCHET_DELIVERY", "merged")
    with pytest.raises(SettingsError) as refused:
        get_settings()
    assert refused.value.message == (
        "RATCHET_ROLLOUTS: `fleet` needs adapters, which RATCHET_DELIVERY=merged gives engines none of: "
        "set `local`, or deliver by `adapter`"
    )
    monkeypatch.setenv("RATCHET_ROLLOUTS", "local")
    assert get_settings().delivery == "merged"


def test_whole_models_are_only_trained_where_they_can_be_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_TUNING", "full")
    with pytest.raises(SettingsError, match=r"RATCHET_TUNING: full makes .* set RATCHET_DELIVERY=merged"):
        get_settings()
    monkeypatch.setenv("RATCHET_DELIVERY", "merged")
    assert get_settings().tuning == "full"


@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_methods_that_train_adapters_alone_are_refused_where_all_weights_are_to_be_trained(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATCHET_METHOD", method)
    assert get_settings().method == method
    get_settings.cache_clear()
    monkeypatch.setenv("RATCHET_DELIVERY", "merged")
    monkeypatch.setenv("RATCHET_TUNING", "full")
    with pytest.raises(SettingsError) as refused:
        get_settings()
    assert refused.value.message == (
        f"RATCHET_TUNING: full is for RATCHET_METHOD=ppo, and {method} trains adapters alone: set ppo, or lora here"
    )


def test_a_wrong_value_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_PORT", "seventy")
    with pytest.raises(SettingsError, match="RATCHET_PORT: "):
        get_settings()
