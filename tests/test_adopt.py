"""`listener adopt` and `listener unadopt` on a stranger's schema."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, LiteralString

import anyio
import pytest
from anyio import to_thread
from psycopg import AsyncConnection, sql

from command import ROOT, listener
from conftest import Database, eventually
from likeness import LEFTOVERS, kind, likeness
from shop import one, rows, settle
from stranger import (
    BY_TENANT,
    NULLABLE_KEY,
    ON_TOP,
    QUOTED,
    RANKED,
    TENANTS,
    TENANTS_QUERY,
    TIED,
    UNIQUE_WITHOUT_TENANT,
    WINDOW,
    WITHOUT_TENANT,
    billing_app,
    invoice,
)

pytestmark = pytest.mark.anyio

LIST = ("--tenants-query", TENANTS_QUERY)
BY_TENANT_ALL = [
    (BY_TENANT, ()),
    (UNIQUE_WITHOUT_TENANT, ()),
    (NULLABLE_KEY, ()),
    (WINDOW, ("--max-age", "1 day")),
    (QUOTED, ("--tenant-column", "Mandant")),
]


def adopt(database: Database, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return listener("adopt", name, *options, url=database.url("listener_migrator"))


def unadopt(database: Database, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return listener("unadopt", name, *options, url=database.url("listener_migrator"))


def mends(database: Database) -> list[str]:
    """What doctor would have done."""
    ended = listener("doctor", "--json", url=database.url("listener_service"))
    return [finding["mend"] for finding in json.loads(ended.stdout)["findings"] if finding["mend"]]


def psql(database: Database, script: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script as somebody who may change views, to its first error."""
    command = [database.server.psql, "-X", "-v", "ON_ERROR_STOP=1", "-f", str(script)]
    return subprocess.run([*command, database.url("listener_migrator")], capture_output=True, text=True, check=False)


async def exact(database: Database) -> bool:
    """Whether every target equals its definition and no change is under way; as the service sees it."""
    async with database.connect("listener_service") as service:
        unlike = await rows(
            service,
            """
            SELECT v.name, t, c.*
            FROM listener.managed_view v, listener.tenants(v.name) t, listener.compare(v.name, t) c
            WHERE c.missing + c.extra > 0 OR c.stale
            """,
        )
        return unlike == []


async def as_the_owner_computes(superuser: AsyncConnection[Any], view: str, target: LiteralString) -> list[Any]:
    """The rows by which a target differs from its query, computed as a whole by one who sees all rows."""
    query = await one(
        superuser,
        """
        SELECT rtrim(a.definition, '; ') FROM listener.adoption a JOIN listener.managed_view v ON v.id = a.view_id
        WHERE v.name = %s
        """,
        view,
    )
    return await rows(
        superuser,
        sql.SQL(
            """
            WITH whole AS (SELECT row(q.*)::text FROM ({}) q), held AS (SELECT row(t.*)::text FROM {} t)
            (TABLE whole EXCEPT ALL TABLE held) UNION ALL (TABLE held EXCEPT ALL TABLE whole)
            """
        ).format(sql.SQL(query), sql.SQL(target)),
    )


@pytest.mark.parametrize(("name", "options"), BY_TENANT_ALL)
async def test_adopt_keeps_all_that_readers_see_and_unadopt_gives_the_same_back(
    stranger: Database, name: LiteralString, options: tuple[str, ...]
) -> None:
    async with stranger.connect() as superuser:
        before = await likeness(superuser, name)
        definition = await one(superuser, "SELECT pg_get_viewdef(%s::regclass)", name)
        adopted = adopt(stranger, name, *LIST, *options)
        assert adopted.returncode == 0, adopted.stderr
        assert adopted.stdout.startswith(f"adopted: {name} is kept fresh as ")
        assert "SHARE ROW EXCLUSIVE on billing." in adopted.stderr
        assert "ACCESS EXCLUSIVE on reporting." in adopted.stderr
        assert await kind(superuser, name) == "r"
        after = await likeness(superuser, name)
        view = await one(superuser, "SELECT name FROM listener.managed_view")
        assert await as_the_owner_computes(superuser, view, name) == []
        for same in ("columns", "owner", "options", "views"):
            assert after[same] == before[same]
        service = {grant for grant in after["grants"] if grant[2] == "listener_service"}
        assert set(before["grants"]) == set(after["grants"]) - service
        assert {grant[3] for grant in service} == {"SELECT", "INSERT", "UPDATE", "DELETE"}
        names = {index[0] for index in after["indexes"]}
        assert {index[0] for index in before["indexes"]} <= names
        assert before["comment"] in {None, after["comment"]}
        assert sum("UNIQUE" in index[1] for index in after["indexes"]) == (0 if name == WINDOW else 1)
        assert await rows(superuser, LEFTOVERS) == []

        back = unadopt(stranger, name)
        assert back.returncode == 0, back.stderr
        assert await kind(superuser, name) == "m"
        assert await likeness(superuser, name) == before
        assert await one(superuser, "SELECT pg_get_viewdef(%s::regclass)", name) == definition
        assert await one(superuser, "SELECT relispopulated FROM pg_class WHERE oid = %s::regclass", name)
        assert await rows(superuser, LEFTOVERS) == []
        assert await rows(superuser, "SELECT name FROM listener.managed_view") == []


async def test_a_unique_index_without_the_tenant_is_kept_without_being_unique_and_says_so(stranger: Database) -> None:
    adopted = adopt(stranger, UNIQUE_WITHOUT_TENANT, *LIST)
    assert "the unique index customer_totals_customer is not unique any more" in adopted.stderr
    async with stranger.connect() as superuser:
        assert await one(superuser, "SELECT pg_get_indexdef('reporting.customer_totals_customer'::regclass)") == (
            "CREATE INDEX customer_totals_customer ON reporting.customer_totals USING btree (customer_id)"
        )


async def test_an_index_on_the_key_is_the_targets_own_under_its_name(stranger: Database) -> None:
    adopt(stranger, BY_TENANT, *LIST)
    async with stranger.connect() as superuser:
        assert await one(superuser, "SELECT pg_get_indexdef('reporting.invoice_totals_key'::regclass)") == (
            "CREATE UNIQUE INDEX invoice_totals_key ON reporting.invoice_totals "
            "USING btree (tenant_id, month, currency) NULLS NOT DISTINCT"
        )
        assert (
            await one(superuser, "SELECT count(*) FROM pg_index WHERE indrelid = 'reporting.invoice_totals'::regclass")
            == 2
        )


@pytest.mark.parametrize("name", [WITHOUT_TENANT, RANKED])
async def test_what_is_no_tenants_alone_stays_a_materialized_view_and_says_why(stranger: Database, name: str) -> None:
    async with stranger.connect() as superuser:
        before = await likeness(superuser, name)
        adopted = adopt(stranger, name, *LIST)
        assert adopted.returncode == 0, adopted.stderr
        assert adopted.stdout == f"{name} stays a materialized view, refreshed when what it reads changes\n"
        why = "it is not proven that a tenant's rows depend" if name == RANKED else "it has no column tenant_id"
        assert f"not by tenant: {why}" in adopted.stderr
        assert "not as a whole: the whole view cannot be computed: row-level security" in adopted.stderr
        assert await rows(superuser, "SELECT strategy FROM listener.managed_view") == [("materialized view",)]
        assert await rows(superuser, LEFTOVERS) == []
        assert unadopt(stranger, name).returncode == 0
        assert (await likeness(superuser, name))["indexes"] == before["indexes"]
        assert await kind(superuser, name) == "m"


@pytest.mark.parametrize("name", [WINDOW, RANKED])
async def test_what_depends_on_the_time_is_refreshed_as_often_as_inventory_says_unless_told_otherwise(
    stranger: Database, name: str
) -> None:
    for options, age in ((), "0:01:00"), (("--max-age", "1 day"), "1 day, 0:00:00"):
        adopted = adopt(stranger, name, *LIST, *options)
        assert adopted.returncode == 0, adopted.stderr
        told = (
            "reporting.recent_payments depends on the time: each key is refreshed at least once a minute"
            in adopted.stderr
        )
        assert told == (name == WINDOW and not options)
        async with stranger.connect() as superuser:
            kept = await one(superuser, "SELECT max_age FROM listener.managed_view")
        assert str(kept) == (age if name == WINDOW or options else "None")
        assert unadopt(stranger, name).returncode == 0


async def test_the_time_zone_is_the_databases_unless_told_otherwise_and_is_told(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        await superuser.execute(
            sql.SQL("ALTER DATABASE {} SET TimeZone = 'Asia/Tokyo'").format(sql.Identifier(stranger.name))
        )
        for options, zone in ((), "Asia/Tokyo"), (("--timezone", "Europe/Paris"), "Europe/Paris"):
            adopted = adopt(stranger, WINDOW, *LIST, *options)
            assert f"key (the whole row), time zone {zone}" in adopted.stderr
            assert await one(superuser, "SELECT time_zone FROM listener.managed_view") == zone
            days = "SELECT count(*) FROM reporting.recent_payments WHERE (day AT TIME ZONE %s)::time <> '00:00'"
            assert await one(superuser, days, zone) == 0
            assert unadopt(stranger, WINDOW).returncode == 0
            assert await one(superuser, days, zone) == 0


async def test_rows_that_a_policy_hides_from_the_service_are_missed_before_the_swap(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        await superuser.execute(
            """
            CREATE POLICY large ON billing.invoices AS RESTRICTIVE FOR SELECT TO listener_service USING (amount < 900)
            """
        )
        adopted = adopt(stranger, BY_TENANT, *LIST)
        (why,) = [line for line in adopted.stderr.splitlines() if line.startswith("not by tenant: ")]
        assert why.startswith("not by tenant: computed alone, other rows come out for 00000000-")
        # No terminal is at the other end, so nothing is folded.
        assert len(why) > 120
        assert await kind(superuser, BY_TENANT) == "m"


async def test_tenants_that_the_tenants_query_does_not_list_are_missed_before_the_swap(stranger: Database) -> None:
    refused = adopt(stranger, BY_TENANT, "--tenants-query", f"{TENANTS_QUERY} LIMIT 3", "--strategy", "tenant")
    assert f"computed alone, other rows come out for {TENANTS[3]}" in refused.stderr


async def test_rows_without_a_tenant_are_named_so(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        await superuser.execute(
            """
            SET ROLE acme_owner;
            CREATE TABLE billing.leads (tenant_id bigint);
            INSERT INTO billing.leads VALUES (1), (NULL);
            CREATE MATERIALIZED VIEW reporting.leads AS SELECT tenant_id, count(*) FROM billing.leads GROUP BY 1;
            GRANT SELECT ON billing.leads TO listener_service;
            """
        )
    refused = adopt(stranger, "reporting.leads", "--tenants-query", "SELECT 1::bigint", "--strategy", "tenant")
    assert "computed alone, other rows come out for rows without a tenant" in refused.stderr


async def test_rows_that_are_the_same_by_chance_are_no_proof(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        await superuser.execute(
            """
            SET ROLE acme_owner;
            CREATE TABLE billing.leads (tenant_id bigint);
            INSERT INTO billing.leads VALUES (1), (2);
            CREATE MATERIALIZED VIEW reporting.ranks AS
            SELECT tenant_id, rank() OVER (ORDER BY count(*)) FROM billing.leads GROUP BY 1;
            GRANT SELECT ON billing.leads TO listener_service;
            """
        )
    tenants = ("--tenants-query", "SELECT DISTINCT tenant_id FROM billing.leads")
    adopted = adopt(stranger, "reporting.ranks", *tenants)
    assert adopted.returncode == 0, adopted.stderr
    assert adopted.stdout.startswith("adopted: reporting.ranks is kept fresh as ranks, as a whole"), adopted.stdout
    assert "not by tenant: it is not proven" in adopted.stderr
    # Who insists is told what it rests on.
    assert unadopt(stranger, "reporting.ranks").returncode == 0
    adopted = adopt(stranger, "reporting.ranks", "--strategy", "tenant", *tenants)
    assert adopted.returncode == 0, adopted.stderr
    assert "by the rows that there are now; it is not proven that they stay so" in adopted.stderr
    assert "it is not proven" not in adopt(stranger, BY_TENANT, *LIST).stderr


@pytest.mark.parametrize("listed", ["SELECT DISTINCT tenant_id FROM billing.visits", "SELECT 1"])
async def test_what_the_planner_proves_is_not_computed_twice_if_all_tenants_are_listed(
    stranger: Database, listed: str
) -> None:
    async with stranger.connect() as superuser:
        await superuser.execute(
            """
            SET ROLE acme_owner;
            CREATE TABLE billing.visits (tenant_id bigint, day date);
            INSERT INTO billing.visits VALUES (1, '2026-01-01'), (1, '2026-01-01'), (2, '2026-01-01');
            CREATE MATERIALIZED VIEW reporting.visits AS
            SELECT tenant_id, day, count(*) FROM billing.visits GROUP BY 1, 2;
            GRANT SELECT ON billing.visits TO listener_service;
            RESET ROLE
            """
        )
        adopted = adopt(stranger, "reporting.visits", "--tenants-query", listed, "--strategy", "tenant")
        if listed == "SELECT 1":
            assert "computed alone, other rows come out for 2" in adopted.stderr
        else:
            assert adopted.returncode == 0, adopted.stderr
            assert "PostgreSQL's planner shows" in adopted.stderr


async def test_without_row_level_security_a_view_without_tenants_is_adopted_as_a_whole(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        await superuser.execute(
            """
            SET ROLE acme_owner;
            CREATE MATERIALIZED VIEW reporting.initials AS
            SELECT left(name, 1) AS initial, count(*) AS tenants FROM billing.tenants GROUP BY 1;
            RESET ROLE
            """
        )
        adopted = adopt(stranger, "reporting.initials")
        assert adopted.stdout == "adopted: reporting.initials is kept fresh as initials, as a whole\n", adopted.stderr
        assert await rows(superuser, "TABLE reporting.initials") == [("T", 4)]
        async with stranger.service():
            await superuser.execute("INSERT INTO billing.tenants VALUES (gen_random_uuid(), 'Another')")
            await eventually(lambda: one(superuser, "SELECT count(*) = 2 FROM reporting.initials"))
        assert unadopt(stranger, "reporting.initials").returncode == 0
        assert await kind(superuser, "reporting.initials") == "m"


async def test_what_is_tied_to_its_rows_is_named_before_anything_is_touched(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        await superuser.execute(
            """
            SET ROLE acme_owner;
            CREATE VIEW reporting.as_json AS SELECT to_jsonb(b) AS row FROM reporting.customer_balances b;
            CREATE TABLE reporting.archive (taken_at timestamptz, balance reporting.customer_balances);
            CREATE FUNCTION reporting.largest() RETURNS numeric LANGUAGE sql STABLE
                BEGIN ATOMIC SELECT max(balance) FROM reporting.customer_balances; END;
            RESET ROLE;
            CREATE VIEW reporting.of_another AS SELECT tenant_id FROM reporting.customer_balances;
            CREATE VIEW reporting.of_a_reader AS SELECT tenant_id FROM reporting.customer_balances;
            ALTER VIEW reporting.of_a_reader OWNER TO acme_auditor;
            """
        )
        before = await rows(
            superuser, "SELECT oid, xmin::text FROM pg_class WHERE relnamespace = 'reporting'::regnamespace"
        )
        for dry in ([], ["--dry-run"]):
            refused = adopt(stranger, TIED, *LIST, *dry)
            assert (refused.returncode, refused.stdout) == (1, "")
            for tied in (
                "function reporting.balances_of(uuid)",
                "function reporting.largest()",
                "materialized view reporting.balance_summary, which reads it",
                "view reporting.as_json, which names its whole row",
                "column balance of table reporting.archive",
                "view reporting.of_another, which belongs to postgres: ALTER VIEW reporting.of_another OWNER TO",
                "view reporting.of_a_reader, which belongs to acme_auditor: GRANT acme_auditor TO listener_owner",
            ):
                assert tied in refused.stderr
            assert len(refused.stderr.strip().splitlines()) == 1
        assert await rows(superuser, LEFTOVERS) == []
        assert before == await rows(
            superuser, "SELECT oid, xmin::text FROM pg_class WHERE relnamespace = 'reporting'::regnamespace"
        )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nowhere.nothing",), "there is no materialized view nowhere.nothing. There are: reporting."),
        (("billing.invoices",), "billing.invoices is no materialized view"),
        (('"',), 'there is no materialized view ".'),
        ((BY_TENANT,), "Give tenants_query"),
        ((BY_TENANT, *LIST, "--key", "nothing"), "the query returns no column nothing"),
        ((BY_TENANT, *LIST, "--key", "month"), "returns two rows with one key"),
        ((BY_TENANT, *LIST, "--timezone", "Nowhere"), "there is no time zone 'Nowhere'"),
        ((BY_TENANT, *LIST, "--quiet-period", "soon"), "invalid input syntax for type interval"),
        ((BY_TENANT, "--tenants-query", "SELECT id FROM nowhere"), 'relation "nowhere" does not exist'),
        ((BY_TENANT, *LIST, "--tenant-column", "nothing", "--strategy", "tenant"), "has no column nothing"),
        ((RANKED, *LIST, "--strategy", "tenant"), "cannot be refreshed by tenant"),
        ((WITHOUT_TENANT, "--strategy", "whole"), "row-level security hides rows"),
        ((ON_TOP, *LIST), "reads the materialized view reporting.customer_balances, whose changes fire no trigger"),
        ((BY_TENANT, "--abort"), "no adoption of reporting.invoice_totals is under way"),
    ],
)
async def test_what_is_refused_is_one_line_and_leaves_everything_as_it_was(
    stranger: Database, arguments: tuple[str, ...], told: str
) -> None:
    async with stranger.connect() as superuser:
        before = await likeness(superuser, BY_TENANT)
        refused = adopt(stranger, *arguments)
        last = refused.stderr.strip().splitlines()[-1]
        assert (refused.returncode, refused.stdout) == (1, "")
        assert last.startswith("listener: ")
        assert told in last
        assert await likeness(superuser, BY_TENANT) == before
        assert await kind(superuser, BY_TENANT) == "m"
        assert await rows(superuser, LEFTOVERS) == []
        assert await rows(superuser, "SELECT name FROM listener.managed_view") == []


async def test_a_dry_run_changes_nothing_and_its_script_does_the_same(stranger: Database, tmp_path: Path) -> None:
    state = (
        "SELECT oid::text, xmin::text FROM pg_class UNION ALL SELECT oid::text, xmin::text FROM pg_trigger ORDER BY 1"
    )
    async with stranger.connect() as superuser:
        before = await rows(superuser, state)
        shown = adopt(stranger, BY_TENANT, *LIST, "--dry-run")
        assert shown.returncode == 0
        assert await rows(superuser, state) == before
        like = await likeness(superuser, BY_TENANT)
        for script in (shown.stdout, None):
            text = unadopt(stranger, BY_TENANT, "--dry-run").stdout if script is None else script
            (tmp_path / "script.sql").write_text(text)
            done = psql(stranger, tmp_path / "script.sql")
            assert done.returncode == 0, done.stderr
            assert await kind(superuser, BY_TENANT) == ("m" if script is None else "r")
            async with stranger.connect("listener_service") as service:
                await settle(service)
            assert await exact(stranger)
        assert await likeness(superuser, BY_TENANT) == like


async def test_the_page_on_adopting_says_how_with_psql_alone(stranger: Database, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "adopting.md").read_text().partition("## With psql alone")[2]
    blocks = [block for block in page.split("\n\n") if block.startswith("    ")]
    adopts, refuses, turns_back = (block for block in blocks if "SELECT listener." in block)
    async with stranger.connect() as superuser:
        before = await likeness(superuser, UNIQUE_WITHOUT_TENANT)
        for block, relkind in (adopts, "r"), (turns_back, "m"):
            (tmp_path / "script.sql").write_text(block)
            done = psql(stranger, tmp_path / "script.sql")
            assert done.returncode == 0, done.stderr
            assert await kind(superuser, UNIQUE_WITHOUT_TENANT) == relkind
        assert await likeness(superuser, UNIQUE_WITHOUT_TENANT) == before
    assert refuses.count("listener.") == 3


async def test_json_tells_what_was_done(stranger: Database) -> None:
    told = json.loads(adopt(stranger, UNIQUE_WITHOUT_TENANT, *LIST, "--json").stdout)
    assert (told["view"], told["strategy"], told["keys"], told["attempts"]) == ("customer_totals", "tenant", 4, 1)
    assert told["locks"] == [UNIQUE_WITHOUT_TENANT]
    assert any("not unique any more" in notice for notice in told["notices"])
    assert (
        "CREATE UNIQUE INDEX"
        in json.loads(unadopt(stranger, "customer_totals", "--dry-run", "--json").stdout)["script"]
    )
    assert json.loads(unadopt(stranger, "customer_totals", "--json").stdout)["locks"] == [UNIQUE_WITHOUT_TENANT]


async def test_adopted_and_unadopted_while_writes_and_reads_go_on_nothing_is_missed(stranger: Database) -> None:
    failed: list[BaseException] = []
    done = anyio.Event()

    async def write(number: int) -> None:
        tenant = TENANTS[number]
        async with billing_app(stranger, tenant) as app:
            written = 0
            while not done.is_set():
                await invoice(app, tenant, number + 1, f"{written % 90}.5", category=f"c{written % 7}")
                written += 1

    async def read() -> None:
        async with stranger.connect("acme_dashboard") as dashboard:
            while not done.is_set():
                for count in (
                    "SELECT count(*) FROM reporting.invoice_totals",
                    "SELECT count(*) FROM reporting.invoice_years",
                ):
                    try:
                        assert await one(dashboard, count) > 0
                    except Exception as error:  # noqa: BLE001
                        failed.append(error)

    async with stranger.service(), stranger.connect() as superuser:
        async with anyio.create_task_group() as tasks:
            for number in range(len(TENANTS)):
                tasks.start_soon(write, number)
            tasks.start_soon(read)
            for name in (BY_TENANT, NULLABLE_KEY):
                adopted = await to_thread.run_sync(adopt, stranger, name, *LIST)
                assert adopted.returncode == 0, adopted.stderr
            back = await to_thread.run_sync(unadopt, stranger, NULLABLE_KEY)
            assert back.returncode == 0, back.stderr
            adopted = await to_thread.run_sync(adopt, stranger, NULLABLE_KEY, *LIST)
            assert adopted.returncode == 0, adopted.stderr
            done.set()
        await eventually(lambda: exact(stranger))
        assert await as_the_owner_computes(superuser, "invoice_totals", BY_TENANT) == []
        assert await as_the_owner_computes(superuser, "category_notes", NULLABLE_KEY) == []
        # No refresh met a target that had just got another name.
        assert await rows(superuser, "SELECT last_error FROM listener.refresh_state WHERE failures > 0") == []
        assert await rows(superuser, "SELECT error_message FROM listener.dead_letter") == []
    assert failed == []


async def test_what_another_managed_view_reads_is_not_turned_back(stranger: Database) -> None:
    assert adopt(stranger, BY_TENANT, *LIST).returncode == 0
    async with stranger.connect("listener_migrator") as migrator:
        await migrator.execute(
            """
            SELECT listener.create_view('reporting.months',
                'SELECT tenant_id, count(*) AS months FROM reporting.invoice_totals GROUP BY tenant_id', '{tenant_id}',
                tenants_query => 'SELECT id FROM billing.tenants')
            """
        )
    for dry in ([], ["--dry-run"]):
        refused = unadopt(stranger, BY_TENANT, *dry)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "invoice_totals is read by months. A materialized view fires no trigger" in refused.stderr
    async with stranger.connect() as superuser:
        assert await rows(superuser, LEFTOVERS) == []


async def test_an_owner_who_lets_listener_act_no_more_is_named_and_what_mends_it(stranger: Database) -> None:
    assert adopt(stranger, BY_TENANT, *LIST).returncode == 0
    async with stranger.connect() as superuser:
        await superuser.execute(
            "REVOKE acme_owner FROM listener_owner; REVOKE USAGE ON SCHEMA reporting FROM listener_service"
        )
        refused = adopt(stranger, NULLABLE_KEY, *LIST)
        assert refused.returncode == 1
        assert "belongs to acme_owner, and role listener_owner may not use the schema reporting" in refused.stderr
        assert "GRANT acme_owner TO listener_owner;" in refused.stderr
        assert 'GRANT USAGE ON SCHEMA "reporting" TO "listener_owner";' in mends(stranger)
        await superuser.execute('GRANT USAGE ON SCHEMA "reporting" TO "listener_owner"')
        # The adopted target stays its owner's.
        told = mends(stranger)
        assert "GRANT acme_owner TO listener_owner" in told
        assert not [mend for mend in told if "OWNER TO" in mend]
        await superuser.execute(
            "GRANT acme_owner TO listener_owner; GRANT USAGE ON SCHEMA reporting TO listener_service"
        )
    assert adopt(stranger, NULLABLE_KEY, *LIST).returncode == 0
