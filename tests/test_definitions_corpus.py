"""Definitions of every breadth: after random writes each target is its definition, whole and from one tenant's rows.

LISTENER_TEST_EXAMPLES (25) says how many statements a round has, and with it how many rounds there are;
LISTENER_TEST_SEED says which.
"""

from __future__ import annotations

import os
import random
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection, sql

from conftest import Database
from definitions import LOOKUP, TENANTS, Writer, definitions, schema
from shop import create_view, one, rows, settle

pytestmark = pytest.mark.anyio

EXAMPLES = int(os.environ.get("LISTENER_TEST_EXAMPLES", "25"))
ROUNDS = max(2, EXAMPLES // 12)
# What a random write may run into: it gives up, as the application would.
GAVE_UP = (psycopg.errors.IntegrityError, psycopg.errors.CardinalityViolation)

# The alias is the name of no column: it is the row.
DIFFERENCES = """
    SELECT 'missing', m.* FROM (SELECT whole::text FROM listener.{definition} whole WHERE {mine}
                                EXCEPT ALL SELECT whole::text FROM {target} whole WHERE {mine}) m
    UNION ALL
    SELECT 'extra', e.* FROM (SELECT whole::text FROM {target} whole WHERE {mine}
                              EXCEPT ALL SELECT whole::text FROM listener.{definition} whole WHERE {mine}) e
"""


def test_the_corpus_is_broad() -> None:
    assert len(definitions(xml=False)) >= 120


async def differences(superuser: AsyncConnection[Any], views: list[Any], mine: sql.Composable) -> list[Any]:
    """The rows of each view that only its definition, or only its target has."""
    found = []
    for view_id, name, query in views:
        statement = sql.SQL(DIFFERENCES).format(
            definition=sql.Identifier(f"definition_{view_id}"), target=sql.Identifier(name), mine=mine
        )
        found += [(query, mine.as_string(), *row) for row in await rows(superuser, statement)]
    return found


async def compare(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], views: list[Any], literals: list[str]
) -> None:
    """Whole, for each tenant as the service computes it, and from that tenant's rows alone."""
    assert await differences(superuser, views, sql.SQL("true")) == []
    for literal in literals:
        tenant = await one(superuser, sql.SQL("SELECT {}::text").format(sql.SQL(literal)))
        for _, name, query in views:
            compared = await rows(service, "SELECT missing, extra, stale FROM listener.compare(%s, %s)", name, tenant)
            assert compared == [(0, 0, False)], (query, tenant)
        async with superuser.transaction(force_rollback=True):
            await superuser.execute("SET LOCAL session_replication_role = replica")
            for table in ("things", "parts", "values_of"):
                await superuser.execute(
                    sql.SQL("DELETE FROM {} WHERE tenant_id <> {}").format(sql.Identifier(table), sql.SQL(literal))
                )
            await superuser.execute("DELETE FROM lines WHERE thing_id NOT IN (SELECT id FROM things)")
            assert await differences(superuser, views, sql.SQL("tenant_id = {}").format(sql.SQL(literal))) == []


@pytest.mark.parametrize("tenant_type", TENANTS)
async def test_after_random_writes_every_definition_is_shown(database: Database, tenant_type: str) -> None:
    """A quarter of the definitions for each type of tenants, another quarter with each seed."""
    seed = int(os.environ.get("LISTENER_TEST_SEED") or random.randrange(2**32))
    print("LISTENER_TEST_SEED", seed)
    chance = random.Random(f"{seed} {tenant_type}")
    async with database.connect() as superuser, database.connect("listener_service") as service:
        await superuser.execute("SET TimeZone = 'UTC'")
        # Not every server is built with it.
        xml = await has_xml(superuser)
        await superuser.execute(schema(tenant_type, xml=xml).encode())
        await superuser.execute("GRANT CREATE, USAGE ON SCHEMA public TO listener_owner, listener_migrator")
        writer = Writer(chance, tenant_type, xml=xml)
        for _ in range(EXAMPLES):
            await write(superuser, writer)
        shuffled = random.Random(seed).sample(definitions(xml=xml), k=len(definitions(xml=xml)))
        own = list(TENANTS).index(tenant_type)
        for number, (keys, query) in enumerate(shuffled[own::4]):
            await create_view(database, f"v{number}", query, keys, tenants_query=None)
            if number == 0:
                async with database.connect("listener_migrator") as migrator:
                    await migrator.execute(LOOKUP)
        views = await rows(superuser, "SELECT id, name, query FROM listener.managed_view ORDER BY id")
        await settle(service)
        for _ in range(ROUNDS):
            for _ in range(EXAMPLES):
                await write(superuser, writer)
            await settle(service)
            await compare(superuser, service, views, TENANTS[tenant_type])
        assert await rows(superuser, "SELECT view_name, error_message FROM listener.dead_letter") == []


async def write(superuser: AsyncConnection[Any], writer: Writer) -> None:
    """One statement, or none where it fails."""
    try:
        await superuser.execute(writer.statement().encode())
    except GAVE_UP:
        return


async def has_xml(superuser: AsyncConnection[Any]) -> bool:
    """Whether the server was built with xml."""
    try:
        await superuser.execute("SELECT '<a/>'::xml")
    except psycopg.errors.FeatureNotSupported:
        return False
    return True
