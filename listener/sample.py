"""The sample schema, and the application's side of it: what an invoice writes, and the transaction that writes it.

The application logs in as listener_app. Connections are autocommit: each statement here is a transaction of its own,
and where a caller has opened one, part of that.
"""

from __future__ import annotations

import hashlib
import itertools
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple, TypeVar

import psycopg
from psycopg import AsyncConnection

from listener.resources import sql_directory

CHANNELS = ("organic", "paid_search", "email", "referral", "social")
LAST_TOUCH, LINEAR = "last_touch-1", "linear-1"

# What a byte of the hash chooses between: choices, and how many of the 256 values each has.
STATES = {"authorized": 20, "chargeback": 8, "captured": 228}
MODELS = {(LAST_TOUCH,): 112, (LAST_TOUCH, LINEAR): 32, (LINEAR,): 112}
RUN_STATES = {"failed": 16, "running": 16, "completed": 224}
# One allocation under the linear model in so many is unbalanced, and one invoice in so many found no event.
UNBALANCED_EVERY, EVENTLESS_EVERY = 16, 24

Choice = TypeVar("Choice")


def load_sample(connection: psycopg.Connection[Any]) -> None:
    """Makes the sample schema and its five views, in one transaction; as an administrator, after `listener migrate`."""
    with connection.transaction():
        for file in sorted((sql_directory() / "sample").glob("*.sql")):
            connection.execute(file.read_bytes())


@dataclass(frozen=True, slots=True)
class Invoice:
    """What a shop knows when it writes an invoice. A number that begins with `C` cancels an earlier one."""

    number: str
    tenant: uuid.UUID
    occurred_at: datetime
    amount_cents: int
    currency: str = "GBP"


class Allocation(NamedTuple):
    """One channel's share of an invoice, under one model."""

    model_version: str
    channel: str
    cents: int
    confidence: Decimal


class Entries(NamedTuple):
    """What an invoice writes, beside what it says itself."""

    state: str
    revenue_cents: int
    is_verified: bool
    channel: str
    has_event: bool  # whether the allocations name the event
    allocations: tuple[Allocation, ...]
    run_state: str  # of the reconciliation run, where the invoice is written with one


class Written(NamedTuple):
    """The rows that later transactions may come back to."""

    ledger_id: uuid.UUID
    event_id: uuid.UUID


def entries(invoice: Invoice) -> Entries:
    """The fixed rule: the same invoice always gives the same entries, on every machine.

    Nine bytes of a hash of the number decide, one question each, so that the answers are independent:
    - state: refunded for a `C` number, else by STATES; nothing is earned while authorized or after a chargeback;
    - the channel that the event names, and one or two more that share with it under the linear model;
    - the models that allocate, by MODELS; last touch gives the event's channel all, linear gives each an equal share;
    - where linear is unbalanced, its first share is 1 to 100 cents short;
    - where no event was found, the allocations carry none.
    """
    state_byte, channel_byte, more, models, balance, short, found, confidence, run = hashlib.blake2b(
        invoice.number.encode(), digest_size=9
    ).digest()
    amount = invoice.amount_cents
    state = "refunded" if invoice.number.startswith("C") else _choose(STATES, state_byte)
    first = channel_byte % len(CHANNELS)
    channels = [CHANNELS[(first + step) % len(CHANNELS)] for step in range(2 + more % 2)]
    certainty = Decimal(50 + confidence % 50) / 100
    allocations: list[Allocation] = []
    for model in _choose(MODELS, models):
        shares = [amount] if model == LAST_TOUCH else _split(amount, len(channels))
        if model == LINEAR and balance % UNBALANCED_EVERY == 0:
            shares[0] -= 1 + short % 100
        # Last touch has one share: the event's channel, which comes first.
        allocations += [Allocation(model, *share, certainty) for share in zip(channels, shares, strict=False)]
    return Entries(
        state=state,
        revenue_cents=amount if state in {"captured", "refunded"} else 0,
        is_verified=state != "authorized",
        channel=channels[0],
        has_event=found % EVENTLESS_EVERY != 0,
        allocations=tuple(allocations),
        run_state=_choose(RUN_STATES, run),
    )


def _choose(choices: Mapping[Choice, int], byte: int) -> Choice:
    """The choice whose part of the 256 values `byte` lies in."""
    return next(
        choice for choice, end in zip(choices, itertools.accumulate(choices.values()), strict=True) if byte < end
    )


def _split(cents: int, parts: int) -> list[int]:
    """Equal shares that add up; the first takes what cannot be divided."""
    share, rest = divmod(cents, parts)
    return [share + rest] + [share] * (parts - 1)


async def create_tenants(connection: AsyncConnection[Any], tenants: Sequence[tuple[uuid.UUID, str]]) -> None:
    """Tenants that exist already are left as they are."""
    await connection.execute(
        """
        INSERT INTO public.tenants (id, name)
        SELECT t.id, t.name FROM unnest(%s::uuid[], %s::text[]) AS t (id, name)
        ON CONFLICT (id) DO NOTHING
        """,
        ([tenant for tenant, _ in tenants], [name for _, name in tenants]),
    )


async def write_invoice(connection: AsyncConnection[Any], invoice: Invoice, *, reconcile: bool = False) -> Written:
    """Ledger row, event, allocations and, with `reconcile`, a reconciliation run: one statement, one round trip.

    The tenant that the rows carry is what set_config returned, so that it is set before the policies look.
    """
    rule = entries(invoice)
    written = Written(uuid.uuid4(), uuid.uuid4())
    await connection.execute(
        """
        WITH tenant AS MATERIALIZED (
            SELECT set_config('app.current_tenant_id', %(tenant)s::text, true)::uuid AS id
        ), ledger AS (
            INSERT INTO public.revenue_ledger (id, tenant_id, amount_cents, revenue_cents, currency, state, is_verified,
                                               verification_timestamp, transaction_id, created_at, updated_at)
            SELECT %(ledger_id)s::uuid, tenant.id, %(amount_cents)s::bigint, %(revenue_cents)s::bigint,
                   %(currency)s::text, %(state)s::text, %(is_verified)s::boolean,
                   CASE WHEN %(is_verified)s::boolean THEN %(occurred_at)s::timestamptz END, %(number)s::text,
                   %(occurred_at)s::timestamptz, %(occurred_at)s::timestamptz
            FROM tenant
        ), event AS (
            INSERT INTO public.attribution_events (id, tenant_id, occurred_at, channel_code, revenue_cents)
            SELECT %(event_id)s::uuid, tenant.id, %(occurred_at)s::timestamptz, %(channel)s::text,
                   %(amount_cents)s::bigint
            FROM tenant
        ), run AS (
            INSERT INTO public.reconciliation_runs (tenant_id, state, last_run_at)
            SELECT tenant.id, %(run_state)s::text, %(occurred_at)s::timestamptz
            FROM tenant WHERE %(reconcile)s::boolean
        )
        INSERT INTO public.attribution_allocations
            (tenant_id, event_id, model_version, channel_code, allocated_revenue_cents, confidence_score, allocated_at)
        SELECT tenant.id, %(allocated_event_id)s::uuid, a.model_version, a.channel_code, a.cents, a.confidence,
               %(occurred_at)s::timestamptz
        FROM tenant, unnest(%(models)s::text[], %(channels)s::text[], %(cents)s::bigint[], %(confidences)s::numeric[])
                     AS a (model_version, channel_code, cents, confidence)
        """,
        {
            "tenant": str(invoice.tenant),
            "ledger_id": written.ledger_id,
            "event_id": written.event_id,
            "allocated_event_id": written.event_id if rule.has_event else None,
            "number": invoice.number,
            "occurred_at": invoice.occurred_at,
            "amount_cents": invoice.amount_cents,
            "revenue_cents": rule.revenue_cents,
            "currency": invoice.currency,
            "state": rule.state,
            "is_verified": rule.is_verified,
            "channel": rule.channel,
            "run_state": rule.run_state,
            "reconcile": reconcile,
            "models": [a.model_version for a in rule.allocations],
            "channels": [a.channel for a in rule.allocations],
            "cents": [a.cents for a in rule.allocations],
            "confidences": [a.confidence for a in rule.allocations],
        },
        prepare=True,
    )
    return written
