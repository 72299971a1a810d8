"""SIGTERM in mid-refresh while the database is frozen or cannot be heard: the service ends all the same."""

from __future__ import annotations

import signal
from contextlib import nullcontext

import anyio
import pytest

from backends import LISTENING, POOL, REFRESH, backends, caught, frozen, locked, until_well
from books import ANNA, BEN, LEDGER_VIEW, book, open_books, revenue, transaction
from conftest import Database
from process import running
from proxy import Mode, proxy_to

pytestmark = pytest.mark.anyio


FAULTS: list[Mode | None] = [None, "deaf", "hole"]


@pytest.mark.parametrize("mode", FAULTS, ids=["all backends are frozen", "deaf", "hole"])
async def test_a_stop_in_the_middle_of_a_fault_ends_and_loses_nothing(sample: Database, mode: Mode | None) -> None:
    await open_books(sample)
    async with proxy_to(sample.url()) as proxy, sample.connect() as superuser:
        settings = {"LISTENER_DATABASE_URL": proxy.url, "LISTENER_GRACE_PERIOD": "2s", "LISTENER_PROBE_TIMEOUT": "30s"}
        with running(sample, **settings) as service:
            await anyio.to_thread.run_sync(lambda: service.until("refreshed", view=LEDGER_VIEW, tenant_id=str(BEN)))
            async with locked(sample, "dashboard", "mv_realtime_revenue"):
                async with transaction(sample) as application:
                    await book(application, ANNA, 100)
                await caught(superuser, REFRESH)
                pids = await backends(superuser, LISTENING) | await backends(superuser, POOL)
                if mode is not None:
                    proxy.switch(mode, later=mode)
                with nullcontext() if mode else frozen(*pids):
                    service.process.send_signal(signal.SIGTERM)
                    ended = await anyio.to_thread.run_sync(lambda: service.process.wait(30))
                    assert ended == 0
    async with sample.service() as after:
        await until_well(sample, after)
    assert await revenue(sample) == 1
