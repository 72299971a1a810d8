"""Capture: what a statement of the application leaves in the log, and whom it wakes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import AsyncConnection, sql

from conftest import Database
from shop import ANNA, BERT, CLEO, SALES, application, create_view, define, heard, one, open_shop, order, rows, settle

pytestmark = pytest.mark.anyio


@pytest.fixture
async def shop(database: Database) -> Database:
    await open_shop(database)
    await create_view(database, "sales", SALES, ["product"])
    return database


@pytest.fixture
async def superuser(shop: Database) -> AsyncIterator[AsyncConnection[Any]]:
    async with shop.connect() as connection:
        await connection.execute(
            "INSERT INTO shop.orders (tenant_id, product) VALUES (%s, 'a'), (%s, 'a')", (ANNA, BERT)
        )
        await take_log(connection)
        yield connection


async def take_log(superuser: AsyncConnection[Any]) -> list[str]:
    """The tenants in the log, with what they stand for; the log is empty afterwards."""
    logged = await rows(superuser, "DELETE FROM listener.change_log WHERE source_id IS NOT NULL RETURNING tenant")
    return sorted(row[0] for row in logged)


async def add_source(superuser: AsyncConnection[Any], table: str, tenant_column: str | None = "tenant_id") -> None:
    await superuser.execute("SELECT listener.add_source(%s, %s)", (table, tenant_column))


@pytest.mark.parametrize(
    ("statement", "tenants"),
    [
        ("INSERT INTO shop.orders (tenant_id) VALUES ({anna}), ({bert}), ({anna})", [ANNA, BERT]),
        ("UPDATE shop.orders SET quantity = 7", [ANNA, BERT]),
        ("DELETE FROM shop.orders", [ANNA, BERT]),
        ("TRUNCATE shop.orders", [""]),
        ("UPDATE shop.orders SET tenant_id = {cleo} WHERE tenant_id = {anna}", [ANNA, CLEO]),
        ("INSERT INTO shop.orders (tenant_id) SELECT {cleo}::uuid FROM generate_series(1, 1000)", [CLEO]),
        (
            """MERGE INTO shop.orders o USING (VALUES ({anna}::uuid), ({cleo}::uuid)) v (t) ON o.tenant_id = v.t
                WHEN MATCHED THEN UPDATE SET quantity = 2
                WHEN NOT MATCHED THEN INSERT (tenant_id) VALUES (v.t)""",
            [ANNA, CLEO],
        ),
        ("WITH gone AS (DELETE FROM shop.orders WHERE tenant_id = {bert}) SELECT 1", [BERT]),
    ],
    ids=["insert", "update", "delete", "truncate", "a move", "many rows", "merge", "inside a CTE"],
)
async def test_a_statement_logs_each_tenant_that_it_touched_once(
    superuser: AsyncConnection[Any], statement: LiteralString, tenants: list[str]
) -> None:
    names = {"anna": sql.Literal(ANNA), "bert": sql.Literal(BERT), "cleo": sql.Literal(CLEO)}
    await superuser.execute(sql.SQL(statement).format(**names))
    assert await take_log(superuser) == tenants


async def test_an_upsert_logs_what_it_inserted_and_what_it_updated(superuser: AsyncConnection[Any]) -> None:
    await superuser.execute(
        """INSERT INTO shop.orders (id, tenant_id) OVERRIDING SYSTEM VALUE VALUES (1, %s), (1000, %s)
           ON CONFLICT (id) DO UPDATE SET quantity = 2""",
        (ANNA, CLEO),
    )
    assert await take_log(superuser) == [ANNA, CLEO]


async def test_copy_logs_each_tenant_once(superuser: AsyncConnection[Any]) -> None:
    async with superuser.cursor() as cursor, cursor.copy("COPY shop.orders (tenant_id, product) FROM STDIN") as copy:
        for tenant in [ANNA, BERT] * 50:
            await copy.write_row((tenant, "copied"))
    assert await take_log(superuser) == [ANNA, BERT]


async def test_a_statement_that_touched_no_row_logs_and_notifies_nothing(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    async with shop.connect() as listening:
        await listening.execute("LISTEN listener_changes")
        await superuser.execute("UPDATE shop.orders SET quantity = 2 WHERE false")
        await superuser.execute("DELETE FROM shop.orders WHERE false")
        await superuser.execute("INSERT INTO shop.orders (tenant_id) SELECT %s WHERE false", (ANNA,))
        assert await heard(listening, superuser) == []
    assert await take_log(superuser) == []


async def test_a_notification_names_the_tenant_and_the_source(shop: Database, superuser: AsyncConnection[Any]) -> None:
    async with shop.connect() as listening:
        await listening.execute("LISTEN listener_changes")
        async with application(shop, ANNA) as app:
            await order(app, ANNA, "a")
        assert await heard(listening, superuser) == [{"tenant_id": ANNA, "source": "shop.orders"}]
        await superuser.execute("TRUNCATE shop.orders")
        assert await heard(listening, superuser) == [{"tenant_id": None, "source": "shop.orders"}]


async def test_more_than_eight_tenants_are_one_notification(shop: Database, superuser: AsyncConnection[Any]) -> None:
    async with shop.connect() as listening:
        await listening.execute("LISTEN listener_changes")
        await superuser.execute(
            "INSERT INTO shop.orders (tenant_id) SELECT gen_random_uuid() FROM generate_series(1, 9)"
        )
        assert await heard(listening, superuser) == [{"tenant_id": None, "source": "shop.orders"}]
    assert len(await take_log(superuser)) == 9


async def test_the_setting_notify_silences_the_doorbell_and_not_the_log(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    async with shop.connect() as listening, application(shop, ANNA) as app:
        await listening.execute("LISTEN listener_changes")
        await app.execute("SET listener.notify = 'off'")
        await order(app, ANNA, "a")
        assert await heard(listening, superuser) == []
    assert await take_log(superuser) == [ANNA]


async def test_a_rollback_leaves_nothing(shop: Database, superuser: AsyncConnection[Any]) -> None:
    async with shop.connect() as listening, application(shop, ANNA, autocommit=False) as app:
        await listening.execute("LISTEN listener_changes")
        await order(app, ANNA, "a")
        await app.rollback()
        assert await heard(listening, superuser) == []
    assert await take_log(superuser) == []


async def test_a_rolled_back_savepoint_leaves_nothing_and_the_rest_stays(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    async with shop.connect(autocommit=False) as connection:
        await order(connection, BERT, "kept")
        async with connection.transaction(force_rollback=True):
            await order(connection, ANNA, "gone")
    assert await take_log(superuser) == [BERT]


async def test_a_replica_session_is_captured(superuser: AsyncConnection[Any]) -> None:
    await superuser.execute("SET session_replication_role = replica")
    await order(superuser, ANNA, "a")
    await superuser.execute("UPDATE shop.orders SET quantity = 9 WHERE tenant_id = %s", (BERT,))
    assert await take_log(superuser) == [ANNA, BERT]


async def test_a_row_without_a_tenant_means_all_tenants(superuser: AsyncConnection[Any]) -> None:
    await order(superuser, None, "nobody's")
    assert await take_log(superuser) == [""]
    await superuser.execute("UPDATE shop.orders SET tenant_id = %s WHERE tenant_id IS NULL", (CLEO,))
    assert await take_log(superuser) == ["", CLEO]


async def test_a_writer_needs_no_right_on_the_schema_and_waits_for_no_other(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    async with application(shop, ANNA, autocommit=False) as first, application(shop, ANNA, autocommit=False) as second:
        await second.execute("SET LOCAL lock_timeout = '1ms'")
        await order(first, ANNA, "a")
        await order(second, ANNA, "a")
        assert await one(first, "SELECT has_schema_privilege('listener', 'USAGE')") is False
        await second.commit()
        await first.commit()
    assert await take_log(superuser) == [ANNA, ANNA]


async def test_a_write_to_a_partitioned_root_or_to_a_leaf_is_logged_once(superuser: AsyncConnection[Any]) -> None:
    await define(
        superuser,
        """
        CREATE TABLE shop.visits (tenant_id uuid, day int) PARTITION BY RANGE (day);
        CREATE TABLE shop.visits_early PARTITION OF shop.visits FOR VALUES FROM (0) TO (10);
        CREATE TABLE shop.visits_late PARTITION OF shop.visits FOR VALUES FROM (10) TO (20) PARTITION BY LIST (day);
        CREATE TABLE shop.visits_12 PARTITION OF shop.visits_late FOR VALUES IN (12);
        """,
    )
    await add_source(superuser, "shop.visits")
    for table in ("visits", "visits_late", "visits_12"):
        await superuser.execute(
            sql.SQL("INSERT INTO {} VALUES (%s, 12)").format(sql.Identifier("shop", table)), (ANNA,)
        )
        assert await take_log(superuser) == [ANNA], table
    await superuser.execute("UPDATE shop.visits SET day = 3 WHERE day = 12")
    assert set(await take_log(superuser)) == {ANNA}
    await superuser.execute("DELETE FROM shop.visits_early")
    assert await take_log(superuser) == [ANNA]
    await superuser.execute("TRUNCATE shop.visits_12")
    assert await take_log(superuser) == [""]


@pytest.mark.parametrize(
    ("create", "reason"),
    [
        ("CREATE UNLOGGED TABLE {} (tenant_id uuid)", "unlogged"),
        ("CREATE TABLE {} (tenant_id uuid); CREATE TABLE shop.child () INHERITS ({})", "inheritance"),
        ("CREATE MATERIALIZED VIEW {} AS SELECT NULL::uuid AS tenant_id", "materialized view"),
        ("CREATE VIEW {} AS SELECT NULL::uuid AS tenant_id", "no table"),
        ("CREATE TABLE {} (id int)", "no column tenant_id"),
    ],
)
async def test_a_relation_whose_changes_fire_no_trigger_is_refused(
    superuser: AsyncConnection[Any], create: LiteralString, reason: str
) -> None:
    await define(superuser, sql.SQL(create).format(sql.Identifier("shop", "odd"), sql.Identifier("shop", "odd")))
    with pytest.raises(psycopg.Error, match=reason) as raised:
        await add_source(superuser, "shop.odd")
    assert raised.value.sqlstate == "LSN03"
    assert await one(superuser, "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'shop.odd'::regclass") == 0


async def test_a_temporary_table_is_refused(superuser: AsyncConnection[Any]) -> None:
    await superuser.execute("CREATE TEMPORARY TABLE odd (tenant_id uuid)")
    with pytest.raises(psycopg.Error, match="temporary"):
        await add_source(superuser, "odd")


@pytest.mark.parametrize(
    ("tenant_type", "tenant", "logged"),
    [
        ("uuid", ANNA.upper(), ANNA),
        ("text", 'Zoë\'s "shop"', 'Zoë\'s "shop"'),
        ("bigint", "9007199254740993", "9007199254740993"),
        ("integer", "-7", "-7"),
        ("varchar(40)", "x", "x"),
    ],
)
async def test_a_tenant_is_logged_as_its_type_writes_it(
    superuser: AsyncConnection[Any], tenant_type: LiteralString, tenant: str, logged: str
) -> None:
    await define(superuser, sql.SQL('CREATE TABLE shop.typed ("the Tenant" {})').format(sql.SQL(tenant_type)))
    await add_source(superuser, "shop.typed", "the Tenant")
    await superuser.execute("INSERT INTO shop.typed VALUES (%s)", (tenant,))
    assert await take_log(superuser) == [logged]


async def test_a_tenant_of_more_than_a_kilobyte_is_a_dead_letter_and_never_a_key(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    await define(
        superuser, "CREATE TABLE shop.notes (tenant_id text, note text); GRANT SELECT ON shop.notes TO listener_service"
    )
    await create_view(
        shop, "notes_of", "SELECT tenant_id, count(*) FROM shop.notes GROUP BY 1", [], tenants_query="SELECT 'good'"
    )
    async with shop.connect("listener_service") as service, shop.connect() as listening:
        await settle(service)
        await listening.execute("LISTEN listener_changes")
        await superuser.execute("INSERT INTO shop.notes VALUES (repeat('ä', 600)), ('good')")
        assert {n["tenant_id"] for n in await heard(listening, superuser)} == {None, "good"}
        await settle(service)
    assert await one(superuser, "SELECT count(*) FROM listener.dirty_key WHERE length(tenant) > 100") == 0
    assert await one(superuser, "SELECT count(*) FROM public.notes_of WHERE tenant_id = 'good'") == 1
    letters = await rows(superuser, "SELECT error_type, error_message FROM listener.dead_letter WHERE status = 'open'")
    assert letters == [("validation_error", "a tenant of 1200 bytes is longer than 1024")]


async def test_the_correlation_id_of_the_application_arrives_at_the_key(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    async with application(shop, ANNA, autocommit=False) as app, shop.connect("listener_service") as service:
        await app.execute("SET LOCAL app.correlation_id = 'request 42'")
        await order(app, ANNA, "a")
        await app.commit()
        await order(app, ANNA, "without an id")
        await app.commit()
        drained = await rows(service, "SELECT app_correlation_id FROM listener.drain() WHERE tenant = %s", ANNA)
    assert drained == [("request 42",)]
    logged = await rows(superuser, "SELECT app_correlation_id FROM listener.change_log WHERE tenant = %s", ANNA)
    assert sorted(logged, key=str) == [("",), ("request 42",)]
