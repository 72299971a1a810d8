"""Nothing that an application puts into `public` or `pg_temp` is called by the project's SQL, whoever runs it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, LiteralString

import psycopg
import pytest

from books import ANNA, BEN, LEDGER_VIEW, book, open_books, settled, transaction
from command import listener
from conftest import Database
from hostile import PLANT_IN_SESSION, hijacked, plant

pytestmark = pytest.mark.anyio


@pytest.fixture
async def books(sample: Database) -> Database:
    await open_books(sample)
    assert listener("sweep", url=sample.url()).returncode == 0
    await plant(sample, "listener_app")
    assert await hijacked(sample) == 0
    return sample


@asynccontextmanager
async def hostile_session(books: Database) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A session of the application whose own objects come first, at work for Anna."""
    async with books.connect("listener_app") as application:
        await application.execute("SELECT set_config('app.current_tenant_id', %s, false)", (str(ANNA),))
        await application.execute(PLANT_IN_SESSION)
        yield application


async def test_what_is_planted_is_called_by_whoever_takes_no_care(books: Database) -> None:
    async with books.connect("listener_service") as careless:
        with pytest.raises(psycopg.Error, match=r"hijacked: text \|\| integer"):
            await careless.execute("SELECT 'definition_' || 1")
    assert await hijacked(books) == 1


WRITES: dict[str, LiteralString] = {
    "insert": """
        INSERT INTO public.attribution_allocations
            (tenant_id, channel_code, model_version, allocated_revenue_cents, confidence_score)
        VALUES ('11111111-1111-4111-8111-111111111111', 'email', 'v', 1, 1)
        """,
    "update": "UPDATE public.attribution_allocations SET channel_code = 'post'",
    "merge": """
        MERGE INTO public.attribution_allocations a USING public.tenants t ON a.tenant_id OPERATOR(pg_catalog.=) t.id
        WHEN MATCHED THEN UPDATE SET channel_code = 'mail'
        """,
    "delete": "DELETE FROM public.attribution_allocations",
    "truncate": "TRUNCATE public.attribution_allocations",
}


async def test_capture_calls_nothing_of_the_writers(books: Database) -> None:
    async with hostile_session(books) as application, books.connect() as superuser:
        for statement in WRITES.values():
            await superuser.execute("DELETE FROM listener.change_log")
            await application.execute(statement)
            cursor = await superuser.execute("SELECT DISTINCT source_id FROM listener.change_log")
            assert len(await cursor.fetchall()) == 1
    assert await hijacked(books) == 0


async def test_drain_and_refresh_call_nothing_of_their_callers(books: Database) -> None:
    async with books.connect() as superuser:
        await superuser.execute(
            """
            GRANT USAGE ON SCHEMA listener TO listener_app;
            DO $$ DECLARE routine regprocedure; BEGIN
                FOR routine IN SELECT p.oid FROM pg_proc p WHERE p.pronamespace = 'listener'::regnamespace
                                  AND has_function_privilege('listener_service', p.oid, 'EXECUTE') LOOP
                    EXECUTE pg_catalog.format('GRANT EXECUTE ON FUNCTION %s TO listener_app', routine);
                END LOOP;
            END $$
            """
        )
    calls: list[LiteralString] = [
        "SELECT outcome FROM listener.drain()",
        "SELECT outcome FROM listener.refresh('mv_realtime_revenue', '11111111-1111-4111-8111-111111111111')",
        """SELECT outcome FROM listener.refresh('mv_realtime_revenue',
               '11111111-1111-4111-8111-111111111111'::pg_catalog.uuid)""",
        "SELECT outcome FROM listener.expand('mv_realtime_revenue')",
        "SELECT outcome FROM listener.pending_keys(false)",
        "SELECT outcome FROM listener.pending_keys(true)",
        "SELECT t FROM listener.tenants('mv_realtime_revenue') t",
        "SELECT missing FROM listener.compare('mv_realtime_revenue', '11111111-1111-4111-8111-111111111111')",
        "SELECT tenant FROM listener.explain_key('mv_realtime_revenue', '11111111-1111-4111-8111-111111111111')",
        "SELECT listener.is_stale(1, '11111111-1111-4111-8111-111111111111')",
        "SELECT c.tenant FROM listener.unconsumed() c",
        """SELECT failures FROM listener.record_failure(1, '11111111-1111-4111-8111-111111111111', 'id', 'e', 's', 'c',
               'm', 't', 'w', 1, '1 s', '1 s', '1 h')""",
        "SELECT listener.record_refusal('v', 't', 'm', NULL, 'w')",
        "SELECT listener.discard_letter('11111111-1111-4111-8111-111111111111')",
        "SELECT listener.purge()",
        "SELECT source FROM listener.repair_capture()",
        "SELECT view FROM listener.changed_definitions()",
        "SELECT listener.readiness()",
        "SELECT listener.hold_lease()",
        "SELECT listener.lease_is_wrong()",
        "SELECT listener.end_lease()",
    ]
    async with hostile_session(books) as application:
        await application.execute(WRITES["insert"])
        for call in calls:
            await application.execute(call)
    # Called so, the capture of a source whose triggers somebody switched off is made anew.
    async with books.connect() as superuser:
        await superuser.execute("ALTER TABLE revenue_ledger DISABLE TRIGGER ALL")
        await superuser.execute("ALTER TABLE attribution_events RENAME COLUMN tenant_id TO owner_id")
    async with hostile_session(books) as application:
        cursor = await application.execute("SELECT outcome FROM listener.repair_capture()")
        assert {outcome for (outcome,) in await cursor.fetchall()} == {"repaired", "renamed"}
    assert await hijacked(books) == 0


async def test_the_service_and_its_commands_call_nothing_of_the_applications(books: Database) -> None:
    async with transaction(books) as application:
        await book(application, ANNA, 100)
    async with books.service(sweep_interval="100ms") as running:
        await settled(books, running)
        assert [r for r in await running.service.reasons_not_ready() if "probe" not in r and "listening" not in r] == []
        await running.service._update_gauges()
    for command in (
        ["status"], ["status", "--tenant", str(ANNA)], ["explain", LEDGER_VIEW, "--tenant", str(ANNA)], ["verify"],
        ["refresh", LEDGER_VIEW, "--tenant", str(ANNA)], ["refresh", LEDGER_VIEW, "--all-tenants"], ["sweep"],
        ["dead-letters", "list", "--closed"],
    ):  # fmt: skip
        ended = listener(*command, url=books.url())
        assert (ended.returncode, ended.stderr) == (0, ""), command
    refused = listener("refresh", LEDGER_VIEW, "--tenant", "no uuid", url=books.url())
    assert "no tenant of type uuid" in refused.stderr
    (letter,) = json.loads(listener("dead-letters", "list", "--json", url=books.url()).stdout)
    for command in (["dead-letters", "show", letter["id"]], ["dead-letters", "discard", "--all"]):
        assert listener(*command, url=books.url()).returncode == 0
    assert await hijacked(books) == 0


MANAGE: list[LiteralString] = [
    """SELECT listener.create_view('states', 'SELECT l.tenant_id, l.state, l.amount_cents FROM revenue_ledger l',
           '{tenant_id,state,amount_cents}', tenants_query => 'SELECT id FROM tenants', target_rls => true)""",
    "SELECT listener.set_window('states', quiet_period => '1 s')",
    "SELECT listener.pause('states')",
    "SELECT listener.resume('states')",
    "SELECT listener.pause(capture => true)",
    "SELECT listener.resume()",
    "SELECT listener.set_notify('always')",
    "SELECT listener.add_source('reconciliation_runs', 'tenant_id')",
    "SELECT listener.add_source('notes', through => 'letters')",
    "SELECT listener.remove_source('notes')",
    "DROP TABLE states",
    "SELECT listener.restore_target('states')",
    "SELECT listener.drop_view('states')",
    "SELECT listener.drop_view('mv_channel_performance', keep_target => true)",
]


async def test_whoever_manages_views_calls_nothing_of_the_applications(books: Database) -> None:
    async with books.connect() as superuser:
        await superuser.execute(
            """
            SET ROLE listener_owner;
            CREATE TABLE public.letters (id bigint PRIMARY KEY, tenant_id uuid);
            CREATE TABLE public.notes (id bigint PRIMARY KEY, letter_id bigint REFERENCES public.letters);
            """
        )
    async with books.connect("listener_migrator") as migrator:
        for statement in MANAGE:
            await migrator.execute(statement)
    for command in (["migrate"], ["pause"], ["resume"], ["uninstall", "--yes"]):
        ended = listener(*command, url=books.url("listener_migrator"))
        assert (ended.returncode, ended.stderr) == (0, ""), command
    assert await hijacked(books) == 0
    async with transaction(books, BEN) as application:
        await book(application, BEN, 100)
