"""SIGTERM in mid-refresh while the database is frozen or cannot be heard: the service ends all the same."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from backends import LISTENING, POOL, REFRESH, backends, caught, frozen, locked, until_well
from books import ANNA, BEN, LEDGER_VIEW, book, open_books, revenue, transaction
from conftest import Database
from process import service_process
from proxy import Mode, proxy_to

pytestmark = pytest.mark.anyio


FAULTS: list[Mode | None] = [None, "deaf", "hole"]


@pytest.mark.parametrize("mode", FAULTS, ids=["all backends are frozen", "deaf", "hole"])
async def test_a_stop_in_the_middle_of_a_fault_ends_and_loses_nothing(sample: Database, mode: Mode | None) -> None:
    await open_books(sample)
    async with (
        sample.connect() as superuser,
        proxy_to(sample.url()) as proxy,
        service_process(proxy.url, grace_period="2s", probe_timeout="30s") as service,
    ):
        await service.until("refreshed", view=LEDGER_VIEW, tenant_id=str(BEN))
        async with locked(sample, "dashboard", "mv_realtime_revenue"):
            async with transaction(sample) as application:
                await book(application, ANNA, 100)
            await caught(superuser, REFRESH)
            pids = await backends(superuser, LISTENING) | await backends(superuser, POOL)
            if mode is not None:
                proxy.switch(mode, later=mode)
            with nullcontext() if mode else frozen(*pids):
                assert await service.end() == 0
    async with sample.service() as after:
        await until_well(sample, after)
    assert await revenue(sample) == 1
