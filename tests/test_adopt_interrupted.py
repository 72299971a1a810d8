"""Adopting against what comes in between: long readers, a killed process, new tenants, changes by others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, LiteralString

import anyio
import psycopg
import pytest
from anyio import to_thread
from psycopg import AsyncConnection, sql

from command import ROOT, environment
from conftest import DEADLINE, Database, eventually
from likeness import LEFTOVERS, kind, likeness
from listener import adoptions
from listener.adopt import unadopt as take_back
from listener.errors import SetupError
from shop import one, rows, settle
from stranger import BY_TENANT, TENANTS, TENANTS_QUERY, billing_app, invoice
from test_adopt import LIST, adopt, as_the_owner_computes, exact, unadopt

pytestmark = pytest.mark.anyio

BEGIN: LiteralString = "SELECT listener.begin_adoption(%s, tenants_query => %s)"


@asynccontextmanager
async def reading(database: Database, relation: LiteralString = BY_TENANT) -> AsyncIterator[AsyncConnection[Any]]:
    """A dashboard's transaction that has read and stays open."""
    async with database.connect("acme_dashboard", autocommit=False) as dashboard:
        await dashboard.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.SQL(relation)))
        yield dashboard


@asynccontextmanager
async def adopting(database: Database, *options: str) -> AsyncIterator[subprocess.Popen[str]]:
    """`listener adopt` as a process of its own, killed at the end."""
    with subprocess.Popen(  # noqa: ASYNC220  # its lines are read as they come
        [sys.executable, "-m", "listener", "adopt", BY_TENANT, *LIST, *options],
        env=environment(LISTENER_DATABASE_URL=database.url("listener_migrator")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("relation", [BY_TENANT, "reporting.invoice_years"])
async def test_behind_a_long_reader_it_gives_way_queues_nobody_and_ends_once_he_is_gone(
    stranger: Database, relation: LiteralString
) -> None:
    waited = """
        SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'relation' AND pid <> pg_backend_pid()
    """
    async with stranger.connect() as superuser, adopting(stranger) as process:
        async with reading(stranger, relation) as dashboard:
            assert process.stderr is not None
            lines: list[str] = []
            # It tells that it gives way, more than once, and nobody waits for a lock meanwhile.
            while sum("the swap gives way" in line for line in lines) < 2:
                line = await to_thread.run_sync(process.stderr.readline)
                assert line, lines
                lines.append(line)
                async with stranger.connect("acme_dashboard") as other:
                    await other.execute("SET statement_timeout = 10000")
                    assert await one(other, "SELECT count(*) FROM reporting.invoice_years") > 0
                assert await one(superuser, waited) == 0
            assert any("is in use" in line and "holds a lock on it" in line for line in lines)
            assert await kind(superuser, BY_TENANT) == "m"
            await dashboard.rollback()
        with anyio.fail_after(DEADLINE):
            out, _ = await to_thread.run_sync(process.communicate)
        assert process.returncode == 0
        assert out.startswith("adopted: ")
        assert await kind(superuser, BY_TENANT) == "r"
        async with stranger.service():
            await eventually(lambda: exact(stranger))


async def test_a_swap_asks_for_no_lock_where_a_transaction_is_in_the_way(stranger: Database) -> None:
    async with (
        stranger.connect("listener_migrator") as migrator,
        stranger.connect("listener_service") as service,
        reading(stranger),
    ):
        view = await one(migrator, BEGIN, BY_TENANT, TENANTS_QUERY)
        await settle(service)
        with pytest.raises(psycopg.errors.LockNotAvailable, match=r"reporting\.invoice_totals is in use") as raised:
            await migrator.execute("SELECT listener.finish_adoption(%s)", (view,))
        assert "holds a lock on it" in str(raised.value.diag.message_hint)


async def test_who_never_gets_the_locks_loses_nothing_and_goes_on_the_next_time(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        before = await likeness(superuser, BY_TENANT)
        async with reading(stranger):
            given_up = await to_thread.run_sync(adopt, stranger, BY_TENANT, *LIST, "--wait", "0.2")
        assert given_up.returncode == 1
        assert "no locks for the swap: reporting.invoice_totals is in use" in given_up.stderr
        assert await likeness(superuser, BY_TENANT) == before
        beside = await one(superuser, "SELECT target_name FROM listener.managed_view WHERE paused_at IS NULL")
        assert await one(superuser, "SELECT state FROM listener.adoption") == "filling"
        adopted = adopt(stranger, BY_TENANT, *LIST)
        assert adopted.returncode == 0, adopted.stderr
        assert await kind(superuser, BY_TENANT) == "r"
        # It was the same table.
        assert beside == await one(superuser, "SELECT 'listener_new_' || relid FROM listener.adoption")
        assert await rows(superuser, LEFTOVERS) == []


async def test_abort_takes_back_what_was_left(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        before = await likeness(superuser, BY_TENANT)
        async with reading(stranger):
            await to_thread.run_sync(adopt, stranger, BY_TENANT, *LIST, "--wait", "0.2")
        aborted = adopt(stranger, BY_TENANT, "--abort")
        assert aborted.stdout == "taken back: reporting.invoice_totals is as it was\n"
        assert await likeness(superuser, BY_TENANT) == before
        assert await rows(superuser, LEFTOVERS) == []
        assert await rows(superuser, "SELECT FROM listener.managed_view") == []


@pytest.mark.parametrize("options", [(), ("--key", "tenant_id,month,currency")])
@pytest.mark.parametrize("moment", ["in the fill", "before the swap", "while it waits for the swap"])
async def test_killed_and_called_again_it_goes_on_or_starts_over(
    stranger: Database, moment: str, options: tuple[str, ...]
) -> None:
    async with stranger.connect() as superuser, stranger.connect(autocommit=False) as blocker:
        before = await likeness(superuser, BY_TENANT)
        if moment == "in the fill":
            # The second tenant's rows cannot be written: its lock is taken.
            view_id = await one(superuser, "SELECT 1 + coalesce(max(id), 0) FROM listener.managed_view")
            await blocker.execute("SELECT pg_advisory_xact_lock(listener.lock_key(%s, %s))", (view_id, TENANTS[1]))
        elif moment == "before the swap":
            await blocker.execute("LOCK TABLE listener.drain_log IN ACCESS EXCLUSIVE MODE")
        else:
            await blocker.execute("SELECT FROM reporting.invoice_totals")
        async with adopting(stranger) as process:
            await eventually(lambda: reached(superuser, moment))
            os.kill(process.pid, signal.SIGKILL)
            await to_thread.run_sync(process.wait)
        assert await kind(superuser, BY_TENANT) == "m"
        assert await likeness(superuser, BY_TENANT) == before
        await blocker.rollback()
        adopted = adopt(stranger, BY_TENANT, *LIST, *options)
        assert adopted.returncode == 0, adopted.stderr
        assert await kind(superuser, BY_TENANT) == "r"
        assert await rows(superuser, LEFTOVERS) == []
        assert await as_the_owner_computes(superuser, "invoice_totals", BY_TENANT) == []
        assert await rows(superuser, "SELECT paused_at FROM listener.managed_view") == [(None,)]
        assert unadopt(stranger, BY_TENANT).returncode == 0
        assert await likeness(superuser, BY_TENANT) == before


async def reached(superuser: AsyncConnection[Any], moment: str) -> bool:
    """Whether the command got that far."""
    filled = await one(superuser, "SELECT count(*) FROM listener.refresh_state WHERE refreshed_at IS NOT NULL")
    if moment == "in the fill":
        return bool(filled >= 1)
    if moment == "before the swap":
        return bool(
            await one(
                superuser,
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'listener.drain_log'::regclass",
            )
        )
    return bool(
        filled >= len(TENANTS) and await one(superuser, "SELECT paused_at IS NOT NULL FROM listener.managed_view")
    )


async def test_a_tenant_that_comes_after_the_fill_is_filled_before_the_swap(stranger: Database) -> None:
    new = "00000000-0000-4000-8000-000000000009"
    async with stranger.connect() as superuser, adopting(stranger) as process:
        async with reading(stranger) as dashboard:
            await eventually(lambda: reached(superuser, "while it waits for the swap"))
            await superuser.execute("INSERT INTO billing.tenants VALUES (%s, 'New')", (new,))
            async with billing_app(stranger, new) as app:
                await invoice(app, new, 1, "5")
            state = "SELECT count(*) FROM listener.refresh_state WHERE tenant = %s"
            await eventually(lambda: one(superuser, state, new))
            await dashboard.rollback()
        with anyio.fail_after(DEADLINE):
            _, told = await to_thread.run_sync(process.communicate)
        assert process.returncode == 0, told
        assert await one(superuser, "SELECT amount FROM reporting.invoice_totals WHERE tenant_id = %s", new) == 5


async def test_what_was_not_filled_is_not_put_in_place(stranger: Database) -> None:
    async with stranger.connect("listener_migrator") as migrator:
        view = await one(migrator, BEGIN, BY_TENANT, TENANTS_QUERY)
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="4 keys of invoice_totals: not filled"):
            await migrator.execute("SELECT listener.finish_adoption(%s)", (view,))


async def test_a_materialized_view_that_was_made_anew_meanwhile_is_not_replaced(stranger: Database) -> None:
    async with stranger.connect("listener_migrator") as migrator, stranger.connect("listener_service") as service:
        view = await one(migrator, BEGIN, BY_TENANT, TENANTS_QUERY)
        await settle(service)
        async with stranger.connect() as superuser:
            await superuser.execute(
                """
                SET ROLE acme_owner;
                DROP MATERIALIZED VIEW reporting.invoice_totals CASCADE;
                CREATE MATERIALIZED VIEW reporting.invoice_totals AS SELECT tenant_id, count(*) AS n
                FROM billing.invoices GROUP BY 1;
                RESET ROLE
                """
            )
            with pytest.raises(psycopg.Error, match="is not the materialized view that this was begun with"):
                await migrator.execute("SELECT listener.finish_adoption(%s)", (view,))
            adopted = adopt(stranger, BY_TENANT, *LIST, "--key", "tenant_id")
            assert adopted.returncode == 0, adopted.stderr
            assert await one(superuser, "SELECT count(*) FROM reporting.invoice_totals") == len(TENANTS)
            assert await rows(superuser, LEFTOVERS) == []


async def test_what_was_tied_to_it_meanwhile_refuses_the_swap_and_all_is_taken_back(stranger: Database) -> None:
    async with stranger.connect() as superuser, adopting(stranger) as process:
        async with reading(stranger) as dashboard:
            await eventually(lambda: reached(superuser, "while it waits for the swap"))
            await superuser.execute(
                """
                SET ROLE acme_owner;
                CREATE FUNCTION reporting.rows_of(uuid) RETURNS SETOF reporting.invoice_totals LANGUAGE sql
                    AS 'SELECT * FROM reporting.invoice_totals WHERE tenant_id = $1';
                RESET ROLE
                """
            )
            await dashboard.rollback()
        with anyio.fail_after(DEADLINE):
            _, told = await to_thread.run_sync(process.communicate)
        assert process.returncode == 1
        assert "tied to it are function reporting.rows_of(uuid)" in told
        assert await kind(superuser, BY_TENANT) == "m"
        assert await rows(superuser, LEFTOVERS) == []
        assert await rows(superuser, "SELECT FROM listener.managed_view") == []


async def test_unadopt_goes_on_from_wherever_it_was_killed(stranger: Database) -> None:
    steps = ("begin_unadoption", "fill_unadoption", "finish_unadoption")
    async with stranger.connect() as superuser, stranger.connect("listener_migrator") as migrator:
        before = await likeness(superuser, BY_TENANT)
        for done in range(1, len(steps) + 1):
            assert adopt(stranger, BY_TENANT, *LIST).returncode == 0
            for step in steps[:done]:
                await migrator.execute(sql.SQL("SELECT listener.{}('invoice_totals')").format(sql.Identifier(step)))
            back = unadopt(stranger, "invoice_totals")
            assert back.returncode == 0, back.stderr
            assert await likeness(superuser, BY_TENANT) == before
            assert await rows(superuser, LEFTOVERS) == []
            assert await rows(superuser, "SELECT FROM listener.managed_view") == []


async def test_unadopt_behind_a_long_reader_leaves_the_view_kept_fresh_and_abort_takes_back_what_is_beside(
    stranger: Database,
) -> None:
    async with stranger.connect() as superuser, stranger.connect("listener_migrator") as migrator, stranger.service():
        assert (await to_thread.run_sync(adopt, stranger, BY_TENANT, *LIST)).returncode == 0
        async with reading(stranger):
            given_up = await to_thread.run_sync(unadopt, stranger, "invoice_totals", "--wait", "0.2")
            assert given_up.returncode == 1
            assert "no locks for the swap" in given_up.stderr
            async with billing_app(stranger, TENANTS[0]) as app:
                await invoice(app, TENANTS[0], 1, "7654321")
            await eventually(
                lambda: one(superuser, "SELECT count(*) FROM reporting.invoice_totals WHERE amount > 7654321")
            )
        await migrator.execute("SELECT listener.abort_adoption('invoice_totals')")
        assert await rows(superuser, LEFTOVERS) == []
        assert await kind(superuser, BY_TENANT) == "r"


async def test_an_error_while_it_is_turned_back_leaves_the_table_in_place(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        assert adopt(stranger, BY_TENANT, *LIST).returncode == 0
        await superuser.execute("REVOKE SELECT ON billing.invoices FROM acme_owner")
        before = await likeness(superuser, BY_TENANT)
        failed = unadopt(stranger, "invoice_totals")
        assert failed.returncode == 1
        assert "permission denied for table invoices" in failed.stderr
        assert await likeness(superuser, BY_TENANT) == before
        assert await rows(superuser, LEFTOVERS) == []
        assert await rows(superuser, "SELECT paused_at FROM listener.managed_view") == [(None,)]


async def test_of_two_who_adopt_the_same_with_other_options_the_one_who_began_last_goes_on(stranger: Database) -> None:
    async with stranger.connect() as superuser, stranger.connect("listener_service") as service:
        async with stranger.connect(autocommit=False) as blocker, adopting(stranger) as process:
            # The first one fills, and the second tenant's rows cannot be written.
            view_id = await one(superuser, "SELECT 1 + coalesce(max(id), 0) FROM listener.managed_view")
            await blocker.execute("SELECT pg_advisory_xact_lock(listener.lock_key(%s, %s))", (view_id, TENANTS[1]))
            await eventually(lambda: reached(superuser, "in the fill"))
            async with stranger.connect("listener_migrator") as migrator:
                begin = "SELECT listener.begin_adoption(%s, tenants_query => %s, max_age => '2 hours')"
                view = await one(migrator, begin, BY_TENANT, TENANTS_QUERY)
                await blocker.rollback()
                with anyio.fail_after(DEADLINE):
                    _, told = await to_thread.run_sync(process.communicate)
                assert process.returncode == 1, told
                await settle(service)
                await migrator.execute("SELECT listener.finish_adoption(%s)", (view,))
        assert await kind(superuser, BY_TENANT) == "r"
        assert await one(superuser, "SELECT max_age::text FROM listener.managed_view") == "02:00:00"
        assert await rows(superuser, LEFTOVERS) == []


async def test_unadopt_pauses_no_view_that_dashboards_read_and_lifts_no_pause(
    stranger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused = "SELECT paused_at IS NOT NULL FROM listener.managed_view"
    seen = []
    async with stranger.connect() as superuser, stranger.connect("listener_migrator") as migrator:
        assert (await to_thread.run_sync(adopt, stranger, BY_TENANT, *LIST)).returncode == 0

        async def gives_way(connection: AsyncConnection[Any], view: str) -> float:
            # Killed here, it would leave it so.
            seen.append(await one(superuser, paused))
            raise psycopg.errors.LockNotAvailable

        monkeypatch.setattr(adoptions, "finish_back", gives_way)
        with pytest.raises(SetupError, match="no locks for the swap"):
            await take_back(migrator, BY_TENANT, lambda _: None, patience=0)
        await migrator.execute("SELECT listener.pause('invoice_totals')")
        with pytest.raises(SetupError, match="no locks for the swap"):
            await take_back(migrator, BY_TENANT, lambda _: None, patience=0)
        assert await one(superuser, paused) is True
        await migrator.execute("SELECT listener.abort_adoption('invoice_totals')")
        assert await one(superuser, paused) is True
    assert seen == [False, True]
