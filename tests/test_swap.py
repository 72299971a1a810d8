"""listener.swap: what a relation hands on to the one that takes its name, and what stands in its way."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from anyio import to_thread
from psycopg import sql

from command import listener
from conftest import Database, eventually, server_of
from likeness import LEFTOVERS, likeness
from shop import one, rows, settle
from stranger import BY_TENANT, NULLABLE_KEY, TENANTS, UNIQUE_WITHOUT_TENANT, billing_app, invoice, load_stranger
from test_adopt import LIST, adopt, exact, unadopt
from test_restore import cluster, dump, installed, other_cluster, run

__all__ = ["cluster", "installed", "other_cluster"]

pytestmark = pytest.mark.anyio

# More than the stranger's views have.
DRESSED: LiteralString = """
    SET ROLE acme_owner;
    CREATE STATISTICS reporting.by_month (ndistinct, dependencies) ON month, currency FROM reporting.invoice_totals;
    ALTER MATERIALIZED VIEW reporting.invoice_totals SET (autovacuum_enabled = false, toast.autovacuum_enabled = false);
    ALTER MATERIALIZED VIEW reporting.invoice_totals ALTER COLUMN month SET (n_distinct = 24);
    ALTER MATERIALIZED VIEW reporting.invoice_totals ALTER COLUMN amount SET STORAGE EXTERNAL;
    CREATE INDEX "Größe, lower" ON reporting.invoice_totals (lower(currency::text) text_pattern_ops) INCLUDE (amount)
        WITH (fillfactor = 70);
    ALTER INDEX reporting."Größe, lower" ALTER COLUMN 1 SET STATISTICS 300;
    ALTER MATERIALIZED VIEW reporting.invoice_totals CLUSTER ON invoice_totals_key;
    COMMENT ON INDEX reporting.invoice_totals_key IS 'The key.';
    CREATE VIEW reporting.euros WITH (security_invoker = true, security_barrier = true) AS
        SELECT * FROM reporting.invoice_totals WHERE currency = 'EUR';
    CREATE VIEW reporting.both AS SELECT o.month, t.amount FROM reporting.invoice_overview o
        JOIN reporting.invoice_totals t USING (tenant_id, month);
    GRANT SELECT ON reporting.euros TO acme_analyst;
    GRANT ALL ON reporting.invoice_totals TO acme_app;
    GRANT SELECT ON reporting.invoice_totals TO PUBLIC;
    SET ROLE acme_auditor;
    GRANT SELECT ON reporting.invoice_totals TO listener_reader;
    RESET ROLE;
    GRANT acme_auditor TO listener_migrator;
    ALTER DEFAULT PRIVILEGES FOR ROLE listener_owner GRANT ALL ON TABLES TO acme_app, listener_reader;
"""
STORAGE: LiteralString = """
    SELECT (SELECT array_agg(a.attname || a.attstorage::text || ARRAY(
                SELECT o FROM unnest(a.attoptions) o WHERE NOT starts_with(o, 'pg_'))::text ORDER BY a.attnum)
            FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0),
           (SELECT t.reloptions FROM pg_class t WHERE t.oid = c.reltoastrelid),
           (SELECT array_agg(pg_get_statisticsobjdef(e.oid) || e.stxowner::regrole::text)
            FROM pg_statistic_ext e WHERE e.stxrelid = c.oid),
           (SELECT array_agg(i.relname::text) FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid
            WHERE x.indrelid = c.oid AND x.indisclustered),
           (SELECT array_agg(i.relname || a.attstattarget) FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid
            JOIN pg_attribute a ON a.attrelid = i.oid WHERE x.indrelid = c.oid AND a.attstattarget >= 0)
    FROM pg_class c WHERE c.oid = %s::regclass
"""


async def test_all_that_a_relation_has_is_handed_on_and_back(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        await superuser.execute(DRESSED)
        before, storage = await likeness(superuser, BY_TENANT), await rows(superuser, STORAGE, BY_TENANT)
        adopted = adopt(stranger, BY_TENANT, *LIST)
        assert adopted.returncode == 0, adopted.stderr
        after = await likeness(superuser, BY_TENANT)
        assert await rows(superuser, STORAGE, BY_TENANT) == storage
        for same in ("columns", "owner", "options", "comment", "views"):
            assert after[same] == before[same]
        own = [grant for grant in after["grants"] if grant[2] != "listener_service"]
        # Who could do nothing with more than SELECT before can do nothing more now.
        assert own == [grant for grant in before["grants"] if grant[3] == "SELECT"]
        assert ("acme_auditor", "listener_reader") in {(grant[1], grant[2]) for grant in own}
        assert "acme_app keeps SELECT alone, and not DELETE, INSERT" in adopted.stderr
        own_key = " NULLS NOT DISTINCT"
        assert [
            (name, definition.removesuffix(own_key), comment) for name, definition, comment in after["indexes"]
        ] == (before["indexes"])
        assert unadopt(stranger, BY_TENANT).returncode == 0
        assert await likeness(superuser, BY_TENANT) == before
        assert await rows(superuser, STORAGE, BY_TENANT) == storage


async def test_what_was_granted_and_made_after_the_adoption_is_kept_when_it_is_turned_back(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        assert adopt(stranger, BY_TENANT, *LIST).returncode == 0
        await superuser.execute(
            """
            SET ROLE acme_owner;
            REVOKE SELECT ON reporting.invoice_totals FROM acme_dashboard;
            GRANT SELECT ON reporting.invoice_totals TO acme_app;
            CREATE INDEX added_since ON reporting.invoice_totals (month);
            COMMENT ON COLUMN reporting.invoice_totals.currency IS 'ISO 4217';
            CREATE VIEW reporting.added_since_on_top AS SELECT sum(amount) FROM reporting.invoice_totals;
            RESET ROLE
            """
        )
        before = await likeness(superuser, BY_TENANT)
        assert unadopt(stranger, BY_TENANT).returncode == 0
        after = await likeness(superuser, BY_TENANT)
        assert [grant for grant in before["grants"] if grant[2] != "listener_service"] == after["grants"]
        assert "added_since" in {index[0] for index in after["indexes"]}
        for same in ("columns", "comment", "views"):
            assert after[same] == before[same]


async def test_a_target_that_is_published_is_published_once_it_is_replaced(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        await superuser.execute(
            """
            SET ROLE acme_owner;
            CREATE TABLE reporting.old (tenant_id bigint PRIMARY KEY, n int, m int);
            CREATE TABLE reporting.new (tenant_id bigint NOT NULL, n int, m int);
            RESET ROLE;
            CREATE PUBLICATION published FOR TABLE reporting.old (tenant_id, n) WHERE (tenant_id > 7);
            ALTER PUBLICATION published OWNER TO listener_owner
            """
        )
        published = "SELECT attnames::text, rowfilter FROM pg_publication_tables WHERE pubname = 'published'"
        before = await rows(superuser, published)
        with pytest.raises(psycopg.Error, match="constraint old_pkey on table"):
            await swap(stranger)
        await superuser.execute("ALTER TABLE reporting.old DROP CONSTRAINT old_pkey")
        await swap(stranger)
        assert await rows(superuser, published) == before


async def swap(database: Database) -> None:
    async with database.connect("listener_migrator") as migrator:
        await migrator.execute("SET ROLE listener_owner")
        await migrator.execute("SELECT listener.swap('reporting.old', 'reporting.new')")


async def test_a_view_on_top_goes_on_to_show_what_it_showed_to_whom_it_showed_it(stranger: Database) -> None:
    shown = "SELECT tenant_id::text, year, amount FROM reporting.invoice_years ORDER BY 1, 2"
    async with stranger.connect("acme_dashboard") as dashboard, stranger.connect("acme_analyst") as analyst:
        before = await rows(dashboard, shown)
        assert len(before) > len(TENANTS)
        assert adopt(stranger, BY_TENANT, *LIST).returncode == 0
        assert await rows(dashboard, shown) == before
        assert await one(analyst, "SELECT sum(amount) FROM reporting.invoice_totals") > 0
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await analyst.execute("SELECT currency FROM reporting.invoice_totals")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await dashboard.execute("DELETE FROM reporting.invoice_totals")
    async with stranger.service(), billing_app(stranger, TENANTS[0]) as app, stranger.connect() as superuser:
        await invoice(app, TENANTS[0], 4, "1000000")
        rich = "SELECT count(*) FROM reporting.invoice_years WHERE amount > 1000000"
        await eventually(lambda: one(superuser, rich))


async def test_nothing_is_wrong_with_an_adopted_view(stranger: Database) -> None:
    for name in (BY_TENANT, UNIQUE_WITHOUT_TENANT):
        assert adopt(stranger, name, *LIST).returncode == 0
    async with stranger.connect("listener_service") as service:
        assert await rows(service, "SELECT * FROM listener.readiness()") == []


async def test_adopted_altered_dumped_restored_and_turned_back_it_is_exact_at_each_step(
    cluster: Any, installed: str, other_cluster: Any, tmp_path: Path
) -> None:
    server = server_of(cluster)
    stranger = Database(server, server.clone(installed))
    with psycopg.connect(stranger.url("postgres"), autocommit=True) as connection:
        load_stranger(connection)
    async with stranger.connect() as superuser:
        before = {name: await likeness(superuser, name) for name in (BY_TENANT, NULLABLE_KEY)}
    for name in before:
        adopted = await to_thread.run_sync(adopt, stranger, name, *LIST)
        assert adopted.returncode == 0, adopted.stderr
    async with stranger.connect("listener_service") as service, stranger.connect() as superuser:
        await settle(service)
        assert await exact(stranger)
        query = await one(superuser, "SELECT query FROM listener.managed_view WHERE target_name = 'invoice_totals'")
        altered_file = tmp_path / "altered.sql"
        altered_file.write_text("\n".join(["SELECT * FROM (", query.strip().rstrip(";"), ") q WHERE currency = 'EUR'"]))
        url = stranger.url("listener_migrator")
        arguments = ("views", "alter", "invoice_totals", "--query", str(altered_file), "--yes")
        altered = await to_thread.run_sync(lambda: listener(*arguments, url=url))
        assert altered.returncode == 0, altered.stderr
        await settle(service)
        assert await exact(stranger)
        assert await rows(superuser, "SELECT DISTINCT currency FROM reporting.invoice_totals") == [("EUR",)]
    async with billing_app(stranger, TENANTS[1]) as app:
        await invoice(app, TENANTS[1], 1, "77")
    file = dump(cluster, stranger, tmp_path)
    roles = run(cluster.bin("pg_dumpall"), "--roles-only", f"--dbname={cluster.url()}")
    # The superuser is there already.
    psql = [other_cluster.bin("psql"), "--quiet", other_cluster.url()]
    await to_thread.run_sync(lambda: subprocess.run(psql, input=roles, text=True, capture_output=True, check=True))
    elsewhere = server_of(other_cluster)
    copy = Database(elsewhere, elsewhere.clone("template0"))
    # Else pg_restore does not fill the team's other materialized views, whose tables have FORCEd row-level security.
    restore = (other_cluster.bin("pg_restore"), "--enable-row-security", f"--dbname={copy.url('postgres')}", file)
    assert run(*restore) == ""
    async with copy.connect() as superuser:
        assert not await exact(copy)
        async with copy.service(), billing_app(copy, TENANTS[2]) as app:
            await invoice(app, TENANTS[2], 2, "78", category="after the restore")
            await eventually(lambda: exact(copy))
        for name, was in before.items():
            back = await to_thread.run_sync(unadopt, copy, name)
            assert back.returncode == 0, back.stderr
            assert await likeness(superuser, name) == was
            assert await one(superuser, "SELECT relkind FROM pg_class WHERE oid = %s::regclass", name) == "m"
        # What was altered stays so.
        assert await rows(superuser, "SELECT DISTINCT currency FROM reporting.invoice_totals") == [("EUR",)]


@pytest.mark.parametrize(
    "setting",
    [
        "quote_all_identifiers = on",
        "standard_conforming_strings = off",
        "DateStyle = 'German'",
        "IntervalStyle = 'iso_8601'",
        "session_replication_role = replica",
    ],
)
async def test_a_view_is_taken_over_and_given_back_whatever_the_database_is_set_to(
    stranger: Database, setting: LiteralString
) -> None:
    async with stranger.connect() as superuser:
        before = await likeness(superuser, BY_TENANT)
        await superuser.execute(
            sql.SQL("ALTER DATABASE {} SET {}").format(sql.Identifier(stranger.name), sql.SQL(setting))
        )
        url = stranger.url("listener_migrator")
        altered = ("views", "alter", "invoice_totals", "--max-age", "2 hours", "--yes")
        for done in (
            await to_thread.run_sync(adopt, stranger, BY_TENANT, *LIST),
            await to_thread.run_sync(lambda: listener(*altered, url=url)),
            await to_thread.run_sync(lambda: listener("verify", url=stranger.url())),
            await to_thread.run_sync(lambda: listener("migrate", url=url)),
            await to_thread.run_sync(unadopt, stranger, BY_TENANT),
        ):
            assert done.returncode == 0, done.stderr
        assert await likeness(superuser, BY_TENANT) == before
        assert await rows(superuser, LEFTOVERS) == []
