"""Health, readiness with its reasons, metrics."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from books import ANNA, LEDGER_VIEW, book, open_books, settled, transaction
from conftest import Database, eventually
from listener.errors import SetupError
from listener.web import bind
from web_client import get, is_ready, reasons

pytestmark = pytest.mark.anyio


async def test_a_service_that_makes_progress_is_ready(sample: Database) -> None:
    async with sample.service() as running:
        assert (await get(running, "/health")).json() == {"status": "alive"}
        await eventually(lambda: is_ready(running))


async def test_a_port_that_is_bound_is_taken_at_once(sample: Database) -> None:
    with bind("127.0.0.1", 0) as bound, pytest.raises(SetupError, match="cannot listen on"):
        bind("127.0.0.1", bound.getsockname()[1])


@pytest.mark.parametrize("host", ["300.1.1.1", "a..b", "é" * 80])
def test_an_address_that_is_none_is_refused(host: str) -> None:
    with pytest.raises(SetupError, match="cannot listen on"):
        bind(host, 0)


async def test_unforced_row_level_security_is_a_reason(sample: Database) -> None:
    async with sample.connect() as superuser, sample.service() as running:
        await eventually(lambda: is_ready(running))
        await superuser.execute("ALTER TABLE revenue_ledger NO FORCE ROW LEVEL SECURITY")
        assert "row-level security is not enabled and forced on public.revenue_ledger" in await reasons(running)
        assert "listener_not_ready_reasons 1.0\n" in (await get(running, "/metrics")).text
        await superuser.execute("ALTER TABLE revenue_ledger FORCE ROW LEVEL SECURITY")
        assert await is_ready(running)
        assert "listener_not_ready_reasons 0.0\n" in (await get(running, "/metrics")).text
        await superuser.execute("ALTER TABLE attribution_events DISABLE ROW LEVEL SECURITY")
        assert "public.attribution_events" in await reasons(running)


async def test_a_missing_target_is_a_reason(sample: Database) -> None:
    async with sample.connect() as superuser, sample.service() as running:
        await eventually(lambda: is_ready(running))
        await superuser.execute("DROP TABLE mv_allocation_summary")
        assert "the target public.mv_allocation_summary of mv_allocation_summary is gone" in await reasons(running)


async def test_a_database_that_does_not_answer_is_a_reason_and_the_process_stays_alive(sample: Database) -> None:
    async with sample.service() as running:
        await eventually(lambda: is_ready(running))
        async with Database(sample.server, "postgres").connect() as administrator:
            await administrator.execute(f'ALTER DATABASE "{sample.name}" ALLOW_CONNECTIONS false'.encode())
            await administrator.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (sample.name,)
            )

            async def is_not_listening() -> bool:
                return "not listening" in await reasons(running)

            await eventually(is_not_listening)
            assert (await get(running, "/health")).status_code == 200
            assert (await get(running, "/metrics")).status_code == 200
            await administrator.execute(f'ALTER DATABASE "{sample.name}" ALLOW_CONNECTIONS true'.encode())
        await eventually(lambda: is_ready(running))


async def test_every_metric_is_there_and_none_names_a_tenant(sample: Database) -> None:
    await open_books(sample)
    async with sample.service() as running:
        await settled(sample, running)
        seen = len(running.outcomes)
        async with transaction(sample) as application:
            await book(application, ANNA, 100)
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        text = (await get(running, "/metrics")).text
    assert str(ANNA) not in text
    samples = {s.name: s.labels for family in text_string_to_metric_families(text) for s in family.samples}
    assert samples.keys() >= {
        "listener_changes_drained_total", "listener_refreshes_total", "listener_refresh_duration_seconds_count",
        "listener_staleness_seconds_count", "listener_dirty_keys", "listener_oldest_dirty_age_seconds",
        "listener_sweep_recovered_total", "listener_reconnects_total", "listener_lock_busy_total",
        "listener_dead_letters", "listener_not_ready_reasons", "listener_paused",
    }  # fmt: skip
    assert samples["listener_refreshes_total"].keys() == {"view", "outcome"}
    for name in ("refresh_duration_seconds_count", "staleness_seconds_count", "dirty_keys", "dead_letters"):
        assert samples[f"listener_{name}"].keys() == {"view"}


async def test_the_keys_of_a_paused_view_do_not_count_as_dirty(sample: Database) -> None:
    await open_books(sample)
    labels = f'{{view="{LEDGER_VIEW}"}}'
    async with sample.connect() as superuser, sample.service(sweep_interval=3600.0) as running:
        await settled(sample, running)
        await superuser.execute("SELECT listener.pause(%s)", (LEDGER_VIEW,))
        seen = len(running.outcomes)
        async with transaction(sample) as application:
            await book(application, ANNA, 100)
        await running.until_refreshed("mv_daily_revenue_summary", ANNA, after=seen)
        text = (await get(running, "/metrics")).text
        assert f"listener_paused{labels} 1.0\n" in text
        assert f"listener_dirty_keys{labels} 0.0\n" in text
        assert f"listener_oldest_dirty_age_seconds{labels} 0.0\n" in text
        dirty = await superuser.execute("SELECT FROM listener.dirty WHERE tenant = %s", (str(ANNA),))
        assert dirty.rowcount == 1
