"""Writes a generation in OpenAI's shape: whole, or as server-sent events. Used by `chat.py`.

Chunks are put together from bytes that are made once per answer, as a stream is hundreds of them; `schemas.Chunk` says what
they must look like, and a test holds each against it.
"""

import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack

import msgspec

from service.errors import RatchetError
from service.generation import Generation, Shown, Voice
from service.schemas import ALIAS, Choice, ComparisonTag, Completion, ReplyMessage, Usage

log = logging.getLogger("ratchet.answers")
encode = msgspec.json.encode
DONE = b"data: [DONE]\n\n"


class Answer:
    """One generation's answer."""

    def __init__(self, generation: Generation, *, include_usage: bool = False) -> None:
        self._generation = generation
        self._id = generation.stored.id
        self._created = int(time.time())
        self._model = ALIAS if generation.asked.pairing else generation.asked.policies[0]
        self._head = (
            b'data: {"id":%b,"object":"chat.completion.chunk","created":%d,"model":%b,"choices":['
            % (encode(self._id), self._created, encode(self._model))
        )
        self._include_usage = include_usage
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"

    async def whole(self) -> str:
        """The answer in one piece of JSON, once every reply has ended and is stored."""
        await self._generation.finish()
        completion = Completion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[_choice(position, voice) for position, voice in enumerate(self._generation.voices)],
            usage=self._usage(),
            comparison=self._verdict(),
        )
        return completion.model_dump_json(exclude=None if completion.comparison else {"comparison"})

    async def events(self, stack: AsyncExitStack) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events; a fault is the last one, with no [DONE]. Ends `stack`."""
        opening = b""
        try:
            async with stack:
                opening = b"".join(map(self._opening, range(len(self._generation.voices))))
                async for shown in self._generation.shown():
                    yield opening + self._chunks(shown)  # in one write
                    opening = b""
                yield (self._usage_chunk() if self._include_usage else b"") + DONE
        except RatchetError as error:
            log.warning("a stream ended in an error: %s", error.message)
            yield opening + _error_event(error)
        except Exception:
            log.exception("a stream ended in an unexpected error")
            yield opening + _error_event(RatchetError("Something went wrong. Try again."))

    def _opening(self, position: int) -> bytes:
        """A reply's first chunk; the first of all also names the comparison."""
        comparison_id = self._generation.stored.comparison_id
        tag = ComparisonTag(id=comparison_id) if comparison_id and position == 0 else None
        return (
            b'%b{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null,"reply_id":%b}]%b'
            % (
                self._head,
                position,
                encode(self._generation.stored.reply_ids[position]),
                self._end(tag),
            )
        )

    def _chunks(self, shown: Sequence[Shown]) -> bytes:
        """All that came at once, a chunk each; that which ends the last reply says whether they can be voted on."""
        written = [self._chunk(part, self._tail) for part in shown[:-1]]
        return b"".join([*written, self._chunk(shown[-1], self._end(self._verdict(shown[-1])))])

    def _chunk(self, part: Shown, end: bytes) -> bytes:
        return b'%b{"index":%d,"delta":{"content":%b},"logprobs":%b,"finish_reason":%b}]%b' % (
            self._head,
            part.position,
            encode(part.text),
            part.logprobs or b"null",
            encode(part.finish_reason),
            end,
        )

    def _verdict(self, part: Shown | None = None) -> ComparisonTag | None:
        """Whether the replies are worth a vote; None where it is no comparison, or one still runs."""
        comparison_id = self._generation.stored.comparison_id
        if comparison_id is None or (part is not None and part.finish_reason is None):
            return None
        if any(voice.finish_reason is None for voice in self._generation.voices):
            return None
        objection = self._generation.objection()
        return ComparisonTag(
            id=comparison_id, votable=objection is None, why_not=objection.code if objection else None
        )

    def _end(self, tag: ComparisonTag | None) -> bytes:
        if tag is None:
            return self._tail
        return b',"comparison":%b%b' % (tag.model_dump_json(exclude_unset=True).encode(), self._tail)

    def _usage_chunk(self) -> bytes:
        return b'%b],"usage":%b}\n\n' % (self._head, self._usage().model_dump_json().encode())

    def _usage(self) -> Usage:
        voices = self._generation.voices
        prompt, completion = voices[0].prompt_tokens, sum(voice.completion_tokens for voice in voices)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def _choice(position: int, voice: Voice) -> Choice:
    return Choice(
        index=position,
        message=ReplyMessage(content=voice.content),
        finish_reason=voice.finish_reason or "error",
        logprobs=_joined(voice.logprobs),
        reply_id=voice.reply_id,
    )


def _joined(logprobs: Sequence[bytes]) -> dict[str, object] | None:
    """One `logprobs` object of those of all pieces."""
    if not logprobs:
        return None
    return {"content": [token for piece in logprobs for token in msgspec.json.decode(piece)["content"] or []]}


def _error_event(error: RatchetError) -> bytes:
    return b"data: %b\n\n" % encode(error.body())
