"""Adopting a materialized view, and turning that back: begin, fill, check, swap. No printing here.

Until the swap the materialized view is as it was. Each step is a transaction of its own, by the functions of
sql/22_adopt.sql; what an interrupted run left is found by the next, which goes on from there.

Behind a long reader the swap gives way and is tried again: nothing waits in a queue meanwhile.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
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
WRITE_IT_LOCAL = (
    "Write the query so that PostgreSQL's planner can prove it; `listener inventory` says what is in the way."
)
BUSY_PATIENCE, BUSY_PAUSE = 30.0, 0.1  # seconds
Result = TypeVar("Result")


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
    """A tenant's rows differ, or may differ, when they are computed alone; the text says whose, or why."""

    def __init__(self, text: str, hint: str = "Leave --strategy out.") -> None:
        super().__init__(text)
        self.hint = hint


async def adopt(connection: AsyncConnection[Any], request: Request, tell: Tell, by: By, patience: float) -> Adopted:
    """Adopts by tenant, else as a whole, else keeps it as the materialized view that it is, and tells why.

    A strategy that the request names is the only one. The swap is tried for `patience` seconds. Raises psycopg.Error
    and SetupError; whatever was made beside the materialized view is gone then, but where only the swap's locks were
    not to be had: the next run goes on there.
    """

    async def attempt(given: Request) -> Adopted:
        if given.strategy == KEPT:
            return Adopted(await adoptions.keep(connection, given), KEPT)
        must_be_proven = given.strategy == BY_TENANT and not request.strategy
        async with adoptions.rehearsal(connection):
            await _check_locality(connection, await adoptions.begin(connection, given), must_be_proven=must_be_proven)
        return await _adopt(connection, given, tell, by, patience, must_be_proven=must_be_proven)

    return await _first_that_works(connection, request, tell, attempt)


async def rehearse(connection: AsyncConnection[Any], request: Request, tell: Tell) -> Request:
    """The request with the strategy that adopt() would take. Tells and raises as adopt() does; changes nothing.

    It compares as adopt() does, which takes as long as a REFRESH. It does not fill, so it misses one error of adopt():
    two rows with one key.
    """

    async def attempt(given: Request) -> Request:
        async with adoptions.rehearsal(connection):
            if given.strategy == KEPT:
                await adoptions.keep(connection, given)
                return given
            view = await adoptions.begin(connection, given)
            await _check_locality(connection, view, must_be_proven=given.strategy == BY_TENANT and not request.strategy)
            await _check_tenants(connection, view, given, tell)
            return given

    return await _first_that_works(connection, request, tell, attempt)


async def _first_that_works(
    connection: AsyncConnection[Any], request: Request, tell: Tell, attempt: Callable[[Request], Awaitable[Result]]
) -> Result:
    """What the first strategy gives that is not refused; tells why each one before it is."""
    strategies = [request.strategy] if request.strategy else [BY_TENANT, WHOLE, KEPT]
    if BY_TENANT in strategies and not await adoptions.has_column(connection, request.name, request.tenant_column):
        if request.strategy:
            raise SetupError(f"{request.name} has no column {request.tenant_column}.", hint="Name it: --tenant-column.")
        tell(f"not by tenant: it has no column {request.tenant_column}")
        strategies.remove(BY_TENANT)
    for strategy in strategies:
        try:
            return await attempt(request.by(strategy))
        except _NotByTenantError as reason:
            if request.strategy:
                raise SetupError(
                    f"{request.name} cannot be refreshed by tenant: {reason}.", hint=reason.hint
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
        await _check_locality(connection, view, must_be_proven=must_be_proven)
        keys = await _fill(connection, view, by)
        await _check(connection, view, request, tell)
        await adoptions.analyze(connection, view)
        await operations.catch_up(connection, view)
    done = await _swap(connection, view, adoptions.finish, tell, patience)
    return Adopted(view, request.strategy or BY_TENANT, keys, tuple(plan["lock"]), done.locked, done.attempts)


async def _check_locality(connection: AsyncConnection[Any], view: str, *, must_be_proven: bool) -> None:
    """Raises _NotByTenantError where a proof is needed and there is none.

    Equal rows are no proof: ranks of equal sums, or of no rows at all, are the same by chance.
    """
    if why := await adoptions.why_not_by_tenant(connection, view):
        raise _NotByTenantError(why, hint=WRITE_IT_LOCAL)
    if must_be_proven and not await adoptions.is_tenant_local(connection, view):
        raise _NotByTenantError(
            "it is not proven that a tenant's rows depend on its own alone; "
            "--strategy tenant compares them as they are now"
        )


async def unadopt(connection: AsyncConnection[Any], name: str, tell: Tell, patience: float) -> Adopted:
    """Gives the materialized view back, filled and compared, and drops the managed view. Raises as adopt()."""
    view, strategy, state = await adoptions.state(connection, name)
    locks: tuple[str, ...] = ()
    locked, attempts = 0.0, 0
    if strategy != KEPT and state != "turned back":
        plan = await adoptions.plan_back(connection, view)
        locks = tuple(plan["lock"])
        await adoptions.begin_back(connection, view)
        async with _taken_back(connection, view):
            tell(f"filling {plan['name'][0]} beside its target")
            await _fill_back(connection, view)
            await adoptions.analyze(connection, view)
        done = await _swap(connection, view, adoptions.finish_back, tell, patience, is_read=True)
        locked, attempts = done.locked, done.attempts
    await adoptions.drop(connection, view)
    return Adopted(view, strategy, locks=locks, locked=locked, attempts=attempts)


async def _fill_back(connection: AsyncConnection[Any], view: str) -> None:
    """Fills the materialized view. Where it is filled from the target, the target is refreshed first.

    Where the rows depend on the time, that happens in the same transaction, at the same now().
    """
    from_target, depends_on_time = await adoptions.fills_from_target(connection, view)
    if from_target:
        await operations.catch_up(connection, view)
    async with connection.transaction():
        if from_target and depends_on_time:
            for tenant in await view_queries.tenants(connection, view):
                await operations.refresh_one(connection, view, tenant)
        await adoptions.fill_back(connection, view)


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
        if difference is None or difference.verdict == "stale":
            continue
        if difference.untenanted:
            if request.strategy == BY_TENANT:
                raise _NotByTenantError(
                    f"computed alone, other rows come out for rows without a tenant ({difference.missing} of them)"
                )
            continue
        # It was filled at another now().
        if difference.verdict == "moved" and await _is_exact_now(connection, view, difference.tenant_id or ""):
            continue
        raise SetupError(
            f"{view} is {difference.verdict} for {difference.tenant_id or 'all tenants'}: "
            f"{difference.error or f'{difference.missing} rows are missing, {difference.extra} too many'}."
        )
    await _check_tenants(connection, view, request, tell)
    if await adoptions.hidden_from_owner(connection, view) and (
        changed := await adoptions.rows_changed(connection, view)
    ):
        tell(f"{changed} rows differ from those of the last REFRESH of the materialized view")


async def _is_exact_now(connection: AsyncConnection[Any], view: str, tenant: str) -> bool:
    """Refreshes and compares a key in one transaction, at one now(); waits while another session refreshes it."""
    deadline = anyio.current_time() + BUSY_PATIENCE
    while True:
        if await adoptions.refresh_and_compare(connection, view, tenant):
            return True
        if anyio.current_time() > deadline:
            return False
        await anyio.sleep(BUSY_PAUSE)


async def _check_tenants(connection: AsyncConnection[Any], view: str, request: Request, tell: Tell) -> None:
    """Compares each tenant's rows with those of the whole query, unless the planner has proved them equal."""
    if request.strategy != BY_TENANT:
        return
    if await adoptions.is_proven(connection, view):
        tell("by tenant: PostgreSQL's planner shows that each one's rows depend on its own alone")
        return
    differing = await adoptions.differing_tenants(connection, view)
    named = ", ".join("rows without a tenant" if tenant is None else tenant for tenant in differing[:NAMED])
    more = f" and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
    hidden = await adoptions.hidden_from_owner(connection, view)
    if hidden is None:
        if differing:
            raise _NotByTenantError(f"computed alone, other rows come out for {named}{more}")
        same = "by tenant: each one's rows are the same computed alone and with all others"
        if not await adoptions.is_tenant_local(connection, view):
            same += ", by the rows that there are now; it is not proven that they stay so"
        tell(same)
        return
    if differing:
        raise _NotByTenantError(
            f"the materialized view has rows of {named}{more}, which the tenants query does not list",
            hint="Give a query that lists every tenant: --tenants-query.",
        )
    source, owner = hidden
    tell(
        "by tenant: PostgreSQL's planner shows that each one's rows depend on its own alone; they are not compared "
        f"with the whole query, since its owner {owner} does not see all rows of {source}"
    )


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
