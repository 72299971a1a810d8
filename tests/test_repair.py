"""What no trigger can see, a disabled trigger, a table renamed or made anew, is noticed by one repair_capture()."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, LiteralString

import anyio
import psycopg
import pytest
from psycopg import AsyncConnection, sql

from books import value
from captured import after_rename, at_home, emptied, logged, reaches, repaired, statement, triggers_on
from conftest import Database, eventually
from listener import view_queries
from shop import ANNA, BERT, SALES, application, create_view, define, differences, one, open_shop, order, rows, settle
from web_client import is_ready

pytestmark = pytest.mark.anyio

# `stock` is read by a function alone, so that nothing but capture depends on its columns.
STOCK: LiteralString = """
    CREATE TABLE shop.stock (shelf int, tenant_id uuid, pieces int);
    CREATE FUNCTION shop.pieces_of(uuid) RETURNS bigint LANGUAGE plpgsql STABLE AS
        $$ BEGIN RETURN (SELECT sum(s.pieces) FROM shop.stock s WHERE s.tenant_id = $1); END $$;
    GRANT ALL ON shop.stock TO shop_app;
    GRANT SELECT ON shop.stock TO listener_service;
    INSERT INTO shop.stock SELECT 1, id, 10 FROM shop.tenants;
"""
PAID = "SELECT tenant_id, product, sum(cents)::bigint AS cents FROM shop.payments GROUP BY 1, 2"
INVENTORY = "SELECT t.id AS tenant_id, shop.pieces_of(t.id) AS pieces FROM shop.tenants t"
WRITES = [
    "INSERT INTO shop.orders ({tenant}, product) VALUES ({{anna}}, 'new')",
    "UPDATE shop.orders SET quantity = quantity + 1 WHERE {tenant} = {{anna}}",
    "DELETE FROM shop.orders WHERE {tenant} = {{anna}}",
]


@pytest.fixture
async def shop(database: Database) -> Database:
    await open_shop(database)
    async with database.connect() as superuser:
        await superuser.execute("GRANT SELECT ON shop.tenants TO shop_owner WITH GRANT OPTION")
        await define(superuser, STOCK)
        await superuser.execute(
            statement("INSERT INTO shop.orders (tenant_id, product) VALUES ({anna}, 'a'), ({bert}, 'a')")
        )
    await create_view(database, "sales", SALES, ["product"])
    await create_view(database, "paid", PAID, ["product"])
    await create_view(database, "inventory", INVENTORY, [], depends_on="{shop.stock}")
    async with database.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.add_source('shop.stock', 'tenant_id')")
    await at_home(database)
    return database


@pytest.fixture
async def app(shop: Database) -> AsyncIterator[AsyncConnection[Any]]:
    async with application(shop, ANNA) as connection:
        yield connection


async def mended_and_exact(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], source: str = "orders", view: str = "sales"
) -> None:
    """One call repairs and marks all tenants, a second finds nothing to do, and the target becomes exact."""
    await superuser.execute("DELETE FROM listener.change_log")
    assert await repaired(service) == [(f"shop.{source}", "repaired")]
    assert await logged(superuser) == {f"{source} of all"}
    assert await repaired(service) == []
    await settle(service)
    assert await differences(superuser, view) == []


async def captured_again(superuser: AsyncConnection[Any], service: AsyncConnection[Any], shop: Database) -> None:
    async with reaches(superuser, service, "sales", {"orders of bert"}), application(shop, BERT) as app:
        await order(app, BERT, "again")
        await app.execute("UPDATE shop.orders SET quantity = quantity + 1")


async def trigger_of(superuser: AsyncConnection[Any], event: str) -> sql.Identifier:
    """The name of the trigger that captures this on shop.orders."""
    name = await one(
        superuser,
        "SELECT tgname FROM pg_trigger WHERE tgrelid = 'shop.orders'::regclass AND tgname LIKE 'listener%%' || %s",
        event,
    )
    return sql.Identifier(name)


@pytest.mark.parametrize("event", ["insert", "update", "delete", "truncate"])
async def test_a_disabled_trigger_is_enabled_again(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], event: str
) -> None:
    await emptied(superuser, service)
    disable = sql.SQL("ALTER TABLE shop.orders DISABLE TRIGGER {}")
    await define(superuser, disable.format(await trigger_of(superuser, event)))
    await mended_and_exact(superuser, service)
    await captured_again(superuser, service, shop)


async def test_what_was_written_while_triggers_were_disabled_is_shown_even_if_they_were_enabled_since(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    await emptied(superuser, service)
    insert = await trigger_of(superuser, "insert")
    await define(superuser, sql.SQL("ALTER TABLE shop.orders DISABLE TRIGGER {}").format(insert))
    await order(app, ANNA, "unseen")
    await define(superuser, sql.SQL("ALTER TABLE shop.orders ENABLE ALWAYS TRIGGER {}").format(insert))
    await settle(service)
    assert len(await differences(superuser, "sales")) == 1
    await mended_and_exact(superuser, service)
    await captured_again(superuser, service, shop)


@pytest.mark.parametrize("event", ["insert", "truncate"])
async def test_a_dropped_trigger_is_made_anew(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], event: str
) -> None:
    await emptied(superuser, service)
    await define(superuser, sql.SQL("DROP TRIGGER {} ON shop.orders").format(await trigger_of(superuser, event)))
    await superuser.execute("TRUNCATE shop.orders")
    await mended_and_exact(superuser, service)
    assert await triggers_on(superuser, "shop.orders") == 4
    await captured_again(superuser, service, shop)


async def test_triggers_that_were_all_disabled_and_enabled_as_a_restore_does_become_always_again(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await emptied(superuser, service)
    await superuser.execute("ALTER TABLE shop.orders DISABLE TRIGGER ALL")
    await superuser.execute("INSERT INTO shop.orders (tenant_id, product) VALUES (%s, 'restored')", (ANNA,))
    await superuser.execute("ALTER TABLE shop.orders ENABLE TRIGGER ALL")
    await mended_and_exact(superuser, service)
    kinds = "SELECT DISTINCT tgenabled FROM pg_trigger WHERE tgrelid = 'shop.orders'::regclass AND NOT tgisinternal"
    assert await rows(superuser, kinds) == [("A",)]
    async with reaches(superuser, service, "sales", {"orders of bert"}), shop.connect() as applying:
        await applying.execute("SET session_replication_role = replica")
        await order(applying, BERT, "replicated")


@pytest.mark.parametrize(
    ("rename", "table", "now"),
    [
        ("ALTER TABLE shop.orders RENAME TO {table}", "shop.bestellungen", "shop.bestellungen"),
        ("ALTER TABLE shop.orders RENAME TO {table}", 'shop."Orders, all"', 'shop."Orders, all"'),
        ("ALTER SCHEMA shop RENAME TO store", "store.orders", "store.orders"),
        (
            """CREATE SCHEMA annex; GRANT USAGE ON SCHEMA annex TO shop_app, listener_service, shop_owner;
               ALTER TABLE shop.orders SET SCHEMA annex""",
            "annex.orders",
            "annex.orders",
        ),
    ],
    ids=["a table", "a table to an odd name", "a schema", "to another schema"],
)
async def test_after_a_renaming_writes_go_on_at_once_and_the_name_is_followed(
    shop: Database,
    superuser: AsyncConnection[Any],
    service: AsyncConnection[Any],
    app: AsyncConnection[Any],
    rename: LiteralString,
    table: LiteralString,
    now: str,
) -> None:
    await order(app, ANNA, "before")
    await emptied(superuser, service)
    short = table.split(".", 1)[1]
    name = sql.SQL(table)
    await superuser.execute(sql.SQL(rename).format(table=sql.SQL(short)))
    async with application(shop, ANNA) as new_session:
        for session in (app, new_session):
            await session.execute(
                sql.SQL("INSERT INTO {} (tenant_id, product) VALUES (%s, 'after')").format(name), (ANNA,)
            )
            await session.execute(sql.SQL("UPDATE {} SET quantity = quantity + 1").format(name))
    assert {line.split(" of ")[1] for line in await logged(superuser)} == {"anna"}
    await settle(service)
    assert await differences(superuser, "sales") == []
    await superuser.execute("DELETE FROM listener.change_log")
    found = await rows(service, "SELECT outcome, detail FROM listener.repair_capture() ORDER BY 2")
    assert ("renamed", f"{now}, tenant column tenant_id") in found
    assert {outcome for outcome, _ in found} == {"renamed"}
    assert await logged(superuser) == set()
    assert await repaired(service) == []
    async with reaches(superuser, service, "sales", {f"{short.strip(chr(34))} of anna"}):
        await app.execute(sql.SQL("DELETE FROM {}").format(name))


@pytest.mark.parametrize("write", WRITES, ids=["insert", "update", "delete"])
@pytest.mark.parametrize("same_session", [True, False], ids=["the same session", "a new session"])
async def test_the_first_write_after_the_tenant_column_was_renamed_succeeds_and_names_its_tenant(
    shop: Database,
    superuser: AsyncConnection[Any],
    service: AsyncConnection[Any],
    app: AsyncConnection[Any],
    write: LiteralString,
    *,
    same_session: bool,
) -> None:
    for warming in (*WRITES, WRITES[0]):
        await app.execute(statement(warming.replace("{tenant}", "tenant_id").replace("{{", "{").replace("}}", "}")))
    await emptied(superuser, service)
    await define(superuser, "ALTER TABLE shop.orders RENAME COLUMN tenant_id TO customer")
    now = statement(write.replace("{tenant}", "customer").replace("{{", "{").replace("}}", "}"))
    async with reaches(superuser, service, "sales", after_rename(superuser, "orders", "anna")):
        if same_session:
            await app.execute(now)
        else:
            async with application(shop, ANNA) as new_session:
                await new_session.execute(now)
    assert await rows(service, "SELECT outcome, detail FROM listener.repair_capture()") == [
        ("renamed", "shop.orders, tenant column customer")
    ]
    assert await repaired(service) == []
    async with reaches(superuser, service, "sales", {"orders of anna"}):
        await app.execute("INSERT INTO shop.orders (customer, product) VALUES (%s, 'z')", (ANNA,))


async def test_another_column_that_takes_the_tenant_columns_old_name_is_not_taken_for_it(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    await emptied(superuser, service)
    await define(
        superuser,
        statement(
            """ALTER TABLE shop.orders RENAME COLUMN tenant_id TO customer;
               ALTER TABLE shop.orders ADD COLUMN tenant_id uuid DEFAULT {bert}"""
        ),
    )
    async with reaches(superuser, service, "sales", after_rename(superuser, "orders", "anna")):
        await app.execute("INSERT INTO shop.orders (customer, product) VALUES (%s, 'z')", (ANNA,))
    assert await rows(service, "SELECT outcome, detail FROM listener.repair_capture()") == [
        ("renamed", "shop.orders, tenant column customer")
    ]
    async with reaches(superuser, service, "sales", {"orders of anna"}):
        await app.execute("INSERT INTO shop.orders (customer, product) VALUES (%s, 'z')", (ANNA,))


async def test_the_tenant_column_is_not_dropped_without_cascade(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    with pytest.raises(psycopg.errors.DependentObjectsStillExist, match=r"listener\.tenant_of_"):
        await superuser.execute("ALTER TABLE shop.stock DROP COLUMN tenant_id")
    async with reaches(superuser, service, "inventory", {"stock of anna"}):
        await app.execute("UPDATE shop.stock SET pieces = 1 WHERE tenant_id = %s", (ANNA,))


async def test_after_the_tenant_column_was_dropped_with_cascade_a_write_is_everybodys_and_readiness_says_so(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    await app.execute("UPDATE shop.stock SET pieces = 11")
    await emptied(superuser, service)
    await superuser.execute("SET client_min_messages = error")
    await superuser.execute("ALTER TABLE shop.stock DROP COLUMN tenant_id CASCADE")
    async with application(shop, BERT) as new_session:
        for session in (app, new_session):
            await superuser.execute("DELETE FROM listener.change_log")
            await session.execute("INSERT INTO shop.stock (shelf, pieces) VALUES (2, 5)")
            assert await logged(superuser) == {"stock of all"}
            for write in ("UPDATE shop.stock SET pieces = 6 WHERE shelf = 2", "DELETE FROM shop.stock WHERE shelf = 2"):
                await superuser.execute("DELETE FROM listener.change_log")
                await session.execute(write.encode())
                assert await logged(superuser) == {"stock of all"}
    gone = (
        "the tenant column tenant_id of shop.stock is gone: a write to it marks every tenant, until listener.add_source"
    )
    assert any(reason.startswith(gone) for reason in await rows_of_readiness(service))
    assert await repaired(service) == []
    # A view that can do without the column is shown as everybody's changes.
    await define(
        superuser,
        """CREATE OR REPLACE FUNCTION shop.pieces_of(uuid) RETURNS bigint LANGUAGE plpgsql STABLE AS
             $$ BEGIN RETURN (SELECT sum(s.pieces) FROM shop.stock s); END $$""",
    )
    async with reaches(superuser, service, "inventory", {"stock of all"}):
        await app.execute("INSERT INTO shop.stock (shelf, pieces) VALUES (2, 5)")
    async with reaches(superuser, service, "sales", {"orders of anna"}):
        await order(app, ANNA, "the others go on")


async def rows_of_readiness(service: AsyncConnection[Any]) -> list[str]:
    return [reason for (reason,) in await rows(service, "SELECT * FROM listener.readiness()")]


async def test_a_tenant_column_that_came_back_is_captured_after_a_repair(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    await emptied(superuser, service)
    await superuser.execute("SET client_min_messages = error")
    await superuser.execute("ALTER TABLE shop.stock DROP COLUMN tenant_id CASCADE")
    await repaired(service)
    await define(superuser, statement("ALTER TABLE shop.stock ADD COLUMN tenant_id uuid DEFAULT {bert}"))
    await mended_and_exact(superuser, service, "stock", "inventory")
    assert await rows_of_readiness(service) == []
    async with reaches(superuser, service, "inventory", {"stock of anna"}):
        await app.execute("INSERT INTO shop.stock VALUES (9, 9, %s)", (ANNA,))


async def test_a_column_before_the_tenant_column_is_dropped_and_nothing_changes(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    for warming in (1, 2):
        await app.execute("UPDATE shop.stock SET pieces = %s WHERE tenant_id = %s", (warming, ANNA))
    await emptied(superuser, service)
    await define(superuser, "ALTER TABLE shop.stock DROP COLUMN shelf, ADD COLUMN note text DEFAULT 'none'")
    async with application(shop, BERT) as new_session:
        for pieces, session in ((6, app), (7, new_session)):
            async with reaches(superuser, service, "inventory", {"stock of anna"}):
                await session.execute("UPDATE shop.stock SET pieces = %s WHERE tenant_id = %s", (pieces, ANNA))
            async with reaches(superuser, service, "inventory", {"stock of bert"}):
                await session.execute("INSERT INTO shop.stock (tenant_id, pieces) VALUES (%s, 1)", (BERT,))
            async with reaches(superuser, service, "inventory", {"stock of bert"}):
                await session.execute("DELETE FROM shop.stock WHERE tenant_id = %s AND pieces = 1", (BERT,))
    assert await repaired(service) == []


@pytest.mark.parametrize("tenant_type", ["uuid", "text"])
async def test_a_table_dropped_with_cascade_and_made_anew_is_captured_after_a_repair(
    superuser: AsyncConnection[Any],
    service: AsyncConnection[Any],
    app: AsyncConnection[Any],
    tenant_type: LiteralString,
) -> None:
    await app.execute("UPDATE shop.stock SET pieces = 11")
    await emptied(superuser, service)
    await superuser.execute("SET client_min_messages = error")
    await superuser.execute("DROP TABLE shop.stock CASCADE")
    gone = "the source shop.stock is gone, which inventory reads: make it again, or listener.drop_view"
    assert await rows_of_readiness(service) == [gone]
    assert await repaired(service) == []
    await define(
        superuser,
        sql.SQL(
            """CREATE TABLE shop.stock (pieces int, note text, tenant_id {});
               GRANT ALL ON shop.stock TO shop_app; GRANT SELECT ON shop.stock TO listener_service;
               CREATE OR REPLACE FUNCTION shop.pieces_of(uuid) RETURNS bigint LANGUAGE plpgsql STABLE AS
                 $$ BEGIN RETURN (SELECT sum(s.pieces) FROM shop.stock s WHERE s.tenant_id::uuid = $1); END $$"""
        ).format(sql.SQL(tenant_type)),
    )
    await app.execute("INSERT INTO shop.stock VALUES (1, 'unseen', %s)", (ANNA,))
    await mended_and_exact(superuser, service, "stock", "inventory")
    assert await rows_of_readiness(service) == []
    async with reaches(superuser, service, "inventory", {"stock of bert"}):
        await app.execute("INSERT INTO shop.stock VALUES (2, 'seen', %s)", (BERT,))


async def test_a_table_replaced_by_another_of_its_name_is_captured_after_a_repair(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    await emptied(superuser, service)
    await define(
        superuser,
        statement(
            """CREATE TABLE shop.stock_new (LIKE shop.stock);
               INSERT INTO shop.stock_new VALUES (1, {anna}, 77);
               GRANT ALL ON shop.stock_new TO shop_app; GRANT SELECT ON shop.stock_new TO listener_service"""
        ),
    )
    await superuser.execute("SET client_min_messages = error")
    await superuser.execute("DROP TABLE shop.stock CASCADE; ALTER TABLE shop.stock_new RENAME TO stock")
    await mended_and_exact(superuser, service, "stock", "inventory")
    async with reaches(superuser, service, "inventory", {"stock of bert"}):
        await app.execute("INSERT INTO shop.stock VALUES (2, %s, 5)", (BERT,))


async def test_two_tables_that_exchanged_their_names_are_followed(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    await emptied(superuser, service)
    await define(
        superuser,
        """ALTER TABLE shop.orders RENAME TO parked;
           ALTER TABLE shop.payments RENAME TO orders;
           ALTER TABLE shop.parked RENAME TO payments""",
    )
    assert await repaired(service) == [("shop.orders", "renamed"), ("shop.payments", "renamed")]
    assert await repaired(service) == []
    async with reaches(superuser, service, "sales", {"payments of anna"}):
        await app.execute("INSERT INTO shop.payments (tenant_id, product) VALUES (%s, 'a')", (ANNA,))
    async with reaches(superuser, service, "paid", {"orders of anna"}):
        await app.execute("INSERT INTO shop.orders (tenant_id, product, cents) VALUES (%s, 'a', 5)", (ANNA,))


async def test_a_table_that_took_the_name_that_a_function_reads_is_captured_after_a_sweep(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    await emptied(superuser, service)
    await define(
        superuser,
        """CREATE TABLE shop.stock_new (LIKE shop.stock);
           GRANT ALL ON shop.stock_new TO shop_app; GRANT SELECT ON shop.stock_new TO listener_service;
           ALTER TABLE shop.stock RENAME TO stock_old; ALTER TABLE shop.stock_new RENAME TO stock""",
    )
    assert await repaired(service) == [("shop.stock", "renamed")]
    changed = "SELECT * FROM listener.changed_definitions()"
    assert await rows(service, changed) == [("inventory", None)]
    assert await repaired(service) == await rows(service, changed) == []
    await settle(service)
    assert await differences(superuser, "inventory") == []
    async with reaches(superuser, service, "inventory", {"stock of all"}):
        await app.execute("INSERT INTO shop.stock VALUES (1, %s, 5)", (ANNA,))


async def test_a_changed_function_that_reads_a_table_of_the_schema_public_is_noticed(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await superuser.execute(
        """CREATE TABLE public.rates (rate int); INSERT INTO public.rates VALUES (7);
           ALTER TABLE public.rates OWNER TO shop_owner;
           GRANT SELECT ON public.rates TO listener_service;
           CREATE FUNCTION public.rate_now() RETURNS int LANGUAGE sql STABLE AS 'SELECT rate FROM public.rates'"""
    )
    rates = "SELECT t.id AS tenant_id, public.rate_now() AS rate FROM shop.tenants t"
    await create_view(shop, "rated", rates, [], depends_on="{rates}")
    await emptied(superuser, service)
    await superuser.execute(
        """CREATE OR REPLACE FUNCTION public.rate_now() RETURNS int LANGUAGE sql STABLE
             AS 'SELECT rate + 1 FROM public.rates'"""
    )
    assert await rows(service, "SELECT * FROM listener.changed_definitions()") == [("rated", None)]
    await settle(service)
    assert await differences(superuser, "rated") == []


async def test_paused_capture_is_not_repaired(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    await emptied(superuser, service)
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.pause(capture => true)")
        assert await repaired(service) == []
        await order(app, ANNA, "unseen")
        assert await logged(superuser) == set()
        await migrator.execute("SELECT listener.resume()")
    assert await repaired(service) == []
    await settle(service)
    assert await differences(superuser, "sales") == []
    await captured_again(superuser, service, shop)


async def test_what_a_session_of_the_owner_disabled_in_an_open_transaction_is_waited_for_by_nobody(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await emptied(superuser, service)
    insert = await trigger_of(superuser, "insert")
    await define(superuser, sql.SQL("ALTER TABLE shop.orders DISABLE TRIGGER {}").format(insert))
    async with shop.connect(autocommit=False) as writer:
        await order(writer, ANNA, "unseen")
        # The lock of the open transaction keeps the trigger away: it is tried again, and said.
        (failed,) = await rows(service, "SELECT outcome, detail FROM listener.repair_capture()")
        assert failed[0] == "failed"
        assert "no lock" in failed[1]
    await mended_and_exact(superuser, service)


async def test_a_repair_of_two_sources_never_makes_a_writer_of_both_the_victim_of_a_deadlock(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await emptied(superuser, service)
    await superuser.execute(
        "ALTER TABLE shop.orders DISABLE TRIGGER ALL; ALTER TABLE shop.payments DISABLE TRIGGER ALL"
    )
    held = "SELECT count(*) FROM pg_locks WHERE relation = 'shop.orders'::regclass AND mode = 'ShareRowExclusiveLock'"
    found: list[Any] = []

    async def repair() -> None:
        found.extend(await repaired(service))

    async def orders_are_locked() -> bool:
        return bool(found) or await one(superuser, held) > 0

    async with application(shop, ANNA, autocommit=False) as writer, anyio.create_task_group() as tasks:
        await writer.execute("INSERT INTO shop.payments (tenant_id, product, cents) VALUES (%s, 'a', 5)", (ANNA,))
        tasks.start_soon(repair)
        await eventually(orders_are_locked)
        await order(writer, ANNA, "a")
        await writer.commit()
    assert found == [("shop.orders", "repaired"), ("shop.payments", "failed")]
    assert await repaired(service) == [("shop.payments", "repaired")]
    assert await repaired(service) == []
    await settle(service)
    assert await differences(superuser, "sales") == await differences(superuser, "paid") == []


async def all_shown(superuser: AsyncConnection[Any], view: str) -> bool:
    return await view_queries.all_fresh(superuser) and not await differences(superuser, view)


async def test_the_service_repairs_a_disabled_trigger_within_a_sweep_and_counts_it(
    shop: Database, superuser: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    async with shop.service(sweep_interval="300ms") as running:
        await eventually(lambda: all_shown(superuser, "sales"))
        assert value(running, "listener_capture_repaired_total") == 0
        insert = await trigger_of(superuser, "insert")
        async with shop.connect(autocommit=False) as owner:
            await owner.execute(sql.SQL("ALTER TABLE shop.orders DISABLE TRIGGER {}").format(insert))
            await order(owner, ANNA, "unseen")
        assert len(await differences(superuser, "sales")) == 1
        await eventually(lambda: all_shown(superuser, "sales"))
        await eventually(lambda: value(running, "listener_capture_repaired_total") == 1)
        assert await is_ready(running)
        seen = len(running.outcomes)
        await order(app, ANNA, "seen")
        await running.until_refreshed("sales", ANNA, after=seen)
        assert await differences(superuser, "sales") == []


async def test_a_source_that_cannot_be_repaired_is_named_and_the_others_go_on(
    shop: Database, superuser: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    async with shop.service(sweep_interval="300ms") as running:
        await eventually(lambda: all_shown(superuser, "sales"))
        insert = await trigger_of(superuser, "insert")
        await superuser.execute("REVOKE shop_owner FROM listener_owner")
        try:
            async with shop.connect(autocommit=False) as owner:
                await owner.execute(sql.SQL("ALTER TABLE shop.orders DISABLE TRIGGER {}").format(insert))
                await order(owner, ANNA, "unseen")

            async def is_named() -> bool:
                return any("capture of shop.orders" in r for r in await running.service.reasons_not_ready())

            await eventually(is_named)
            reasons = await running.service.reasons_not_ready()
            assert [r for r in reasons if "capture of shop.orders" not in r] == []
            assert not await is_ready(running)
            seen = len(running.outcomes)
            await app.execute("INSERT INTO shop.payments (tenant_id, product, cents) VALUES (%s, 'a', 5)", (ANNA,))
            await running.until_refreshed("paid", ANNA, after=seen)
            assert await differences(superuser, "paid") == []
            assert value(running, "listener_capture_repaired_total") == 0
            assert len(await differences(superuser, "sales")) == 1
        finally:
            await superuser.execute("GRANT shop_owner TO listener_owner")
        await eventually(lambda: all_shown(superuser, "sales"))
        await eventually(lambda: is_ready(running))
        assert value(running, "listener_capture_repaired_total") == 1
