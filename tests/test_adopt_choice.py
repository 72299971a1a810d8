"""What inventory proposes adopt does: dry runs, refusals, max_age, the owner of the target, and who may write it."""

from __future__ import annotations

import json
from typing import Any, LiteralString

import pytest
from psycopg import sql

from command import listener
from conftest import Database
from likeness import LEFTOVERS, likeness
from shop import one, rows
from stranger import BY_TENANT, RANKED, TENANTS, WINDOW, invoice
from test_adopt import LIST, adopt, unadopt
from test_inventory import stock

pytestmark = pytest.mark.anyio

STATE: LiteralString = """
    SELECT oid::text, xmin::text FROM pg_class UNION ALL SELECT oid::text, xmin::text FROM pg_trigger
    UNION ALL SELECT oid::text, xmin::text FROM pg_proc ORDER BY 1, 2
"""
ODD: LiteralString = """
    SET ROLE acme_owner;
    CREATE TABLE billing.points (tenant_id bigint, at point, note text);
    INSERT INTO billing.points VALUES (1, '(1,2)', 'a'), (2, '(3,4)', 'b');
    GRANT SELECT ON billing.points TO listener_service;
    CREATE MATERIALIZED VIEW reporting.points AS SELECT tenant_id, count(*) FROM billing.points GROUP BY 1;
    CREATE MATERIALIZED VIEW reporting.odd_names AS
    SELECT note AS "listener.row", count(*) FROM billing.points GROUP BY 1;
    CREATE MATERIALIZED VIEW reporting.whole AS SELECT count(*) FROM billing.points;
    CREATE UNLOGGED TABLE billing.passing (tenant_id bigint);
    CREATE MATERIALIZED VIEW reporting.passing AS SELECT tenant_id FROM billing.passing;
    CREATE MATERIALIZED VIEW reporting.numbers AS SELECT n FROM generate_series(1, 3) n;
    RESET ROLE;
    CREATE MATERIALIZED VIEW reporting.of_root AS SELECT tenant_id, count(*) FROM billing.points GROUP BY 1
"""


async def test_a_dry_run_takes_the_strategy_that_adopt_takes_and_refuses_what_it_refuses(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        await superuser.execute(ODD)
        await superuser.execute("DROP POLICY populate ON billing.payments")
        for name, found in stock(stranger, "--tenant-column", "tenant_id").items():
            before = await rows(superuser, STATE)
            shown = adopt(stranger, name, *LIST_FOR.get(name, LIST), "--dry-run")
            assert await rows(superuser, STATE) == before, name
            adopted = adopt(stranger, name, *LIST_FOR.get(name, LIST), "--json")
            proposed = found["proposed"] if not blocked(found) else "refused"
            assert (shown.returncode == 0) == (adopted.returncode == 0) == (proposed != "refused"), (
                name,
                proposed,
                shown,
            )
            if adopted.returncode:
                assert shown.stderr.strip().splitlines()[-1] == adopted.stderr.strip().splitlines()[-1]
                assert await rows(superuser, LEFTOVERS) == []
                continue
            strategy = json.loads(adopted.stdout)["strategy"]
            assert strategy == proposed, (name, found["why"])
            told = {
                "tenant": "refreshed by tenant",
                "whole": "refreshed as a whole",
                "materialized view": "keep_material",
            }
            assert told[strategy] in shown.stdout, (name, shown.stdout)
            assert unadopt(stranger, name).returncode == 0


LIST_FOR = {"reporting.points": ("--tenants-query", "SELECT DISTINCT tenant_id FROM billing.points")}


def blocked(found: dict[str, Any]) -> bool:
    """Whether inventory says what must be done before."""
    return any(mend.startswith(("GRANT", "ALTER")) for mend in found["mends"])


async def test_the_default_age_is_what_inventory_says_and_the_dry_run_shows_it(stranger: Database) -> None:
    assert stock(stranger)[WINDOW]["max_age"] == 60
    assert (
        "refreshed by tenant, each key at least once in 00:01:00" in adopt(stranger, WINDOW, *LIST, "--dry-run").stdout
    )
    async with stranger.connect() as superuser:
        await superuser.execute(
            """
            SET ROLE acme_owner;
            CREATE MATERIALIZED VIEW reporting.days AS SELECT tenant_id, count(*) FROM billing.payments
            WHERE received_at > date_trunc('day', now()) - interval '90 days' GROUP BY 1;
            RESET ROLE
            """
        )
        assert adopt(stranger, "reporting.days", *LIST).returncode == 0
        assert adopt(stranger, WINDOW, *LIST).returncode == 0
        assert await rows(superuser, "SELECT name, max_age::text FROM listener.managed_view ORDER BY 1") == [
            ("days", "01:00:00"),
            ("recent_payments", "00:01:00"),
        ]


async def test_why_a_strategy_is_not_taken_the_dry_run_tells_as_adopt_does(stranger: Database) -> None:
    shown = adopt(stranger, RANKED, *LIST, "--dry-run")
    told = adopt(stranger, RANKED, *LIST)
    assert shown.stdout.startswith("SELECT listener.keep_materialized_view('reporting.tenant_ranks'")
    assert [line for line in shown.stderr.splitlines() if line.startswith("not ")] == [
        line for line in told.stderr.splitlines() if line.startswith("not ")
    ]
    assert "not as a whole" in shown.stderr


async def test_a_dry_run_compares_as_adopt_does(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        await superuser.execute(
            "CREATE POLICY large ON billing.invoices AS RESTRICTIVE FOR SELECT TO listener_service USING (amount < 900)"
        )
    shown = adopt(stranger, BY_TENANT, *LIST, "--dry-run")
    assert "not by tenant: computed alone, other rows come out for" in shown.stderr
    assert shown.stdout.startswith("SELECT listener.keep_materialized_view")


async def test_a_dry_run_leaves_an_adoption_alone_that_is_under_way(stranger: Database) -> None:
    async with stranger.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.begin_adoption(%s, tenants_query => %s)", (BY_TENANT, LIST[1]))
        before = await rows(migrator, STATE)
        shown = adopt(stranger, BY_TENANT, *LIST, "--max-age", "2 hours", "--dry-run")
        assert shown.returncode == 0, shown.stderr
        assert await rows(migrator, STATE) == before


async def test_a_dry_run_waits_for_no_writer(stranger: Database) -> None:
    async with stranger.connect("acme_app", autocommit=False) as app:
        await app.execute("SELECT set_config('app.current_tenant_id', %s, false)", (TENANTS[0],))
        await invoice(app, TENANTS[0], 1, "5")
        shown = adopt(stranger, BY_TENANT, *LIST, "--dry-run")
        assert shown.returncode == 0, shown.stderr
        assert "refreshed by tenant" in shown.stdout


async def test_no_setting_of_a_session_keeps_triggers_off_a_source(stranger: Database) -> None:
    async with stranger.connect("listener_migrator") as migrator:
        await migrator.execute("SET listener.rehearsal = '1'; SELECT listener.begin_rehearsal()")
        await migrator.execute("SELECT listener.begin_adoption(%s, tenants_query => %s)", (BY_TENANT, LIST[1]))
        assert await one(migrator, "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'listener\\_%'") > 0


async def test_the_grants_that_inventory_lists_are_those_that_adopt_needs(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        await superuser.execute(
            """
            REVOKE acme_owner FROM listener_owner;
            ALTER SCHEMA reporting OWNER TO postgres;
            GRANT USAGE ON SCHEMA reporting TO acme_owner;
            REVOKE USAGE ON SCHEMA billing FROM listener_service;
            SET ROLE acme_owner;
            CREATE VIEW billing.plain WITH (security_invoker = true) AS SELECT tenant_id, amount FROM billing.payments;
            CREATE MATERIALIZED VIEW billing.sums AS
            SELECT tenant_id, sum(amount) AS amount FROM billing.plain GROUP BY 1;
            RESET ROLE
            """
        )
        for name in (BY_TENANT, "billing.sums"):
            assert adopt(stranger, name, *LIST).returncode == 1
            mends = [mend for mend in stock(stranger, user="postgres")[name]["mends"] if "GRANT" in mend]
            assert any("-- CREATE until it is adopted" in mend for mend in mends) == (name == BY_TENANT)
            for mend in mends:
                await superuser.execute(mend.partition("; CREATE can")[0].encode())
            adopted = adopt(stranger, name, *LIST)
            assert adopted.returncode == 0, "\n".join([*mends, adopted.stderr])
        creating = "SELECT has_schema_privilege('acme_owner', 'reporting', 'CREATE')"
        assert await one(superuser, creating)
        # As is said, it can be revoked: refreshes go on, and doctor asks for nothing.
        await superuser.execute("REVOKE CREATE ON SCHEMA reporting FROM acme_owner, listener_owner")
        assert listener("sweep", url=stranger.url()).returncode == 0
        told = json.loads(listener("doctor", "--json", url=stranger.url()).stdout)["findings"]
        assert not [finding for finding in told if "GRANT CREATE" in (finding["mend"] or "")]


async def test_a_target_of_another_owner_is_read_by_all_and_goes_back_to_its_owner(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        before = await likeness(superuser, BY_TENANT)
        refused = adopt(stranger, BY_TENANT, *LIST, "--owner", "acme_auditor")
        assert "role listener_owner is no member of it. GRANT acme_auditor TO listener_owner;" in refused.stderr
        assert "there is no role nobody_at_all" in adopt(stranger, BY_TENANT, *LIST, "--owner", "nobody_at_all").stderr
        refused = adopt(stranger, BY_TENANT, *LIST, "--owner", "postgres")
        assert "that role is a superuser. Name another role, for example listener_owner." in refused.stderr
        # Where everything belongs to a superuser, this is no hindrance.
        await superuser.execute("SELECT listener.check_new_owner(%s::regclass, current_user)", (BY_TENANT,))
        adopted = adopt(stranger, BY_TENANT, *LIST, "--owner", "listener_owner")
        assert adopted.returncode == 0, adopted.stderr
        after = await likeness(superuser, BY_TENANT)
        assert after["owner"] == "listener_owner"
        granted = {grant[2:] for grant in after["grants"]}
        assert ("acme_owner", "SELECT", False) in granted
        assert {grant[2:] for grant in before["grants"]} <= granted
        assert after["views"] == before["views"]
        for reader in ("acme_dashboard", "acme_auditor"):
            async with stranger.connect(reader) as connection:
                assert await one(connection, "SELECT count(*) FROM reporting.invoice_totals") > 0
                if reader == "acme_dashboard":
                    assert await one(connection, "SELECT count(*) FROM reporting.invoice_years") > 0
        assert unadopt(stranger, BY_TENANT).returncode == 0
        assert await likeness(superuser, BY_TENANT) == before


async def test_doctor_finds_who_of_the_application_may_write_a_target(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        assert adopt(stranger, BY_TENANT, *LIST).returncode == 0

        def told() -> list[tuple[str, str]]:
            ended = listener("doctor", "--json", url=stranger.url())
            return [
                (finding["problem"], finding["mend"])
                for finding in json.loads(ended.stdout)["findings"]
                if finding["object"] == BY_TENANT and finding["check"] == "roles"
            ]

        assert told() == []
        await superuser.execute("GRANT UPDATE, TRUNCATE ON reporting.invoice_totals TO acme_app")
        ((problem, mend),) = told()
        assert problem == "acme_app, which writes sources, may write this target, too: UPDATE, TRUNCATE."
        await superuser.execute(mend.encode())
        assert told() == []
        await superuser.execute("GRANT acme_owner TO acme_app")
        ((problem, mend),) = told()
        assert "acme_app, a role of the application, is a member of the role that owns it" in problem
        assert "switch its row-level security off" in problem
        await superuser.execute(mend.encode())
        assert told() == []
        assert await one(superuser, "SELECT has_table_privilege('acme_owner', %s, 'SELECT')", BY_TENANT)
        await superuser.execute("REVOKE acme_owner FROM acme_app")


CLOCKS = {
    "now() - max(p.received_at)": True,
    "extract(epoch FROM now() - max(p.received_at))::int": True,
    "max(p.received_at) > CURRENT_TIMESTAMP - interval '5 min'": True,
    "CASE WHEN max(p.received_at) < clock_timestamp() THEN 1 END": True,
    "localtimestamp": True,
    "max(p.received_at)": False,
    "count(*) FILTER (WHERE p.received_at > now() - interval '1 day')": False,
    "sum(CASE WHEN p.received_at > now() THEN 1 END)": False,
    "CURRENT_DATE - max(p.received_at)::date": False,
    "date_trunc('day', now()) - max(p.received_at)": False,
    "now()::date": False,
    "(SELECT count(*) FROM billing.tenants t WHERE now() > '2020-01-01')": False,
}


async def test_a_column_that_counts_the_clock_is_told_from_a_condition_on_it(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        found = {}
        for expression in CLOCKS:
            await superuser.execute(
                sql.SQL(
                    """
                    CREATE OR REPLACE VIEW billing.inner_one AS
                    SELECT p.tenant_id, ({} )::text AS "the Column {{1}}" FROM billing.payments p
                    WHERE p.received_at < now() GROUP BY p.tenant_id
                    """
                ).format(sql.SQL(expression))
            )
            await superuser.execute(
                """
                CREATE OR REPLACE VIEW billing.outer_one AS
                SELECT * FROM (SELECT tenant_id, "the Column {1}" FROM billing.inner_one WHERE now() > '2020-01-01') x
                """
            )
            for view in ("billing.inner_one", "billing.outer_one"):
                columns = await rows(superuser, "SELECT c FROM listener.clock_columns(%s) c", view)
                found[expression] = columns == [("the Column {1}",)]
                assert found[expression] or columns == []
        assert found == CLOCKS
