"""The wall clock of the service's process steps by an hour: no refresh is early, none is missed."""

from __future__ import annotations

import ast
import time
from pathlib import Path
from typing import Any

import pytest
from psycopg import AsyncConnection

import listener
from books import value
from conftest import Database, eventually
from on_call import explained, is_exact, pauses_and_resumes
from shop import ANNA, BERT, SALES, application, create_view, order
from test_sql_checks import APPLICATION

pytestmark = pytest.mark.anyio

PAID = "SELECT tenant_id, product, sum(cents)::bigint AS cents FROM shop.payments GROUP BY 1, 2"
READS_THE_WALL_CLOCK = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
# It says to people how long ago something was.
COMMANDS = {"console", "doctor"}


class Clock:
    """The wall clock, as much ahead as a test says."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self._time = time.time

    def time(self) -> float:
        return self._time() + self.ahead

    def time_ns(self) -> int:
        return int(self.time() * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What this process takes for the time; the server's clock, in processes of its own, is left alone."""
    clock = Clock()
    monkeypatch.setattr(time, "time", clock.time)
    monkeypatch.setattr(time, "time_ns", clock.time_ns)
    return clock


async def pay(connection: AsyncConnection[Any]) -> None:
    await connection.execute("INSERT INTO shop.payments (tenant_id, product, cents) VALUES (%s, 'tea', 5)", (ANNA,))


@pytest.mark.parametrize("step", [3600.0, -3600.0], ids=["ahead", "back"])
async def test_a_clock_that_steps_by_an_hour_brings_no_refresh_early_and_loses_none(
    shop: Database, superuser: AsyncConnection[Any], clock: Clock, step: float
) -> None:
    await create_view(shop, "paid", PAID, ["product"])
    await create_view(shop, "sales", SALES, ["product"])
    await create_view(shop, "aged", SALES, ["product"], max_age="50 min")
    async with shop.service(sweep_interval="200ms") as running, application(shop, ANNA) as anna:
        service = running.service
        await eventually(lambda: is_exact(shop, "sales", "paid", "aged"))
        # Half an hour is to pass before this is shown.
        await superuser.execute("SELECT listener.set_window('sales', '30 min', '45 min', 'trailing')")
        seen = len(running.outcomes)
        await order(anna, ANNA, "tea")
        await running.until_refreshed("aged", ANNA, after=seen)
        seen = len(running.outcomes)
        swept = value(running, "listener_sweep_recovered_total")
        await eventually(lambda: service.drainer.doorbell.state == "resting")
        clock.ahead = step
        await pay(anna)
        await running.until_refreshed("paid", ANNA, after=seen)
        # Nothing but a sweep brings this.
        await eventually(lambda: service.drainer.doorbell.state == "resting")
        seen_then = len(running.outcomes)
        await anna.execute("SET listener.notify = 'off'")
        await pay(anna)
        await running.until_refreshed("paid", ANNA, after=seen_then)
        await eventually(lambda: value(running, "listener_sweep_recovered_total") > swept)
        assert [(c.key.view, c.key.tenant) for c, _ in running.outcomes[seen:] if c.key.view != "paid"] == []
        assert any(line.startswith("it is due in 17") for line in await explained(shop, "sales", ANNA))
        await pauses_and_resumes(shop, "paid", ANNA)
        # And back again, as clocks do.
        clock.ahead = 0.0
        async with application(shop, BERT) as bert:
            await order(bert, BERT, "tea")
        await running.until_refreshed("aged", BERT, after=seen)
        assert {c.key.view for c, _ in running.outcomes[seen:]} == {"paid", "aged"}
        await superuser.execute("SELECT listener.set_window('sales', '0', '0')")
        await eventually(lambda: is_exact(shop, "sales", "paid", "aged"))


def test_nothing_that_runs_in_the_service_reads_the_wall_clock() -> None:
    found = []
    root = Path(listener.__file__).parent
    for path in root.rglob("*.py"):
        if path.stem in APPLICATION | COMMANDS or "cli" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in READS_THE_WALL_CLOCK:
                found.append(f"{path.relative_to(root)}:{node.lineno} {ast.unparse(node)}")
            if (
                isinstance(node, ast.ImportFrom)
                and node.module == "time"
                and {"time", "time_ns"} & {n.name for n in node.names}
            ):
                found.append(f"{path.relative_to(root)}:{node.lineno} from time import")
    assert found == []
