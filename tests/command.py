"""Runs the command line as a user would: a process of its own, an environment with nothing but what is given.

Such a process spends most of its time on imports. `listener` and `alembic` fork theirs from one that has them behind
it; `python` starts a fresh one, for what only that shows.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired, run
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
PATIENCE = 60.0  # seconds

forks = multiprocessing.get_context("forkserver")
# Without workers of xdist, pytest is the main module, and what is forked imports that again.
forks.set_forkserver_preload(["listener.cli", "alembic.config", "pytest"])


def environment(**given: str) -> dict[str, str]:
    """Given variables, and what a process needs to start; none of the caller's LISTENER_ variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LISTENER_", "PG"))}
    return kept | {"COLUMNS": "200", "LISTENER_HTTP_PORT": "0"} | given


def listener(*arguments: str, url: str | None = None, **given: str) -> CompletedProcess[str]:
    """`listener …` to its end; at most a minute."""
    return forked("listener.cli", "listener", *arguments, **with_url(url, given))


def alembic(*arguments: str, url: str) -> CompletedProcess[str]:
    """`alembic …` in the clone."""
    return forked("alembic.config", "alembic", *arguments, LISTENER_DATABASE_URL=url)


def python(*arguments: str, url: str | None = None, **given: str) -> CompletedProcess[str]:
    """`python …` in the clone: `-m listener`, for one."""
    return run(
        [sys.executable, *arguments],
        env=environment(**with_url(url, given)),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        cwd=ROOT,
    )


def with_url(url: str | None, given: dict[str, str]) -> dict[str, str]:
    return given if url is None else given | {"LISTENER_DATABASE_URL": url}


def forked(module: str, *command: str, **given: str) -> CompletedProcess[str]:
    """What `main` of this module does when it is called so."""
    with TemporaryDirectory() as name:
        out, err = Path(name, "out"), Path(name, "err")
        process = forks.Process(target=become, args=(module, command, environment(**given), out, err))
        process.start()
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutExpired(command, PATIENCE)
        ended = CompletedProcess(command, process.exitcode, out.read_text(), err.read_text())
        process.close()
        return ended


def become(module: str, command: Sequence[str], variables: dict[str, str], out: Path, err: Path) -> None:
    """In the forked process: everything is as it would be in one that was started so."""
    for number, path in ((1, out), (2, err)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.argv = list(command)
    # Made anew, since it asked where its lines go when it was imported.
    importlib.reload(importlib.import_module("listener.console"))
    importlib.import_module(module).main()
