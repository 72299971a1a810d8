"""A team's billing and its materialized views, as they are before anybody adopts one: tests/stranger.sql says what.

`acme_owner` owns everything, `acme_app` writes for the tenant that it names, `acme_dashboard`, `acme_analyst` and
`acme_auditor` read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, LiteralString

import psycopg
from psycopg import AsyncConnection

if TYPE_CHECKING:  # conftest imports this module
    from conftest import Database

TENANTS = tuple(f"00000000-0000-4000-8000-00000000000{n}" for n in range(1, 5))
TENANTS_QUERY = "SELECT id FROM billing.tenants"
# The materialized views, by what they stand for.
BY_TENANT: LiteralString = "reporting.invoice_totals"
UNIQUE_WITHOUT_TENANT: LiteralString = "reporting.customer_totals"
NULLABLE_KEY: LiteralString = "reporting.category_notes"
WINDOW: LiteralString = "reporting.recent_payments"
WITHOUT_TENANT: LiteralString = "reporting.currency_totals"
RANKED: LiteralString = "reporting.tenant_ranks"
QUOTED: LiteralString = 'reporting."Größte Kunden"'
TIED: LiteralString = "reporting.customer_balances"
ON_TOP: LiteralString = "reporting.balance_summary"


def load_stranger(connection: psycopg.Connection[Any]) -> None:
    """Makes the schema, its rows and its views, in one transaction; as a superuser, after `listener migrate`."""
    with connection.transaction():
        connection.execute((Path(__file__).parent / "stranger.sql").read_bytes())


@asynccontextmanager
async def billing_app(database: Database, tenant: str) -> AsyncIterator[AsyncConnection[Any]]:
    """An autocommitted session of the application, at work for one tenant."""
    async with database.connect("acme_app") as connection:
        await connection.execute("SELECT set_config('app.current_tenant_id', %s, false)", (tenant,))
        yield connection


async def invoice(
    app: AsyncConnection[Any],
    tenant: str,
    customer: int,
    amount: str,
    *,
    category: str | None = None,
    issued_on: str = "2026-05-04",
) -> None:
    """One more invoice, in euros; `app` is at work for this tenant."""
    await app.execute(
        """
        INSERT INTO billing.invoices (tenant_id, customer_id, category, currency, amount, issued_on)
        VALUES (%s, %s, %s, 'EUR', %s, %s)
        """,
        (tenant, customer, category, amount, issued_on),
    )
