"""A server of a test's own, which may be crashed and stopped, with the sample schema and two tenants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg
from psycopg import sql

from conftest import Database, install, server_of, start_embedded
from listener.embedded import EmbeddedServer
from listener.sample import load_sample


@dataclass(frozen=True)
class LoneServer:
    """The server, and the database on it that is copied for each test."""

    embedded: EmbeddedServer

    def clone(self) -> Database:
        """A database of one test."""
        server = server_of(self.embedded)
        name = server.clone("books")
        server.execute(sql.SQL("SELECT count(*) FROM listener.repair_capture()").format(), name)
        return Database(server, name)


@contextmanager
def lone_server(**settings: str) -> Iterator[LoneServer]:
    """Started with these settings; whatever a test did to it, it is stopped at the end."""
    with start_embedded(**settings) as embedded:
        server = server_of(embedded)
        server.execute(sql.SQL("CREATE DATABASE books TEMPLATE template0").format())
        install(server, "books")
        with psycopg.connect(server.url("postgres", "books"), autocommit=True) as connection:
            load_sample(connection)
        yield LoneServer(embedded)
