"""A real PostgreSQL for every test: one server a worker, one database a test, cloned from a template.

The server is the embedded one, or LISTENER_TEST_POSTGRES_BIN's binaries, or the one at LISTENER_TEST_DATABASE_URL (a
superuser's URL; the roles and databases that the tests make are dropped or kept by name there). A given server has one
worker alone: roles belong to all of its databases, and what is drained waits for the transactions of all of them.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import anyio
import psycopg
import pytest
import structlog
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from pydantic import SecretStr

from listener.embedded import EmbeddedServer
from listener.migrate import roles_script, upgrade
from listener.refresh import Outcome
from listener.sample import load_sample
from listener.service import Service
from listener.settings import Settings
from listener.views import Change
from shop import EXTRAS, define, open_shop
from stranger import load_stranger

# A generous bound on events that come within milliseconds: reached only when something is broken.
DEADLINE = 30.0


@pytest.fixture(autouse=True)
def default_logging() -> None:
    """A command that an earlier test ran in this process may have set a level of its own."""
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Psycopg's async connections are asyncio's."""
    return "asyncio"


@dataclass(frozen=True)
class Server:
    """Where databases are made; `url` gives a libpq URL for a user and a database, `psql` is the program."""

    url: Callable[[str, str], str]
    psql: str

    def execute(self, statement: sql.Composed, database: str = "postgres") -> None:
        """As the superuser, autocommitted."""
        with psycopg.connect(self.url("postgres", database), autocommit=True) as connection:
            connection.execute(statement)

    def clone(self, template: str) -> str:
        """A new database, a copy of `template`."""
        name = f"listener_test_{uuid.uuid4().hex[:12]}"
        self.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template)))
        return name

    def drop(self, name: str) -> None:
        """Whoever is still connected is disconnected."""
        self.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The server of this worker. Missing or unreachable, the tests fail; they are never skipped."""
    given = os.environ.get("LISTENER_TEST_DATABASE_URL")
    if given:
        assert "PYTEST_XDIST_WORKER" not in os.environ, "one worker alone on LISTENER_TEST_DATABASE_URL: pytest -n 0"
        parts = {name: str(value) for name, value in conninfo_to_dict(given).items()}
        superuser = parts.pop("user", "")
        parts.pop("dbname", None)
        assert superuser, "LISTENER_TEST_DATABASE_URL must name a superuser"

        def url(user: str, database: str) -> str:
            # A URL, as the embedded server gives: host, port, password and the like follow the question mark.
            who = quote(superuser if user == "postgres" else user, safe="")
            return f"postgresql://{who}@/{quote(database, safe='')}?{urlencode(parts, quote_via=quote)}"

        yield Server(url, "psql")
        return
    with start_embedded() as embedded:
        yield server_of(embedded)


def start_embedded(**settings: str) -> EmbeddedServer:
    """One more embedded server, of the binaries of this run."""
    binaries = os.environ.get("LISTENER_TEST_POSTGRES_BIN")
    # The tests crash processes, never the operating system, and what a server wrote outlives it without fsync, too.
    # Where a server compiles queries, it takes longer to do so than any of these runs; the service asks for none.
    given = {"synchronous_commit": "on", "fsync": "off", "jit": "off"} | settings
    return EmbeddedServer.start(settings=given, binaries=Path(binaries) if binaries else None)


def server_of(embedded: EmbeddedServer) -> Server:
    """The same, as tests use it."""
    return Server(lambda user, database: embedded.url(user=user, database=database), str(embedded.bin("psql")))


def settings_for(url: str, **given: Any) -> Settings:
    """Settings with an HTTP port of their own, independent of the environment's."""
    return Settings.model_validate({"database_url": SecretStr(url), "http_port": 0, "log_level": "warning"} | given)


@pytest.fixture(scope="session")
def template(server: Server) -> Iterator[str]:
    """A database with the roles and the schema listener, made by an owner who is no superuser."""
    name = server.clone("template0")
    install(server, name)
    yield name
    server.drop(name)


def install(server: Server, name: str) -> None:
    """The roles and the schema listener, made by an owner who is no superuser."""
    with psycopg.connect(server.url("postgres", name), autocommit=True) as connection:
        settings = settings_for(server.url("listener_migrator", name))
        connection.execute(roles_script(settings, name).encode())
        connection.execute(
            """
            DO $$ BEGIN
                IF to_regrole('listener_migrator') IS NULL THEN CREATE ROLE listener_migrator LOGIN; END IF;
            END $$;
            GRANT listener_owner TO listener_migrator;
            GRANT CREATE, USAGE ON SCHEMA public TO listener_owner;
            GRANT USAGE ON SCHEMA public TO listener_service, listener_reader;
            """
        )
    upgrade(settings)


@pytest.fixture(scope="session")
def sample_template(server: Server, template: str) -> Iterator[str]:
    """The same with the sample schema and its five views."""
    name = server.clone(template)
    with psycopg.connect(server.url("postgres", name), autocommit=True) as connection:
        load_sample(connection)
    yield name
    server.drop(name)


@pytest.fixture(scope="session")
def stranger_template(server: Server, template: str) -> Iterator[str]:
    """The same with a team's billing and its materialized views, none of them managed."""
    name = server.clone(template)
    with psycopg.connect(server.url("postgres", name), autocommit=True) as connection:
        load_stranger(connection)
    yield name
    server.drop(name)


@dataclass(frozen=True)
class Database:
    """A database of one test."""

    server: Server
    name: str

    def url(self, user: str = "listener_service") -> str:
        """For this user; the service's by default."""
        return self.server.url(user, self.name)

    @asynccontextmanager
    async def connect(
        self, user: str = "postgres", *, autocommit: bool = True
    ) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """A connection; the superuser's by default, for what a test arranges and asserts."""
        connection = await psycopg.AsyncConnection.connect(self.url(user), autocommit=autocommit)
        async with connection:
            yield connection

    @property
    def directory(self) -> str:
        """Where the server's socket is."""
        return str(conninfo_to_dict(self.url()).get("host"))

    @asynccontextmanager
    async def service(self, **settings: Any) -> AsyncIterator[RunningService]:
        """A running service, in this process, as the service's role; stopped at the end."""
        async with self.starting(**settings) as running:
            with anyio.fail_after(DEADLINE):
                await running.service.started.wait()
            yield running

    @asynccontextmanager
    async def starting(self, **settings: Any) -> AsyncIterator[RunningService]:
        """The same from its first moment: HTTP answers, and it may wait for its database."""
        running = RunningService()
        running.service = Service(settings_for(self.url(), **settings), on_outcome=running.record)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(running.service.run)
            await eventually(lambda: running.service.port)
            try:
                yield running
            finally:
                running.service.stop()


async def eventually(is_so: Callable[[], Any]) -> None:
    """Until `is_so` (a function, sync or async) says yes; for what tells nobody when it happens."""
    with anyio.fail_after(DEADLINE):
        while True:
            answer = is_so()
            if hasattr(answer, "__await__"):
                answer = await answer
            if answer:
                return
            # An outside state tells nobody when it changes; the service under test runs on this event loop, too.
            await anyio.sleep(0.005)


@dataclass
class RunningService:
    """A service and what it did; `until` waits for an event, never for a time."""

    outcomes: list[tuple[Change, Outcome]] = field(default_factory=list)
    service: Service = field(init=False)
    _happened: anyio.Event = field(default_factory=anyio.Event)

    def record(self, change: Change, outcome: Outcome) -> None:
        """Called by the service after each refresh."""
        self.outcomes.append((change, outcome))
        self._happened.set()
        self._happened = anyio.Event()

    async def until(self, is_so: Callable[[], Any]) -> None:
        """Until `is_so` (a function, sync or async) says yes, asked again after each refresh."""
        with anyio.fail_after(DEADLINE):
            while True:
                happened = self._happened
                answer = is_so()
                if hasattr(answer, "__await__"):
                    answer = await answer
                if answer:
                    return
                await happened.wait()

    async def until_refreshed(self, view: str, tenant: object, *, after: int = 0) -> Outcome:
        """Until this key was refreshed, or found to be, counting outcomes from number `after` on; the outcome."""
        found: list[Outcome] = []

        def seen() -> bool:
            found[:] = [
                o
                for c, o in self.outcomes[after:]
                if (c.key.view, c.key.tenant) == (view, str(tenant)) and o.outcome in {"refreshed", "fresh"}
            ]
            return bool(found)

        await self.until(seen)
        return found[-1]


@pytest.fixture
def database(server: Server, template: str) -> Iterator[Database]:
    """A database with the schema listener and nothing else."""
    name = at_home(server, server.clone(template))
    yield Database(server, name)
    server.drop(name)


@pytest.fixture
def sample(server: Server, sample_template: str) -> Iterator[Database]:
    """A database with the sample schema and its five views."""
    name = at_home(server, server.clone(sample_template))
    yield Database(server, name)
    server.drop(name)


@pytest.fixture
def stranger(server: Server, stranger_template: str) -> Iterator[Database]:
    """A database with a team's billing and its materialized views, none of them managed."""
    name = at_home(server, server.clone(stranger_template))
    yield Database(server, name)
    server.drop(name)


def at_home(server: Server, name: str) -> str:
    """The clone, no longer taken for a copy that must be repaired."""
    server.execute(sql.SQL("SELECT count(*) FROM listener.repair_capture()").format(), name)
    return name


@pytest.fixture
def recorded_ledger() -> Path:
    """The real ledger, for tests marked `ledger`. Missing, they fail; `make test` leaves them out."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "online_retail_invoices.csv.gz"
    path = Path(os.environ.get("LISTENER_REPLAY_FILE") or beside)
    assert path.exists(), f"{path} is missing: set LISTENER_REPLAY_FILE to the recorded ledger"
    return path


@pytest.fixture
async def shop(database: Database) -> Database:
    """A database with the shop's tables and no view; modules arrange more in a fixture `shop` of their own."""
    await open_shop(database)
    async with database.connect() as superuser:
        await define(superuser, EXTRAS)
    return database


@pytest.fixture
async def superuser(shop: Database) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """Who arranges and asserts."""
    async with shop.connect() as connection:
        yield connection


@pytest.fixture
async def service(shop: Database) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """Who drains and refreshes."""
    async with shop.connect("listener_service") as connection:
        yield connection
