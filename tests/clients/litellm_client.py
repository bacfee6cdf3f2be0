"""LiteLLM as a client, unmodified, as `test_litellm.py` tells it. Runs in .venv-peers."""

from typing import Any

import litellm
from replying import piece, reply

litellm.suppress_debug_info = True
STREAMED: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


def words(text: str, base_url: str, model: str = "ratchet", **fields: Any) -> dict[str, Any]:
    """The arguments of a call: the service as a provider with OpenAI's API."""
    return {
        "model": f"openai/{model}",
        "messages": [{"role": "user", "content": text}],
        "api_base": base_url,
        "api_key": "none",
        "max_retries": 0,
        "timeout": 60,
    } | fields


def completion(**fields: Any) -> dict[str, Any]:
    return litellm.completion(**words(**fields)).model_dump()


async def acompletion(**fields: Any) -> dict[str, Any]:
    return (await litellm.acompletion(**words(**fields))).model_dump()


def stream(close_after: int = 0, **fields: Any) -> dict[str, Any]:
    chunks = []
    response = litellm.completion(**words(**fields), **STREAMED)
    for chunk in response:
        chunks.append(chunk)
        report(chunk)
        if len(chunks) == close_after:
            response.completion_stream.close()  # LiteLLM has no `close` of its own here
            break
    return litellm.stream_chunk_builder(chunks).model_dump()


async def astream(close_after: int = 0, **fields: Any) -> dict[str, Any]:
    chunks = []
    response = await litellm.acompletion(**words(**fields), **STREAMED)
    async for chunk in response:
        chunks.append(chunk)
        report(chunk)
        if len(chunks) == close_after:
            await response.aclose()
            break
    return litellm.stream_chunk_builder(chunks).model_dump()


def report(chunk: Any) -> None:
    piece(chunk.choices[0].delta.content or "" if chunk.choices else "")


if __name__ == "__main__":
    reply({call.__name__: call for call in (completion, acompletion, stream, astream)})
