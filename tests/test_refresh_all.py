"""One call for all views of a tenant: in the order of what they read, within the caller's transaction."""

from __future__ import annotations

import random
import secrets
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection, sql

from conftest import Database
from shop import ANNA, BERT, SALES, TENANTS, application, create_view, differences, one, open_shop, order, rows

pytestmark = pytest.mark.anyio

# Named so that neither the alphabet nor the order of registration is the right order.
TOTALS = "SELECT tenant_id, sum(orders)::bigint AS orders, sum(quantity)::bigint AS quantity FROM sales GROUP BY 1"
GRADE = "SELECT tenant_id, quantity >= 100 AS is_large FROM a_totals"
ALL = "SELECT sum(quantity) AS quantity FROM a_totals"
STORED = "CREATE MATERIALIZED VIEW a_stored AS SELECT tenant_id, sum(orders) AS orders FROM sales GROUP BY 1"
CALL = "SELECT view_name, outcome FROM listener.refresh_all_for_tenant(%s::text)"
BY_TENANT = ["sales", "a_totals", "grade"]


@pytest.fixture
async def shop(database: Database) -> Database:
    """A chain of three views by tenant; over it one without tenants and a materialized view that stays one."""
    await open_shop(database)
    await create_view(database, "sales", SALES, ["product"])
    await create_view(database, "a_totals", TOTALS, ["tenant_id"])
    await create_view(database, "grade", GRADE, ["tenant_id"], tenants_query=None)
    await create_view(database, "a_all", ALL, [], tenant_column=None, tenants_query=None)
    async with database.connect() as superuser:
        await superuser.execute("GRANT CREATE ON SCHEMA public TO listener_owner")
        await superuser.execute("SET ROLE listener_owner")
        await superuser.execute(STORED)
        await superuser.execute("SELECT listener.keep_materialized_view('a_stored')")
        await superuser.execute("RESET ROLE")
        for tenant in TENANTS:
            await order(superuser, tenant, "tea", 10)
    async with database.connect("listener_service") as service:
        await settle_all(service)
    return database


async def settle_all(service: AsyncConnection[Any]) -> list[tuple[str, str]]:
    """As settle() does, with the keys of views without tenants; the keys that were refreshed."""
    done: list[tuple[str, str]] = []
    while True:
        outcome = await one(service, "SELECT outcome FROM listener.drain()")
        keys = await rows(service, "SELECT view_name, tenant FROM listener.pending_keys(false) WHERE outcome = 'dirty'")
        if outcome == "nothing" and not keys:
            return done
        for view, tenant in keys:
            await service.execute("SELECT listener.refresh_key(%s, %s::text)", (view, tenant))
            done.append((view, tenant))


async def exact(superuser: AsyncConnection[Any], *views: str) -> bool:
    return not [view for view in views if await differences(superuser, view)]


async def may_refresh(superuser: AsyncConnection[Any]) -> None:
    """What the page on integrations says an application needs."""
    await superuser.execute(
        """
        GRANT USAGE ON SCHEMA listener TO shop_app;
        GRANT EXECUTE ON FUNCTION listener.refresh_all_for_tenant(text), listener.refresh_all_for_tenant(uuid),
            listener.refresh_all_for_tenant(bigint) TO shop_app;
        """
    )


async def test_the_application_sees_its_write_in_every_view_before_it_commits(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    await may_refresh(superuser)
    await superuser.execute("GRANT SELECT ON grade, a_all, a_stored TO shop_app")
    async with application(shop, ANNA, autocommit=False) as app:
        await order(app, ANNA, "pot", 200)
        found = await rows(app, CALL, ANNA)
        assert await rows(app, "SELECT is_large FROM grade WHERE tenant_id = %s", ANNA) == [(True,)]
        assert await one(app, "SELECT quantity FROM a_all") == 230
        assert await one(app, "SELECT orders FROM a_stored WHERE tenant_id = %s", ANNA) == 2
        assert await one(app, "SELECT current_setting('app.current_tenant_id')") == ANNA
        await app.commit()
    assert [outcome for _, outcome in found] == ["refreshed"] * 5
    names = [name for name, _ in found]
    assert names.index("sales") < names.index("a_totals") < min(names.index("grade"), names.index("a_all"))
    assert names.index("sales") < names.index("a_stored")
    assert await exact(superuser, *BY_TENANT, "a_all", "a_stored")


async def test_no_view_is_refreshed_again_for_what_the_call_wrote_itself(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    async with service.transaction():
        await order(superuser, ANNA, "pot", 200)
        await rows(service, CALL, ANNA)
    # The application's own write is still in the log: it concerns the first view, and nothing changes there.
    assert await settle_all(service) == [("sales", ANNA)]
    assert await exact(superuser, *BY_TENANT, "a_all", "a_stored")


async def test_a_change_of_another_tenant_stays_marked(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await order(superuser, BERT, "pot", 200)
    await rows(service, CALL, ANNA)
    assert await rows(superuser, "SELECT is_large FROM grade WHERE tenant_id = %s", BERT) == [(False,)]
    await settle_all(service)
    assert await rows(superuser, "SELECT is_large FROM grade WHERE tenant_id = %s", BERT) == [(True,)]
    assert await exact(superuser, *BY_TENANT, "a_all", "a_stored")


async def test_views_without_tenants_are_computed_only_where_a_change_is_not_shown(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    unchanged = dict(await rows(service, CALL, ANNA))
    assert unchanged == dict.fromkeys(BY_TENANT, "refreshed") | {"a_all": "fresh", "a_stored": "fresh"}
    # Another tenant's change is theirs as well.
    await superuser.execute("UPDATE a_totals SET quantity = quantity + 1 WHERE tenant_id = %s", (BERT,))
    changed = dict(await rows(service, CALL, ANNA))
    assert (changed["a_all"], changed["a_stored"]) == ("refreshed", "fresh")


async def test_a_paused_view_and_a_busy_one_are_reported_and_stop_no_other(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.pause('grade')")
        await migrator.execute("SELECT listener.pause('a_all')")
    lock = "SELECT pg_advisory_xact_lock(listener.lock_key(id, %s)) FROM listener.managed_view WHERE name = 'a_totals'"
    await order(superuser, ANNA, "pot", 200)
    async with superuser.transaction():
        await superuser.execute(lock, (ANNA,))
        found = dict(await rows(service, CALL, ANNA))
    assert found == {
        "sales": "refreshed", "a_totals": "busy", "grade": "paused", "a_all": "paused", "a_stored": "refreshed",
    }  # fmt: skip
    # What they have not seen was left for them.
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.resume()")
    assert {("a_totals", ANNA), ("grade", ANNA), ("a_all", "")} <= set(await settle_all(service))
    assert await exact(superuser, *BY_TENANT, "a_all", "a_stored")


async def test_an_error_names_its_view_and_takes_everything_back(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await create_view(shop, "odd", "SELECT tenant_id, 100 / quantity AS share FROM a_totals", ["tenant_id"])
    await settle_all(service)
    before = await rows(superuser, "SELECT * FROM sales ORDER BY 1, 2")
    async with application(shop, ANNA) as app:
        await app.execute("UPDATE shop.orders SET quantity = 0")
    with pytest.raises(psycopg.errors.DivisionByZero, match="odd: division by zero") as failed:
        await rows(service, CALL, ANNA)
    assert "is undone" in str(failed.value.diag.message_detail)
    assert "listener.refresh(view, tenant_id)" in str(failed.value.diag.message_hint)
    assert await rows(superuser, "SELECT * FROM sales ORDER BY 1, 2") == before
    # In a transaction that goes on after it.
    async with service.transaction():
        with pytest.raises(psycopg.errors.DivisionByZero):
            async with service.transaction():
                await rows(service, CALL, ANNA)
        await service.execute("SELECT listener.refresh('sales', %s)", (ANNA,))
    assert await exact(superuser, "sales")


async def test_it_tells_what_each_view_cost(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await order(superuser, ANNA, "pot", 200)
    found = await rows(
        service,
        "SELECT view_name, inserted, updated, deleted, version >= 0, duration"
        " FROM listener.refresh_all_for_tenant(%s::text)",
        ANNA,
    )
    assert {row[0]: row[1:4] for row in found if row[0] in BY_TENANT} == {
        "sales": (1, 0, 0), "a_totals": (0, 1, 0), "grade": (0, 1, 0),
    }  # fmt: skip
    assert all(row[4] and timedelta(0) < row[5] < timedelta(seconds=30) for row in found)


async def test_a_tenant_of_any_type_is_given_as_such_and_views_of_other_types_are_left_out(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await superuser.execute(
        "SET ROLE shop_owner; CREATE TABLE shop.plain (tenant_id bigint, n int); INSERT INTO shop.plain VALUES (7, 1);"
        " GRANT SELECT ON shop.plain TO listener_service; RESET ROLE"
    )
    await create_view(
        shop, "numbers", "SELECT tenant_id, sum(n) AS n FROM shop.plain GROUP BY 1", ["tenant_id"], tenants_query=None
    )
    await settle_all(service)
    of_seven = [("numbers", "refreshed"), ("a_all", "fresh"), ("a_stored", "fresh")]
    for spelled in ("7::bigint", "'7'", "' 07'"):
        call = sql.SQL("SELECT view_name, outcome FROM listener.refresh_all_for_tenant({})").format(sql.SQL(spelled))
        found = await rows(service, call)
        assert sorted(found) == sorted(of_seven), spelled
    found = await rows(service, "SELECT view_name FROM listener.refresh_all_for_tenant(%s::uuid)", ANNA)
    assert {name for (name,) in found} == {*BY_TENANT, "a_all", "a_stored"}


@pytest.mark.parametrize("tenant", [None, "", "nobody", "x" * 2000])
async def test_what_can_be_no_tenant_is_refused(shop: Database, service: AsyncConnection[Any], tenant: str) -> None:
    with pytest.raises(psycopg.Error, match="can be no tenant of any view") as refused:
        await rows(service, CALL, tenant)
    assert refused.value.sqlstate == "LSN02"
    assert refused.value.diag.message_hint == "Their tenants are of type uuid."


async def test_it_needs_its_own_grant_and_read_committed(shop: Database, service: AsyncConnection[Any]) -> None:
    async with application(shop, ANNA) as app:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await rows(app, CALL, ANNA)
    await service.execute("SET default_transaction_isolation = 'repeatable read'")
    with pytest.raises(psycopg.Error, match="READ COMMITTED") as refused:
        await rows(service, CALL, ANNA)
    assert refused.value.sqlstate == "LSN05"


async def test_the_callers_path_is_what_it_was_whatever_a_definition_does_to_it(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    await superuser.execute(
        """
        SET ROLE shop_owner;
        CREATE FUNCTION shop.lure(quantity bigint) RETURNS bigint LANGUAGE plpgsql VOLATILE AS
            $$ BEGIN PERFORM set_config('search_path', 'shop', false); RETURN quantity; END $$;
        RESET ROLE;
        GRANT CREATE, USAGE ON SCHEMA shop TO shop_app;
        """
    )
    await create_view(
        shop, "lured", "SELECT tenant_id, shop.lure(sum(quantity)) AS n FROM shop.orders GROUP BY 1", ["tenant_id"],
        depends_on="{}",
    )  # fmt: skip
    async with shop.connect("listener_service") as other:
        await settle_all(other)
    await may_refresh(superuser)
    for user in ("listener_service", "listener_migrator", "postgres", "shop_app"):
        async with shop.connect(user) as caller:
            await caller.execute("SET search_path = pg_catalog, listener, public")
            assert ("lured", "refreshed") in await rows(caller, CALL, ANNA)
            path = await one(caller, "SELECT pg_catalog.current_setting('search_path')")
            assert path == "pg_catalog, listener, public", user
            async with caller.transaction():
                await caller.execute("SET LOCAL search_path = pg_catalog, public")
                await rows(caller, CALL, ANNA)
                assert await one(caller, "SELECT pg_catalog.current_setting('search_path')") == "pg_catalog, public"


async def test_what_is_being_altered_is_refreshed_where_dashboards_read_it(
    shop: Database, service: AsyncConnection[Any]
) -> None:
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.begin_alter('grade', %s)", (GRADE.replace("100", "50"),))
    assert len(await rows(service, "SELECT FROM listener.managed_view")) == 6
    assert {name for name, _ in await rows(service, CALL, ANNA)} == {*BY_TENANT, "a_all", "a_stored"}


async def test_after_any_writes_and_calls_every_view_is_exact(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    seed = secrets.randbelow(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    await may_refresh(superuser)
    for _ in range(25):
        tenant = draw.choice(TENANTS)
        async with application(shop, tenant, autocommit=False) as app:
            for _ in range(draw.randint(1, 4)):
                what = draw.choice(["write", "write", "call", "savepoint", "drain"])
                if what == "write":
                    await order(app, tenant, draw.choice(["tea", "pot"]), draw.randint(-50, 150))
                elif what == "call":
                    await rows(app, CALL, tenant)
                elif what == "savepoint":
                    await app.execute("SAVEPOINT s")
                    await order(app, tenant, "pot", 1)
                    await rows(app, CALL, tenant)
                    await app.execute("ROLLBACK TO s")
                else:
                    await service.execute("SELECT listener.drain()")
            await (app.commit() if draw.random() < 0.8 else app.rollback())
        if draw.random() < 0.3:
            await service.execute("SELECT listener.drain()")
    await settle_all(service)
    assert await exact(superuser, *BY_TENANT, "a_all", "a_stored"), seed
    # And nothing that is marked clean is wrong before the settling, either.
    await order(superuser, BERT, "tea", 1)
    await rows(service, CALL, BERT)
    assert await exact(superuser, *BY_TENANT, "a_all", "a_stored"), seed
