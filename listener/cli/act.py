"""By hand: refresh, sweep, pause, resume."""

from __future__ import annotations

from typing import Annotated

import typer

from listener import console, errors, operations, queries
from listener.cli.session import AnyView, Connection, Json, View, app, recording_refusals, with_connection


@app.command()
def refresh(
    view: View,
    tenant: Annotated[str | None, typer.Option("--tenant", help="the tenant's id")] = None,
    all_tenants: Annotated[bool, typer.Option("--all-tenants", help="every tenant of the view")] = False,
    as_json: Json = False,
) -> None:
    """Refreshes one tenant of a view now, or all of them."""
    if (tenant is None) is not all_tenants:
        raise errors.SetupError("give either --tenant ID or --all-tenants.")

    async def act(connection: Connection) -> None:
        if tenant is not None:
            outcome = await recording_refusals(
                connection, view, tenant, operations.refresh_one(connection, view, tenant)
            )
            row = operations.outcome_row(outcome)
            if as_json:
                console.print_json(row)
            else:
                console.out.print(", ".join(f"{name} {value}" for name, value in row.items()))
            if outcome.outcome != "refreshed":
                raise typer.Exit(1)
            return
        everyone = await queries.tenants(connection, view)
        with console.progress(quiet=as_json) as bar:
            for one in bar.track(everyone, description=view):
                await operations.refresh_one(connection, view, one)
        done = {"view": view, "tenants": len(everyone)}
        console.print_json(done) if as_json else console.out.print(f"{len(everyone)} tenants of {view} refreshed")

    with_connection(act)


@app.command()
def sweep(as_json: Json = False) -> None:
    """One sweep by hand: drains, then refreshes every dirty key. Works without the service."""

    async def act(connection: Connection) -> None:
        done = 0
        with console.progress(quiet=as_json) as bar:
            task = bar.add_task("sweep", total=None)
            async for done, total, _ in operations.sweep_once(connection):
                bar.update(task, completed=done, total=total)
        console.print_json({"refreshed": done}) if as_json else console.out.print(f"{done} keys refreshed")

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

    with_connection(act)


@app.command()
def resume(view: AnyView = None) -> None:
    """Takes up refreshing again, with what changed meanwhile."""

    async def act(connection: Connection) -> None:
        await connection.execute("SELECT listener.resume(%s)", (view,))
        console.out.print(f"resumed: {view or 'all views'}")

    with_connection(act)
