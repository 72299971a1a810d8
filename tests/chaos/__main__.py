"""Draws faults at random against replicas under a random write load, and checks at the end that nothing was lost.

Exits 1 where a target differs from its definition, a change is not consumed, a lock or a letter is left, or where what
the longest-lived replica holds has grown.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import uuid
from contextlib import AsyncExitStack
from functools import partial
from random import Random

import anyio
import anyio.to_thread

from chaos.canary import Canary, NeverShownError
from chaos.faults import FAULTS
from chaos.replica import Replica
from chaos.report import Report, judged, printed
from chaos.storm import storm
from chaos.verdict import calm, counted, verdict
from chaos.world import DATABASE, World, make_tenants, set_up, until
from listener.embedded import EmbeddedServer
from proxy import proxy_to

WARM_UP = 8.0  # seconds under load, before what the replicas hold is counted
PATIENCE = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=os.environ["CHAOS_SECONDS"], help="how long faults are drawn (CHAOS_SECONDS)"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), help="the same faults again")
    parser.add_argument("--outage", type=float, default=5.0, help="seconds that a fault with a duration lasts (5)")
    parser.add_argument("--replicas", type=int, default=3, help="two at least (3)")
    parser.add_argument("--tenants", type=int, default=50, help="(50)")
    parser.add_argument("--rate", type=float, default=100.0, help="writes a second (100)")
    parser.add_argument("--only", metavar="FAULT", action="append", help="faults of this name alone; may be repeated")
    options = parser.parse_args()
    if unknown := set(options.only or ()) - set(FAULTS):
        parser.error(f"unknown fault {', '.join(sorted(unknown))}; there are: {', '.join(FAULTS)}")
    if options.replicas < 2:
        parser.error("--replicas: two at least, or nobody takes over")
    # Connections that break are what this is about.
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    print(f"seed {options.seed}", flush=True)
    try:
        report = anyio.run(run, options)
    except* NeverShownError as errors:
        sys.exit(f"chaos: {errors.exceptions[0]}; seed {options.seed}")
    print(printed(report))
    sys.exit(0 if judged(report) else 1)


async def run(options: argparse.Namespace) -> Report:
    random = Random(options.seed)
    tenants = [uuid.UUID(int=random.getrandbits(128), version=4) for _ in range(options.tenants)]
    server = await anyio.to_thread.run_sync(lambda: EmbeddedServer.start(settings={"fsync": "off"}))
    async with AsyncExitStack() as opened:
        opened.callback(server.stop)
        await anyio.to_thread.run_sync(set_up, server)
        url = server.url(user="listener_service", database=DATABASE)
        replicas = []
        for number in range(options.replicas):
            replica = Replica(f"replica {number + 1}", await opened.enter_async_context(proxy_to(url)))
            opened.callback(replica.end)
            replicas.append(replica)
        canary, *others = tenants
        world = World(server, replicas, random, options.outage, others)
        await make_tenants(world)
        for replica in replicas:
            replica.start()
        with anyio.fail_after(PATIENCE):
            for replica in replicas:
                await until(partial(has_begun, replica), 0.1)
        report = Report(options.seed, options.replicas * int(replicas[0].said("starting")[-1]["connections"]))
        watch = Canary(world, canary)
        async with anyio.create_task_group() as load:
            load.start_soon(world.write, options.rate, 4)
            await anyio.sleep(WARM_UP)
            report.before = await counted(world)
            load.start_soon(watch.sing)
            await storm(world, watch, report, options.seconds, options.only)
            load.cancel_scope.cancel()
        await calm(world)
        report.after = await counted(world)
        report.changes = world.load.commits
        report.freshness = watch.samples
        await verdict(world, report)
    return report


async def has_begun(replica: Replica) -> bool:
    """Whether it serves."""
    return bool(replica.said("serving"))


main()
