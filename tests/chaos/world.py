"""What the faults act on: a server, its database with the sample and one odd view, replicas, an application.

The odd view divides, so that a write can poison it for one tenant; its tables can be renamed and emptied without
breaking the application.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, LiteralString

import anyio
import psycopg
from psycopg import AsyncConnection
from pydantic import SecretStr

from chaos.replica import Replica
from listener.embedded import EmbeddedServer
from listener.load import LoadCounters, write_load
from listener.migrate import roles_script, upgrade
from listener.sample import create_tenants, load_sample
from listener.settings import Settings

DATABASE = "chaos"
ODD: LiteralString = """
CREATE TABLE public.divisors (tenant_id uuid NOT NULL, divisor int NOT NULL);
CREATE INDEX ON public.divisors (tenant_id);
ALTER TABLE public.divisors OWNER TO listener_owner;
GRANT SELECT ON public.divisors TO listener_service;
SET ROLE listener_owner;
SELECT listener.create_view('shares',
    'SELECT tenant_id, count(*) AS parts, sum(100 / divisor) AS share FROM public.divisors GROUP BY 1',
    '{tenant_id}', tenants_query => 'SELECT id FROM public.tenants');
RESET ROLE;
"""


@dataclass
class World:
    """`outage`: how many seconds a fault lasts that has a duration."""

    server: EmbeddedServer
    replicas: list[Replica]
    random: Random
    outage: float
    tenants: Sequence[uuid.UUID]
    load: LoadCounters = field(default_factory=LoadCounters)

    @property
    def mortals(self) -> list[Replica]:
        """Those that may be killed: the first lives through everything, so that what it holds can be compared."""
        return self.replicas[1:]

    @asynccontextmanager
    async def superuser(self, *, autocommit: bool = True) -> AsyncIterator[AsyncConnection[Any]]:
        """A connection past all proxies."""
        async with await AsyncConnection.connect(
            self.server.url(database=DATABASE), autocommit=autocommit, application_name="chaos", connect_timeout=10
        ) as connection:
            yield connection

    async def write(self, rate: float, connections: int) -> None:
        """The application: it waits out whatever the faults do to it, and goes on. Until cancelled."""
        url = self.server.url(user="listener_app", database=DATABASE)
        async with anyio.create_task_group() as tasks:
            for _ in range(connections):
                tasks.start_soon(self._write_again, url, rate / connections)

    async def _write_again(self, url: str, rate: float) -> None:
        random = Random(self.random.getrandbits(64))
        while True:
            try:
                await write_load(url, self.tenants, self.load, random, rate=rate, connections=1)
            except* (psycopg.Error, OSError):
                pass
            await anyio.sleep(0.2)


async def until(is_so: Callable[[], Awaitable[bool]], pause: float) -> None:
    """Asks again and again, so many seconds apart: the database tells nobody when it changes."""
    while True:
        if await is_so():
            return
        await anyio.sleep(pause)


def set_up(server: EmbeddedServer) -> None:
    """The database, its roles and schema, the sample, the odd view."""
    with psycopg.connect(server.url(), autocommit=True) as administrator:
        administrator.execute(f"CREATE DATABASE {DATABASE}".encode())
    url = server.url(database=DATABASE)
    settings = Settings.model_validate({"database_url": SecretStr(url)})
    with psycopg.connect(url, autocommit=True) as administrator:
        administrator.execute("SET client_min_messages = warning")
        administrator.execute(roles_script(settings, DATABASE).encode())
        administrator.execute("GRANT CREATE, USAGE ON SCHEMA public TO listener_owner")
        administrator.execute("GRANT USAGE ON SCHEMA public TO listener_service")
        upgrade(settings)
        load_sample(administrator)
        administrator.execute(ODD)


async def make_tenants(world: World) -> None:
    """Each with a divisor, so that the odd view has a row of it."""
    async with world.superuser() as superuser:
        await create_tenants(superuser, [(tenant, str(tenant)) for tenant in world.tenants])
        await superuser.execute("INSERT INTO public.divisors SELECT id, 1 FROM public.tenants")
