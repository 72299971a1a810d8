"""`listener run` as a process: what it says first, how it ends, and that nothing is lost when it does."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from books import ANNA, BEN, book, open_books, transaction
from command import ROOT, environment, listener
from conftest import DEADLINE, Database, eventually
from entrance import entrance_to
from gates import FIRST, close, create_slow_view, open_gate, waiting_at
from process import service_process

pytestmark = pytest.mark.anyio


@pytest.fixture
async def slow(sample: Database) -> Database:
    """A view whose refresh is slow for as long as the test says."""
    await open_books(sample)
    async with sample.connect() as superuser:
        await create_slow_view(superuser)
    assert listener("sweep", url=sample.url()).returncode == 0
    return sample


async def test_the_first_log_line_says_what_runs_and_where(sample: Database) -> None:
    async with service_process(sample.url()) as service:
        await service.until("serving")
        line = service.log[0]
        assert line["event"] == "starting"
        assert line.keys() >= {"version", "commit", "database", "migration", "postgresql", "connections", "settings"}
        assert line["database"].startswith("listener_service@")
        assert line["settings"]["sweep_interval"] == "5s"
        assert await service.end() == 0
        assert service.log[-1]["event"] == "stopped"


async def test_a_refresh_under_way_is_finished_when_it_can_be_within_the_grace_time(slow: Database) -> None:
    async with slow.connect() as holder:
        await close(holder, FIRST)
        async with service_process(slow.url()) as service:
            await service.until("serving")
            async with transaction(slow) as application:
                await book(application, ANNA, 100)
            await eventually(lambda: waiting_at(holder, FIRST))
            service.send(signal.SIGTERM)
            await service.until("stopping")
            await open_gate(holder, FIRST)
            await service.until("refreshed", view="slow", tenant_id=str(ANNA))
            assert await service.ended() == 0
        row = await (await holder.execute("SELECT cents FROM slow WHERE tenant_id = %s", (ANNA,))).fetchone()
        assert row == (100,)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "kill -9"])
async def test_a_service_ended_in_mid_refresh_loses_nothing(slow: Database, end: signal.Signals) -> None:
    async with slow.connect() as holder:
        await close(holder, FIRST)
        async with service_process(slow.url(), grace_period="100ms") as service:
            await service.until("serving")
            async with transaction(slow, BEN) as application:
                await book(application, BEN, 300)
            await eventually(lambda: waiting_at(holder, FIRST))
            assert await service.end(end) == (0 if end == signal.SIGTERM else -end)
        assert await (await holder.execute("SELECT * FROM slow")).fetchall() == []
        await open_gate(holder, FIRST)
        # By the second service, or by the first one's backend, which went on when it got its lock: either is right.
        async with service_process(slow.url()):

            async def is_shown() -> bool:
                cursor = await holder.execute("SELECT cents FROM slow WHERE tenant_id = %s", (BEN,))
                return await cursor.fetchone() == (300,)

            await eventually(is_shown)


@pytest.mark.parametrize("hangs", [False, True], ids=["between two attempts", "while an attempt hangs"])
async def test_a_service_that_waits_for_its_database_ends_when_it_is_told_to(sample: Database, *, hangs: bool) -> None:
    async with entrance_to(sample) as entrance, service_process(entrance.url("listener_service")) as service:
        await service.until("waiting for the database")
        if hangs:
            await entrance.switch("silent")
            await eventually(lambda: entrance.attempts)
        assert await service.end() == 0
        assert service.log[-1]["event"] == "stopped"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_demo_without_an_end_of_its_own_is_left_with_exit_code_0(end: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "listener", "demo", "--tenants", "2"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        bound = threading.Timer(2 * DEADLINE, process.kill)
        bound.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("a source:"):
                break
        process.send_signal(end)
        said, complaints = process.communicate()
        bound.cancel()
    assert said.endswith("interrupted: not verified\n")
    assert "Traceback" not in complaints
    assert "query cancellation" not in complaints
    assert process.returncode == 0


async def test_a_superuser_who_is_allowed_is_warned(sample: Database) -> None:
    async with service_process(sample.url("postgres"), allow_superuser="true") as service:
        warned = await service.until("row-level security does not bind this role: only predicates keep tenants apart")
        assert warned["level"] == "warning"
        await service.until("serving")
        assert await service.end() == 0
