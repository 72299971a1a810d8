"""A hot standby of an embedded server, made as an operator makes one: pg_basebackup, then promoted or not."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from listener.embedded import EmbeddedServer, _give, _run, _unprivileged_account

# What a primary needs; `trust` for replication is initdb's.
PRIMARY = {"wal_level": "replica", "max_wal_senders": "4", "hot_standby": "on"}


@contextmanager
def standby_of(primary: EmbeddedServer) -> Iterator[EmbeddedServer]:
    """Follows the primary until it is promoted, or to its end."""
    account = _unprivileged_account()
    directory = Path(tempfile.mkdtemp(prefix="listener-", dir="/tmp"))
    try:
        _give(directory, account)
        code, said = _run(
            [
                primary.bin("pg_basebackup"), "--host", primary.socket_directory, "--username=postgres",
                "--pgdata", directory / "data", "--checkpoint=fast", "--wal-method=stream", "--write-recovery-conf",
            ],
            account,
            primary.socket_directory,
        )  # fmt: skip
        assert code == 0, said
        binaries = primary.bin("postgres").parent
        with EmbeddedServer.start(directory, {"fsync": "off", **PRIMARY}, binaries=binaries) as standby:
            yield standby
    finally:
        shutil.rmtree(directory)
