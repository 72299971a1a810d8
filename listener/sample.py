"""The sample schema, and the application that writes it: one transaction for each invoice."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import psycopg

from listener.resources import sql_directory

CHANNELS = ("organic", "paid_search", "email", "affiliate")
MODELS = ("v1", "v2")


def load_sample(connection: psycopg.Connection[Any]) -> None:
    """Makes the sample schema, as an administrator, in a database where the schema listener is."""
    for file in sorted((sql_directory() / "sample").glob("*.sql")):
        connection.execute(file.read_bytes())


@dataclass(frozen=True, slots=True)
class Invoice:
    """What the application books; `amount_cents` is negative for a refund."""

    tenant: uuid.UUID
    number: str
    at: datetime
    amount_cents: int
    is_refund: bool = False
    reconciled: bool = False


@dataclass(frozen=True, slots=True)
class Allocation:
    """A share of an invoice's revenue that a model gives to a channel."""

    channel: str
    model: str
    cents: int
    confidence: float


def state_of(invoice: Invoice) -> str:
    """Refunds are refunded; of the others 4 % are authorized only, 2 % charged back, the rest captured."""
    if invoice.is_refund:
        return "refunded"
    share = _digits(invoice)[0] % 100
    return "authorized" if share < 4 else "chargeback" if share < 6 else "captured"  # noqa: PLR2004


def has_event(invoice: Invoice) -> bool:
    """One invoice in 25 has allocations whose event is unknown."""
    return _digits(invoice)[1] % 25 != 0


def allocations_of(invoice: Invoice) -> list[Allocation]:
    """A fixed rule, drawn from a hash of the invoice's number, so that every replay yields the same rows.

    Model v1 splits the amount 60 : 40 between two of four channels, to the cent. Half of the invoices are allocated
    by model v2 as well, to one channel, and every tenth of those is off by a few cents: unbalanced.
    """
    _, _, first, second, model, drift, confidence, _ = _digits(invoice)
    one = CHANNELS[first % 4]
    other = CHANNELS[(first + 1 + second % 3) % 4]
    major = invoice.amount_cents * 60 // 100
    score = 0.5 + (confidence % 50) / 100
    found = [
        Allocation(one, MODELS[0], major, score),
        Allocation(other, MODELS[0], invoice.amount_cents - major, 1 - score),
    ]
    if model % 2:
        off = 1 + drift % 99 if drift % 10 == 0 else 0
        found.append(Allocation(one, MODELS[1], invoice.amount_cents + off, score))
    return found


def _digits(invoice: Invoice) -> tuple[int, ...]:
    digest = hashlib.sha256(f"{invoice.tenant}/{invoice.number}".encode()).digest()
    return tuple(int.from_bytes(digest[i : i + 4]) for i in range(0, 32, 4))


async def create_tenants(connection: psycopg.AsyncConnection[Any], names: Iterable[str]) -> dict[str, uuid.UUID]:
    """Adds those tenants that are not there; ids follow from the names."""
    made = {name: uuid.uuid5(uuid.NAMESPACE_DNS, name) for name in names}
    await connection.execute(
        """
        INSERT INTO tenants (id, name) SELECT * FROM unnest(%s::uuid[], %s::text[]) ON CONFLICT DO NOTHING
        """,
        (list(made.values()), list(made)),
    )
    return made


async def set_tenant(connection: psycopg.AsyncConnection[Any], tenant: uuid.UUID) -> None:
    """For the transaction that is open."""
    await connection.execute("SELECT set_config('app.current_tenant_id', %s, true)", (str(tenant),))


async def write_invoice(connection: psycopg.AsyncConnection[Any], invoice: Invoice) -> None:
    """Books an invoice in one transaction and one round trip: ledger row, event, allocations."""
    event = uuid.uuid5(invoice.tenant, invoice.number)
    known = has_event(invoice)
    state = state_of(invoice)
    verified = state != "authorized"
    allocations = allocations_of(invoice)
    async with connection.pipeline(), connection.transaction():
        await set_tenant(connection, invoice.tenant)
        await connection.execute(
            """
            INSERT INTO revenue_ledger (tenant_id, transaction_id, amount_cents, revenue_cents, currency, state,
                                        is_verified, verification_timestamp, created_at, updated_at)
            VALUES (%s, %s, %s, %s, 'GBP', %s, %s, %s, %s, %s)
            """,
            (
                invoice.tenant,
                invoice.number,
                invoice.amount_cents,
                invoice.amount_cents * 97 // 100,
                state,
                verified,
                invoice.at + timedelta(hours=3) if verified else None,
                invoice.at,
                invoice.at,
            ),
        )
        if known:
            await connection.execute(
                """
                INSERT INTO attribution_events (id, tenant_id, occurred_at, channel_code, revenue_cents)
                VALUES (%s, %s, %s, %s, %s)
                """,
                (event, invoice.tenant, invoice.at, allocations[0].channel, invoice.amount_cents),
            )
        await connection.execute(
            """
            INSERT INTO attribution_allocations
                (tenant_id, event_id, allocated_at, channel_code, model_version, allocated_revenue_cents,
                 confidence_score)
            SELECT %s, %s, %s, a.* FROM unnest(%s::text[], %s::text[], %s::bigint[], %s::numeric[]) AS a
            """,
            (
                invoice.tenant,
                event if known else None,
                invoice.at,
                [a.channel for a in allocations],
                [a.model for a in allocations],
                [a.cents for a in allocations],
                [a.confidence for a in allocations],
            ),
        )
        if invoice.reconciled:
            await connection.execute(
                "INSERT INTO reconciliation_runs (tenant_id, state, last_run_at) VALUES (%s, %s, %s)",
                (invoice.tenant, "completed" if verified else "failed", invoice.at),
            )
