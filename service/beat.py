"""When streams are read: at the same moments all of them, so that what has come meanwhile goes on together.

Between beats nothing is received: what comes stays with the operating system, which costs a small part of waking up for it. It is
looked at there now and then, since a reply's end should not wait: its client may be about to ask the next question.
"""

import asyncio
import socket
from collections.abc import Callable

import aiohttp

LAST_CHUNK = b"0\r\n\r\n"
"""How a body of unknown length ends (RFC 9112, 7.1)."""
_held = memoryview(bytearray(1 << 16))
"""What was looked at last; more than comes between two beats."""


class Beat:
    """So many moments a second, the same for all who wait. Costs a timer while anybody does, and nothing else."""

    def __init__(self, seconds: float, looks: int) -> None:
        """seconds: from when the first begins to wait. looks: how often meanwhile it is asked who need not wait any longer."""
        self._look_seconds = seconds / looks
        self._looks = looks
        self._left = 0
        self._waiting: list[tuple[asyncio.Future[None], Callable[[], bool]]] = []

    async def wait(self, over: Callable[[], bool]) -> None:
        """Until the next moment, or until `over` has been found to hold."""
        loop = asyncio.get_running_loop()
        if not self._left:
            self._left = self._looks
            loop.call_later(self._look_seconds, self._look)
        moment = loop.create_future()
        self._waiting.append((moment, over))
        await moment

    def _look(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._left -= 1
        for moment, over in waiting:
            if moment.done():  # its request was cancelled
                continue
            if not self._left or over():
                moment.set_result(None)
            else:
                self._waiting.append((moment, over))
        if self._waiting:
            asyncio.get_running_loop().call_later(self._look_seconds, self._look)
        else:
            self._left = 0


class Rest:
    """How one stream rests between two reads. To be closed with its response."""

    def __init__(self, beat: Beat, response: aiohttp.ClientResponse) -> None:
        self._beat = beat
        self._response = response
        self._socket = _own_socket(response)

    async def __call__(self) -> None:
        """Receive nothing until the next beat, or until all has come."""
        connection = self._response.connection
        if connection is None or connection.protocol is None:  # all has been received
            return
        protocol = connection.protocol
        protocol.pause_reading()
        try:
            await self._beat.wait(self._has_all)
        finally:
            protocol.resume_reading()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def _has_all(self) -> bool:
        """Whether what waits to be received has the body's end. Behind TLS that cannot be seen, and it waits for the beat."""
        if self._socket is None:
            return False
        try:
            num_bytes = self._socket.recv_into(_held, 0, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:  # the engine is gone, as the reader will see
            return True
        return not num_bytes or _held[num_bytes - len(LAST_CHUNK) : num_bytes] == LAST_CHUNK


def _own_socket(response: aiohttp.ClientResponse) -> socket.socket | None:
    """The connection's socket under a number of its own, which can be looked at while the event loop has the other."""
    connection = response.connection
    transport = connection.transport if connection else None
    theirs = transport.get_extra_info("socket") if transport else None
    if theirs is None:
        return None
    ours = socket.fromfd(theirs.fileno(), theirs.family, theirs.type)
    ours.setblocking(False)
    return ours
