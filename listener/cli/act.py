"""By hand: refresh, sweep, pause, resume."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

import typer

from listener import console, errors, operations, view_queries
from listener.cli.session import AnyView, Connection, Json, Tenant, app, known_key, retry_policy, with_connection
from listener.operations import Failed
from listener.refresh import Outcome
from listener.settings import load


@app.command()
def refresh(
    view: Annotated[str | None, typer.Argument(help="name of a managed view; left out with --all-views")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="the tenant's id")] = None,
    all_tenants: Annotated[bool, typer.Option("--all-tenants", help="every tenant of the view")] = False,
    all_views: Annotated[
        bool,
        typer.Option("--all-views", help="every view of the tenant, in the order in which the views read each other"),
    ] = False,
    as_json: Json = False,
) -> None:
    """Refreshes one tenant of a view now, or every tenant. A view without tenants is refreshed as a whole.

    With --all-views, it refreshes every view of one tenant in one transaction. An error of one view undoes all.
    """
    if all_views and (view is not None or all_tenants or tenant is None):
        raise errors.SetupError("--all-views needs --tenant ID, and neither a view nor --all-tenants.")
    if view is None and not all_views:
        raise errors.SetupError("the view is missing.", hint="Give one, or --all-views.")
    if tenant is not None and all_tenants:
        raise errors.SetupError("give either --tenant ID or --all-tenants.")

    async def act(connection: Connection) -> None:
        if view is not None and all_tenants:
            await _refresh_all_tenants(connection, view, as_json=as_json)
        elif view is not None:
            if tenant is None and await view_queries.has_tenants(connection, view):
                raise errors.SetupError("give either --tenant ID or --all-tenants.")
            await _refresh_one(connection, view, tenant, as_json=as_json)
        elif tenant is not None:
            await _refresh_all_views(connection, tenant, as_json=as_json)

    with_connection(act)


async def _refresh_all_tenants(connection: Connection, view: str, *, as_json: bool) -> None:
    name = await view_queries.view_name(connection, view)
    tally = await _shown(name, operations.refresh_all(connection, name), as_json=as_json)
    tenants = tally.outcomes.total()
    if as_json:
        console.print_json(
            {"view": name, "tenants": tenants, **_counts(tally), "seconds": tally.seconds, "errors": _errors(tally)}
        )
    else:
        took = f", took {console.duration(tally.seconds)}" if tally.seconds else ""
        console.out.print(f"{console.count(tenants, 'tenant')} of {name}: {_counted(tally)}{took}")
    if tally.outcomes["paused"]:
        console.error(_paused(name))
    if tally.outcomes["refreshed"] != tenants:
        raise typer.Exit(1)


async def _refresh_one(connection: Connection, view: str, tenant: str | None, *, as_json: bool) -> None:
    name, canonical = await known_key(connection, view, tenant)
    outcome = await operations.refresh_one(connection, name, canonical)
    row = operations.outcome_row(outcome)
    if as_json:
        console.print_json(row)
    if outcome.outcome == "paused":
        raise errors.SetupError(_paused(name))
    if outcome.outcome == "busy":
        whose, option = (f" of tenant {canonical}", f" --tenant {canonical}") if canonical else ("", "")
        raise errors.SetupError(
            f"another session has been refreshing {name}{whose} all the while.",
            hint=f"See: listener explain {name}{option}",
        )
    if not as_json:
        seconds = row.pop("seconds")
        took = [f"took {console.duration(seconds)}"] if seconds is not None else []
        console.out.print(", ".join([f"{name} {value}" for name, value in row.items()] + took))


async def _refresh_all_views(connection: Connection, tenant: str, *, as_json: bool) -> None:
    if not tenant or not await view_queries.is_tenant_of_any_view(connection, tenant):
        raise errors.SetupError(f"no view has a tenant {tenant!r}.")
    rows = await operations.refresh_all_views(connection, tenant)
    if as_json:
        console.print_json({"tenant_id": tenant, "views": rows})
    else:
        shown = [row | {"seconds": console.duration(row["seconds"])} for row in rows]
        console.out.print(console.table(shown, rows[0]))
    for row in rows:
        if row["outcome"] == "paused":
            console.error(_paused(row["view"]))
        elif row["outcome"] == "busy":
            console.error(f"another session has been refreshing {row['view']} all the while.")
    if any(row["outcome"] in {"paused", "busy"} for row in rows):
        raise typer.Exit(1)


def _paused(view: str) -> str:
    return f"{view} is paused: nothing was refreshed. Run: listener resume {view}"


async def _shown(
    what: str, results: AsyncIterator[tuple[int, int, Outcome | Failed | None]], *, as_json: bool
) -> operations.Tally:
    """Goes through the results under a progress bar; then one line on stderr for each kind of error."""
    tally = operations.Tally()
    with console.progress(quiet=as_json) as bar:
        task = bar.add_task(what, total=None)
        async for done, total, result in results:
            bar.update(task, completed=done, total=total)
            if result is not None:
                tally.add(result)
    for failed in tally.first.values():
        tenant = f"tenant {failed.tenant_id}" if failed.tenant_id else "all tenants"
        console.error(f"{failed.view} of {tenant}: {errors.from_database(failed.error)}")
    return tally


def _counts(tally: operations.Tally) -> dict[str, int]:
    return {outcome: tally.outcomes[outcome] for outcome in ("refreshed", "busy", "paused", "failed")}


def _counted(tally: operations.Tally) -> str:
    counts = _counts(tally)
    return ", ".join(f"{n} {outcome}" for outcome, n in counts.items() if n or outcome == "refreshed")


def _errors(tally: operations.Tally) -> list[dict[str, object]]:
    return [
        {
            "view": failed.view,
            "tenant_id": failed.tenant_id,
            "sqlstate": failed.error.sqlstate,
            "error": str(errors.from_database(failed.error)),
        }
        for failed in tally.first.values()
    ]


@app.command()
def sweep(as_json: Json = False) -> None:
    """One sweep by hand: drains, then refreshes every dirty key. Works without the service.

    A key that fails is recorded as the service records it, and the others go on; exit 1 where one failed.
    """
    settings = load()
    policy = retry_policy(settings)

    async def act(connection: Connection) -> None:
        tally = await _shown("sweep", operations.sweep_once(connection, policy), as_json=as_json)
        if as_json:
            console.print_json({**_counts(tally), "errors": _errors(tally)})
        else:
            console.out.print(
                f"{console.count(tally.outcomes['refreshed'], 'key')} {_counted(tally).partition(' ')[2]}"
            )
        if tally.outcomes["failed"]:
            raise typer.Exit(1)

    with_connection(act)


@app.command()
def pause(
    view: AnyView = None,
    capture: Annotated[
        bool, typer.Option("--capture", help="disable the triggers too; resume marks all dirty")
    ] = False,
) -> None:
    """Stops refreshing a view, or all of them; changes go on being captured."""

    async def act(connection: Connection) -> None:
        await connection.execute("SELECT listener.pause(%s, %s)", (view, capture))
        console.out.print(f"paused: {view or 'all views'}{', and capture' if capture else ''}")

    with_connection(act, as_owner=True)


@app.command()
def resume(view: AnyView = None) -> None:
    """Takes up refreshing again, with what changed meanwhile."""

    async def act(connection: Connection) -> None:
        await connection.execute("SELECT listener.resume(%s)", (view,))
        console.out.print(f"resumed: {view or 'all views'}")

    with_connection(act, as_owner=True)


@app.command()
def forget(
    tenant: Tenant,
    view: Annotated[str | None, typer.Option("--view", help="only in this view; in all of them where left out")] = None,
    as_json: Json = False,
) -> None:
    """Deletes what is kept of a tenant that is no more: its rows of the targets, its keys, its dead letters, its log.

    Refused while a view's tenants query lists it, or a view's query still returns rows of it: it would come back. So
    delete it in your own tables first. Of messages about others it is struck out. What a view without tenants holds
    follows from what it reads. Only vacuum takes deleted rows off the disk; logs of the service may name it, too.
    """

    async def act(connection: Connection) -> None:
        rows = await view_queries.forget(connection, tenant, view)
        if as_json:
            console.print_json({"tenant_id": tenant, "forgotten": rows})
            return
        for row in rows:
            what = row["view_name"] or "logs and letters of no view"
            kept = f"{console.count(row['rows_deleted'], 'row')}, " if row["view_name"] else ""
            console.out.print(f"{what}: {kept}{console.count(row['records'], 'record')}")

    with_connection(act, as_owner=True)
