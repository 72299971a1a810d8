"""A tenant that is no more leaves nothing: in no target, and in no table of the schema."""

from __future__ import annotations

import json
import random
import secrets
from typing import Any

import anyio
import psycopg
import pytest
from psycopg import sql

from command import listener
from conftest import Database, eventually
from shop import ANNA, BALANCE, BERT, SALES, create_view, define, differences, one, order, rows, settle

pytestmark = pytest.mark.anyio

VIEWS = ("sales", "totals", "named", "noted", "balance")
LATE = "AAAAAAAA-AAAA-4AAA-8AAA-AAAAAAAAAAAA"  # as somebody writes it
GONE = LATE.lower()


@pytest.fixture
async def shop(shop: Database) -> Database:
    """Views of one tenant that is to go and of others: secured, over another view, by text, over a text column."""
    async with shop.connect() as superuser:
        await define(superuser, "CREATE TABLE shop.notes (tenant_id text, note text)")
        await superuser.execute("GRANT SELECT ON shop.notes TO listener_service")
        await superuser.execute("INSERT INTO shop.tenants VALUES (%s)", (GONE,))
        await create_view(shop, "sales", SALES, ["product"], target_rls=True)
        await create_view(shop, "totals", "SELECT tenant_id, sum(orders) AS n FROM sales GROUP BY 1", ["tenant_id"])
        await create_view(
            shop, "named", "SELECT o.tenant_id::text AS tenant_id, count(*) AS n FROM shop.orders o GROUP BY 1",
            ["tenant_id"], tenants_query="SELECT id::text FROM shop.tenants",
        )  # fmt: skip
        await create_view(
            shop, "noted", "SELECT tenant_id::uuid AS tenant_id, note FROM shop.notes", ["note"], tenants_query=None
        )
        await create_view(shop, "balance", BALANCE, ["product"])
        for tenant in (GONE, ANNA, BERT):
            await order(superuser, tenant, "tea", 3)
            await superuser.execute("INSERT INTO shop.notes VALUES (%s, 'mine')", (tenant.upper(),))
    async with shop.connect("listener_service") as service:
        await settle(service)
    return shop


async def mentions(superuser: psycopg.AsyncConnection[Any], tenant: str) -> dict[str, int]:
    """The tables of the schema, and the targets, with rows that have this text in them."""
    tables = await rows(
        superuser,
        """
        SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'r' AND (n.nspname = 'listener' OR EXISTS (
            SELECT FROM listener.managed_view v WHERE (v.target_schema, v.target_name) = (n.nspname, c.relname)))
        """,
    )
    assert len(tables) > 15
    found = {}
    for schema, table in tables:
        count = await one(
            superuser,
            sql.SQL("SELECT count(*) FROM {} t WHERE t::text ILIKE '%%' || %s || '%%'").format(
                sql.Identifier(schema, table)
            ),
            tenant,
        )
        if count:
            found[table] = count
    return found


async def offboard(superuser: psycopg.AsyncConnection[Any], tenant: str) -> None:
    """What the application does with a tenant that leaves."""
    await superuser.execute("DELETE FROM shop.orders WHERE tenant_id = %s", (tenant,))
    await superuser.execute("DELETE FROM shop.notes WHERE lower(tenant_id) = %s", (tenant,))
    await superuser.execute("DELETE FROM shop.tenants WHERE id = %s", (tenant,))


async def letter(
    superuser: psycopg.AsyncConnection[Any], tenant: str | None, message: str, view_id: int | None
) -> None:
    await superuser.execute(
        "INSERT INTO listener.dead_letter (view_id, view_name, tenant, error_type, exception_class, error_message,"
        " traceback, correlation_id, arguments) VALUES (%s, 'sales', %s, 'definition_error', 'E', %s, %s, 'c',"
        " jsonb_build_object('tenant_id', %s::text))",
        (view_id, tenant, message, message, tenant),
    )


async def test_nothing_is_left_of_a_tenant_and_all_of_the_others(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    sales = await one(superuser, "SELECT id FROM listener.managed_view WHERE name = 'sales'")
    await letter(superuser, GONE, "of its own", sales)
    await letter(superuser, LATE, "a call that was refused", None)
    await letter(superuser, ANNA, f"duplicate key (tenant)=({LATE})", sales)
    await superuser.execute(
        "UPDATE listener.refresh_state SET last_error = %s WHERE tenant = %s", (f"saw {GONE}", ANNA)
    )
    await superuser.execute("INSERT INTO listener.moved_tenant SELECT '1', min(id), %s FROM listener.source", (LATE,))
    before = await mentions(superuser, GONE)
    assert before.keys() >= {"dirty_key", "refresh_state", "dead_letter", "moved_tenant", "change_log", *VIEWS}
    of_anna = await mentions(superuser, ANNA)
    await offboard(superuser, GONE)

    done = listener("forget", "--tenant", "{" + LATE + "}", "--json", url=shop.url("listener_migrator"))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["forgotten"]
    assert {row["view_name"]: row["rows_deleted"] for row in told} == dict.fromkeys(VIEWS, 1) | {None: 0}
    assert await mentions(superuser, GONE) == {}
    assert await mentions(superuser, ANNA) == of_anna
    assert await rows(superuser, "SELECT error_message FROM listener.dead_letter") == [
        ("duplicate key (tenant)=((forgotten))",)
    ]
    assert await rows(superuser, "SELECT last_error FROM listener.refresh_state WHERE last_error <> ''") != []
    await settle(service)
    assert await mentions(superuser, GONE) == {}
    for view in VIEWS:
        assert await differences(superuser, view) == []
    again = listener("forget", "--tenant", GONE, url=shop.url("listener_migrator"))
    assert (again.returncode, again.stdout.splitlines()[0]) == (0, "sales: 0 rows, 0 records")


async def test_a_tenant_that_is_still_there_is_not_forgotten(
    shop: Database, superuser: psycopg.AsyncConnection[Any]
) -> None:
    before = await mentions(superuser, GONE)
    url = shop.url("listener_migrator")
    for statement, line in (
        (
            "SELECT 1",
            "is still there: sales has it by its tenants query. It would come back with the next refresh: delete it",
        ),
        ("DELETE FROM shop.tenants WHERE id = %s", "is still there: sales has it by what it reads. It would come back"),
        ("DELETE FROM shop.orders WHERE tenant_id = %s", "is still there: noted has it by its tenants query."),
    ):
        await superuser.execute(statement, (GONE,) if "%s" in statement else None)
        done = listener("forget", "--tenant", GONE, url=url)
        assert done.returncode == 1
        assert done.stderr.startswith(f"listener: tenant {GONE} {line}")
        assert done.stderr.count("\n") == 1
        after = await mentions(superuser, GONE)
        assert after | {"change_log": 0} == before | {"change_log": 0}, "all or nothing"


async def test_a_key_that_a_replica_still_holds_leaves_no_record(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await offboard(superuser, GONE)
    await service.execute("SELECT listener.drain()")
    held = await rows(service, "SELECT view_id, view_name, tenant, version FROM listener.pending_keys(false)")
    assert held
    await superuser.execute("SELECT * FROM listener.forget(%s)", (GONE,))
    for key in held:
        await service.execute("SELECT listener.refresh_dirty(%s, %s::text, %s::text, %s)", key)
    # As it does for one that is older than its view's max_age; and as somebody may by hand.
    await service.execute("SELECT listener.refresh('sales', %s::text)", (GONE,))
    assert await mentions(superuser, GONE) == {}


async def test_it_waits_for_a_refresh_an_expansion_and_a_drain(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await offboard(superuser, GONE)
    blocked = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"

    async def waits() -> bool:
        return bool(await one(superuser, blocked))

    for call in (
        "SELECT listener.drain()",
        f"SELECT listener.refresh('sales', '{GONE}'::text)",
        "SELECT listener.expand('totals')",
    ):
        async with shop.connect("listener_service", autocommit=False) as other:
            await other.execute(call.encode())
            async with anyio.create_task_group() as forgetting:
                forgetting.start_soon(_forget, shop)
                await eventually(waits)
                await other.commit()
        assert await mentions(superuser, GONE) == {}, call


async def _forget(shop: Database) -> None:
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT * FROM listener.forget(%s)", (GONE,))


async def test_tenants_that_come_and_go_under_a_running_service_leave_nothing(
    shop: Database, superuser: psycopg.AsyncConnection[Any]
) -> None:
    seed = secrets.randbelow(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    async with shop.service() as running:
        for _ in range(25):
            await superuser.execute("INSERT INTO shop.tenants VALUES (%s) ON CONFLICT DO NOTHING", (GONE,))
            await order(superuser, GONE, "tea")
            await order(superuser, ANNA, "tea")
            if draw.random() < 0.3:
                await superuser.execute("SELECT listener.mark_all_dirty(id) FROM listener.managed_view")
            await anyio.sleep(draw.random() * 0.1)
            await offboard(superuser, GONE)
            await anyio.sleep(draw.choice([0, 0, draw.random() * 0.1]))
            await _forget(shop)

        async def idle() -> bool:
            return (
                not len(running.service.debouncer)
                and not running.service.debouncer.running
                and await one(superuser, "SELECT NOT EXISTS (SELECT FROM listener.unconsumed())")
            )

        await eventually(idle)
        assert await mentions(superuser, GONE) == {}, f"seed {seed}"
        for view in VIEWS:
            assert await differences(superuser, view) == []


async def test_one_view_forgets_and_those_over_it_follow(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await offboard(superuser, GONE)
    done = listener("forget", "--tenant", GONE, "--view", "sales", url=shop.url("listener_migrator"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sales: 1 row, ")
    assert await one(superuser, "SELECT count(*) FROM sales WHERE tenant_id = %s", GONE) == 0
    assert await one(superuser, "SELECT count(*) FROM named WHERE tenant_id = %s", GONE) == 1
    await settle(service)
    for view in VIEWS:
        assert await differences(superuser, view) == []


async def test_what_cannot_be_forgotten_is_one_line(shop: Database, superuser: psycopg.AsyncConnection[Any]) -> None:
    await superuser.execute("SET ROLE listener_owner")
    await superuser.execute("SELECT listener.drop_view('named')")
    await superuser.execute("RESET ROLE")
    await create_view(
        shop, "everybody", "SELECT count(*) AS n FROM shop.tenants", ["n"], tenant_column=None, tenants_query=None
    )
    url = shop.url("listener_migrator")
    for arguments, line in (
        (["--tenant", ""], "'' can be no tenant of any view"),
        (["--tenant", "acme"], "'acme' can be no tenant of any view"),
        (["--tenant", GONE, "--view", "slaes"], "there is no managed view 'slaes'."),
        (["--tenant", GONE, "--view", "everybody"], "everybody has no tenants."),
    ):
        done = listener("forget", *arguments, url=url)
        assert done.returncode == 1
        assert done.stderr.startswith(f"listener: {line}")
        assert done.stderr.count("\n") == 1
    denied = listener("forget", "--tenant", GONE, url=shop.url())
    assert denied.returncode == 1
    assert "listener_owner" in denied.stderr
