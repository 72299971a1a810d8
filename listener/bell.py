"""An event that can be rung again and again; any number of rings before a wait are one."""

from __future__ import annotations

import anyio


class Bell:
    """Rung by anyone, waited for by one or more tasks."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    @property
    def is_rung(self) -> bool:
        """Whether a wait would return at once."""
        return self._event.is_set()

    def ring(self) -> None:
        """Wakes every task that waits, or the next one that will."""
        self._event.set()

    async def wait(self, timeout: float | None = None) -> None:
        """Until rung, or `timeout` seconds at the most. Clears the ring."""
        if timeout is None:
            await self._event.wait()
        else:
            with anyio.move_on_after(timeout):
                await self._event.wait()
        if self._event.is_set():
            self._event = anyio.Event()
