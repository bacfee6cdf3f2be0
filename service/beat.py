"""So many moments a second, the same for all who wait for the next."""

import asyncio


class Beat:
    """Costs one timer while anybody waits, and nothing else."""

    def __init__(self, seconds: float) -> None:
        """seconds: from when the first begins to wait."""
        self._seconds = seconds
        self._next: asyncio.Event | None = None

    async def wait(self) -> None:
        """Until the next moment."""
        if self._next is None:
            self._next = asyncio.Event()
            asyncio.get_running_loop().call_later(self._seconds, self._strike)
        await self._next.wait()

    def _strike(self) -> None:
        struck, self._next = self._next, None
        if struck is not None:
            struck.set()
