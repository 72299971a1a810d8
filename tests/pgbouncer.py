"""PgBouncer before a database: Debian's, as whoever runs the tests, or as `nobody` where that is root."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import anyio

from conftest import Database, Server, eventually
from listener.embedded import _circumstances, _give, _unprivileged_account

CONFIGURATION = """
[databases]
* = host={server} port=5432
[pgbouncer]
listen_addr =
listen_port = 6432
unix_socket_dir = {directory}
auth_type = trust
auth_file = {directory}/users
pool_mode = {pool_mode}
default_pool_size = {pool_size}
"""
USERS = ("listener_service", "listener_migrator")


@asynccontextmanager
async def pgbouncer(
    database: Database, pool_mode: Literal["transaction", "session"], *, pool_size: int = 3
) -> AsyncIterator[Database]:
    """The same database as it is reached through the pooler, which has so many connections to it for each user."""
    places = [str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"]
    program = shutil.which("pgbouncer", path=os.pathsep.join(places))
    assert program is not None, "pgbouncer is not there: Debian has it in the package pgbouncer"
    account = _unprivileged_account()
    # Short: a socket's path may have 103 bytes.
    with tempfile.TemporaryDirectory(prefix="listener-", dir="/tmp") as name:
        directory = Path(name)
        given = {"server": database.directory, "pool_mode": pool_mode, "pool_size": pool_size}
        files = {
            directory / "pgbouncer.ini": CONFIGURATION.format(directory=directory, **given),
            directory / "users": "".join(f'"{user}" ""\n' for user in USERS),
        }
        _give(directory, account)
        for path, text in files.items():
            path.write_text(text)
            _give(path, account)
        command = [program, str(directory / "pgbouncer.ini")]
        async with await anyio.open_process(command, stdout=None, **_circumstances(account, directory)) as process:
            try:
                await eventually((directory / ".s.PGSQL.6432").exists)

                def url(user: str, database: str) -> str:
                    return f"postgresql://{user}@/{database}?host={quote(name, safe='')}&port=6432"

                yield Database(Server(url, database.server.psql), database.name)
            finally:
                process.kill()
