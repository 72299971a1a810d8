"""What others do between the beginning of an alteration or an adoption and its swap."""

from __future__ import annotations

from typing import Any, LiteralString

import anyio
import psycopg
import pytest
from psycopg import AsyncConnection

from conftest import DEADLINE, Database, eventually
from likeness import LEFTOVERS, kind, likeness
from listener import alter
from shop import ANNA, BERT, CLEO, SALES, application, create_view, differences, one, order, rows, settle
from stranger import BY_TENANT, TENANTS_QUERY
from test_adopt import LIST, adopt, unadopt

pytestmark = pytest.mark.anyio

CHANGED: LiteralString = """
    SELECT tenant_id, product, count(*) AS orders, sum(quantity) AS quantity, max(quantity) AS largest
    FROM shop.orders GROUP BY 1, 2
"""
BOTH: LiteralString = """
    SELECT o.tenant_id, o.product, count(*) AS orders,
           (SELECT count(*) FROM shop.payments p WHERE p.tenant_id = o.tenant_id) AS paid
    FROM shop.orders o GROUP BY 1, 2
"""
# What an alteration, or an adoption, could leave beside the target.
BESIDE: LiteralString = (
    "SELECT c.oid::regclass::text FROM pg_class c WHERE c.relname ~ '^listener_(alter|back|new|old)_'"
)


@pytest.fixture
async def shop(shop: Database) -> Database:
    """With the view `sales`, filled."""
    await create_view(shop, "sales", SALES, ["product"])
    for tenant, product, quantity in ((ANNA, "a", 1), (ANNA, "b", 100), (BERT, "a", 2), (CLEO, None, 200)):
        async with application(shop, tenant) as app:
            await order(app, tenant, product, quantity)
    async with shop.connect("listener_service") as service:
        await settle(service)
    return shop


@pytest.fixture
async def begun(shop: Database, service: AsyncConnection[Any]) -> Database:
    """An alteration of `sales` that is filled and not in place yet."""
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.begin_alter('sales', %s)", (CHANGED,))
    await settle(service)
    return shop


async def call(database: Database, statement: LiteralString, *given: Any) -> Any:
    """The first value, as the migrating role."""
    async with database.connect("listener_migrator") as migrator:
        return await one(migrator, statement, *given)


async def test_what_is_granted_revoked_and_made_while_an_alteration_is_filled_is_so_after_it(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await superuser.execute(
        """
        SET ROLE listener_owner;
        GRANT SELECT ON sales TO shop_owner;
        CREATE INDEX before ON sales (orders);
        RESET ROLE
        """
    )
    await call(shop, "SELECT listener.begin_alter('sales', %s)", CHANGED)
    await settle(service)
    await superuser.execute(
        """
        SET ROLE listener_owner;
        REVOKE SELECT ON sales FROM shop_owner;
        GRANT SELECT ON sales TO shop_app;
        GRANT SELECT (product) ON sales TO listener_reader;
        DROP INDEX before;
        CREATE INDEX since ON sales (quantity);
        COMMENT ON COLUMN sales.product IS 'its name';
        RESET ROLE
        """
    )
    await call(shop, "SELECT listener.finish_alter('sales')")
    found = """
        SELECT has_table_privilege('shop_owner', 'sales', 'SELECT'), has_table_privilege('shop_app', 'sales', 'SELECT'),
               has_column_privilege('listener_reader', 'sales', 'product', 'SELECT'),
               col_description('sales'::regclass, 2),
               ARRAY(SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = 'sales'::regclass ORDER BY 1)
    """
    assert await rows(superuser, found) == [(False, True, True, "its name", ["sales_tenant_id_product_idx", "since"])]
    async with application(shop, ANNA) as app:
        await order(app, ANNA, "c")
    await settle(service)
    assert await differences(superuser, "sales") == []


async def test_what_is_granted_revoked_and_made_while_an_adoption_is_filled_is_so_after_it(stranger: Database) -> None:
    async with stranger.connect() as superuser, stranger.connect("listener_service") as service:
        view = await call(stranger, "SELECT listener.begin_adoption(%s, tenants_query => %s)", BY_TENANT, TENANTS_QUERY)
        await settle(service)
        await superuser.execute(
            """
            SET ROLE acme_owner;
            REVOKE SELECT ON reporting.invoice_totals FROM acme_dashboard;
            GRANT SELECT ON reporting.invoice_totals TO acme_app;
            DROP INDEX reporting.invoice_totals_key;
            CREATE UNIQUE INDEX since ON reporting.invoice_totals (month, tenant_id, currency);
            RESET ROLE
            """
        )
        before = await likeness(superuser, BY_TENANT)
        await call(stranger, "SELECT listener.finish_adoption(%s)", view)
        after = await likeness(superuser, BY_TENANT)
        assert [grant for grant in after["grants"] if grant[2] != "listener_service"] == [
            grant for grant in before["grants"] if grant[3] == "SELECT"
        ]
        assert {"since", "invoice_totals_by_amount"} < {index[0] for index in after["indexes"]}
        assert await rows(superuser, LEFTOVERS) == []
        # What it was when it was put aside is what comes back.
        assert unadopt(stranger, BY_TENANT).returncode == 0
        assert await likeness(superuser, BY_TENANT) == before


async def test_a_window_that_is_set_and_a_pause_while_an_alteration_is_filled_are_kept(
    begun: Database, superuser: AsyncConnection[Any]
) -> None:
    await call(
        begun, "SELECT listener.set_window('sales', quiet_period => '7 s', max_wait => '1 min', max_age => '1 day')"
    )
    await call(begun, "SELECT listener.pause('sales')")
    await call(begun, "SELECT listener.finish_alter('sales')")
    found = "SELECT quiet_period::text, max_wait::text, max_age::text, paused_at IS NOT NULL FROM listener.managed_view"
    assert await rows(superuser, found) == [("00:00:07", "00:01:00", "1 day", True)]


@pytest.mark.parametrize("how", ["SELECT listener.drop_view('sales')", "SELECT listener.uninstall()"])
async def test_a_view_that_is_dropped_while_it_is_altered_takes_what_is_beside_along(
    begun: Database, superuser: AsyncConnection[Any], how: LiteralString
) -> None:
    await call(begun, how)
    assert await rows(superuser, "SELECT name FROM listener.managed_view") == []
    assert await rows(superuser, "SELECT tgname FROM pg_trigger WHERE tgname LIKE 'listener%'") == []
    assert await rows(superuser, BESIDE) == []


@pytest.mark.parametrize("done", ["adopting", "turning back", "turned back"])
async def test_who_uninstalls_while_a_view_is_adopted_or_turned_back_finds_nothing_beside(
    stranger: Database, done: str
) -> None:
    async with stranger.connect() as superuser, stranger.connect("listener_service") as service:
        view = await call(stranger, "SELECT listener.begin_adoption(%s, tenants_query => %s)", BY_TENANT, TENANTS_QUERY)
        await settle(service)
        if done != "adopting":
            await call(stranger, "SELECT listener.finish_adoption(%s)", view)
            await call(stranger, "SELECT listener.begin_unadoption(%s)", view)
        if done == "turned back":
            await call(stranger, "SELECT listener.fill_unadoption(%s)", view)
            await call(stranger, "SELECT listener.finish_unadoption(%s)", view)
        await call(stranger, "SELECT listener.uninstall(drop_targets => %s)", done == "turned back")
        assert await kind(superuser, BY_TENANT) == ("r" if done == "turning back" else "m")
        assert await one(superuser, "SELECT count(*) FROM reporting.invoice_years") > 0
        assert await rows(superuser, LEFTOVERS) == []
        assert await rows(superuser, "SELECT FROM listener.managed_view") == []


async def test_who_waits_to_drop_a_view_while_it_is_put_in_place_drops_all_of_it(
    begun: Database, superuser: AsyncConnection[Any]
) -> None:
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'"
    async with begun.connect("listener_migrator", autocommit=False) as migrator, anyio.create_task_group() as tasks:
        await migrator.execute("SELECT listener.finish_alter('sales')")
        tasks.start_soon(call, begun, "SELECT listener.drop_view('sales')")
        await eventually(lambda: one(superuser, waiting))
        await migrator.commit()
    assert await rows(superuser, "SELECT name FROM listener.managed_view") == []
    assert await one(superuser, "SELECT to_regclass('sales')") is None
    assert await rows(superuser, BESIDE) == []


async def test_a_view_is_not_altered_while_it_is_turned_back_nor_turned_back_while_it_is_altered(
    stranger: Database,
) -> None:
    async with stranger.connect() as superuser:
        assert adopt(stranger, BY_TENANT, *LIST).returncode == 0
        await call(stranger, "SELECT listener.begin_unadoption('invoice_totals')")
        with pytest.raises(psycopg.Error, match="invoice_totals is turning back"):
            await call(stranger, "SELECT listener.begin_alter('invoice_totals', max_age => '1 hour')")
        await call(stranger, "SELECT listener.abort_adoption('invoice_totals')")
        await call(stranger, "SELECT listener.begin_alter('invoice_totals', max_age => '1 hour')")
        with pytest.raises(psycopg.Error, match="invoice_totals is being altered"):
            await call(stranger, "SELECT listener.begin_unadoption('invoice_totals')")
        await call(stranger, "SELECT listener.abort_alter('invoice_totals')")
        assert await rows(superuser, LEFTOVERS) == []


async def test_a_publication_that_cannot_be_led_over_is_named_before_anything_is_done(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    await superuser.execute("CREATE PUBLICATION theirs FOR TABLE sales")
    with pytest.raises(psycopg.Error, match=r"publication theirs, which belongs to .*OWNER TO listener_owner"):
        await call(shop, "SELECT listener.begin_alter('sales', %s)", CHANGED)


async def test_what_is_published_is_not_turned_back_into_what_cannot_be(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        assert adopt(stranger, BY_TENANT, *LIST).returncode == 0
        await superuser.execute(
            "CREATE PUBLICATION ours FOR TABLE reporting.invoice_totals; ALTER PUBLICATION ours OWNER TO listener_owner"
        )
        with pytest.raises(psycopg.Error, match="is part of the publication ours"):
            await call(stranger, "SELECT listener.begin_unadoption('invoice_totals')")


async def test_behind_a_long_reader_the_swap_of_a_view_that_others_read_gives_way_at_once(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await create_view(shop, "totals", "SELECT tenant_id, sum(orders) AS orders FROM sales GROUP BY 1", [])
    await call(shop, "SELECT listener.begin_alter('sales', %s)", CHANGED)
    await settle(service)
    queued = 0
    over = anyio.Event()

    async def watch() -> None:
        nonlocal queued
        while not over.is_set():
            queued += await one(superuser, "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'relation'")

    async with shop.connect(autocommit=False) as reader, anyio.create_task_group() as tasks:
        await reader.execute("SELECT FROM sales")
        tasks.start_soon(watch)
        with pytest.raises(psycopg.errors.LockNotAvailable, match="sales is in use"):
            await call(shop, "SELECT listener.finish_alter('sales')")
        over.set()
    # It asked for no lock that a later reader would have waited behind.
    assert queued == 0
    await call(shop, "SELECT listener.finish_alter('sales')")
    await settle(service)
    assert await differences(superuser, "sales") == await differences(superuser, "totals") == []


async def test_readers_do_not_wait_for_a_refresh_of_the_definition_that_goes(
    begun: Database, superuser: AsyncConnection[Any]
) -> None:
    async with begun.connect(autocommit=False) as refresh:
        await refresh.execute("SELECT FROM listener.definition_1")
        with anyio.fail_after(DEADLINE):
            with pytest.raises(psycopg.errors.LockNotAvailable, match=r"listener\.definition_1 is in use"):
                await call(begun, "SELECT listener.finish_alter('sales')")
    await call(begun, "SELECT listener.finish_alter('sales')")
    assert await differences(superuser, "sales") == []


async def test_readers_do_not_wait_for_the_triggers_of_a_table_that_is_read_no_more(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    captured = "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'shop.payments'::regclass AND tgname LIKE 'listener%'"
    await create_view(shop, "paid", BOTH, ["product"])
    await settle(service)
    told: list[str] = []
    async with (
        shop.connect("listener_migrator") as migrator,
        alter.begun(migrator, "paid", {"query": SALES}) as beside,
        anyio.create_task_group() as tasks,
    ):
        await settle(service)
        async with shop.connect(autocommit=False) as writer:
            await writer.execute("LOCK TABLE shop.payments IN ROW EXCLUSIVE MODE")
            tasks.start_soon(alter.finish, migrator, "paid", beside, told.append)
            # It is in place, and the triggers are still there.
            await eventually(
                lambda: one(superuser, "SELECT count(*) = 0 FROM listener.managed_view WHERE replaces > 0")
            )
            assert await one(superuser, "SELECT count(*) FROM paid") == 4
            assert await one(superuser, captured) == 4
    assert told == []
    assert await one(superuser, captured) == 0
    assert await differences(superuser, "paid") == []


async def test_a_target_that_is_made_again_while_it_is_turned_back_leaves_nothing_beside(stranger: Database) -> None:
    async with stranger.connect() as superuser, stranger.connect("listener_service") as service:
        assert adopt(stranger, BY_TENANT, *LIST).returncode == 0
        await call(stranger, "SELECT listener.begin_unadoption('invoice_totals')")
        await superuser.execute("DROP TABLE reporting.invoice_totals CASCADE")
        await call(stranger, "SELECT listener.restore_target('invoice_totals')")
        await settle(service)
        back = unadopt(stranger, "invoice_totals")
        assert back.returncode == 0, back.stderr
        assert await kind(superuser, BY_TENANT) == "m"
        assert await rows(superuser, LEFTOVERS) == []


async def test_triggers_that_a_killed_alteration_left_are_named_with_what_takes_them_off(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    found = "SELECT mend FROM listener.progress_findings() WHERE object = 'shop.payments' AND problem ~ 'no view reads'"
    await create_view(shop, "paid", BOTH, ["product"])
    await call(shop, "SELECT listener.begin_alter('paid', %s)", SALES)
    await settle(service)
    await call(shop, "SELECT listener.finish_alter('paid')")
    assert await rows(superuser, found) == [("SELECT listener.end_alter();",)]
    await call(shop, "SELECT listener.end_alter()")
    assert await rows(superuser, found) == []
