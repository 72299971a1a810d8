"""Views whose refresh stops at gates: advisory locks, closed for as long as a test holds them."""

from __future__ import annotations

from typing import Any, LiteralString

from psycopg import AsyncConnection

from conftest import Database
from shop import create_view, define, rows

# Both are passed by a refresh of each key that has rows, the first one first.
FIRST, SECOND = 7, 8

GATE: LiteralString = """
    CREATE FUNCTION shop.gate(number int) RETURNS int LANGUAGE plpgsql STABLE AS $$ BEGIN
        PERFORM pg_advisory_xact_lock_shared(number);
        RETURN 0;
    END $$;
"""
GATED = """
    SELECT tenant_id, product, sum(quantity)::bigint + shop.gate(7) + shop.gate(8) AS quantity
    FROM shop.orders GROUP BY 1, 2
"""


async def create_gated_view(shop: Database, superuser: AsyncConnection[Any]) -> None:
    """The view `gated` of the shop; nothing stops at a gate that nobody holds."""
    await define(superuser, GATE)
    await create_view(shop, "gated", GATED, ["product"], depends_on="{}")


async def create_slow_view(superuser: AsyncConnection[Any]) -> None:
    """The view `slow` of the sample's ledger, whose refresh stops at the first gate."""
    await superuser.execute(GATE.replace("shop.gate", "public.gate"))
    await superuser.execute(
        """
        SELECT listener.create_view('slow', 'SELECT tenant_id, sum(revenue_cents)::bigint + public.gate(7) AS cents
            FROM revenue_ledger GROUP BY tenant_id', '{tenant_id}', tenants_query => 'SELECT id FROM tenants',
            depends_on => '{}')
        """
    )


async def close(holder: AsyncConnection[Any], gate: int) -> None:
    """Until the holder opens it, or ends."""
    await holder.execute("SELECT pg_advisory_lock(%s)", (gate,))


async def open_gate(holder: AsyncConnection[Any], gate: int) -> None:
    """Whoever waits goes on."""
    await holder.execute("SELECT pg_advisory_unlock(%s)", (gate,))


async def waiting_at(connection: AsyncConnection[Any], gate: int) -> list[int]:
    """The backends that wait there."""
    found = await rows(
        connection,
        """
        SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND classid = 0 AND objid = %s
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        """,
        gate,
    )
    return [pid for (pid,) in found]
