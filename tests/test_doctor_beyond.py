"""Doctor, where a harm takes more than a statement: partitions, nested views, progress, time zones, the server."""

from __future__ import annotations

import re
from contextlib import AsyncExitStack, suppress

import pytest
from psycopg import AsyncConnection, sql
from psycopg.errors import AdminShutdown

from conftest import Database, eventually, install, server_of, start_embedded
from diagnosis import OF_THE_OWNER, mend, mended, wrong
from listener.doctor import Finding, clock, minor_release
from on_call import is_exact
from shop import ANNA, SALES, application, create_view, define, one, order, rows, settle

pytestmark = pytest.mark.anyio

VISITS = "SELECT tenant_id, date_trunc('day', seen_at) AS day, count(*) AS visits FROM shop.visits GROUP BY 1, 2"


@pytest.fixture
async def clean(shop: Database, superuser: AsyncConnection[object]) -> Database:
    """The shop and a view, nothing to complain of."""
    await superuser.execute("ALTER TABLE shop.orders ALTER COLUMN tenant_id SET NOT NULL")
    await create_view(shop, "sales", SALES, ["product"])
    return shop


def told(found: list[Finding]) -> list[tuple[str, str, str]]:
    return [(f.check, f.level, f.object) for f in found]


async def test_a_trigger_missing_on_one_leaf_of_a_partitioned_source_is_found(shop: Database) -> None:
    async with shop.connect() as superuser:
        await define(
            superuser,
            """
            CREATE TABLE shop.visits (tenant_id uuid NOT NULL, seen_at timestamptz NOT NULL)
                PARTITION BY RANGE (seen_at);
            CREATE TABLE shop.visits_old PARTITION OF shop.visits FOR VALUES FROM ('2020-01-01') TO ('2025-01-01');
            CREATE TABLE shop.visits_new PARTITION OF shop.visits DEFAULT;
            CREATE INDEX ON shop.visits (tenant_id);
            GRANT SELECT ON shop.visits TO listener_service
            """,
        )
        await create_view(shop, "visits", VISITS, ["day"])
        assert await wrong(shop) == []
        await superuser.execute("ALTER TABLE shop.visits_old DISABLE TRIGGER listener_1_truncate")
    assert told(await wrong(shop)) == [("capture", "error", "shop.visits_old")]
    assert await mended(shop) == []


async def test_the_table_that_a_look_up_goes_through_needs_its_triggers_too(shop: Database) -> None:
    async with shop.connect() as superuser:
        await define(
            superuser,
            """
            ALTER TABLE shop.orders ALTER COLUMN tenant_id SET NOT NULL;
            CREATE TABLE shop.lines (order_id bigint NOT NULL REFERENCES shop.orders ON DELETE CASCADE, pieces int);
            CREATE INDEX ON shop.lines (order_id);
            GRANT SELECT ON shop.lines TO listener_service
            """,
        )
        async with shop.connect(OF_THE_OWNER) as migrator:
            await migrator.execute("SELECT listener.add_source('shop.lines', through => 'shop.orders')")
        await create_view(
            shop,
            "pieces",
            "SELECT o.tenant_id, sum(l.pieces) AS n FROM shop.lines l JOIN shop.orders o ON o.id = l.order_id"
            " GROUP BY 1",
            [],
        )
        assert await wrong(shop) == []
        for table in ("orders", "lines"):
            await superuser.execute(
                sql.SQL("ALTER TABLE {} DISABLE TRIGGER USER").format(sql.Identifier("shop", table))
            )
    found = await wrong(shop)
    assert told(found) == [("capture", "error", "shop.lines"), ("capture", "error", "shop.orders")]
    assert await mended(shop) == []


async def test_a_nested_view_that_reads_one_more_table_is_found_before_the_sweep_does(
    clean: Database, superuser: AsyncConnection[object]
) -> None:
    await create_view(
        clean, "busy", "SELECT tenant_id, product, count(*) AS n FROM shop.busy_orders GROUP BY 1, 2", ["product"]
    )
    assert await wrong(clean) == []
    await define(
        superuser,
        """
        CREATE OR REPLACE VIEW shop.busy_orders WITH (security_invoker = true) AS
        SELECT * FROM shop.orders o WHERE EXISTS (
            SELECT FROM shop.payments p WHERE p.tenant_id = o.tenant_id AND p.product = o.product)
        """,
    )
    found = await wrong(clean)
    assert told(found) == [("capture", "error", "shop.payments")]
    assert "its changes do not reach that view" in found[0].problem
    assert await mended(clean) == []


async def test_a_nested_view_with_its_owners_rights_is_found_where_the_table_does_not_force_row_security(
    clean: Database, superuser: AsyncConnection[object]
) -> None:
    await define(
        superuser,
        """
        CREATE TABLE shop.visits (tenant_id uuid NOT NULL, seen_at timestamptz NOT NULL);
        CREATE INDEX ON shop.visits (tenant_id);
        ALTER TABLE shop.visits ENABLE ROW LEVEL SECURITY;
        CREATE POLICY tenant ON shop.visits USING (tenant_id = current_setting('app.current_tenant_id')::uuid);
        CREATE VIEW shop.recent_visits AS SELECT * FROM shop.visits;
        GRANT SELECT ON shop.visits, shop.recent_visits TO listener_service
        """,
    )
    await create_view(clean, "visits", VISITS.replace("shop.visits", "shop.recent_visits"), ["day"])
    found = await wrong(clean)
    assert told(found) == [("row security", "error", "shop.recent_visits"), ("row security", "warning", "shop.visits")]
    assert "reads shop.visits with the rights of shop_owner" in found[0].problem
    # Either mend ends the error: the first alone, here.
    await mend(clean, found[:1])
    assert told(await wrong(clean)) == [("row security", "warning", "shop.visits")]
    assert await mended(clean) == []


async def test_views_of_each_kind_over_a_strangers_tables_are_nothing_to_complain_of(stranger: Database) -> None:
    async with stranger.connect(OF_THE_OWNER) as migrator, stranger.connect() as superuser:
        # The owner computes a materialized view, with its own rights.
        await migrator.execute("SELECT listener.keep_materialized_view('reporting.currency_totals')")
        await create_view(
            stranger,
            "invoiced",
            "SELECT tenant_id, sum(amount) AS amount FROM billing.invoices GROUP BY 1",
            [],
            tenants_query="SELECT id FROM billing.tenants",
        )
        # What reads every tenant needs a policy that shows them all, and it is no mistake there.
        await superuser.execute(
            "CREATE POLICY listener_reads ON billing.payments FOR SELECT TO listener_service USING (true)"
        )
        await create_view(
            stranger,
            "paid",
            "SELECT customer_id, sum(amount) AS amount FROM billing.payments GROUP BY 1",
            ["customer_id"],
            tenant_column=None,
            tenants_query=None,
        )
    assert await wrong(stranger) == []
    assert await wrong(stranger, OF_THE_OWNER) == []


async def test_a_definition_that_reads_other_tenants_rows_is_told_with_how_to_write_it(
    clean: Database, superuser: AsyncConnection[object]
) -> None:
    ranked = "SELECT tenant_id, id, rank() OVER (ORDER BY quantity, id) AS place FROM shop.orders"
    await create_view(clean, "places", ranked, ["id"])
    found = await wrong(clean)
    assert told(found) == [("scope", "warning", "shop.orders")]
    assert "PARTITION BY orders.tenant_id" in found[0].problem
    assert await wrong(clean, OF_THE_OWNER) == found
    assert await one(superuser, "SELECT count(*) FROM pg_class WHERE relpersistence = 't'") == 0


async def test_a_key_that_nobody_refreshes_is_found_and_a_service_mends_it(
    clean: Database, superuser: AsyncConnection[object], service: AsyncConnection[object]
) -> None:
    await settle(service)
    async with application(clean, ANNA) as anna:
        await order(anna, ANNA, "tea")
    await superuser.execute("UPDATE listener.change_log SET changed_at = now() - interval '5 min'")
    found = await wrong(clean)
    assert told(found) == [("progress", "error", "listener.change_log")]
    assert re.search(r"logged up to 5 min ago, and nobody drained them: no service runs", found[0].problem)
    await service.execute("SELECT listener.drain()")
    await superuser.execute("UPDATE listener.dirty_key SET first_change_at = now() - interval '5 min'")
    found = await wrong(clean)
    assert told(found) == [("progress", "error", "sales")]
    assert (found[0].mend, ANNA in str(found)) == ("listener run", False)
    async with clean.service():
        await eventually(lambda: is_exact(clean, "sales"))
        assert await wrong(clean) == []


async def test_with_a_service_at_hand_the_mend_of_a_stale_key_is_a_sweep(
    clean: Database, superuser: AsyncConnection[object], service: AsyncConnection[object]
) -> None:
    await settle(service)
    async with application(clean, ANNA) as anna:
        await order(anna, ANNA, "tea")
    await service.execute("SELECT listener.drain()")
    await superuser.execute("UPDATE listener.dirty_key SET first_change_at = now() - interval '5 min'")
    await service.execute("SET application_name = 'listener listen'")
    found = await wrong(clean)
    assert [f.mend for f in found] == ["listener sweep"]
    assert await mended(clean) == []


async def test_a_role_that_row_security_no_longer_binds_is_told_by_a_service_that_runs(
    clean: Database, superuser: AsyncConnection[object]
) -> None:
    async with clean.service() as running:

        async def reasons(expected: list[str]) -> bool:
            return await running.service.reasons_not_ready() == expected

        await eventually(lambda: reasons([]))
        try:
            await superuser.execute("ALTER ROLE listener_compute BYPASSRLS")
            told_so = "role listener_compute is a superuser or has BYPASSRLS: row-level security does not bind it"
            await eventually(lambda: reasons([told_so]))
        finally:
            await superuser.execute("ALTER ROLE listener_compute NOBYPASSRLS")
        await eventually(lambda: reasons([]))


async def test_an_open_dead_letter_is_a_warning_and_the_retry_closes_it(
    clean: Database, superuser: AsyncConnection[object], service: AsyncConnection[object]
) -> None:
    await settle(service)
    await superuser.execute(
        """
        INSERT INTO listener.dead_letter (view_id, view_name, tenant, error_type, exception_class, error_message,
                                          correlation_id)
        SELECT v.id, v.name, %s, 'definition_error', 'X', 'no', 'x' FROM listener.managed_view v
        UNION ALL SELECT NULL, NULL, NULL, 'validation_error', 'X', 'no', 'x'
        """,
        (ANNA,),
    )
    found = await wrong(clean)
    assert [(f.level, f.mend) for f in found] == [
        ("warning", "listener dead-letters discard --all"),
        ("warning", "listener dead-letters retry --view sales"),
    ]
    await mend(clean, found[1:])
    await mend(clean, found[:1])
    assert await wrong(clean) == []


async def test_a_view_that_has_been_paused_for_long_is_a_warning(
    clean: Database, superuser: AsyncConnection[object]
) -> None:
    await superuser.execute("SELECT listener.pause('sales')")
    assert await wrong(clean) == [], "a pause is nobody's mistake at first"
    await superuser.execute("UPDATE listener.managed_view SET paused_at = now() - interval '3 h'")
    found = await wrong(clean)
    assert [(f.problem, f.mend) for f in found] == [("it has been paused for 3 h.", "listener resume sales")]
    assert await mended(clean) == []


async def test_a_definition_that_depends_on_the_time_zone_is_told_where_the_database_has_another(
    clean: Database, superuser: AsyncConnection[object]
) -> None:
    await define(
        superuser,
        """
        CREATE TABLE shop.visits (tenant_id uuid NOT NULL, seen_at timestamptz NOT NULL);
        CREATE INDEX ON shop.visits (tenant_id);
        GRANT SELECT ON shop.visits TO listener_service
        """,
    )
    await create_view(clean, "visits", VISITS, ["day"])
    name = sql.Identifier(clean.name)
    await superuser.execute(sql.SQL("ALTER DATABASE {} SET timezone = 'Etc/UCT'").format(name))
    assert await wrong(clean) == [], "another name of the same zone"
    await superuser.execute(sql.SQL("ALTER DATABASE {} SET timezone = 'Asia/Kolkata'").format(name))
    found = await wrong(clean)
    assert told(found) == [("time zone", "warning", "visits")], "sales does not depend on it"
    by = "date_trunc(text,timestamp with time zone)"
    assert f"in UTC, the database is in Asia/Kolkata, and its definition depends on that ({by})" in found[0].problem
    assert await mended(clean) == []


async def test_a_database_whose_sessions_only_read_is_told_with_where_that_is_set(
    clean: Database, superuser: AsyncConnection[object]
) -> None:
    await superuser.execute(
        sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(sql.Identifier(clean.name))
    )
    found = await wrong(clean)
    assert [(f.check, f.level, f.mend) for f in found] == [
        ("connection", "error", f"ALTER DATABASE {clean.name} RESET default_transaction_read_only;")
    ]
    await superuser.execute("SET transaction_read_only = off")
    await superuser.execute((found[0].mend or "").encode())
    assert await wrong(clean) == []


async def test_an_old_transaction_is_named_by_its_backend(clean: Database, superuser: AsyncConnection[object]) -> None:
    async with AsyncExitStack() as opened:
        # It is terminated below, and its end is told to whoever closes it.
        opened.enter_context(suppress(AdminShutdown))
        forgotten = await opened.enter_async_context(clean.connect("shop_app", autocommit=False))
        await forgotten.execute("SELECT pg_current_xact_id()")
        pid = forgotten.info.backend_pid
        query = "SELECT object, mend FROM listener.server_findings(8, '0') WHERE level <> 'ok'"
        assert await rows(superuser, query) == [(f"backend {pid}", f"SELECT pg_terminate_backend({pid});")]
        assert await rows(superuser, "SELECT FROM listener.server_findings(8) WHERE level <> 'ok'") == []
        await superuser.execute(f"SELECT pg_terminate_backend({pid})".encode())
        await eventually(lambda: no_backend(superuser, pid))
    assert await rows(superuser, query) == []


async def no_backend(superuser: AsyncConnection[object], pid: int) -> bool:
    return await one(superuser, "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = %s)", pid) is True


async def test_settings_of_the_server_are_found_and_mended(clean: Database, superuser: AsyncConnection[object]) -> None:
    changed = ("track_activities", "track_counts", "autovacuum")

    async def are(value: str) -> bool:
        return all([await one(superuser, "SELECT current_setting(%s)", name) == value for name in changed])

    try:
        for name in changed:
            await superuser.execute(f"ALTER SYSTEM SET {name} = off".encode())
        await superuser.execute("SELECT pg_reload_conf()")
        await eventually(lambda: are("off"))
        assert sorted(f.object for f in await wrong(clean)) == sorted(changed)
        await mend(clean, await wrong(clean))
        await eventually(lambda: are("on"))
        assert await wrong(clean) == []
    finally:
        for name in changed:
            await superuser.execute(f"ALTER SYSTEM RESET {name}".encode())
        await superuser.execute("SELECT pg_reload_conf()")


async def test_a_server_with_too_few_connections_and_prepared_transactions_is_told_so() -> None:
    with start_embedded(max_prepared_transactions="2", max_connections="20") as embedded:
        server = server_of(embedded)
        name = server.clone("template0")
        install(server, name)
        database = Database(server, name)
        # Nothing was chosen: nothing notifies, and nothing is wrong with that.
        assert await wrong(database, OF_THE_OWNER) == []
        async with database.connect() as superuser:
            await superuser.execute("SELECT listener.set_notify('when_idle')")
            query = "SELECT object, mend FROM listener.server_findings(%s) WHERE level = 'warning'"
            assert await rows(superuser, query, 18) == [
                ("max_prepared_transactions", "SELECT listener.set_notify('never');"),
                ("max_connections", "ALTER SYSTEM SET max_connections = 38;"),
            ]
            await superuser.execute("ALTER SYSTEM SET max_connections = 38")
        found = await wrong(database, OF_THE_OWNER)
        assert told(found) == [("server", "warning", "max_prepared_transactions")]
        assert await mended(database, OF_THE_OWNER) == []


@pytest.mark.parametrize(
    ("version", "level", "mend"),
    [
        (180001, "warning", "upgrade PostgreSQL to 18.2 or newer"),
        (180002, "ok", None),
        (170007, "warning", "upgrade PostgreSQL to 17.8 or newer"),
        (170008, "ok", None),
        (160011, "warning", "upgrade PostgreSQL to 16.12 or newer"),
        (160012, "ok", None),
        (150015, "warning", "upgrade PostgreSQL to 15.16 or newer"),
        (150016, "ok", None),
        (190000, "ok", None),
        (140020, "error", "upgrade PostgreSQL to 15 or newer"),
    ],
)
def test_a_minor_release_in_which_listen_may_fail_is_a_warning(version: int, level: str, mend: str | None) -> None:
    found = minor_release(version)
    assert (found.level, found.mend) == (level, mend)


@pytest.mark.parametrize(("skew", "says"), [(0.2, None), (-4.9, None), (9.0, "9 s ahead of"), (-3600, "3600 s behind")])
def test_a_clock_that_is_wrong_is_a_warning(skew: float, says: str | None) -> None:
    found = clock(skew)
    assert (found.level == "warning") is (says is not None)
    assert (says or "agree") in found.problem


async def test_what_was_begun_beside_a_view_and_left_there_is_told(
    clean: Database, superuser: AsyncConnection[object], service: AsyncConnection[object]
) -> None:
    await define(superuser, "CREATE POLICY owner_reads ON shop.orders FOR SELECT TO shop_owner USING (true)")
    await define(superuser, sql.SQL("CREATE MATERIALIZED VIEW shop.mine AS {}").format(sql.SQL(SALES)))
    await define(superuser, "GRANT CREATE, USAGE ON SCHEMA shop TO listener_owner")
    async with clean.connect(OF_THE_OWNER) as owner:
        await owner.execute("SELECT listener.begin_alter('sales', %s)", (f"{SALES} HAVING count(*) > 1",))
        await owner.execute(
            "SELECT listener.begin_adoption('shop.mine', '{product}', tenants_query => 'SELECT id FROM shop.tenants')"
        )
    await settle(service)
    assert await wrong(clean) == []
    await superuser.execute(
        """
        UPDATE listener.managed_view SET created_at = created_at - interval '2 hours' WHERE replaces IS NOT NULL;
        UPDATE listener.adoption SET begun_at = begun_at - interval '2 hours'
        """
    )
    assert told(await wrong(clean)) == [("progress", "warning", "mine"), ("progress", "warning", "sales")]
    assert await mended(clean, OF_THE_OWNER) == []
    assert await rows(superuser, "SELECT name FROM listener.managed_view") == [("sales",)]
