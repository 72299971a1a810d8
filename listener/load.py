"""A live load: an application that books, updates, deletes and reconciles, with tenants as uneven as real ones."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import anyio
import psycopg

from listener.database_url import libpq_url
from listener.sample import Invoice, set_tenant, write_invoice


@dataclass(slots=True)
class Load:
    """What is to be written: transactions a second over all connections; and how many were committed."""

    tenants: Sequence[uuid.UUID]
    rate: float
    seed: int
    connections: int = 4
    committed: int = 0


async def write_load(url: str, load: Load) -> None:
    """Writes until cancelled; `url` logs in as the application. Tenant number n gets a share of 1/n."""
    async with anyio.create_task_group() as tasks:
        for number in range(load.connections):
            tasks.start_soon(_write, url, load, random.Random(load.seed + number))


async def _write(url: str, load: Load, rng: random.Random) -> None:
    weights = [1 / (n + 1) for n in range(len(load.tenants))]
    async with await psycopg.AsyncConnection.connect(libpq_url(url), autocommit=True) as connection:
        due = anyio.current_time()
        while True:
            # Exponential gaps: independent writers, not a metronome.
            due = max(due + rng.expovariate(load.rate / load.connections), anyio.current_time() - 1)
            await anyio.sleep_until(due)
            (tenant,) = rng.choices(load.tenants, weights)
            await _transaction(connection, tenant, rng)
            load.committed += 1


async def _transaction(connection: psycopg.AsyncConnection[Any], tenant: uuid.UUID, rng: random.Random) -> None:
    kind = rng.random()
    if kind < 0.75:  # noqa: PLR2004 - three of four transactions book an invoice
        refund = rng.random() < 0.05  # noqa: PLR2004
        cents = rng.randrange(100, 50_000)
        number = f"{'C' if refund else ''}{rng.getrandbits(48):012x}"
        invoice = Invoice(
            tenant, number, datetime.now(UTC), -cents if refund else cents, refund, reconciled=rng.random() < 0.1  # noqa: PLR2004
        )  # fmt: skip
        await write_invoice(connection, invoice)
        return
    async with connection.transaction():
        await set_tenant(connection, tenant)
        if kind < 0.95:  # noqa: PLR2004 - one of five captures what was only authorized
            await connection.execute(
                """
                UPDATE revenue_ledger
                SET state = 'captured', is_verified = true, verification_timestamp = now(), updated_at = now()
                WHERE id IN (SELECT id FROM revenue_ledger WHERE state = 'authorized'
                             ORDER BY created_at LIMIT 1 FOR UPDATE SKIP LOCKED)
                """
            )
        else:
            await connection.execute(
                """
                DELETE FROM revenue_ledger
                WHERE id IN (SELECT id FROM revenue_ledger ORDER BY created_at LIMIT 1 FOR UPDATE SKIP LOCKED)
                """
            )
