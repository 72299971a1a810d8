"""The storm: faults drawn one after the other, now and then two at once, each followed by the recovery from it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from random import Random

import anyio

from chaos.canary import Canary
from chaos.faults import FAULTS, go_together
from chaos.report import Report
from chaos.world import World

TWO_AT_ONCE = 0.25  # the share of draws
BREATH = 0.5  # seconds between a recovery and the next fault, at the most


async def storm(world: World, canary: Canary, report: Report, seconds: float, only: Sequence[str] | None) -> None:
    """Until so many seconds are over and the last fault has been recovered from."""
    end = anyio.current_time() + seconds
    deck = drawn(world.random, only or list(FAULTS))
    while anyio.current_time() < end:
        names = [next(deck)]
        if world.random.random() < TWO_AT_ONCE:
            other = world.random.choice(list(FAULTS))
            if not only and other not in names and go_together(names[0], other):
                names.append(other)
        async with anyio.create_task_group() as faults:
            for name in names:
                faults.start_soon(FAULTS[name], world)
        seconds = await canary.recovered(anyio.current_time())
        report.recovered(names, seconds)
        print(f"  {' and '.join(names)}: shown {seconds:.2f} s after it was over", file=sys.stderr, flush=True)
        await anyio.sleep(world.random.uniform(0, BREATH))


def drawn(random: Random, names: Sequence[str]) -> Iterator[str]:
    """Every name once in random order, then again."""
    while True:
        deck = list(names)
        random.shuffle(deck)
        yield from deck
