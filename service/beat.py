"""When streams are read: at the same moments all of them, so that what has come meanwhile goes on together."""

import asyncio

import aiohttp


class Beat:
    """So many moments a second, the same for all who wait. Costs one timer while anybody does, and nothing else."""

    def __init__(self, seconds: float) -> None:
        """seconds: from when the first begins to wait."""
        self._seconds = seconds
        self._waiting: list[asyncio.Future[None]] = []

    def next(self) -> asyncio.Future[None]:
        """Done at the next moment, or before, by whoever has it."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_later(self._seconds, self._strike)
        moment = loop.create_future()
        self._waiting.append(moment)
        return moment

    def _strike(self) -> None:
        struck, self._waiting = self._waiting, []
        for moment in struck:
            if not moment.done():
                moment.set_result(None)


class Rest:
    """How one stream rests between two reads."""

    def __init__(self, beat: Beat, response: aiohttp.ClientResponse) -> None:
        self._beat = beat
        self._response = response
        self._moment: asyncio.Future[None] | None = None
        response.content.on_eof(self._wake)

    async def listening(self) -> None:
        """Until the next beat, or until all has come."""
        if not self._response.content.is_eof():
            self._moment = self._beat.next()
            await self._moment

    async def deaf(self) -> None:
        """Until the next beat. What comes stays with the operating system, which costs less still, but its end is seen late."""
        connection = self._response.connection
        if connection is None or connection.protocol is None:  # all has come
            return
        protocol = connection.protocol
        protocol.pause_reading()
        try:
            await self._beat.next()
        finally:
            protocol.resume_reading()

    def _wake(self) -> None:
        if self._moment is not None and not self._moment.done():
            self._moment.set_result(None)
