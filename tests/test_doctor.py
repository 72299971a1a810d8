"""Doctor: each thing that can be wrong is broken for real, found, and mended by the command that was printed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, LiteralString

import pytest
from psycopg import AsyncConnection

from conftest import Database
from diagnosis import OF_THE_OWNER, mended, wrong
from harms import HARMS
from shop import BALANCE, EXTRAS, SALES, create_view, define, open_shop

pytestmark = pytest.mark.anyio

# What a test may have made of the roles, which belong to all databases of the server.
AS_THEY_WERE: LiteralString = """
ALTER ROLE listener_service NOSUPERUSER NOBYPASSRLS NOCREATEROLE NOCREATEDB NOREPLICATION CONNECTION LIMIT -1;
REVOKE listener_owner, shop_owner, shop_writers FROM listener_service;
GRANT shop_owner, listener_service, listener_compute TO listener_owner;
GRANT pg_read_all_stats TO listener_service;
"""


@pytest.fixture
async def shop(database: Database) -> AsyncIterator[Database]:
    """Two views, and nothing to complain of."""
    await open_shop(database)
    async with database.connect() as superuser:
        await define(superuser, EXTRAS)
        await superuser.execute(
            """
            DO $$ BEGIN IF to_regrole('shop_writers') IS NULL THEN CREATE ROLE shop_writers; END IF; END $$;
            ALTER TABLE shop.orders ALTER COLUMN tenant_id SET NOT NULL;
            """
        )
    await create_view(database, "sales", SALES, ["product"])
    await create_view(database, "balance", BALANCE, ["product"], target_rls=True)
    assert await wrong(database) == []
    yield database
    async with database.connect() as superuser:
        await superuser.execute(AS_THEY_WERE)


async def harm(superuser: AsyncConnection[Any], statement: str) -> None:
    await superuser.execute(statement.encode())


@pytest.mark.parametrize("what", HARMS)
async def test_what_is_wrong_is_found_and_the_command_that_is_printed_mends_it(shop: Database, what: str) -> None:
    done = HARMS[what]
    async with shop.connect() as superuser:
        await harm(superuser, done.statement)
    found = await wrong(shop, OF_THE_OWNER)
    assert [f for f in found if (f.check, f.level, f.object) == (done.check, done.level, done.object)
            and done.says in f.problem], found  # fmt: skip
    assert await mended(shop, OF_THE_OWNER) == []
    # And whoever asks as the service's role sees the same.
    assert await wrong(shop) == []


@pytest.mark.parametrize("what", ["a trigger dropped", "a source", "INSERT on a source", "no policy left"])
async def test_the_services_role_sees_what_a_member_of_the_owner_sees(shop: Database, what: str) -> None:
    async with shop.connect() as superuser:
        await harm(superuser, HARMS[what].statement)
    found = await wrong(shop)
    assert found == await wrong(shop, OF_THE_OWNER)
    assert HARMS[what].object in {f.object for f in found}


@pytest.mark.parametrize("what", [what for what, done in HARMS.items() if done.level == "error"])
async def test_readiness_shows_errors_of_rights_and_row_security_and_names_no_tenant(shop: Database, what: str) -> None:
    done = HARMS[what]
    async with shop.connect() as superuser:
        await harm(superuser, done.statement)
        lines = [r for (r,) in await (await superuser.execute("SELECT * FROM listener.readiness()")).fetchall()]
    # The sweep mends capture, or says why not; what its own role may be, the service knows.
    assert any(done.says in line for line in lines) is (done.check not in {"capture", "roles"}), lines


async def test_a_sound_database_has_no_reason_not_to_be_ready(shop: Database) -> None:
    async with shop.connect("listener_service") as service:
        assert await (await service.execute("SELECT * FROM listener.readiness()")).fetchall() == []
