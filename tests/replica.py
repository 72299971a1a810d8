"""`listener run` as a process whose log goes to a file: it can be left alone while others are waited for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx

from command import ROOT, environment
from conftest import DEADLINE, eventually


@dataclass(frozen=True)
class Replica:
    """A running service."""

    process: subprocess.Popen[bytes]
    log: Path

    def lines(self, event: str, **fields: object) -> list[dict[str, Any]]:
        """What it has logged of this event with these fields."""
        # The last line may not be whole yet.
        whole = self.log.read_text().rpartition("\n")[0].splitlines()
        return [line for line in map(json.loads, whole) if line["event"] == event and fields.items() <= line.items()]

    async def until(self, event: str, **fields: object) -> dict[str, Any]:
        """The first such line, once it is there; fails where the process ends without it."""

        def said() -> bool:
            if self.lines(event, **fields):
                return True
            assert self.process.poll() is None, self.log.read_text()
            return False

        await eventually(said)
        return self.lines(event, **fields)[0]

    async def get(self, path: str) -> httpx.Response:
        """One of its pages, or whatever it answers."""
        address = (await self.until("serving"))["http"]
        async with httpx.AsyncClient() as client:
            return await client.get(f"http://{address}{path}", timeout=DEADLINE)

    async def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        with anyio.fail_after(DEADLINE):
            return await anyio.to_thread.run_sync(self.process.wait)


def start(url: str, log: Path, clone: Path, settings: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "listener", "run"],
            env=environment(LISTENER_DATABASE_URL=url, LISTENER_LOG_FORMAT="json", **settings),
            stderr=file,
            cwd=clone,
        )


@asynccontextmanager
async def replica(url: str, log: Path, *, clone: Path | None = None, **settings: str) -> AsyncIterator[Replica]:
    """A service of the release in `clone`, by default this one; killed at the end if it still runs."""
    process = start(url, log, clone or ROOT, settings)
    try:
        yield Replica(process, log)
    finally:
        process.kill()
        process.wait()
