"""The faults: each a function that injects one, lasts as long as it lasts, and returns once it is over."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import anyio
import anyio.to_thread
import psycopg

from chaos.replica import Replica
from chaos.world import World

Fault = Callable[[World], Coroutine[Any, Any, None]]
STORM = 2000  # notifications
BULK = 20  # rows of each tenant
SLOW = 50_000  # bytes a second
FORGED = ("no JSON", "{}", "[" * 3000, '{"probe": 7}', "x" * 7999, "'; DROP TABLE tenants; --", '{"tenant_id": 1}')


async def listening_backends_killed(world: World) -> None:
    await _terminate(world, "application_name = 'listener listen'")


async def some_backends_killed(world: World) -> None:
    await _terminate(world, "application_name LIKE 'listener%' AND random() < 0.5")


async def all_backends_killed(world: World) -> None:
    await _terminate(world, "application_name LIKE 'listener%'")


async def _terminate(world: World, which: str) -> None:
    async with world.superuser() as superuser:
        await superuser.execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {which}".encode()  # noqa: S608 - those above
        )


async def refreshes_cancelled(world: World) -> None:
    """Whatever the replicas run, for a second."""
    async with world.superuser() as superuser:
        for _ in range(20):
            await superuser.execute(
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'listener' AND state = 'active'"
            )
            await anyio.sleep(0.05)


async def a_backend_frozen(world: World) -> None:
    """One that works, if there is one: the process stands, with the locks that it holds."""
    async with world.superuser() as superuser:
        cursor = await superuser.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'listener%'"
            " ORDER BY state = 'active' DESC, random() LIMIT 1"
        )
        row = await cursor.fetchone()
    if row is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(row[0], signal.SIGSTOP)
        await anyio.sleep(world.outage)
        os.kill(row[0], signal.SIGCONT)


async def the_server_crashes(world: World) -> None:
    """And is started again at once; it recovers from its log."""
    await anyio.to_thread.run_sync(world.server.restart, "immediate")


async def the_server_is_gone(world: World) -> None:
    await anyio.to_thread.run_sync(world.server._end, "fast")
    await anyio.sleep(world.outage)
    await anyio.to_thread.run_sync(world.server._launch)


async def no_connection_is_left(world: World) -> None:
    """Other clients take every slot, and what the replicas had is cut."""
    async with AsyncExitStack() as taken:
        with contextlib.suppress(psycopg.OperationalError):
            await _terminate(world, "application_name LIKE 'listener%'")
            while True:
                await taken.enter_async_context(world.superuser())
        await anyio.sleep(world.outage)


async def a_black_hole(world: World) -> None:
    """A replica's connections stand and carry nothing, and new ones do no better; the old ones never will."""
    proxy = world.random.choice(world.replicas).proxy
    proxy.switch("hole", later="hole")
    await anyio.sleep(world.outage)
    proxy.later = "forward"


async def answers_lost(world: World) -> None:
    world.random.choice(world.replicas).proxy.switch("deaf")


async def requests_lost(world: World) -> None:
    world.random.choice(world.replicas).proxy.switch("mute")


async def a_stuck_link(world: World) -> None:
    """What was sent meanwhile arrives afterwards."""
    proxy = world.random.choice(world.replicas).proxy
    proxy.switch("stuck", later="stuck")
    await anyio.sleep(world.outage)
    proxy.switch("forward")


async def a_slow_link(world: World) -> None:
    link = world.random.choice(world.replicas).proxy.link
    link.rate = SLOW
    await anyio.sleep(world.outage)
    link.rate = math.inf


async def notifications_lost(world: World) -> None:
    """To all replicas: nobody is rung for."""
    for replica in world.replicas:
        replica.proxy.switch("unnotified")
    await anyio.sleep(world.outage)
    for replica in world.replicas:
        replica.proxy.switch("forward")


async def a_network_reset(world: World) -> None:
    for replica in world.replicas:
        replica.proxy.switch("reset")


async def a_replica_killed(world: World) -> None:
    """Kill -9; whoever looks after processes starts it again."""
    replica = world.random.choice(world.mortals)
    replica.signal(signal.SIGKILL)
    await anyio.to_thread.run_sync(replica.wait)
    await anyio.sleep(world.outage)
    replica.start()


async def a_replica_deployed_anew(world: World) -> None:
    """SIGTERM, then the next."""
    replica = world.random.choice(world.mortals)
    await _told_to_stop(replica)
    replica.start()


async def all_mortals_told_to_stop(world: World) -> None:
    async with anyio.create_task_group() as tasks:
        for replica in world.mortals:
            tasks.start_soon(_told_to_stop, replica)
    for replica in world.mortals:
        replica.start()


async def _told_to_stop(replica: Replica) -> None:
    replica.signal(signal.SIGTERM)
    await anyio.to_thread.run_sync(replica.wait)


async def a_replica_stopped(world: World) -> None:
    """SIGSTOP, in the middle of whatever it does; then it goes on as if nothing had been."""
    replica = world.random.choice(world.mortals)
    replica.signal(signal.SIGSTOP)
    await anyio.sleep(world.outage)
    replica.signal(signal.SIGCONT)


async def a_forged_storm(world: World) -> None:
    async with world.superuser() as superuser:
        for number in range(STORM):
            payload = FORGED[number % len(FORGED)]
            await superuser.execute("SELECT pg_notify('listener_changes', %s)", (payload,))


async def an_idle_transaction(world: World) -> None:
    """It has written, and holds a snapshot."""
    async with world.superuser(autocommit=False) as session:
        await session.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        await session.execute("UPDATE public.divisors SET divisor = 1 WHERE tenant_id = %s", (world.tenants[0],))
        await anyio.sleep(world.outage)


async def a_target_locked(world: World) -> None:
    """Refreshes of one view queue behind somebody's lock."""
    async with world.superuser(autocommit=False) as session:
        await session.execute("LOCK TABLE dashboard.mv_realtime_revenue IN EXCLUSIVE MODE")
        await anyio.sleep(world.outage)


async def a_drain_left_open(world: World) -> None:
    """A session that drained and does not end its transaction: nobody else drains meanwhile."""
    async with world.superuser(autocommit=False) as session:
        await session.execute("SELECT count(*) FROM listener.drain()")
        await anyio.sleep(world.outage)
        await session.rollback()


async def a_poisoned_tenant(world: World) -> None:
    """Its rows divide by zero, until somebody mends them."""
    tenant = world.random.choice(world.tenants)
    async with world.superuser() as superuser:
        await superuser.execute("INSERT INTO public.divisors VALUES (%s, 0)", (tenant,))
        await anyio.sleep(world.outage)
        await superuser.execute("UPDATE public.divisors SET divisor = 1 WHERE tenant_id = %s", (tenant,))


async def a_trigger_disabled(world: World) -> None:
    """What is written until the sweep notices was seen by nobody."""
    async with world.superuser() as superuser:
        await superuser.execute("ALTER TABLE public.reconciliation_runs DISABLE TRIGGER USER")
    await anyio.sleep(world.outage)


async def a_column_renamed(world: World) -> None:
    async with world.superuser() as superuser:
        await superuser.execute("ALTER TABLE public.divisors RENAME COLUMN divisor TO dividing")
        await anyio.sleep(world.outage)
        await superuser.execute("ALTER TABLE public.divisors RENAME COLUMN dividing TO divisor")


async def a_table_emptied(world: World) -> None:
    async with world.superuser() as superuser, superuser.transaction():
        await superuser.execute("TRUNCATE public.divisors")
        await superuser.execute("INSERT INTO public.divisors SELECT id, 1 FROM public.tenants")


async def a_bulk_write(world: World) -> None:
    async with world.superuser() as superuser:
        await superuser.execute(
            "INSERT INTO public.divisors SELECT id, 1 FROM public.tenants, generate_series(1, %s)", (BULK,)
        )


async def a_view_paused(world: World) -> None:
    async with world.superuser() as superuser:
        await superuser.execute("SELECT listener.pause('shares')")
        await anyio.sleep(world.outage)
        await superuser.execute("SELECT listener.resume('shares')")


FAULTS: dict[str, Fault] = {
    function.__name__.replace("_", " "): function
    for function in (
        listening_backends_killed,
        some_backends_killed,
        all_backends_killed,
        refreshes_cancelled,
        a_backend_frozen,
        the_server_crashes,
        the_server_is_gone,
        no_connection_is_left,
        a_black_hole,
        answers_lost,
        requests_lost,
        a_stuck_link,
        a_slow_link,
        notifications_lost,
        a_network_reset,
        a_replica_killed,
        a_replica_deployed_anew,
        all_mortals_told_to_stop,
        a_replica_stopped,
        a_forged_storm,
        an_idle_transaction,
        a_target_locked,
        a_drain_left_open,
        a_poisoned_tenant,
        a_trigger_disabled,
        a_column_renamed,
        a_table_emptied,
        a_bulk_write,
        a_view_paused,
    )
}

# One of these beside one that asks the server something: it would have nobody to ask.
TAKE_THE_SERVER = {"the server crashes", "the server is gone", "no connection is left"}
ASK_NO_SERVER = {
    "a black hole",
    "answers lost",
    "requests lost",
    "a stuck link",
    "a slow link",
    "notifications lost",
    "a network reset",
    "a replica killed",
    "a replica deployed anew",
    "all mortals told to stop",
    "a replica stopped",
}


def go_together(one: str, other: str) -> bool:
    """Whether both can be injected at the same time."""
    for taking, asking in ((one, other), (other, one)):
        if taking in TAKE_THE_SERVER and asking not in ASK_NO_SERVER:
            return False
    # A process that is stopped does not end when it is told to.
    return not ({one, other} <= ASK_NO_SERVER and "a replica stopped" in {one, other})
