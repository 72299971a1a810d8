"""Runs the command line as a user would: a process of its own, an environment with nothing but what is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(**given: str) -> dict[str, str]:
    """Given variables, and what a process needs to start; none of the caller's LISTENER_ variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LISTENER_", "PG"))}
    return kept | {"COLUMNS": "200", "LISTENER_HTTP_PORT": "0"} | given


def listener(*arguments: str, url: str | None = None, **given: str) -> subprocess.CompletedProcess[str]:
    """`listener …` to its end; at most a minute."""
    if url is not None:
        given["LISTENER_DATABASE_URL"] = url
    return subprocess.run(
        [sys.executable, "-m", "listener", *arguments],
        env=environment(**given),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=ROOT,
    )


def alembic(*arguments: str, url: str) -> subprocess.CompletedProcess[str]:
    """`alembic …` in the clone."""
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        env=environment(LISTENER_DATABASE_URL=url),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=ROOT,
    )
