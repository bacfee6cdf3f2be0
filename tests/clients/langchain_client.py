"""LangChain's `ChatOpenAI`, unmodified, as `test_langchain.py` tells it. Runs in .venv-peers."""

from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, BaseMessageChunk, HumanMessage
from langchain_core.outputs import LLMResult
from langchain_openai import ChatOpenAI
from replying import piece, reply


def chat(base_url: str, **fields: Any) -> ChatOpenAI:
    settings = {"model": "ratchet", "api_key": "none", "max_retries": 0, "timeout": 60} | fields
    return ChatOpenAI(base_url=base_url, **settings)


def invoke(text: str, **fields: Any) -> dict[str, Any]:
    return shown(chat(**fields).invoke(text))


async def ainvoke(text: str, **fields: Any) -> dict[str, Any]:
    return shown(await chat(**fields).ainvoke(text))


def batch(texts: list[str], **fields: Any) -> list[dict[str, Any]]:
    return [shown(answer) for answer in chat(**fields).batch(texts)]


class CompletionId(BaseCallbackHandler):
    """Notes the completion's id, which LangChain drops where there is more than one choice."""

    seen: str

    def on_llm_end(self, response: LLMResult, **_: Any) -> None:
        self.seen = (response.llm_output or {})["id"]


def generate(text: str, **fields: Any) -> dict[str, Any]:
    """All choices, of which `invoke` shows the first."""
    noted = CompletionId()
    result = chat(**fields).generate([[HumanMessage(text)]], callbacks=[noted])
    return {"id": noted.seen, "texts": [generation.text for generation in result.generations[0]]}


def stream(text: str, close_after: int = 0, **fields: Any) -> dict[str, Any]:
    whole: BaseMessageChunk | None = None
    chunks = chat(**fields).stream(text)
    for number, chunk in enumerate(chunks, start=1):
        piece(chunk.content)
        whole = chunk if whole is None else whole + chunk
        if number == close_after:
            chunks.close()
    return shown(whole)


async def astream(text: str, close_after: int = 0, **fields: Any) -> dict[str, Any]:
    whole: BaseMessageChunk | None = None
    chunks = chat(**fields).astream(text)
    number = 0
    async for chunk in chunks:
        piece(chunk.content)
        whole = chunk if whole is None else whole + chunk
        number += 1
        if number == close_after:
            await chunks.aclose()
    return shown(whole)


def shown(answer: AIMessage) -> dict[str, Any]:
    """What an application sees of an answer."""
    return {
        "text": answer.content,
        "usage": answer.usage_metadata,
        "finish_reason": answer.response_metadata.get("finish_reason"),
        "model": answer.response_metadata.get("model_name"),
    }


if __name__ == "__main__":
    reply({call.__name__: call for call in (invoke, ainvoke, batch, generate, stream, astream)})
