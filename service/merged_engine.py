"""A vLLM that holds one policy at a time, in its own weights instead of an adapter: faster, and for models that take no adapters.

It answers to the base's name whatever it holds. Which policy that is, the engine itself remembers (vLLM's `weight_version`): it is
known after a restart of the service too, and forgotten with the weights when the engine restarts. Needs `VLLM_SERVER_DEV_MODE=1`.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus

import aiohttp
import msgspec

from service.engine import LOAD_SECONDS, Message, Models, Sampling, VllmEngine
from service.errors import EngineUnavailable, PolicyRefused
from service.pieces import Piece
from service.policies import BASE

AS_STARTED = "default"
"""vLLM's version of the weights that it started with."""
BETWEEN = "between"
"""Ours, while they are being exchanged, and where that failed."""


class _Weights(msgspec.Struct):
    weight_version: str


class MergedEngine(VllmEngine):
    """As `VllmEngine`, but `load` exchanges the weights of the whole model, whose former policy is gone with them."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        super().__init__(url, session)
        self._version: str | None = None
        """Of its weights, where that is known. vLLM asks its core for it, and should that be gone just then, waits for ever, and
        does not end: so it is asked seldom."""

    @asynccontextmanager
    async def generate(
        self,
        policy: str,
        messages: Sequence[Message],
        sampling: Sampling,
        count: int,
        *,
        stream: bool,
        deadline: float,
    ) -> AsyncIterator[AsyncIterator[list[Piece]]]:
        async with super().generate(
            policy, messages, sampling, count, stream=stream, deadline=deadline
        ) as pieces:
            yield _renamed(pieces, policy)

    async def models(self) -> Models:
        try:
            found = await super().models()
        except EngineUnavailable:
            self._version = None  # it may be another one when it answers again
            raise
        if self._version is None:
            weights: _Weights = await self._call("GET", "/weight_info", wanted=_Weights)
            self._version = weights.weight_version
        held = {AS_STARTED: {BASE}, BETWEEN: set()}.get(self._version, {self._version})
        return Models(frozenset(held), found.context_tokens)

    def forget(self) -> None:
        self._version = None

    async def load(self, policy: str, path: str) -> None:
        """Exchange the weights; nothing may be asked of the engine meanwhile. Raises PolicyRefused where it cannot read them.

        path: folder of a whole model.
        """
        await self._name_weights(BETWEEN)
        await self._call("POST", "/pause?mode=wait", seconds=LOAD_SECONDS)
        try:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": path}}
            status, answer = await self._send("POST", "/collective_rpc", reload, LOAD_SECONDS)
            if status != HTTPStatus.OK:
                raise PolicyRefused(f"the engine could not load it: {answer[:200]}")
            await self._call("POST", "/reset_prefix_cache", seconds=LOAD_SECONDS)
        finally:
            await self._call("POST", "/resume")
        await self._name_weights(policy)

    async def unload(self, policy: str) -> None:
        """What it holds is no policy any more, until `load` brings one."""
        await self._name_weights(BETWEEN)

    async def _name_weights(self, version: str) -> None:
        self._version = None
        await self._call("POST", "/update_weight_version", {"new_version": version})
        self._version = version

    def _served_name(self, policy: str) -> str:
        return BASE


async def _renamed(pieces: AsyncIterator[list[Piece]], policy: str) -> AsyncIterator[list[Piece]]:
    """What the engine gave under the base's name."""
    async for together in pieces:
        for piece in together:
            if piece.model == BASE:
                piece.model = policy
        yield together
