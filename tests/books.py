"""What an application does to the sample schema, for the tests that follow a change to its target."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg

from conftest import Database, RunningService
from listener import view_queries

ANNA = uuid.UUID("11111111-1111-4111-8111-111111111111")
BEN = uuid.UUID("22222222-2222-4222-8222-222222222222")
LEDGER_VIEW = "mv_realtime_revenue"


async def open_books(sample: Database) -> None:
    """Two tenants that have nothing yet."""
    async with sample.connect("listener_app") as application:
        await application.execute("INSERT INTO tenants (id, name) VALUES (%s, 'Anna'), (%s, 'Ben')", (ANNA, BEN))


@asynccontextmanager
async def transaction(sample: Database, tenant: uuid.UUID = ANNA) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A transaction of the application for one tenant."""
    async with sample.connect("listener_app") as application, application.transaction():
        await application.execute("SELECT set_config('app.current_tenant_id', %s, true)", (str(tenant),))
        yield application


async def book(application: psycopg.AsyncConnection[Any], tenant: uuid.UUID, cents: int, number: str = "") -> None:
    """One captured, verified ledger row."""
    await application.execute(
        """
        INSERT INTO revenue_ledger (tenant_id, transaction_id, amount_cents, revenue_cents, currency, state,
                                    is_verified, verification_timestamp)
        VALUES (%s, %s, %s, %s, 'EUR', 'captured', true, '2026-01-01 12:00+00')
        """,
        (tenant, number or uuid.uuid4().hex, cents, cents),
    )


async def settled(sample: Database, running: RunningService) -> None:
    """Until nothing is dirty: the filling is over, or all that was written is shown."""

    async def is_fresh() -> bool:
        async with sample.connect() as superuser:
            return await view_queries.all_fresh(superuser)

    await running.until(is_fresh)


async def revenue(sample: Database, tenant: uuid.UUID = ANNA) -> float | None:
    """total_revenue as the dashboard shows it."""
    async with sample.connect() as superuser:
        row = await (
            await superuser.execute("SELECT total_revenue FROM mv_realtime_revenue WHERE tenant_id = %s", (tenant,))
        ).fetchone()
    return None if row is None else float(row[0])


def value(running: RunningService, metric: str, **labels: str) -> float:
    """A metric of the service; 0 where it was never counted."""
    return running.service.metrics.registry.get_sample_value(metric, labels) or 0.0
