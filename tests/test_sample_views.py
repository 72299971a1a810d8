"""What the five sample views say of a few rows, against what was worked out by hand."""

from __future__ import annotations

import json
import subprocess
import time
import uuid
from datetime import date
from decimal import Decimal
from typing import Any

import pytest

from books import ANNA, book, open_books, transaction
from command import ROOT, environment, listener
from conftest import Database
from listener.operations import sweep_once

pytestmark = pytest.mark.anyio

EVENT = uuid.UUID("aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa")
VIEWS = {
    "mv_realtime_revenue",
    "mv_reconciliation_status",
    "mv_daily_revenue_summary",
    "mv_channel_performance",
    "mv_allocation_summary",
}
GONE = uuid.UUID("bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb")


async def shown(sample: Database, query: str) -> list[tuple[Any, ...]]:
    """The rows after a sweep by the service's role, in the query's order."""
    async with sample.connect("listener_service") as service:
        async for _ in sweep_once(service):
            pass
    async with sample.connect() as superuser:
        return await (await superuser.execute(query)).fetchall()


@pytest.fixture
async def books(sample: Database) -> Database:
    await open_books(sample)
    return sample


def test_the_sample_is_loaded_by_psql_as_by_the_demo(database: Database) -> None:
    url = database.url("postgres")
    for file in sorted((ROOT / "sql" / "sample").glob("*.sql")):
        command = [database.server.psql, url, "--no-psqlrc", "--set=ON_ERROR_STOP=1", "--quiet", f"--file={file}"]
        loaded = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=60)
        assert (loaded.returncode, loaded.stderr) == (0, "")
    listed = listener("status", "--json", url=database.url())
    assert {row["view"] for row in json.loads(listed.stdout)["views"]} == VIEWS


async def test_realtime_revenue_counts_the_seconds_at_the_moment_of_reading(books: Database) -> None:
    started = time.monotonic()
    async with transaction(books) as application:
        await book(application, ANNA, 150)
        await book(application, ANNA, -25)
        await application.execute("UPDATE revenue_ledger SET updated_at = now() - interval '90 s'")
    ((total, verified, seconds),) = await shown(
        books, "SELECT total_revenue, verified, data_freshness_seconds FROM mv_realtime_revenue"
    )
    assert (total, verified) == (Decimal("1.25"), True)
    assert 90 <= seconds <= 90 + (time.monotonic() - started)
    # The target is not written again: only reading it later makes the number larger.
    ((later,),) = await shown(
        books,
        "SELECT r.data_freshness_seconds - floor(extract(epoch FROM clock_timestamp() - d.newest_update_at))"
        " FROM mv_realtime_revenue r JOIN dashboard.mv_realtime_revenue d USING (tenant_id)",
    )
    assert later in {0, -1}


async def test_reconciliation_status_has_one_row_when_two_runs_share_a_time(books: Database) -> None:
    async with transaction(books) as application:
        await application.execute(
            """
            INSERT INTO reconciliation_runs (id, tenant_id, state, last_run_at)
            VALUES (%(gone)s, %(a)s, 'completed', '2026-02-01 00:00+00'),
                   (%(event)s, %(a)s, 'failed', '2026-02-01 00:00+00'),
                   (gen_random_uuid(), %(a)s, 'running', '2026-01-01 00:00+00')
            """,
            {"a": ANNA, "event": EVENT, "gone": GONE},
        )
    rows = await shown(books, "SELECT state, reconciliation_run_id FROM mv_reconciliation_status")
    assert rows == [("completed", GONE)]


async def test_daily_summary_counts_captured_refunded_and_chargeback_by_day_and_currency(books: Database) -> None:
    async with transaction(books) as application:
        await application.execute(
            """
            INSERT INTO revenue_ledger (tenant_id, transaction_id, amount_cents, revenue_cents, currency, state,
                                        verification_timestamp)
            VALUES (%(a)s, '1', 100, 1, 'EUR', 'captured', '2026-01-01 23:59+00'),
                   (%(a)s, '2', 200, 1, 'EUR', 'captured', '2026-01-01 00:00+00'),
                   (%(a)s, '3', 400, 1, 'USD', 'captured', '2026-01-01 00:00+00'),
                   (%(a)s, '4', -50, 1, 'EUR', 'refunded', '2026-01-02 00:00+00'),
                   (%(a)s, '5', 70, 1, 'EUR', 'chargeback', '2026-01-02 00:00+00'),
                   (%(a)s, '6', 900, 1, 'EUR', 'authorized', '2026-01-02 00:00+00'),
                   (%(a)s, '7', 900, 1, 'EUR', 'captured', NULL)
            """,
            {"a": ANNA},
        )
    rows = await shown(
        books,
        "SELECT revenue_date, state, currency::text, total_amount_cents, transaction_count"
        " FROM mv_daily_revenue_summary ORDER BY 1, 2, 3",
    )
    assert rows == [
        (date(2026, 1, 1), "captured", "EUR", 300, 2),
        (date(2026, 1, 1), "captured", "USD", 400, 1),
        (date(2026, 1, 2), "chargeback", "EUR", 70, 1),
        (date(2026, 1, 2), "refunded", "EUR", -50, 1),
    ]


async def test_channel_performance_counts_distinct_events(books: Database) -> None:
    async with transaction(books) as application:
        await application.execute(
            """
            INSERT INTO attribution_allocations (tenant_id, event_id, channel_code, model_version,
                                                 allocated_revenue_cents, confidence_score, allocated_at)
            VALUES (%(a)s, %(e)s, 'email', 'one', 10, 0.5, now()), (%(a)s, %(e)s, 'email', 'two', 20, 1, now()),
                   (%(a)s, NULL, 'email', 'one', 5, 0.75, now()),
                   (%(a)s, %(e)s, 'email', 'old', 99, 1, now() - interval '91 days')
            """,
            {"a": ANNA, "e": EVENT},
        )
    rows = await shown(
        books,
        "SELECT channel_code, total_conversions, total_revenue_cents, avg_confidence_score, total_allocations"
        " FROM mv_channel_performance",
    )
    assert rows == [("email", 1, 35, Decimal("0.75"), 3)]


async def test_allocation_summary_tells_drift_and_knows_nothing_where_the_event_is_gone(books: Database) -> None:
    async with transaction(books) as application:
        await application.execute(
            "INSERT INTO attribution_events (id, tenant_id, occurred_at, channel_code, revenue_cents)"
            " VALUES (%s, %s, now(), 'email', 100)",
            (EVENT, ANNA),
        )
        await application.execute(
            """
            INSERT INTO attribution_allocations (tenant_id, event_id, channel_code, model_version,
                                                 allocated_revenue_cents, confidence_score)
            VALUES (%(a)s, %(e)s, 'email', 'even', 60, 1), (%(a)s, %(e)s, 'social', 'even', 40, 1),
                   (%(a)s, %(e)s, 'email', 'short', 97, 1),
                   (%(a)s, %(gone)s, 'email', 'even', 7, 1), (%(a)s, NULL, 'email', 'even', 3, 1),
                   (%(a)s, NULL, 'email', 'even', 4, 1)
            """,
            {"a": ANNA, "e": EVENT, "gone": GONE},
        )
    rows = await shown(
        books,
        "SELECT event_id, model_version, total_allocated_cents, event_revenue_cents, is_balanced, drift_cents"
        " FROM mv_allocation_summary ORDER BY event_id NULLS LAST, model_version",
    )
    assert rows == [
        (EVENT, "even", 100, 100, True, 0),
        (EVENT, "short", 97, 100, False, -3),
        (GONE, "even", 7, None, None, None),
        (None, "even", 7, None, None, None),
    ]
