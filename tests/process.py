"""`listener run` as a process, and its log."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from command import ROOT, environment
from conftest import DEADLINE, Database


class Run:
    """A running process and its log, read line by line: each line is an event to wait for."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def until(self, event: str, **fields: object) -> dict[str, Any]:
        """The next log line of this event with these fields."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            assert line.startswith("{"), line + self.process.stderr.read()
            found: dict[str, Any] = json.loads(line)
            if found["event"] == event and fields.items() <= found.items():
                return found
        raise AssertionError(f"the service ended without {event} {fields}")


@contextmanager
def running(database: Database, user: str = "listener_service", **settings: str) -> Iterator[Run]:
    """Killed at the end if it still runs."""
    with subprocess.Popen(
        [sys.executable, "-m", "listener", "run"],
        env=environment(**{"LISTENER_DATABASE_URL": database.url(user), "LISTENER_LOG_FORMAT": "json"} | settings),
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        # A log line that never comes must fail the test, not hang it.
        bound = threading.Timer(2 * DEADLINE, process.kill)
        bound.start()
        try:
            yield Run(process)
        finally:
            bound.cancel()
            process.kill()
