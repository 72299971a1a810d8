"""A live load on the sample schema: few tenants write most of it, as in life."""

from __future__ import annotations

import itertools
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from random import Random
from typing import Any, NamedTuple

import anyio
from psycopg import AsyncConnection

from listener.sample import CHANNELS, Invoice, write_invoice

# How often each kind of transaction comes. Invoices insert; what they wrote is changed and deleted later.
MIX = {"invoice": 70, "settle": 12, "delete": 5, "reconcile": 7, "allocate": 6}
# How steeply the load falls from one tenant to the next.
ZIPF_EXPONENT = 1.1
CANCELLED = 0.1  # the share of invoices that cancel one
EVENTLESS = 0.2  # the share of allocations by hand that name no event
# How many of its invoices a connection remembers, to change or delete them.
REMEMBERED = 1000


@dataclass(slots=True)
class LoadCounters:
    """What the load has committed so far."""

    commits: int = 0


class Remembered(NamedTuple):
    """An invoice that was written here."""

    tenant: uuid.UUID
    ledger_id: uuid.UUID
    event_id: uuid.UUID


@dataclass(slots=True)
class Writer:
    """One connection of the load; its random numbers are its own, so that no other writer's pace changes them."""

    connection: AsyncConnection[Any]
    tenants: Sequence[uuid.UUID]
    random: Random
    _weights: list[float] = field(init=False)
    _written: deque[Remembered] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def __post_init__(self) -> None:
        self._weights = list(itertools.accumulate(zipf_weights(len(self.tenants))))

    async def write(self) -> None:
        """One transaction of a random kind."""
        (kind,) = self.random.choices(list(MIX), list(MIX.values()))
        if kind in {"settle", "delete", "allocate"} and self._written:
            index = self.random.randrange(len(self._written))
            remembered = self._written[index]
            if kind == "settle":
                await self._settle(remembered)
            elif kind == "allocate":
                await self._allocate(remembered)
            else:
                del self._written[index]
                await self._delete(remembered)
            return
        (tenant,) = self.random.choices(self.tenants, cum_weights=self._weights)
        if kind == "reconcile":
            await self._reconcile(tenant)
        else:
            await self._invoice(tenant)

    async def _invoice(self, tenant: uuid.UUID) -> None:
        cancels = "C" if self.random.random() < CANCELLED else ""
        amount = int(self.random.lognormvariate(8, 1))
        number = f"{cancels}{self.random.getrandbits(48):012x}"
        invoice = Invoice(number, tenant, datetime.now(UTC), -amount if cancels else amount)
        written = await write_invoice(self.connection, invoice)
        self._written.append(Remembered(tenant, *written))

    # The writes below read rows first. Their plans ask the policy for the tenant, so it is set by a statement of its
    # own; the pipeline keeps all of it one round trip.

    async def _settle(self, remembered: Remembered) -> None:
        """An authorized amount is captured; a captured one may be charged back."""
        async with self.connection.pipeline(), self.connection.transaction():
            await self._set_tenant(remembered.tenant)
            await self.connection.execute(
                """
                UPDATE public.revenue_ledger
                SET state = CASE state WHEN 'authorized' THEN 'captured' ELSE 'chargeback' END,
                    revenue_cents = CASE state WHEN 'authorized' THEN amount_cents ELSE 0 END,
                    is_verified = true, verification_timestamp = now(), updated_at = now()
                WHERE tenant_id = %s AND id = %s AND state IN ('authorized', 'captured')
                """,
                (remembered.tenant, remembered.ledger_id),
            )

    async def _delete(self, remembered: Remembered) -> None:
        async with self.connection.pipeline(), self.connection.transaction():
            await self._set_tenant(remembered.tenant)
            await self.connection.execute(
                "DELETE FROM public.revenue_ledger WHERE tenant_id = %s AND id = %s",
                (remembered.tenant, remembered.ledger_id),
            )

    async def _reconcile(self, tenant: uuid.UUID) -> None:
        (state,) = self.random.choices(("completed", "running", "failed"), (8, 1, 1))
        async with self.connection.pipeline(), self.connection.transaction():
            await self._set_tenant(tenant)
            await self.connection.execute(
                "INSERT INTO public.reconciliation_runs (tenant_id, state) VALUES (%s, %s)", (tenant, state)
            )

    async def _allocate(self, remembered: Remembered) -> None:
        """Somebody allocates by hand, to an event or to none."""
        event_id = None if self.random.random() < EVENTLESS else remembered.event_id
        async with self.connection.pipeline(), self.connection.transaction():
            await self._set_tenant(remembered.tenant)
            await self.connection.execute(
                """
                INSERT INTO public.attribution_allocations AS a
                    (tenant_id, event_id, model_version, channel_code, allocated_revenue_cents, confidence_score)
                VALUES (%s, %s, 'manual-1', %s, %s, 1)
                ON CONFLICT (tenant_id, event_id, model_version, channel_code)
                DO UPDATE SET allocated_revenue_cents = excluded.allocated_revenue_cents
                """,
                (remembered.tenant, event_id, self.random.choice(CHANNELS), self.random.randrange(10_000)),
            )

    async def _set_tenant(self, tenant: uuid.UUID) -> None:
        await self.connection.execute("SELECT set_config('app.current_tenant_id', %s::text, true)", (str(tenant),))


def zipf_weights(count: int) -> list[float]:
    """The first of `count` tenants is the busiest."""
    return [1 / rank**ZIPF_EXPONENT for rank in range(1, count + 1)]


async def write_load(
    url: str,
    tenants: Sequence[uuid.UUID],
    counters: LoadCounters,
    random: Random,
    *,
    rate: float | None = None,
    connections: int = 4,
) -> None:
    """Writes until it is cancelled: `rate` transactions a second in all, or as many as go; `url` is listener_app's.

    Arrivals are random. Where the database is slower than the rate, the load goes on as fast as it can until it has
    caught up. It is cancelled between two transactions only: whatever was committed is counted.
    """
    async with anyio.create_task_group() as tasks:
        for _ in range(connections):
            share = None if rate is None else rate / connections
            tasks.start_soon(_write_until_cancelled, url, tenants, counters, Random(random.getrandbits(64)), share)


async def _write_until_cancelled(
    url: str, tenants: Sequence[uuid.UUID], counters: LoadCounters, random: Random, rate: float | None
) -> None:
    async with await AsyncConnection.connect(url, autocommit=True) as connection:
        writer = Writer(connection, tenants, random)
        due = anyio.current_time()
        while True:
            if rate is not None:
                due += random.expovariate(rate)
            await anyio.sleep_until(due)
            with anyio.CancelScope(shield=True):
                await writer.write()
                counters.commits += 1
