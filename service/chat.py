"""`POST /v1/chat/completions`: checks a request and starts its generation; `answers.py` writes the answer."""

import re
from contextlib import AsyncExitStack
from random import SystemRandom
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy import func, select

from service.answers import Answer
from service.auth import IdentityDep
from service.chat_route import ChatRoute
from service.context import Context, ContextDep
from service.conversations import read_context
from service.duels import Match
from service.engine import Sampling
from service.errors import BadRequest, NotFound, NotReady
from service.generation import Asked, Generation, generating
from service.journal import UserName
from service.keyring import Identity
from service.pairing import Pairing, Rates, draw, pair
from service.schemas import ALIAS, CHUNK_EVENT, ChatRequest, Completion, read_messages
from service.streaming import EventStream, until_gone
from service.tables import Comparison, User

router = APIRouter(tags=["chat"], route_class=ChatRoute)
CHANCE = SystemRandom()
MOST_IGNORED = 16
SAFE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def _text_header(description: str) -> dict[str, Any]:
    return {"description": description, "schema": {"type": "string"}}


@router.post(
    "/v1/chat/completions",
    response_model=Completion,
    response_class=JSONResponse,
    responses={
        200: {
            "description": "The answer; with `stream`, chunks of it as server-sent events, then `data: [DONE]`.",
            "content": {"text/event-stream": {"schema": CHUNK_EVENT}},
            "headers": {
                "x-ratchet-policy": _text_header("The policy that answers; not in a comparison."),
                "x-ratchet-ignored": _text_header("Fields of the request that are not taken."),
            },
        }
    },
)
async def chat(body: ChatRequest, request: Request, identity: IdentityDep, context: ContextDep) -> Response:
    """Answer a conversation, with one reply or with two to vote on. OpenAI's request and response."""
    return await until_gone(request.receive, _answer(body, identity, context))


async def _answer(body: ChatRequest, identity: Identity, context: Context) -> Response:
    async with AsyncExitStack() as stack:
        asked, generation = await _begin(stack, body, identity, context)
        headers = _headers(body, asked, generation)
        if not body.stream:
            whole = await Answer(generation).whole()
            return Response(whole, media_type="application/json", headers=headers)
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = Answer(generation, include_usage=usage).events(stack.pop_all())
        return EventStream(events, headers, generation.deadline)


async def _begin(
    stack: AsyncExitStack, body: ChatRequest, identity: Identity, context: Context
) -> tuple[Asked, Generation]:
    """Check and start; again where the policy that the alias stood for has given way to another one since."""
    while True:
        asked = await _checked(body, identity, context)
        try:
            return asked, await stack.enter_async_context(generating(context, asked))
        except NotReady:
            if body.model != ALIAS or not await context.fleet.settled():
                raise


async def _checked(body: ChatRequest, identity: Identity, context: Context) -> Asked:
    """What to generate. Raises BadRequest and NotFound that say what to change."""
    _check_fields(body, context)
    user = identity.user(body.user)
    sampling = read_sampling(body, context)
    messages = read_messages(body.messages)
    if body.conversation is not None:
        so_far = await read_context(context.sessions, body.conversation, user, body.follows)
        messages = so_far + messages
    pairing = await _pairing(body, sampling, user, context)
    duel = _draw_duel(context) if pairing is not None else None
    policy = _policy(body.model, context)
    return Asked(
        user=user,
        messages=messages,
        policies=(duel.challenger, duel.incumbent) if duel else (policy,) * (1 if pairing is None else 2),
        sampling=sampling,
        pairing=pairing,
        duel_id=duel.id if duel else None,
        conversation=body.conversation,
        stream=bool(body.stream),
    )


def _check_fields(body: ChatRequest, context: Context) -> None:
    """What no single field can tell."""
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options: only with `stream`.", param="stream_options", code="needs_stream")
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequest("top_logprobs: only with `logprobs`.", param="top_logprobs", code="needs_logprobs")
    if body.follows is not None and body.conversation is None:
        raise BadRequest("follows: only with `conversation`.", param="follows", code="needs_conversation")
    if body.model_extra and context.settings.unknown_fields == "refuse":
        name = next(iter(body.model_extra))[:64]
        raise BadRequest(f"There is no field {name!r}. Leave it out.", param=name, code="unknown_field")


def _policy(model: str, context: Context) -> str:
    """The policy that answers this request, to its end: the alias is read here and nowhere later."""
    if model == ALIAS:
        return context.fleet.live_policy()
    loaded = context.fleet.policies()
    if model not in loaded:
        raise NotFound(
            f"There is no model {model[:100]!r}. There are: {', '.join([ALIAS, *loaded])}.",
            param="model",
            code="model_not_found",
        )
    return model


def _draw_duel(context: Context) -> Match | None:
    """The duel that this comparison is of, if it is of one."""
    match = context.fleet.match()
    if match is None:
        return None
    settings = context.settings
    share = settings.duel_share if match.kind == "trial" else settings.watch_share
    return match if CHANCE.random() < share else None


def read_sampling(body: ChatRequest, context: Context) -> Sampling:
    """How to draw a reply. Raises BadRequest."""
    max_tokens = body.max_completion_tokens or body.max_tokens or context.settings.default_max_tokens
    default = context.settings.comparison_temperature
    return Sampling(
        # vLLM refuses more than the whole context, and cuts to what the prompt leaves of it.
        max_tokens=min(max_tokens, context.fleet.context_tokens() or max_tokens),
        temperature=default if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=context.settings.default_min_p if body.top_p is None else 0.0,
        stop=tuple(body.stop or ()),
        seed=body.seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


async def _pairing(body: ChatRequest, sampling: Sampling, user: UserName, context: Context) -> Pairing | None:
    """Whether to show two. Only the alias is compared, and only where two replies can differ and stay blind."""
    able = body.model == ALIAS and sampling.temperature > 0 and sampling.logprobs is None
    if body.comparison == "always":
        if not able:
            raise BadRequest(
                f"A comparison needs model `{ALIAS}`, a temperature above 0, and no logprobs.",
                param="comparison",
                code="no_comparison",
            )
        return Pairing("always", 1.0)
    rates = Rates(context.settings.comparison_rate, context.settings.evaluation_rate)
    drawn = draw(rates, CHANCE) if able and body.comparison == "auto" else None
    if drawn is None:
        return None
    opted_out, num_shown = await _seen(context, user)
    capped = num_shown >= context.settings.comparisons_per_hour
    return pair(drawn, rates, opted_out=opted_out, capped=capped)


async def _seen(context: Context, user: UserName) -> tuple[bool, int]:
    """Whether a user opted out of comparisons, and how many `auto` has shown them within the last hour."""
    hour = func.now() - func.make_interval(0, 0, 0, 0, 1)
    shown = (
        select(func.count())
        .where(Comparison.user_id == User.id, Comparison.created_at > hour, Comparison.reason == "auto")
        .scalar_subquery()
    )
    async with context.sessions() as session:
        query = select(User.compares, shown).where(User.account == user.account, User.name == user.name)
        row = (await session.execute(query)).first()
    return (False, 0) if row is None else (not row[0], row[1])


def _headers(body: ChatRequest, asked: Asked, generation: Generation) -> dict[str, str]:
    """In a comparison nothing tells the policy; its id is here too, for clients that hide fields they do not know."""
    comparison_id = generation.stored.comparison_id
    headers = (
        {"x-ratchet-comparison": comparison_id} if comparison_id else {"x-ratchet-policy": asked.policies[0]}
    )
    ignored = [name for name in body.model_extra or {} if SAFE_NAME.fullmatch(name)][:MOST_IGNORED]
    return headers | ({"x-ratchet-ignored": ", ".join(ignored)} if ignored else {})
