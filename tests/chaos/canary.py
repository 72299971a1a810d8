"""What an application sees: how long after its commit a write is shown, all the time and after each fault."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
import psycopg
from psycopg import AsyncConnection

from chaos.world import World, until

LOOK = 0.01  # seconds between two looks
PAUSE = 0.1
PATIENCE = 120.0


class NeverShownError(Exception):
    """A write was not shown within PATIENCE: something waits for a hand."""


@dataclass
class Canary:
    """A tenant of its own that is written all the time."""

    world: World
    tenant: uuid.UUID
    samples: list[float] = field(default_factory=list)

    async def sing(self) -> None:
        """Writes, and waits until it is shown, again and again, until cancelled; the seconds between in `samples`."""
        while True:
            try:
                async with self.world.superuser() as connection:
                    while True:
                        await self._write(connection)
                        await self._until_shown(anyio.current_time())
                        await anyio.sleep(PAUSE)
            except psycopg.Error:
                await anyio.sleep(PAUSE)

    async def recovered(self, since: float) -> float:
        """Writes once more; seconds from `since` until that is shown."""
        await self._committed()
        await self._until_shown(since, sample=False)
        return anyio.current_time() - since

    async def _committed(self) -> None:
        while True:
            try:
                async with self.world.superuser() as connection:
                    await self._write(connection)
                return
            except psycopg.Error:
                await anyio.sleep(LOOK)

    async def _write(self, connection: AsyncConnection[Any]) -> None:
        await connection.execute("INSERT INTO public.divisors VALUES (%s, 1)", (self.tenant,))

    async def _until_shown(self, since: float, *, sample: bool = True) -> None:
        """All rows of the tenant, over whatever happens to the connection meanwhile."""
        with anyio.move_on_after(PATIENCE):
            while True:
                try:
                    async with self.world.superuser() as connection:
                        await until(partial(self._is_shown, connection), LOOK)
                    if sample:
                        self.samples.append(anyio.current_time() - since)
                    return
                except psycopg.Error:
                    await anyio.sleep(LOOK)
        raise NeverShownError(f"a write of tenant {self.tenant} was not shown within {PATIENCE:g} s")

    async def _is_shown(self, connection: AsyncConnection[Any]) -> bool:
        row = await (
            await connection.execute(
                "SELECT coalesce((SELECT s.parts FROM public.shares s WHERE s.tenant_id = %(tenant)s), 0)"
                " >= (SELECT count(*) FROM public.divisors d WHERE d.tenant_id = %(tenant)s)",
                {"tenant": self.tenant},
            )
        ).fetchone()
        return row == (True,)
