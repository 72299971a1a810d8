"""A managed view that reads the target of another: woken by what a refresh changed, and by nothing else."""

from __future__ import annotations

import random
import secrets
from typing import Any

import psycopg
import pytest

from captured import at_home, triggers_on
from command import listener
from conftest import Database
from listener import operations
from shop import ANNA, BERT, SALES, TENANTS, application, create_view, define, differences, one, order, rows, settle

pytestmark = pytest.mark.anyio

TOTALS = "SELECT tenant_id, sum(orders)::bigint AS orders, sum(quantity)::bigint AS quantity FROM sales GROUP BY 1"
GRADE = "SELECT tenant_id, quantity >= 100 AS is_large FROM totals"
# Reads the base table beside what is over it, so that one write reaches it by two ways.
SHARE = """
    SELECT o.tenant_id, o.id, o.quantity::numeric / nullif(t.quantity, 0) AS share
    FROM shop.orders o JOIN totals t ON t.tenant_id = o.tenant_id
"""
CHAIN = ("sales", "totals", "grade")


@pytest.fixture
async def shop(shop: Database) -> Database:
    """Three views, each over the one before."""
    await create_view(shop, "sales", SALES, ["product"])
    await create_view(shop, "totals", TOTALS, ["tenant_id"])
    await create_view(shop, "grade", GRADE, ["tenant_id"], tenants_query=None)
    return shop


async def woken(superuser: psycopg.AsyncConnection[Any]) -> set[tuple[str, str]]:
    """Which table's change of which tenant was logged since the log was emptied."""
    found = await rows(
        superuser,
        "SELECT s.table_name, l.tenant FROM listener.change_log l JOIN listener.source s ON s.id = l.source_id",
    )
    return {(table, tenant) for table, tenant in found}


async def exact(superuser: psycopg.AsyncConnection[Any], *views: str) -> bool:
    return not [view for view in views if await differences(superuser, view)]


async def test_a_write_reaches_the_end_of_a_chain(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await settle(service)
    await order(superuser, ANNA, "tea", 120)
    await settle(service)
    assert await rows(superuser, "SELECT tenant_id::text, is_large FROM grade") == [(ANNA, True)]
    await superuser.execute("DELETE FROM shop.orders")
    await settle(service)
    assert await rows(superuser, "SELECT * FROM sales, totals, grade") == []


async def test_a_refresh_that_changed_nothing_wakes_nobody(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await order(superuser, ANNA, "tea", 5)
    await settle(service)
    await superuser.execute("DELETE FROM listener.change_log")
    drains = await one(superuser, "SELECT count(*) FROM listener.drain_log")
    for tenant in TENANTS:
        await service.execute("SELECT listener.refresh('sales', %s::text)", (tenant,))
    await service.execute("SELECT listener.drain()")
    assert await rows(superuser, "SELECT * FROM listener.change_log") == []
    assert await one(superuser, "SELECT count(*) FROM listener.drain_log") == drains

    # Of what a drain brings, only the views whose rows changed are passed on: the grade stays as it was.
    await order(superuser, ANNA, "tea", 1)
    await settle(service)
    assert await woken(superuser) == {("orders", ANNA), ("sales", ANNA), ("totals", ANNA)}
    logged = await rows(superuser, "SELECT source_id, tenant FROM listener.change_log")
    assert len(logged) == 3, logged


async def test_whoever_refreshes_the_change_is_logged(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await settle(service)
    await superuser.execute("GRANT USAGE ON SCHEMA listener TO shop_app")
    await superuser.execute("GRANT EXECUTE ON FUNCTION listener.refresh(text, text) TO shop_app")
    async with application(shop, ANNA) as app:
        await order(app, ANNA, "tea")
        await superuser.execute("DELETE FROM listener.change_log")
        await app.execute("SELECT listener.refresh('sales', %s)", (ANNA,))
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await app.execute("SELECT * FROM listener.change_log")
    assert await woken(superuser) == {("sales", ANNA)}
    await settle(service)
    assert await exact(superuser, *CHAIN)


async def test_a_chain_is_exact_and_fresh_within_the_sum_of_its_windows(
    shop: Database, superuser: psycopg.AsyncConnection[Any]
) -> None:
    async with shop.service() as running:
        await running.until(lambda: exact(superuser, *CHAIN))
        await order(superuser, ANNA, "tea", 200)
        done = len(running.outcomes)
        await running.until_refreshed("grade", ANNA, after=done)
        assert await rows(superuser, "SELECT is_large FROM grade WHERE tenant_id = %s", ANNA) == [(True,)]
        # Each link waits for its own window from the commit of the refresh before, and for no sweep.
        for change, outcome in running.outcomes[done:]:
            if outcome.outcome == "refreshed":
                assert change.window.max_wait == 2.0
        assert running.service.metrics.sweep_recovered._value.get() == 0


async def test_a_filled_chain_is_exact_whichever_view_is_filled_first(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    for n, tenant in enumerate(TENANTS):
        await order(superuser, tenant, "tea", 60 * n)
    await superuser.execute("DELETE FROM listener.change_log")
    for view in ("grade", "totals", "sales"):
        await superuser.execute(
            "SELECT listener.mark_all_dirty(v.id) FROM listener.managed_view v WHERE v.name = %s", (view,)
        )
        await settle(service)
    assert await exact(superuser, *CHAIN)
    assert await one(superuser, "SELECT count(*) FROM grade") == 3


async def test_after_any_writes_a_chain_and_a_diamond_are_exact(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    seed = secrets.randbelow(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    await create_view(shop, "share", SHARE, ["id"])
    views = (*CHAIN, "share")
    for _ in range(40):
        tenant, other = draw.sample(TENANTS, 2)
        match draw.randrange(7):
            case 0 | 1 | 2:
                await order(superuser, tenant, draw.choice(["tea", "pot", None]), draw.randrange(-5, 60))
            case 3:
                await superuser.execute(
                    "UPDATE shop.orders SET quantity = quantity + 1 WHERE tenant_id = %s", (tenant,)
                )
            case 4:
                await superuser.execute(
                    "UPDATE shop.orders SET tenant_id = %s WHERE tenant_id = %s AND product = 'tea'", (other, tenant)
                )
            case 5:
                await superuser.execute("DELETE FROM shop.orders WHERE tenant_id = %s AND id %% 2 = 0", (tenant,))
            case _:
                await superuser.execute("UPDATE shop.orders SET quantity = quantity WHERE tenant_id = %s", (tenant,))
        # Some of what is due, in any order, as workers of several replicas would.
        for _ in range(draw.randrange(4)):
            await service.execute("SELECT listener.drain()")
            keys = await rows(service, "SELECT view_name, tenant FROM listener.pending_keys(false)")
            for view, whose in draw.sample(keys, min(len(keys), 2)):
                step = "SELECT listener.refresh(%s, %s::text)" if whose else "SELECT listener.expand(%s || %s)"
                await service.execute(step, (view, whose))
    await settle(service)
    assert await exact(superuser, *views), f"seed {seed}"


async def test_a_circle_is_refused_when_a_nested_view_would_close_it(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await at_home(shop)
    await define(
        superuser,
        "CREATE VIEW shop.plan WITH (security_invoker = true) AS SELECT tenant_id, 1 AS goal FROM shop.orders",
    )
    await superuser.execute("GRANT SELECT ON shop.plan TO listener_service; GRANT SELECT ON grade TO shop_owner")
    await create_view(shop, "goals", "SELECT DISTINCT tenant_id, goal FROM shop.plan", ["goal"])
    await create_view(
        shop, "reached", "SELECT g.tenant_id, t.is_large FROM goals g JOIN grade t ON t.tenant_id = g.tenant_id", []
    )
    await settle(service)
    await superuser.execute("GRANT SELECT ON reached TO shop_owner")
    await define(
        superuser,
        "CREATE OR REPLACE VIEW shop.plan WITH (security_invoker = true) AS"
        " SELECT tenant_id, count(*)::int AS goal FROM reached GROUP BY 1",
    )
    changed = await rows(service, "SELECT view, trouble FROM listener.changed_definitions()")
    assert changed == [
        ("goals", "managed views would read each other in a circle: goals reads reached, which reads goals")
    ]
    assert await triggers_on(superuser, "reached") == 0
    # It ends once the circle does.
    await define(
        superuser,
        "CREATE OR REPLACE VIEW shop.plan WITH (security_invoker = true) AS"
        " SELECT tenant_id, 2 AS goal FROM shop.orders",
    )
    assert await rows(service, "SELECT view, trouble FROM listener.changed_definitions()") == [("goals", None)]
    await settle(service)
    assert await exact(superuser, *CHAIN, "goals", "reached")


async def test_a_view_that_is_no_longer_read_may_be_dropped(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await superuser.execute("GRANT SELECT ON grade TO shop_owner")
    await define(
        superuser,
        "CREATE VIEW shop.plan WITH (security_invoker = true) AS SELECT tenant_id, 1 AS goal FROM grade",
    )
    await superuser.execute("GRANT SELECT ON shop.plan TO listener_service")
    await create_view(shop, "goals", "SELECT DISTINCT tenant_id, goal FROM shop.plan", ["goal"])
    async with shop.connect("listener_migrator") as migrator:
        with pytest.raises(psycopg.Error, match="grade is read by goals"):
            await migrator.execute("SELECT listener.drop_view('grade')")
        await define(
            superuser,
            "CREATE OR REPLACE VIEW shop.plan WITH (security_invoker = true) AS"
            " SELECT tenant_id, 2 AS goal FROM shop.orders",
        )
        assert await rows(service, "SELECT view, trouble FROM listener.changed_definitions()") == [("goals", None)]
        await migrator.execute("SELECT listener.drop_view('grade')")
    await order(superuser, ANNA, "tea")
    await settle(service)
    assert await exact(superuser, "sales", "totals", "goals")


async def test_row_level_security_of_a_target_binds_who_reads_it(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await create_view(shop, "secured", SALES, ["product"], target_rls=True)
    # It forgets the tenant: were the target not bound, each tenant would be shown everybody's sum.
    await create_view(
        shop,
        "leaky",
        "SELECT s.tenant_id, (SELECT sum(quantity) FROM secured) AS everybodys FROM secured s GROUP BY 1",
        [],
        tenants_query=None,
    )
    await order(superuser, ANNA, "tea", 1)
    await order(superuser, BERT, "tea", 10)
    await settle(service)
    assert await rows(superuser, "SELECT tenant_id::text, everybodys FROM leaky ORDER BY 2") == [(ANNA, 1), (BERT, 10)]
    # The tenants of both are listed all the same, whatever tenant the caller works for.
    await superuser.execute("TRUNCATE leaky; DELETE FROM listener.refresh_state; DELETE FROM listener.dirty_key")
    await service.execute("SELECT set_config('app.current_tenant_id', %s, false)", (ANNA,))
    for view in ("secured", "leaky"):
        assert {ANNA, BERT} <= {t for (t,) in await rows(service, "SELECT listener.tenants(%s)", view)}
    assert await one(service, "SELECT current_setting('app.current_tenant_id')") == ANNA
    assert await one(service, "SELECT count(*) FROM secured") == 1
    # What the first release made is mended by the next migration.
    await superuser.execute("ALTER POLICY listener_list ON secured USING (true)")
    assert await one(service, "SELECT count(*) FROM secured") == 2
    await superuser.execute("SET ROLE listener_owner; SELECT listener.regenerate(); RESET ROLE")
    assert await one(service, "SELECT count(*) FROM secured") == 1


async def test_a_target_whose_tenant_column_has_another_name_is_read_by_tenant(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await superuser.execute(
        "SET ROLE listener_owner; SELECT listener.add_source('shop.orders', 'tenant_id'); RESET ROLE"
    )
    await create_view(
        shop, "accounts", "SELECT tenant_id AS account, count(*) AS n FROM shop.orders GROUP BY 1", [],
        tenant_column="account",
    )  # fmt: skip
    await create_view(shop, "doubled", "SELECT account AS tenant_id, 2 * n AS n FROM accounts", [])
    await settle(service)
    await superuser.execute("DELETE FROM listener.change_log")
    await order(superuser, ANNA, "tea")
    await settle(service)
    assert ("accounts", ANNA) in await woken(superuser)
    assert ("accounts", "") not in await woken(superuser)
    assert await exact(superuser, "accounts", "doubled")


async def test_a_view_that_others_read_is_not_dropped_with_its_target(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await settle(service)
    async with shop.connect("listener_migrator") as migrator:
        with pytest.raises(psycopg.Error, match="sales is read by totals"):
            await migrator.execute("SELECT listener.drop_view('sales')")
        # As a plain table it is a source like any other.
        await migrator.execute("SELECT listener.drop_view('sales', keep_target => true)")
        await superuser.execute("INSERT INTO sales VALUES (%s, 'pot', 1, 300)", (ANNA,))
        await settle(service)
        assert await exact(superuser, "totals", "grade")
        for view in ("grade", "totals"):
            await migrator.execute("SELECT listener.drop_view(%s)", (view,))
    assert await triggers_on(superuser, "sales") == 0


async def test_uninstall_takes_views_before_what_they_read(
    shop: Database, superuser: psycopg.AsyncConnection[Any]
) -> None:
    await superuser.execute("SET ROLE listener_owner; SELECT listener.add_source('totals', 'tenant_id'); RESET ROLE")
    done = listener("uninstall", "--yes", "--drop-targets", url=shop.url("listener_migrator"))
    assert done.returncode == 0, done.stderr
    left = "SELECT to_regclass('sales'), to_regclass('totals'), to_regclass('grade'), to_regclass('listener.source')"
    assert await rows(superuser, left) == [(None, None, None, None)]
    assert await triggers_on(superuser, "shop.orders") == 0


async def test_a_target_that_was_dropped_and_made_again_feeds_its_readers(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await at_home(shop)
    await order(superuser, ANNA, "tea", 120)
    await settle(service)
    await superuser.execute("DROP TABLE sales CASCADE")
    await superuser.execute("SELECT listener.restore_target('sales')")
    for _ in range(2):
        await rows(service, "SELECT * FROM listener.repair_capture()")
        await rows(service, "SELECT * FROM listener.changed_definitions()")
    await settle(service)
    await order(superuser, BERT, "tea", 7)
    await settle(service)
    assert await exact(superuser, *CHAIN)
    assert await one(superuser, "SELECT count(*) FROM grade") == 2


async def test_explain_names_the_key_that_it_waits_for(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await order(superuser, ANNA, "tea")
    await order(superuser, BERT, "tea")
    await settle(service)
    await superuser.execute("SELECT listener.pause('sales')")
    await order(superuser, ANNA, "tea")
    assert operations.reasons(await operations.explain(service, "grade", ANNA)) == [
        f"it reads sales, which has a change that is not drained yet for tenant {ANNA}, and is paused"
    ]
    await service.execute("SELECT listener.drain()")
    (reason,) = operations.reasons(await operations.explain(service, "grade", ANNA))
    assert reason.startswith("it reads sales, which has been dirty for ")
    assert reason.endswith(f"for tenant {ANNA}, and is paused")
    assert operations.reasons(await operations.explain(service, "grade", BERT)) == []
    waits = "SELECT view_name, waits_for FROM listener.freshness WHERE tenant_id = %s ORDER BY 1"
    assert await rows(superuser, waits, ANNA) == [
        ("grade", f"sales of tenant {ANNA}"), ("sales", None), ("totals", f"sales of tenant {ANNA}")
    ]  # fmt: skip
    status = listener("status", url=shop.url())
    assert [line.split()[:2] for line in status.stdout.splitlines()[1:]] == [
        ["grade", "totals"],
        ["sales", "-"],
        ["totals", "sales"],
    ]
    assert f"sales of tenant {ANNA}" in listener("status", "--tenant", ANNA, url=shop.url()).stdout


async def test_what_is_pending_upstream_makes_a_difference_stale(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await order(superuser, ANNA, "tea")
    await order(superuser, BERT, "tea")
    await settle(service)
    await superuser.execute("UPDATE grade SET is_large = NOT is_large")
    await order(superuser, ANNA, "tea")
    verdicts = "SELECT tenant, (listener.compare('grade', tenant)).stale FROM unnest(%s::text[]) tenant"
    assert await rows(service, verdicts, [ANNA, BERT]) == [(ANNA, True), (BERT, False)]


async def test_a_view_without_tenants_reads_a_target_whole_and_is_read_by_tenant(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await create_view(
        shop, "secured", TOTALS.replace("sales", "shop.orders").replace("orders)", "1)"), [], target_rls=True
    )
    ranks = "SELECT tenant_id, rank() OVER (ORDER BY quantity DESC) AS place FROM secured"
    await create_view(shop, "ranks", ranks, ["tenant_id"], tenant_column=None, tenants_query=None)
    await create_view(shop, "winners", "SELECT tenant_id, place = 1 AS wins FROM ranks", [], tenants_query=None)
    await order(superuser, ANNA, "tea", 1)
    await order(superuser, BERT, "tea", 10)
    await settle(service)
    won = "SELECT tenant_id::text, wins FROM winners ORDER BY 1"
    assert await rows(superuser, won) == [(ANNA, False), (BERT, True)]
    await order(superuser, ANNA, "tea", 100)
    (stale,) = await rows(service, "SELECT stale FROM listener.compare('winners', %s)", BERT)
    assert stale == (True,), "BERT's place may change by what ANNA wrote"
    await settle(service)
    assert await rows(superuser, won) == [(ANNA, True), (BERT, False)]
