"""Adopting, keeping and turning back where row-level security binds the owner: what is done, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import AsyncConnection, sql

from conftest import Database
from likeness import LEFTOVERS, kind, likeness
from shop import one, rows
from stranger import BY_TENANT, NULLABLE_KEY, RANKED, TENANTS, WINDOW, WITHOUT_TENANT, billing_app, invoice
from test_adopt import LIST, adopt, as_the_owner_computes, unadopt
from test_inventory import stock

pytestmark = pytest.mark.anyio

BIND: LiteralString = "DROP POLICY populate ON billing.invoices; DROP POLICY populate ON billing.payments"
FREE: LiteralString = "CREATE POLICY populate ON billing.invoices FOR SELECT TO acme_owner USING (true)"
QUERY_VIEWS: LiteralString = "SELECT count(*) FROM pg_class WHERE relname ~ '^invoice_totals_query'"
HELD: LiteralString = "SELECT t::text FROM reporting.invoice_totals t ORDER BY 1"


@pytest.fixture
async def superuser(stranger: Database) -> AsyncIterator[AsyncConnection[Any]]:
    """The stranger's database, where nothing shows the owner all rows any more."""
    async with stranger.connect() as connection:
        await connection.execute(BIND)
        yield connection


async def nothing_is_left(superuser: AsyncConnection[Any]) -> bool:
    """Neither a managed view nor anything of one."""
    return await rows(superuser, LEFTOVERS) == [] and await rows(superuser, "SELECT FROM listener.managed_view") == []


@pytest.mark.parametrize("name", [RANKED, WITHOUT_TENANT])
async def test_what_neither_proof_nor_refresh_can_compute_is_refused_by_all_and_stays_as_it_is(
    stranger: Database, superuser: AsyncConnection[Any], name: LiteralString
) -> None:
    before = await one(superuser, sql.SQL("SELECT count(*) FROM {}").format(sql.SQL(name)))
    found = stock(stranger)[name]
    assert found["proposed"] == "refused"
    assert "from its owner acme_owner" in found["why"]
    assert any("CREATE POLICY" in mend for mend in found["mends"])
    for dry in ([], ["--dry-run"]):
        refused = adopt(stranger, name, *LIST, *dry)
        assert (refused.returncode, refused.stdout) == (1, "")
        last = refused.stderr.strip().splitlines()[-1]
        assert "its owner acme_owner does not see all rows of billing.invoices without a tenant" in last
        assert "so REFRESH would empty it" in last
        assert "CREATE POLICY" in last
    for strategy in ("tenant", "whole", "materialized-view"):
        assert adopt(stranger, name, *LIST, "--strategy", strategy).returncode == 1
    async with stranger.connect("listener_migrator") as migrator:
        with pytest.raises(psycopg.Error, match="REFRESH would empty it"):
            await migrator.execute("SELECT listener.keep_materialized_view(%s)", (name,))
    assert await one(superuser, sql.SQL("SELECT count(*) FROM {}").format(sql.SQL(name))) == before
    assert await nothing_is_left(superuser)


async def test_who_insists_on_a_query_that_is_not_proven_is_told_why_it_cannot_be(
    stranger: Database, superuser: AsyncConnection[Any]
) -> None:
    refused = adopt(stranger, RANKED, *LIST, "--strategy", "tenant")
    assert "neither the whole query nor REFRESH can be trusted, and it is not proven" in refused.stderr
    assert "PARTITION BY invoices.tenant_id" in refused.stderr
    async with stranger.connect("listener_migrator") as migrator:
        view = await one(migrator, "SELECT listener.begin_adoption(%s, tenants_query => %s)", RANKED, LIST[1])
        with pytest.raises(psycopg.Error, match="cannot be refreshed by tenant"):
            await migrator.execute("SELECT listener.check_comparable(%s)", (view,))
        await migrator.execute("SELECT listener.abort_adoption(%s)", (view,))
    assert await nothing_is_left(superuser)


async def test_one_that_is_kept_is_not_emptied_when_its_owner_is_bound_later(
    stranger: Database, superuser: AsyncConnection[Any]
) -> None:
    await superuser.execute(FREE)
    assert adopt(stranger, WITHOUT_TENANT).returncode == 0
    before = await one(superuser, "SELECT count(*) FROM reporting.currency_totals")
    await superuser.execute("DROP POLICY populate ON billing.invoices")
    async with stranger.connect("listener_service") as service:
        with pytest.raises(psycopg.Error, match="REFRESH would empty it"):
            await service.execute("SELECT listener.refresh('currency_totals', '')")
        told = await rows(
            service,
            "SELECT problem, mend FROM listener.state_findings() WHERE view = 'currency_totals' AND level = 'error'",
        )
    assert await one(superuser, "SELECT count(*) FROM reporting.currency_totals") == before
    assert any("hides rows from acme_owner" in problem and "CREATE POLICY" in mend for problem, mend in told)


async def test_a_nested_view_reads_as_its_own_owner(stranger: Database, superuser: AsyncConnection[Any]) -> None:
    await superuser.execute(
        """
        CREATE VIEW billing.all_invoices AS SELECT currency, amount FROM billing.invoices;
        GRANT SELECT ON billing.all_invoices TO acme_owner;
        CREATE VIEW billing.own_invoices WITH (security_invoker = true) AS
        SELECT currency, amount FROM billing.invoices;
        GRANT SELECT ON billing.own_invoices TO acme_owner;
        SET ROLE acme_owner;
        CREATE MATERIALIZED VIEW reporting.through_all AS SELECT sum(amount) FROM billing.all_invoices;
        CREATE MATERIALIZED VIEW reporting.through_own AS SELECT sum(amount) FROM billing.own_invoices WITH NO DATA;
        RESET ROLE
        """
    )
    hidden = "SELECT listener.hidden_from_owner(%s)::text"
    assert await one(superuser, hidden, "reporting.through_all") is None
    assert await one(superuser, hidden, "reporting.through_own") == "billing.invoices"


async def test_a_tenant_that_is_not_listed_is_named_and_one_that_is_gone_is_not(
    stranger: Database, superuser: AsyncConnection[Any]
) -> None:
    fewer = f"{LIST[1]} WHERE id <> '{TENANTS[3]}'"
    refused = adopt(stranger, BY_TENANT, "--tenants-query", fewer, "--strategy", "tenant")
    assert refused.returncode == 1
    assert f"has rows of {TENANTS[3]}, which the tenants query does not list" in refused.stderr
    assert "--tenants-query" in refused.stderr
    assert await nothing_is_left(superuser)
    await superuser.execute("DELETE FROM billing.invoices WHERE tenant_id = %s", (TENANTS[3],))
    adopted = adopt(stranger, BY_TENANT, "--tenants-query", fewer)
    assert adopted.returncode == 0, adopted.stderr
    assert "28 rows differ from those of the last REFRESH of the materialized view" in adopted.stderr
    assert await as_the_owner_computes(superuser, "invoice_totals", BY_TENANT) == []


@pytest.mark.parametrize("options", [(), ("--target-rls",)])
async def test_turned_back_it_holds_the_rows_of_the_target_and_looks_as_before(
    stranger: Database, superuser: AsyncConnection[Any], options: tuple[str, ...]
) -> None:
    before = await likeness(superuser, BY_TENANT)
    held = await rows(superuser, HELD)
    assert adopt(stranger, BY_TENANT, *LIST, *options).returncode == 0
    back = unadopt(stranger, BY_TENANT)
    assert back.returncode == 0, back.stderr
    assert await rows(superuser, HELD) == held
    after = await likeness(superuser, BY_TENANT)
    assert [view for view in after["views"] if view[0] != "reporting.invoice_totals_query"] == before["views"]
    assert {name: what for name, what in after.items() if name != "views"} == {
        name: what for name, what in before.items() if name != "views"
    }
    assert await one(
        superuser, "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE relname = 'invoice_totals_query'"
    ) == ("acme_owner")
    assert await as_the_owner_computes_the_view(superuser) == []
    assert await nothing_is_left(superuser)


async def as_the_owner_computes_the_view(superuser: AsyncConnection[Any]) -> list[Any]:
    """The rows by which the materialized view differs from the view that holds its query now."""
    return await rows(
        superuser,
        """
        WITH whole AS (SELECT q::text FROM reporting.invoice_totals_query q),
             held AS (SELECT t::text FROM reporting.invoice_totals t)
        (TABLE whole EXCEPT ALL TABLE held) UNION ALL (TABLE held EXCEPT ALL TABLE whole)
        """,
    )


async def test_turning_back_goes_on_from_wherever_it_was_killed_and_is_taken_back_whole(
    stranger: Database, superuser: AsyncConnection[Any]
) -> None:
    steps = ("begin_unadoption", "fill_unadoption", "finish_unadoption")
    held = await rows(superuser, HELD)
    async with stranger.connect("listener_migrator") as migrator:
        for done in range(1, len(steps) + 1):
            assert adopt(stranger, BY_TENANT, *LIST).returncode == 0
            for step in steps[:done]:
                await migrator.execute(sql.SQL("SELECT listener.{}('invoice_totals')").format(sql.Identifier(step)))
            if done < len(steps):
                await migrator.execute("SELECT listener.abort_adoption('invoice_totals')")
                assert await kind(superuser, BY_TENANT) == "r"
                assert await one(superuser, QUERY_VIEWS) == done - 1
                for step in steps[:done]:
                    await migrator.execute(sql.SQL("SELECT listener.{}('invoice_totals')").format(sql.Identifier(step)))
            back = unadopt(stranger, "invoice_totals")
            assert back.returncode == 0, back.stderr
            assert await rows(superuser, HELD) == held
            assert await nothing_is_left(superuser)
            assert await one(superuser, QUERY_VIEWS) == done


async def test_rows_that_nothing_explains_refuse_the_swap_back_and_are_named(
    stranger: Database, superuser: AsyncConnection[Any]
) -> None:
    await superuser.execute(FREE)
    assert adopt(stranger, BY_TENANT, *LIST).returncode == 0
    await superuser.execute(
        "CREATE POLICY large ON billing.invoices AS RESTRICTIVE FOR SELECT TO listener_service USING (amount < 900)"
    )
    before = await likeness(superuser, BY_TENANT)
    refused = unadopt(stranger, "invoice_totals")
    assert refused.returncode == 1
    assert f"has other rows than its query for {TENANTS[0]}, {TENANTS[1]}, {TENANTS[2]} and 1 more" in refused.stderr
    assert await kind(superuser, BY_TENANT) == "r"
    assert await likeness(superuser, BY_TENANT) == before
    assert await rows(superuser, LEFTOVERS) == []


@pytest.mark.parametrize("bound", [True, False])
async def test_a_write_that_comes_in_between_is_no_reason_to_refuse(
    stranger: Database, superuser: AsyncConnection[Any], *, bound: bool
) -> None:
    if not bound:
        await superuser.execute(FREE)
    assert adopt(stranger, NULLABLE_KEY, *LIST).returncode == 0
    async with stranger.connect("listener_migrator") as migrator, billing_app(stranger, TENANTS[0]) as app:
        await migrator.execute("SELECT listener.begin_unadoption('category_notes')")
        # Of a change that is not shown yet, the target has nothing.
        await invoice(app, TENANTS[0], 1, "5")
        await migrator.execute("SELECT listener.fill_unadoption('category_notes')")
        await migrator.execute("SELECT listener.abort_adoption('category_notes')")
    back = unadopt(stranger, "category_notes")
    assert back.returncode == 0, back.stderr
    assert await one(superuser, "SELECT sum((details ->> 'invoices')::int) FROM reporting.category_notes") == 2001


async def test_what_counts_the_time_is_turned_back_at_one_moment(
    stranger: Database, superuser: AsyncConnection[Any]
) -> None:
    count = "SELECT count(*) FROM reporting.recent_payments"
    before = await one(superuser, count)
    adopted = adopt(stranger, WINDOW, *LIST)
    assert adopted.returncode == 0, adopted.stderr
    back = unadopt(stranger, WINDOW)
    assert back.returncode == 0, back.stderr
    assert await one(superuser, count) == before


async def test_an_order_that_the_query_does_not_ask_for_is_no_reason_to_refuse(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        await superuser.execute(
            """
            SET ROLE acme_owner;
            CREATE TABLE billing.tags (tenant_id bigint, tag text, filling text DEFAULT repeat('x', 500));
            CREATE INDEX ON billing.tags (tenant_id, tag DESC);
            INSERT INTO billing.tags
            SELECT CASE WHEN n IN (1, 2000, 4000) THEN 1 ELSE 2 END, n FROM generate_series(1, 5000) n;
            CREATE MATERIALIZED VIEW reporting.tags AS
            SELECT tenant_id, string_agg(tag, ',') AS tags FROM billing.tags GROUP BY tenant_id;
            GRANT SELECT ON billing.tags TO listener_service;
            RESET ROLE
            """
        )
        await superuser.execute("ANALYZE billing.tags")
        tenants = ("--tenants-query", "SELECT DISTINCT tenant_id FROM billing.tags")
        assert adopt(stranger, "reporting.tags", *tenants).returncode == 0
        kept = await rows(superuser, "SELECT tags FROM reporting.tags WHERE tenant_id = 1")
        back = unadopt(stranger, "reporting.tags")
        assert back.returncode == 0, back.stderr
        assert await rows(superuser, "SELECT tags FROM reporting.tags WHERE tenant_id = 1") != kept
