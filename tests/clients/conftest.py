"""What tests of real clients share: the service on the real vLLM, the answer they must show, and ways to fail."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.engine import free_port
from tests.service.conftest import Serve, ask, prepared, rows, serve  # noqa: F401  (fixtures)
from tests.service.fake_engine import FakeEngine

CHAT = "/v1/chat/completions"
ASKED: dict[str, Any] = {"text": "what colour is a lemon?", "max_tokens": 60, "seed": 3, "temperature": 0.3}
"""So cool that the tiny model does not end by itself."""
VOTABLE: dict[str, Any] = {"text": "hi", "max_tokens": 400, "stop": "e", "seed": 7, "user": "ada"}
"""Its replies end, and differ; what is cut off or alike is not voted on."""
Fault = Callable[[str], tuple[httpx.Client, dict[str, Any]]]


@pytest.fixture
def service(serve: Serve, vllm: str) -> httpx.Client:  # noqa: F811
    """The service on the real vLLM, by plain HTTP."""
    return serve(url=vllm)


@pytest.fixture
def told(service: httpx.Client) -> dict[str, Any]:
    """What plain HTTP gives for `ASKED`. The seed makes it the same for every client."""
    body: dict[str, Any] = service.post(CHAT, json=ask(**ASKED)).raise_for_status().json()
    return body


@pytest.fixture
def fault(serve: Serve, vllm: str) -> Fault:  # noqa: F811
    """`fault(name)` gives a service and what to ask of it so that it refuses."""

    def make(name: str) -> tuple[httpx.Client, dict[str, Any]]:
        match name:
            case "engine gone":
                nobody = f"http://127.0.0.1:{free_port()}"
                return serve(url=nobody, ready=False), {}
            case "key needed":
                return serve(url=vllm, require_keys=True, ready=False), {}
            case "too many calls":
                service = serve(url=vllm, requests_per_minute=1)
                key = service.post("/operator/keys", json={"account": "acme"}).json()["key"]
                service.get("/v1/models", headers={"authorization": f"Bearer {key}"}).raise_for_status()
                return service, {"api_key": key}
            case "breaks midway":
                return serve(FakeEngine(replies=("one two three four",), breaks_after=2)), {}
            case _:
                return serve(url=vllm), dict(WRONG[name])

    return make


WRONG: dict[str, dict[str, Any]] = {
    "unknown model": {"model": "gpt-9"},
    "bad temperature": {"temperature": 3.0},
    "wrong key": {"api_key": "rk-wrong"},
    "too long": {"text": "word " * 600},
}
"""What to ask of a sound service so that it refuses."""


def cut(text: str) -> tuple[str, str]:
    """A letter of a reply, and what comes before: the reply if that letter is to stop it."""
    letter = next(letter for letter in text[3:] if letter.isascii() and letter.isalpha())
    return letter, text.split(letter)[0]
