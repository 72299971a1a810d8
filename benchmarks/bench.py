"""What every benchmark needs: a server, a database with the schema, a service in its own process, percentiles."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, LiteralString

import psycopg
from psycopg import sql
from pydantic import SecretStr

from listener import __version__
from listener.embedded import EmbeddedServer
from listener.migrate import roles_script, upgrade
from listener.settings import Settings


@dataclass
class Result:
    """One table: a heading, the column names, the rows."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[object]] = field(default_factory=list)
    note: str = ""


@contextmanager
def database(server: EmbeddedServer, name: str) -> Iterator[psycopg.Connection[Any]]:
    """A fresh database with the schema listener; a superuser's connection to it, autocommit. Dropped at the end."""
    _administer(server, "DROP DATABASE IF EXISTS {} WITH (FORCE)", name)
    _administer(server, "CREATE DATABASE {}", name)
    try:
        settings = Settings(database_url=SecretStr(server.url(database=name)))
        with psycopg.connect(server.url(database=name), autocommit=True) as connection:
            connection.execute("SET client_min_messages = warning")
            connection.execute(roles_script(settings, name).encode())
            connection.execute("GRANT CREATE, USAGE ON SCHEMA public TO listener_owner")
            connection.execute("GRANT USAGE ON SCHEMA public TO listener_service")
            upgrade(settings)
            yield connection
    finally:
        _administer(server, "DROP DATABASE IF EXISTS {} WITH (FORCE)", name)


def _administer(server: EmbeddedServer, statement: LiteralString, name: str) -> None:
    with psycopg.connect(server.url(), autocommit=True) as administrator:
        administrator.execute(sql.SQL(statement).format(sql.Identifier(name)))


@contextmanager
def service(server: EmbeddedServer, name: str) -> Iterator[subprocess.Popen[str]]:
    """`listener run` on the database, as its own role, with its defaults; ready when the block begins."""
    environment = os.environ | {
        "LISTENER_DATABASE_URL": server.url(user="listener_service", database=name),
        "LISTENER_HTTP_PORT": "0",
        "LISTENER_LOG_FORMAT": "json",
    }
    command = [sys.executable, "-m", "listener", "run"]
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if '"serving"' in line:
                break
        else:
            raise RuntimeError("the service did not start")
        # Somebody must read on, or the service would block on a full pipe.
        reader = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)
            reader.wait(30)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def environment(server: EmbeddedServer) -> str:
    """Machine and versions, in one line."""
    with psycopg.connect(server.url()) as connection:
        row = connection.execute("SHOW server_version").fetchone()
    assert row is not None
    return (
        f"listener {__version__}, PostgreSQL {row[0]}, psycopg {psycopg.__version__}, Python "
        f"{platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores, fsync on"
    )
