"""inventory: every materialized view and managed view, what is known of each, and what adopt would do with it."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest

import stranger
from command import listener
from conftest import Database, install, server_of, start_embedded
from stranger import TENANTS, TENANTS_QUERY, billing_app, invoice

pytestmark = pytest.mark.anyio

WIDTH = 100


@pytest.fixture
def billing(database: Database) -> Database:
    """The stranger's schema."""
    with psycopg.connect(database.url("postgres")) as superuser:
        stranger.load_stranger(superuser)
    return database


def stock(database: Database, *arguments: str, user: str = "listener_service") -> dict[str, dict[str, Any]]:
    """What --json says, by name."""
    ended = listener("inventory", "--json", *arguments, url=database.url(user))
    assert ended.returncode == 0, ended.stderr
    return {view["relation"]: view for view in json.loads(ended.stdout)["views"]}


async def test_each_view_of_a_stranger_gets_the_strategy_that_fits(billing: Database) -> None:
    found = stock(billing, "--tenant-column", "tenant_id", "--tenant-column", "Mandant")
    assert {name: (view["proposed"], view["separable"], view["key_columns"]) for name, view in found.items()} == {
        stranger.BY_TENANT: ("tenant", True, ["tenant_id", "month", "currency"]),
        stranger.UNIQUE_WITHOUT_TENANT: ("tenant", True, ["tenant_id", "customer_id"]),
        stranger.NULLABLE_KEY: ("tenant", True, ["tenant_id", "category"]),
        stranger.WINDOW: ("tenant", True, []),
        stranger.WITHOUT_TENANT: ("materialized view", None, None),
        stranger.RANKED: ("materialized view", False, None),
        stranger.QUOTED: ("tenant", True, ["Mandant", "Kunde"]),
        stranger.TIED: ("refused", True, None),
        stranger.ON_TOP: ("refused", False, None),
    }
    assert (found[stranger.WINDOW]["timed"], found[stranger.WINDOW]["max_age"]) == (["now()"], 60)
    assert "PARTITION BY invoices.tenant_id" in found[stranger.RANKED]["findings"][0]
    assert found[stranger.ON_TOP]["mends"] == [f"adopt {stranger.TIED} first: its changes are seen then"]
    totals = found[stranger.BY_TENANT]
    assert (totals["owner"], totals["kind"], totals["rows"]) == ("acme_owner", "materialized view", 112)
    assert (totals["reads"], totals["unique_key"]) == (["billing.invoices"], ["tenant_id", "month", "currency"])
    assert totals["bytes"] > 0
    assert any("tenants_query" in mend for mend in totals["mends"])


async def test_what_is_printed_fits_a_hundred_columns(billing: Database) -> None:
    ended = listener("inventory", url=billing.url())
    assert ended.returncode == 0
    assert max(map(len, ended.stdout.splitlines())) <= WIDTH
    assert ended.stdout.count("refreshed by nothing that the database shows") == 9
    assert ended.stdout.splitlines()[-1].startswith("9 views, 0 managed; proposals: 4 tenant")


async def test_a_table_of_nobodys_policies_is_proposed_as_a_whole(billing: Database) -> None:
    async with billing.connect() as superuser:
        await superuser.execute("ALTER TABLE billing.invoices DISABLE ROW LEVEL SECURITY")
    found = stock(billing)
    assert {name for name, view in found.items() if view["proposed"] == "whole"} == {
        stranger.WITHOUT_TENANT, stranger.RANKED, stranger.QUOTED,
    }  # fmt: skip


async def test_what_adopt_would_refuse_is_proposed_to_nobody(billing: Database) -> None:
    found = stock(billing)[stranger.TIED]
    assert found["proposed"] == "refused"
    assert "function reporting.balances_of(uuid)" in found["why"]
    assert "materialized view reporting." in found["why"]
    refused = listener("adopt", stranger.TIED, url=billing.url("listener_migrator"))
    assert refused.returncode == 1
    assert "function reporting.balances_of(uuid)" in refused.stderr


async def test_a_target_that_the_service_lists_whole_hides_nothing_from_it(billing: Database) -> None:
    async with billing.connect() as superuser:
        await superuser.execute("SET ROLE listener_owner")
        await superuser.execute(
            "SELECT listener.create_view('sums', 'SELECT tenant_id, sum(amount) AS s FROM billing.payments GROUP BY 1',"
            " tenants_query => %s, target_rls => true)",
            (TENANTS_QUERY,),
        )
        await superuser.execute("CREATE MATERIALIZED VIEW public.how_many AS SELECT count(*) AS n FROM public.sums")
    assert stock(billing)["public.how_many"]["proposed"] == "whole"


async def test_a_managed_view_is_listed_with_how_fresh_it_is(billing: Database) -> None:
    async with billing.connect() as superuser:
        await superuser.execute("SET ROLE listener_owner")
        await superuser.execute(
            "SELECT listener.create_view('sums', 'SELECT tenant_id, sum(amount) AS s FROM billing.payments GROUP BY 1',"
            " tenants_query => %s)",
            (TENANTS_QUERY,),
        )
        await superuser.execute("SELECT listener.keep_materialized_view('reporting.currency_totals')")
    found = stock(billing)
    assert (found["public.sums"]["managed"], found["public.sums"]["strategy"]) == ("sums", "tenant")
    assert found["public.sums"]["refreshed_by"] == ["listener"]
    assert found["public.sums"]["proposed"] is None
    assert found[stranger.WITHOUT_TENANT]["strategy"] == "materialized view"
    assert listener("sweep", url=billing.url()).returncode == 0
    assert stock(billing)["public.sums"]["staleness"].startswith("fresh, refreshed")


async def test_who_refreshes_it_is_told_as_far_as_the_database_shows(billing: Database) -> None:
    async with billing.connect() as superuser:
        await superuser.execute(
            """
            CREATE FUNCTION reporting.renew() RETURNS trigger LANGUAGE plpgsql AS
                'BEGIN REFRESH MATERIALIZED VIEW reporting.tenant_ranks; RETURN NULL; END';
            CREATE TRIGGER renewed AFTER INSERT ON billing.tenants EXECUTE FUNCTION reporting.renew();
            CREATE FUNCTION reporting.other() RETURNS void LANGUAGE sql AS
                'SELECT 1 -- REFRESH MATERIALIZED VIEW reporting.tenant_ranks_2';
            CREATE SCHEMA cron;
            CREATE TABLE cron.job (jobid bigint, schedule text, command text);
            INSERT INTO cron.job VALUES
                (7, '*/5 * * * *', 'refresh materialized view concurrently reporting."Größte Kunden"'),
                (8, '@daily', 'SELECT reporting.renew()'), (9, '@daily', 'VACUUM');
            GRANT USAGE ON SCHEMA cron TO listener_service; GRANT SELECT ON cron.job TO listener_service;
            """
        )
    found = {name: view["refreshed_by"] for name, view in stock(billing).items() if view["refreshed_by"]}
    assert found == {
        stranger.RANKED: [
            "the function reporting.renew()",
            "the trigger renewed on billing.tenants",
            "the job 8 of pg_cron, at @daily",
        ],
        stranger.QUOTED: ["the job 7 of pg_cron, at */5 * * * *"],
    }
    async with billing.connect() as superuser:
        await superuser.execute(
            "REVOKE ALL ON cron.job FROM listener_service; REVOKE USAGE ON SCHEMA cron FROM listener_service"
        )
    assert stock(billing)[stranger.QUOTED]["refreshed_by"] == []


async def test_compare_counts_what_differs_or_says_why_not(billing: Database) -> None:
    async with billing.connect() as superuser:
        await superuser.execute("GRANT acme_owner TO listener_migrator")
    async with billing_app(billing, TENANTS[0]) as app:
        await invoice(app, TENANTS[0], 4, "12.50", category="goods")
    found = stock(billing, "--compare", user="listener_migrator")
    assert (found[stranger.BY_TENANT]["missing"], found[stranger.BY_TENANT]["extra"]) == (1, 1)
    assert found[stranger.BY_TENANT]["staleness"] == "1 row missing, 1 row too many"
    # It is computed of materialized views that are as stale.
    assert found[stranger.ON_TOP]["staleness"].startswith("not at all")
    # Row-level security may show others other rows, and the query runs its owner's code.
    unknown = stock(billing, "--compare")[stranger.BY_TENANT]["staleness"]
    assert unknown.endswith("listener_service may not run a query as acme_owner. Run it as a member of acme_owner.")
    async with billing.connect() as superuser:
        await superuser.execute(
            "CREATE MATERIALIZED VIEW reporting.slow AS SELECT 1 AS x, pg_sleep(10) IS NULL AS y WITH NO DATA;"
            "ALTER MATERIALIZED VIEW reporting.slow OWNER TO acme_owner"
        )
    slow = stock(billing, "--compare", "--timeout", "0.2", user="listener_migrator")["reporting.slow"]
    assert slow["staleness"].startswith("unknown: ")
    assert slow["populated"] is False


async def test_what_somebody_holds_a_lock_on_stops_no_other(billing: Database) -> None:
    async with billing.connect(autocommit=False) as superuser:
        await superuser.execute("REFRESH MATERIALIZED VIEW reporting.tenant_ranks")
        found = stock(billing)
    assert "holds a lock" in found[stranger.RANKED]["error"]
    assert found[stranger.BY_TENANT]["proposed"] == "tenant"


async def test_what_the_service_lacks_is_named(billing: Database) -> None:
    async with billing.connect() as superuser:
        await superuser.execute(
            "REVOKE acme_owner FROM listener_owner; REVOKE USAGE ON SCHEMA billing FROM listener_service;"
            "REVOKE SELECT ON billing.payments FROM listener_service"
        )
    found = stock(billing)[stranger.TIED]
    assert (found["separable"], found["findings"]) == (
        None,
        ["PostgreSQL could not plan it for one tenant: permission denied for schema billing"],
    )
    assert {
        "GRANT acme_owner TO listener_owner;",
        "GRANT USAGE ON SCHEMA billing TO listener_service; GRANT SELECT ON billing.payments TO listener_service;",
    } <= set(found["mends"])
    async with billing.connect() as superuser:
        await superuser.execute("REVOKE USAGE ON SCHEMA reporting FROM listener_service")
    assert {view.get("error") for view in stock(billing).values()} == {
        "permission denied for schema reporting: look as a member of its owner, or as an administrator"
    }
    seen = stock(billing, user="postgres")[stranger.TIED]
    assert "GRANT USAGE ON SCHEMA reporting TO listener_service;" in seen["mends"]


async def test_the_time_of_a_commit_is_told_where_it_is_kept() -> None:
    with start_embedded(track_commit_timestamp="on") as embedded:
        server = server_of(embedded)
        name = server.clone("template0")
        install(server, name)
        with psycopg.connect(server.url("postgres", name), autocommit=True) as superuser:
            superuser.execute("CREATE MATERIALIZED VIEW public.one AS SELECT 1 AS x")
        ended = listener("inventory", url=server.url("listener_service", name))
    assert "rewritten or altered" in ended.stdout


async def test_bad_input_is_one_line(billing: Database) -> None:
    for arguments in (["--timeout", "0"], ["--timeout", "soon"], ["extra"]):
        ended = listener("inventory", *arguments, url=billing.url())
        assert ended.returncode != 0
        assert "Traceback" not in ended.stderr
    with psycopg.connect(billing.url("postgres"), autocommit=True) as superuser:
        superuser.execute("DROP SCHEMA reporting, billing CASCADE")
    assert "0 views, 0 managed" in listener("inventory", url=billing.url()).stdout
