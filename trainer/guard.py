"""The guard set: prompts that the operator owns, each with patterns that a right reply must and must not match.

A file of JSON lines, `{"messages": [...], "right": "regex", "wrong": "regex" or null}`, named by `RATCHET_GUARD`, or `guard.jsonl` in
the model's folder (the starter brings one). It is frozen and never trained on; a policy that does worse on it does not go live.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from service.errors import SettingsError
from service.tables import Message


@dataclass(frozen=True, slots=True)
class Guard:
    """One prompt, and how to tell a right reply."""

    messages: list[Message]
    right: str
    wrong: str | None

    def passes(self, reply: str) -> bool:
        """Whether the reply matches `right` and not `wrong`, whatever the case."""
        found = re.search(self.right, reply, re.IGNORECASE) is not None
        return found and not (self.wrong and re.search(self.wrong, reply, re.IGNORECASE))


def load_guards(path: Path | None, model_folder: Path) -> list[Guard]:
    """The guard set; empty where there is none. Raises SettingsError where a named file is not there or not of this form."""
    found = path or model_folder / "guard.jsonl"
    if not found.exists():
        if path is None:
            return []
        raise SettingsError(f"RATCHET_GUARD: there is no file {path}.")
    try:
        return [Guard(**json.loads(line)) for line in found.read_text().splitlines() if line.strip()]
    except (ValueError, TypeError) as error:
        raise SettingsError(f"RATCHET_GUARD: {found.name} is not a guard set: {error}.") from None
