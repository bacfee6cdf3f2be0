"""`POST /v1/chat/completions`: checks a request, writes its generation in OpenAI's shape."""

import logging
import re
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from random import SystemRandom

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from service import policies
from service.context import Context, ContextDep
from service.engine import Message, Sampling
from service.errors import BadRequest, NotFound, RatchetError
from service.generation import Asked, Generation, generating
from service.pairing import Pairing, decide
from service.schemas import (
    ALIAS,
    ANONYMOUS,
    ChatRequest,
    Choice,
    Chunk,
    ChunkChoice,
    ComparisonTag,
    Completion,
    Delta,
    ReplyMessage,
    Usage,
)
from service.streaming import EventStream, event, until_gone

log = logging.getLogger("ratchet.chat")
router = APIRouter(tags=["chat"])
CHANCE = SystemRandom()
MOST_STOPS = 4
MOST_IGNORED = 16
SAFE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@router.post("/v1/chat/completions", response_model=Completion, response_class=Response)
async def chat(body: ChatRequest, request: Request, context: ContextDep) -> Response:
    """Answer a conversation, with one reply or with two to vote on. OpenAI's request and response."""
    return await until_gone(request.receive, _answer(body, context))


async def _answer(body: ChatRequest, context: Context) -> Response:
    asked = await _checked(body, context)
    async with AsyncExitStack() as stack:
        generation = await stack.enter_async_context(generating(context, asked))
        answer = Answer(
            generation, include_usage=bool(body.stream_options and body.stream_options.include_usage)
        )
        headers = _headers(body, asked)
        if body.stream:
            return EventStream(answer.events(stack.pop_all()), headers)
        return Response(await answer.whole(), media_type="application/json", headers=headers)


async def _checked(body: ChatRequest, context: Context) -> Asked:
    """What to generate. Raises BadRequest and NotFound that say what to change."""
    if body.messages[-1].role != "user":
        raise BadRequest(
            "The last message must be the user's.", param="messages", code="last_message_not_user"
        )
    sampling = _sampling(body, context)
    pairing = _pairing(body, sampling, context.settings.comparison_rate)
    return Asked(
        user=body.user or ANONYMOUS,
        # Many chat templates know no role `developer`, OpenAI's newer name of `system`.
        messages=[Message("system" if m.role == "developer" else m.role, m.content) for m in body.messages],
        policy=await _policy(body.model, context),
        sampling=sampling,
        pairing=pairing,
    )


async def _policy(model: str, context: Context) -> str:
    """The policy that answers this request, to its end: the alias is read here and nowhere later."""
    if model == ALIAS:
        async with context.sessions() as session:
            return (await policies.read_deployment(session)).live
    loaded = context.fleet.policies()
    if model not in loaded:
        raise NotFound(
            f"There is no model {model[:100]!r}. There are: {', '.join([ALIAS, *loaded])}.",
            param="model",
            code="model_not_found",
        )
    return model


def _sampling(body: ChatRequest, context: Context) -> Sampling:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stop) > MOST_STOPS:
        raise BadRequest(f"stop: at most {MOST_STOPS} texts.", param="stop")
    max_tokens = body.max_completion_tokens or body.max_tokens or context.settings.default_max_tokens
    default = context.settings.comparison_temperature
    return Sampling(
        # vLLM refuses more than the whole context, and cuts to what the prompt leaves of it.
        max_tokens=min(max_tokens, context.fleet.context_tokens() or max_tokens),
        temperature=default if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        stop=tuple(stop),
        seed=body.seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
    )


def _pairing(body: ChatRequest, sampling: Sampling, rate: float) -> Pairing | None:
    """Whether to show two. Only the alias is compared, and only where two replies can differ."""
    able = body.model == ALIAS and sampling.temperature > 0
    if body.comparison == "always" and not able:
        raise BadRequest(
            f"A comparison needs model `{ALIAS}` and a temperature above 0.",
            param="comparison",
            code="no_comparison",
        )
    return decide(body.comparison, rate, CHANCE) if able else None


def _headers(body: ChatRequest, asked: Asked) -> dict[str, str]:
    """In a comparison nothing tells the policy."""
    headers = {} if asked.pairing else {"x-ratchet-policy": asked.policy}
    ignored = [name for name in body.model_extra or {} if SAFE_NAME.fullmatch(name)][:MOST_IGNORED]
    return headers | ({"x-ratchet-ignored": ", ".join(ignored)} if ignored else {})


class Answer:
    """Writes one generation in OpenAI's shape."""

    def __init__(self, generation: Generation, *, include_usage: bool) -> None:
        self._generation = generation
        self._include_usage = include_usage
        self._created = int(time.time())
        self._model = ALIAS if generation.asked.pairing else generation.asked.policy
        comparison_id = generation.stored.comparison_id
        self._comparison = ComparisonTag(id=comparison_id) if comparison_id else None

    async def whole(self) -> str:
        """The answer in one piece of JSON, once every reply has ended."""
        async for _ in self._generation.shown():
            pass
        completion = Completion(
            id=self._generation.stored.id,
            created=self._created,
            model=self._model,
            choices=[
                Choice(
                    index=position,
                    message=ReplyMessage(content="".join(voice.text)),
                    finish_reason=voice.finish_reason or "error",
                    reply_id=voice.reply_id,
                )
                for position, voice in enumerate(self._generation.voices)
            ],
            usage=self._usage(),
            comparison=self._comparison,
        )
        return completion.model_dump_json(exclude=None if self._comparison else {"comparison"})

    async def events(self, stack: AsyncExitStack) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events; a fault is the last one, with no [DONE]. Ends `stack`."""
        try:
            async with stack:
                for position in range(self._generation.count):
                    yield self._first_chunk(position)
                async for shown in self._generation.shown():
                    yield self._chunk(shown.position, Delta(content=shown.text), shown.finish_reason)
                if self._include_usage:
                    yield self._event([], usage=self._usage())
                yield event("[DONE]")
        except RatchetError as error:
            log.warning("a stream ended in an error: %s", error.message)
            yield event(_json(ErrorEvent.model_validate(error.body())))
        except Exception:
            log.exception("a stream ended in an unexpected error")
            yield event(
                _json(ErrorEvent.model_validate(RatchetError("Something went wrong. Try again.").body()))
            )

    def _first_chunk(self, position: int) -> bytes:
        """Opens a reply; the first one of all also names the comparison."""
        choice = ChunkChoice(
            index=position,
            delta=Delta(role="assistant", content=""),
            finish_reason=None,
            reply_id=self._generation.stored.reply_ids[position],
        )
        return self._event([choice], comparison=self._comparison if position == 0 else None)

    def _chunk(self, position: int, delta: Delta, finish_reason: str | None) -> bytes:
        return self._event([ChunkChoice(index=position, delta=delta, finish_reason=finish_reason)])

    def _event(
        self,
        choices: list[ChunkChoice],
        *,
        usage: Usage | None = None,
        comparison: ComparisonTag | None = None,
    ) -> bytes:
        """A chunk without the fields that do not apply; `usage` is there, or null, where it was asked for."""
        chunk = Chunk(
            id=self._generation.stored.id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
        )
        if self._include_usage:
            chunk.usage = usage
        if comparison is not None:
            chunk.comparison = comparison
        return event(_json(chunk))

    def _usage(self) -> Usage:
        voices = self._generation.voices
        prompt, completion = voices[0].prompt_tokens, sum(voice.completion_tokens for voice in voices)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class ErrorBody(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEvent(BaseModel):
    """OpenAI's error, as an event."""

    error: ErrorBody


def _json(model: BaseModel) -> str:
    """One line, without what was not set (OpenAI leaves fields out, but needs `finish_reason: null`)."""
    return model.model_dump_json(exclude_unset=True)
