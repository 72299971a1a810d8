"""A committed change is in its tenant's dashboards a moment later: from write to target, by the running service."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from books import ANNA, BEN, LEDGER_VIEW, book, open_books, revenue, settled, transaction
from conftest import Database, RunningService

pytestmark = pytest.mark.anyio


@pytest.fixture
async def running(sample: Database) -> AsyncIterator[RunningService]:
    await open_books(sample)
    async with sample.service(sweep_interval=3600.0) as service:
        await settled(sample, service)
        yield service


async def shows(sample: Database, running: RunningService, expected: float | None, tenant: object = ANNA) -> None:
    async def is_shown() -> bool:
        return await revenue(sample, tenant) == expected  # type: ignore[arg-type]

    await running.until(is_shown)


async def test_an_insert_is_shown(sample: Database, running: RunningService) -> None:
    async with transaction(sample) as application:
        await book(application, ANNA, 1250)
    await shows(sample, running, 12.5)


async def test_an_update_is_shown(sample: Database, running: RunningService) -> None:
    async with transaction(sample) as application:
        await book(application, ANNA, 100)
    await shows(sample, running, 1)
    async with transaction(sample) as application:
        await application.execute("UPDATE revenue_ledger SET revenue_cents = 300")
    await shows(sample, running, 3)


async def test_a_row_that_moves_to_another_tenant_leaves_one_and_joins_the_other(
    sample: Database, running: RunningService
) -> None:
    async with transaction(sample) as application:
        await book(application, ANNA, 100)
        await book(application, ANNA, 700, "moves")
    await shows(sample, running, 8)
    # Row-level security lets no tenant give a row away: an administrator does.
    async with sample.connect() as administrator:
        await administrator.execute("UPDATE revenue_ledger SET tenant_id = %s WHERE transaction_id = 'moves'", (BEN,))
    await shows(sample, running, 1)
    await shows(sample, running, 7, BEN)


async def test_a_delete_is_shown(sample: Database, running: RunningService) -> None:
    async with transaction(sample) as application:
        await book(application, ANNA, 100)
    await shows(sample, running, 1)
    async with transaction(sample) as application:
        await application.execute("DELETE FROM revenue_ledger")
    await shows(sample, running, None)


async def test_a_truncate_empties_every_tenant(sample: Database, running: RunningService) -> None:
    for tenant in (ANNA, BEN):
        async with transaction(sample, tenant) as application:
            await book(application, tenant, 100)
        await shows(sample, running, 1, tenant)
    async with sample.connect("listener_app") as application:
        await application.execute("TRUNCATE revenue_ledger")
    await shows(sample, running, None)
    await shows(sample, running, None, BEN)


async def test_rows_that_were_copied_in_are_shown(sample: Database, running: RunningService) -> None:
    # COPY FROM is refused under row-level security, so bulk loads are an administrator's.
    async with (
        sample.connect() as administrator,
        administrator.cursor() as cursor,
        cursor.copy(
            "COPY revenue_ledger (tenant_id, transaction_id, amount_cents, revenue_cents, currency, state) FROM STDIN"
        ) as copy,
    ):
        for number in range(100):
            tenant = ANNA if number % 2 else BEN
            await copy.write_row((tenant, f"copied {number}", 100, 100, "EUR", "captured"))
    await shows(sample, running, 50)
    await shows(sample, running, 50, BEN)


async def test_a_rolled_back_write_refreshes_nothing(sample: Database, running: RunningService) -> None:
    async with transaction(sample, BEN) as application, application.transaction(force_rollback=True):
        await book(application, BEN, 999)
    seen = len(running.outcomes)
    async with transaction(sample) as application:
        await book(application, ANNA, 100)
    await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
    assert {change.key.tenant for change, _ in running.outcomes[seen:]} == {str(ANNA)}
    assert await revenue(sample, BEN) is None


async def test_one_tenants_refresh_leaves_the_others_rows_untouched_to_the_byte(
    sample: Database, running: RunningService
) -> None:
    for tenant in (ANNA, BEN):
        async with transaction(sample, tenant) as application:
            await book(application, tenant, 100)
        await shows(sample, running, 1, tenant)
    physical = "SELECT xmin::text, ctid::text, r::text FROM dashboard.mv_realtime_revenue r WHERE tenant_id = %s"
    async with sample.connect() as superuser:
        before = await (await superuser.execute(physical, (BEN,))).fetchall()
        seen = len(running.outcomes)
        async with transaction(sample) as application:
            await book(application, ANNA, 200)
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        assert await revenue(sample) == 3
        assert await (await superuser.execute(physical, (BEN,))).fetchall() == before


async def test_the_applications_correlation_id_travels_beside_ours(sample: Database, running: RunningService) -> None:
    seen = len(running.outcomes)
    async with transaction(sample) as application:
        await application.execute("SET LOCAL app.correlation_id = 'request 7'")
        await book(application, ANNA, 100)
    await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
    ours = {change.correlation_id for change, _ in running.outcomes[seen:] if change.key.tenant == str(ANNA)}
    theirs = {change.app_correlation_id for change, _ in running.outcomes[seen:] if change.key.tenant == str(ANNA)}
    assert len(ours) == 1
    assert theirs == {"request 7"}
