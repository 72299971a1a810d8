"""One replica: `listener run` as a process, behind a proxy of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from proxy import Proxy

# Faults are over within seconds here; so must be what is waited for after them.
HASTE = {
    "LISTENER_PROBE_INTERVAL": "2s",
    "LISTENER_PROBE_TIMEOUT": "1s",
    "LISTENER_SWEEP_INTERVAL": "2s",
    "LISTENER_RETRY_BASE": "200ms",
    "LISTENER_RETRY_CAP": "1s",
    "LISTENER_RETRY_QUARANTINED": "2s",
    "LISTENER_STATEMENT_TIMEOUT": "10s",
    "LISTENER_GRACE_PERIOD": "3s",
    "LISTENER_HTTP_PORT": "0",
    "LISTENER_LOG_FORMAT": "json",
}
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Resources:
    """What a process holds: resident bytes and file descriptors."""

    resident: int
    descriptors: int


@dataclass
class Replica:
    """Started by `start`; whatever ended it, it can be started again."""

    name: str
    proxy: Proxy
    log: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """A new process; it serves once it can."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "listener", "run"],
            env=os.environ | HASTE | {"LISTENER_DATABASE_URL": self.proxy.url},
            stdout=subprocess.DEVNULL,
            stderr=self.log,
        )

    @property
    def is_running(self) -> bool:
        """Whether there is a process, stopped or not."""
        return self._process is not None and self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Sent to the process, where there is one."""
        if self._process is not None:
            self._process.send_signal(number)

    def wait(self) -> int:
        """Until the process has ended; its exit code. Blocks."""
        assert self._process is not None
        return self._process.wait(30)

    def end(self) -> None:
        """Leaves no process, whatever state it is in."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self.log.close()

    def log_lines(self) -> list[bytes]:
        """What all its processes have said."""
        size = self.log.tell()
        return os.pread(self.log.fileno(), size, 0).splitlines()

    def said(self, event: str) -> list[dict[str, Any]]:
        """The log lines of this event."""
        mark = f'"event": "{event}"'.encode()
        return [json.loads(line) for line in self.log_lines() if mark in line]

    def resources(self) -> Resources:
        """Of the running process, as the kernel counts them."""
        assert self._process is not None
        home = Path("/proc") / str(self._process.pid)
        resident = int((home / "statm").read_text().split()[1]) * PAGE
        return Resources(resident, len(list((home / "fd").iterdir())))
