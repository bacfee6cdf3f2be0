"""Where the base model's folder is, and whether it can serve: the starter, a folder, or a Hugging Face id.

Used by `ratchet up` before anything starts. An id is downloaded once, and then always means the same files.
"""

import json
from pathlib import Path

from service.errors import SettingsError
from service.settings import Settings

STARTER = "starter"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
WEIGHTS = ("*.safetensors", "*.bin")
NEEDED = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]


def folder_of(settings: Settings) -> Path:
    """The base model's folder, absolute; a Hugging Face id is downloaded. Raises SettingsError."""
    if settings.model == STARTER:
        return (settings.state / STARTER).resolve()
    path = Path(settings.model).expanduser()
    folder = path.resolve() if path.exists() or settings.model[0] in "./~" else _download(settings.model)
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Raises SettingsError where `folder` is not a causal LM with a tokenizer and a chat template."""
    if not folder.is_dir():
        raise _refusal(folder, "is not a folder")
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise _refusal(folder, "is not a model folder: it has no config.json") from None
    except (OSError, ValueError):
        raise _refusal(folder, "is not a model folder: its config.json cannot be read") from None
    kinds = config.get("architectures") or [] if isinstance(config, dict) else []
    if not any("CausalLM" in str(kind) or "LMHead" in str(kind) for kind in kinds):
        raise _refusal(folder, "is not a causal language model: its config.json names no ...ForCausalLM")
    if not any(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise _refusal(folder, "has no weights (*.safetensors)")
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise _refusal(folder, "has no tokenizer (tokenizer.json)")
    if not _has_chat_template(folder):
        raise _refusal(folder, "has no chat template (chat_template.jinja): a base model that cannot chat")


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template"))
    except (OSError, ValueError):
        return False


def _download(name: str) -> Path:
    """The files of a Hugging Face id, from the cache where they are there. Shows its own progress."""
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    for offline in (True, False):
        try:
            folder = Path(snapshot_download(name, allow_patterns=NEEDED, local_files_only=offline))
        except Exception as error:  # a library of many errors; all mean the same here
            reason = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
            )
            continue
        if not offline or any(folder.glob("*.safetensors")):
            return folder
    raise SettingsError(
        f"RATCHET_MODEL: {name} is neither a folder here nor to be had from Hugging Face ({reason})."
    )


def _refusal(folder: Path, reason: str) -> SettingsError:
    return SettingsError(f"RATCHET_MODEL: {folder} {reason}.")
