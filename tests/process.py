"""`listener run` as a process: its log is read as it comes, each line an event to wait for.

Nothing here blocks the event loop, so that a test can write, wait and look while several services run.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx

from command import ROOT, environment
from conftest import DEADLINE


class ServiceProcess:
    """One replica. `log` has every line that it wrote, in order."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.log: list[dict[str, Any]] = []
        self._wrote = anyio.Event()
        self._is_read = anyio.Event()

    async def read(self) -> None:
        """Takes the log in, to its end."""
        assert self.process.stderr is not None
        try:
            async for line in self.process.stderr:
                # Anything else is an error without a caller: the rest of it says which.
                assert line.startswith(b"{"), line + await self.process.stderr.read()
                self.log.append(json.loads(line))
                self._tell()
        finally:
            self._is_read.set()
            self._tell()

    def _tell(self) -> None:
        self._wrote.set()
        self._wrote = anyio.Event()

    def logged(self, event: str, *, after: int = 0, **fields: object) -> list[dict[str, Any]]:
        """The log lines until now of this event with these fields, from line number `after` on."""
        return [line for line in self.log[after:] if line["event"] == event and fields.items() <= line.items()]

    async def until(self, event: str, *, after: int = 0, **fields: object) -> dict[str, Any]:
        """The first such line, once it is there; fails where the log ends without it."""
        with anyio.fail_after(DEADLINE):
            while True:
                wrote = self._wrote
                if found := self.logged(event, after=after, **fields):
                    return found[0]
                assert not self._is_read.is_set(), f"it ended without {event} {fields}: {self.log[-3:]}"
                await wrote.wait()

    async def get(self, path: str) -> httpx.Response:
        """One of its pages, once it serves; whatever it answers."""
        address = (await self.until("serving"))["http"]
        async with httpx.AsyncClient() as client:
            return await client.get(f"http://{address}{path}", timeout=DEADLINE)

    def send(self, what: signal.Signals) -> None:
        """SIGSTOP, SIGCONT, and whatever ends it."""
        self.process.send_signal(what)

    async def ended(self) -> int:
        """Its exit code, once it has one; then the log is whole."""
        with anyio.fail_after(DEADLINE):
            await self._is_read.wait()
            return await self.process.wait()

    async def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Ends it, stopped or not; its exit code."""
        self.send(how)
        if how != signal.SIGKILL:
            self.send(signal.SIGCONT)
        return await self.ended()


@asynccontextmanager
async def service_process(url: str, clone: Path = ROOT, /, **settings: str) -> AsyncIterator[ServiceProcess]:
    """The release in `clone` on this database, which may not serve yet when the block begins; killed at its end.

    Settings as the environment has them, without LISTENER_ and in lower case.
    """
    given = {f"LISTENER_{name.upper()}": value for name, value in settings.items()}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "listener",
        "run",
        env=environment(LISTENER_DATABASE_URL=url, LISTENER_LOG_FORMAT="json", **given),
        stderr=PIPE,
        cwd=clone,
        # The longest line names twenty keys, or has a traceback.
        limit=2**20,
    )
    service = ServiceProcess(process)
    async with anyio.create_task_group() as reading:
        reading.start_soon(service.read)
        try:
            yield service
        finally:
            if process.returncode is None:
                process.kill()
            with anyio.CancelScope(shield=True):
                await process.wait()
