"""Adopting a materialized view, and turning that back: begin, fill, check, swap. No printing here.

Until the swap the materialized view is as it was. Each step is a transaction of its own, by the functions of
sql/22_adopt.sql; what an interrupted run left is found by the next, which goes on from there.

Behind a long reader the swap gives way and is tried again: nothing waits in a queue meanwhile.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg

from listener import adoptions, operations, view_queries
from listener.adoptions import Request
from listener.dead_letters import RetryPolicy
from listener.errors import SetupError
from listener.fill import fill
from listener.swap import Swapped, Tell, swapped

if TYPE_CHECKING:
    from psycopg import AsyncConnection

# Strategies, as managed_view calls them.
BY_TENANT, WHOLE, KEPT = "tenant", "whole", "materialized view"
REFUSED = "LSN03"
NAMED = 3  # tenants in a message


@dataclass(frozen=True, slots=True)
class By:
    """Who fills: `workers` connections of `connect`; `progress` is told how many keys of how many are done."""

    connect: Callable[[], AbstractAsyncContextManager[AsyncConnection[Any]]]
    workers: int
    policy: RetryPolicy
    progress: Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Adopted:
    """What became of it. `locked`: seconds that readers were locked out of `locks`, had at attempt number `attempts`.

    A view that is kept as a materialized view was never swapped: no locks, no attempts.
    """

    view: str
    strategy: str
    keys: int = 0
    locks: tuple[str, ...] = ()
    locked: float = 0.0
    attempts: int = 0


class _NotByTenantError(Exception):
    """A tenant's rows are others when they are computed alone; the text says whose."""


async def adopt(connection: AsyncConnection[Any], request: Request, tell: Tell, by: By, patience: float) -> Adopted:
    """Adopts by tenant, else as a whole, else keeps it as the materialized view that it is, and tells why.

    A strategy that the request names is the only one. The swap is tried for `patience` seconds. Raises psycopg.Error
    and SetupError; whatever was made beside the materialized view is gone then, but where only the swap's locks were
    not to be had: the next run goes on there.
    """
    strategies = [request.strategy] if request.strategy else [BY_TENANT, WHOLE, KEPT]
    if BY_TENANT in strategies and not await adoptions.has_column(connection, request.name, request.tenant_column):
        if request.strategy:
            raise SetupError(f"{request.name} has no column {request.tenant_column}.", hint="Name it: --tenant-column.")
        tell(f"not by tenant: it has no column {request.tenant_column}")
        strategies.remove(BY_TENANT)
    for strategy in strategies:
        if strategy == KEPT:
            return Adopted(await adoptions.keep(connection, request), KEPT)
        try:
            must_be_proven = strategy == BY_TENANT and not request.strategy
            return await _adopt(connection, request.by(strategy), tell, by, patience, must_be_proven=must_be_proven)
        except _NotByTenantError as reason:
            if request.strategy:
                raise SetupError(
                    f"{request.name} cannot be refreshed by tenant: {reason}.", hint="Leave --strategy away."
                ) from reason
            tell(f"not by tenant: {reason}")
        except psycopg.Error as error:
            # What is tied to it is in the way of any swap, and whoever asked has to know; it was looked for first.
            if strategy != WHOLE or request.strategy or error.sqlstate != REFUSED:
                raise
            if await adoptions.tied(connection, request.name):
                raise
            tell(f"not as a whole: {error.diag.message_primary}")
    raise AssertionError(strategies)


async def _adopt(
    connection: AsyncConnection[Any], request: Request, tell: Tell, by: By, patience: float, *, must_be_proven: bool
) -> Adopted:
    plan = await adoptions.plan(connection, request)
    view = await adoptions.begin(connection, request)
    tell(f"SHARE ROW EXCLUSIVE on {', '.join(plan['source'])}, for a moment each: capture triggers")
    tell(f"key ({', '.join(plan['key']) or 'the whole row'}), time zone {request.timezone or plan['time zone'][0]}")
    async with _taken_back(connection, view):
        # Equal rows are no proof: ranks of equal sums, or of no rows at all, are the same by chance.
        if must_be_proven and not await adoptions.is_tenant_local(connection, view):
            raise _NotByTenantError(
                "it is not proven that a tenant's rows depend on its own alone; "
                "--strategy tenant compares them as they are now"
            )
        keys = await _fill(connection, view, by)
        await _check(connection, view, request, tell)
        await adoptions.analyze(connection, view)
        await operations.catch_up(connection, view)
    done = await _swap(connection, view, adoptions.finish, tell, patience)
    return Adopted(view, request.strategy or BY_TENANT, keys, tuple(plan["lock"]), done.locked, done.attempts)


async def unadopt(connection: AsyncConnection[Any], name: str, tell: Tell, patience: float) -> Adopted:
    """Gives the materialized view back, filled, and drops the managed view. Raises as adopt()."""
    view, strategy, state = await adoptions.state(connection, name)
    locks: tuple[str, ...] = ()
    locked, attempts = 0.0, 0
    if strategy != KEPT and state != "turned back":
        plan = await adoptions.plan_back(connection, view)
        locks = tuple(plan["lock"])
        await adoptions.begin_back(connection, view)
        async with _taken_back(connection, view):
            tell(f"filling {plan['name'][0]} beside its target")
            await adoptions.fill_back(connection, view)
            await adoptions.analyze(connection, view)
        done = await _swap(connection, view, adoptions.finish_back, tell, patience, is_read=True)
        locked, attempts = done.locked, done.attempts
    await adoptions.drop(connection, view)
    return Adopted(view, strategy, locks=locks, locked=locked, attempts=attempts)


@asynccontextmanager
async def _taken_back(connection: AsyncConnection[Any], view: str) -> AsyncIterator[None]:
    """What was made beside is dropped where the block raises; where that cannot be, the next run finds it.

    What somebody else made meanwhile, who adopts the same with other options, is his.
    """
    begun = await adoptions.begun_at(connection, view)
    try:
        yield
    except Exception:
        with suppress(psycopg.Error):
            if await adoptions.begun_at(connection, view) == begun:
                await adoptions.abort(connection, view)
        raise


async def _fill(connection: AsyncConnection[Any], view: str, by: By) -> int:
    """Until every key was filled once, and not until none is dirty: writes go on. The number of keys."""
    failed: list[psycopg.Error] = []
    steps = fill(
        by.connect, view, workers=by.workers, policy=by.policy, on_failure=lambda _key, error: failed.append(error)
    )
    async with aclosing(steps):
        async for step in steps:
            if failed:
                raise failed[0]
            if step.paused:
                raise SetupError(f"{view} was paused while it was filled.", hint="Run it again: it goes on.")
            unfilled = len(await view_queries.unfilled(connection, view))
            by.progress(step.done, step.done + unfilled)
            if not unfilled:
                break
    return len(await view_queries.tenants(connection, view))


async def _check(connection: AsyncConnection[Any], view: str, request: Request, tell: Tell) -> None:
    async for _, _, difference in operations.verify(connection, [view]):
        if difference is not None and difference.untenanted and request.strategy == BY_TENANT:
            raise _NotByTenantError(
                f"computed alone, other rows come out for rows without a tenant ({difference.missing} of them)"
            )
        if difference is not None and difference.verdict != "stale":
            raise SetupError(
                f"{view} is {difference.verdict} for {difference.tenant_id or 'all tenants'}: "
                f"{difference.error or f'{difference.missing} rows are missing, {difference.extra} too many'}."
            )
    if request.strategy != BY_TENANT:
        return
    if await adoptions.is_proven(connection, view):
        tell("by tenant: PostgreSQL's planner shows that each one's rows depend on its own alone")
        return
    differing = await adoptions.differing_tenants(connection, view)
    if differing:
        named = ", ".join("rows without a tenant" if tenant is None else tenant for tenant in differing[:NAMED])
        more = f" and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
        raise _NotByTenantError(f"computed alone, other rows come out for {named}{more}")
    same = "by tenant: each one's rows are the same computed alone and with all others"
    if not await adoptions.is_tenant_local(connection, view):
        same += ", by the rows that there are now; it is not proven that they stay so"
    tell(same)


async def _swap(
    connection: AsyncConnection[Any],
    view: str,
    finish: Callable[[AsyncConnection[Any], str], Awaitable[float]],
    tell: Tell,
    patience: float,
    *,
    is_read: bool = False,
) -> Swapped:
    """Where only the locks were not to be had, what was filled stays for the next run; else it is taken back."""
    begun = await adoptions.begun_at(connection, view)
    try:
        return await swapped(connection, view, lambda: finish(connection, view), tell, patience, is_read=is_read)
    except psycopg.Error:
        with suppress(psycopg.Error):
            if await adoptions.begun_at(connection, view) == begun:
                await adoptions.abort(connection, view)
        raise
