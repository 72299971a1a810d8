"""A table is emptied between the moment at which a comparison looks and the moment at which it reads the table."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from psycopg import AsyncConnection

from conftest import Database, eventually
from shop import ANNA, rows, settle

pytestmark = pytest.mark.anyio

VIEW = "SELECT tenant_id, count(*) AS n FROM public.emptied GROUP BY 1"


async def test_what_truncate_took_away_meanwhile_is_no_difference(
    database: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await superuser.execute(
        """
        CREATE TABLE public.emptied (tenant_id uuid NOT NULL);
        ALTER TABLE public.emptied OWNER TO listener_owner;
        GRANT SELECT ON public.emptied TO listener_service
        """
    )
    await superuser.execute("INSERT INTO public.emptied VALUES (%s), (%s)", (ANNA, ANNA))
    await superuser.execute("SELECT listener.create_view('emptied_view', %s, '{tenant_id}')", (VIEW,))
    await settle(service)
    found: list[Any] = []

    async def compare() -> None:
        found.extend(
            await rows(service, "SELECT missing, extra, stale FROM listener.compare('emptied_view', %s)", str(ANNA))
        )

    waiting = """
        SELECT count(*) = 1 FROM pg_locks l
        WHERE l.relation = 'public.emptied'::regclass AND NOT l.granted AND l.mode = 'AccessShareLock'
        """
    async with database.connect() as watcher, anyio.create_task_group() as tasks:
        # Holds the table, so that the comparison has its snapshot and waits.
        await superuser.execute("BEGIN; TRUNCATE public.emptied")
        tasks.start_soon(compare)

        async def waits() -> bool:
            return bool((await rows(watcher, waiting))[0][0])

        await eventually(waits)
        await superuser.execute("COMMIT")
    assert [(missing, extra) for missing, extra, stale in found if not stale] == []
