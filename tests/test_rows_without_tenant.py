"""Rows whose tenant is NULL or '': no tenant's refresh returns them, and every place that could hide that says so."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest

from command import listener
from conftest import Database
from shop import create_view, one, rows, settle

pytestmark = pytest.mark.anyio

QUERY = "SELECT tenant_id, id FROM words"
FINDING = "SELECT level, problem, mend FROM listener.result_findings() WHERE view = %s"


@pytest.fixture
async def words(database: Database) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """The superuser; three rows have a tenant, one has none and one has ''."""
    async with database.connect() as superuser:
        await superuser.execute(
            """SET ROLE listener_owner;
               CREATE TABLE words (id int PRIMARY KEY, tenant_id text);
               INSERT INTO words VALUES (1, 't1'), (2, 't1'), (3, 't2'), (4, NULL), (5, '');
               CREATE TABLE ids (id int PRIMARY KEY, tenant_id uuid);
               INSERT INTO ids VALUES (1, gen_random_uuid()), (2, NULL);
               CREATE INDEX ON words (tenant_id); CREATE INDEX ON ids (tenant_id);
               GRANT SELECT ON words, ids TO listener_service;
               RESET ROLE; GRANT CREATE, USAGE ON SCHEMA public TO listener_owner, listener_migrator"""
        )
        yield superuser


async def warnings_of(database: Database, statement: str) -> list[tuple[str, str]]:
    """What the migrating role is warned of."""
    warned: list[tuple[str, str]] = []
    async with database.connect("listener_migrator") as migrator:
        migrator.add_notice_handler(
            lambda notice: (
                warned.append((str(notice.message_primary), str(notice.message_hint)))
                if notice.severity == "WARNING"
                else None
            )
        )
        await migrator.execute(statement.encode())
    return warned


@pytest.mark.parametrize(
    ("query", "warning"),
    [
        (QUERY, "2 rows have no tenant (tenant_id is NULL or ''), and v never has them"),
        ("SELECT tenant_id, id FROM ids", "1 row has no tenant (tenant_id is NULL), and v never has them"),
        (QUERY + " WHERE tenant_id <> ''''", None),
    ],
)
async def test_registration_warns_with_their_number(
    words: psycopg.AsyncConnection[Any], database: Database, query: str, warning: str | None
) -> None:
    warned = await warnings_of(database, f"SELECT listener.create_view('v', '{query}', '{{id}}')")
    assert [message for message, _ in warned] == ([warning] if warning else [])
    assert all("tenant_column => NULL" in hint for _, hint in warned)


async def test_verify_and_doctor_say_that_they_are_left_out(
    words: psycopg.AsyncConnection[Any], database: Database
) -> None:
    await create_view(database, "v", QUERY, ["id"], tenants_query=None)
    async with database.connect("listener_service") as service:
        await settle(service)
    assert await one(words, "SELECT count(*) FROM v") == 3
    done = listener("verify", "v", url=database.url())
    assert done.returncode == 1
    assert "2 keys compared, 0 stale, 0 different, 0 failed, 2 rows without a tenant" in done.stdout
    found = json.loads(listener("verify", "v", "--json", url=database.url()).stdout)
    assert (found["rows_without_tenant"], found["different"]) == (2, 0)
    assert found["differences"] == [
        {"view": "v", "tenant_id": None, "missing": 2, "extra": 0, "verdict": "without a tenant", "error": None}
    ]
    assert await rows(words, FINDING, "v") == [
        (
            "warning",
            "2 rows of it have no tenant (tenant_id is NULL or ''), and the target never has them.",
            "listener views alter v --query FILE",
        )
    ]
    await words.execute("DELETE FROM words WHERE tenant_id IS NULL OR tenant_id = ''")
    assert [row[0] for row in await rows(words, FINDING, "v")] == ["ok"]
    done = listener("verify", "v", url=database.url())
    assert (done.returncode, "without a tenant" in done.stdout) == (0, False)


async def test_a_view_without_a_tenant_column_keeps_them(
    words: psycopg.AsyncConnection[Any], database: Database
) -> None:
    statement = f"SELECT listener.create_view('v', '{QUERY}', '{{id}}', tenant_column => NULL)"
    assert await warnings_of(database, statement) == []
    async with database.connect("listener_service") as service:
        await settle(service)
        everything = "SELECT tenant_id, id FROM v ORDER BY id"
        assert await rows(words, everything) == [("t1", 1), ("t1", 2), ("t2", 3), (None, 4), ("", 5)]
        await words.execute("UPDATE words SET tenant_id = NULL WHERE id = 3; INSERT INTO words VALUES (6, '')")
        await settle(service)
    assert await rows(words, everything) == [("t1", 1), ("t1", 2), (None, 3), (None, 4), ("", 5), ("", 6)]
    assert listener("verify", "v", url=database.url()).returncode == 0


async def test_rows_that_a_policy_hides_from_the_service_are_not_counted(
    words: psycopg.AsyncConnection[Any], database: Database
) -> None:
    await words.execute(
        """ALTER TABLE words ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
           CREATE POLICY tenant ON words USING (tenant_id = current_setting('app.current_tenant_id'));
           ALTER TABLE ids ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
           CREATE POLICY tenant ON ids USING (tenant_id = current_setting('app.current_tenant_id')::uuid)"""
    )
    await create_view(database, "v", QUERY, ["id"], tenants_query="SELECT 't1'")
    await create_view(database, "w", "SELECT tenant_id, id FROM ids", ["id"], tenants_query="SELECT NULL::uuid")
    # With no tenant set one policy lets the rows of '' through, and the other raises an error.
    assert await one(words, "SELECT listener.rows_without_tenant('v')") == 1
    assert await one(words, "SELECT listener.rows_without_tenant('w')") is None
