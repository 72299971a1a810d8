"""What is fresh, and why not: status, explain, verify. They change nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from listener import console, operations, queries
from listener.cli.session import (
    AnyView,
    Connection,
    Json,
    Tenant,
    View,
    app,
    recording_refusals,
    with_connection,
)


@app.command()
def status(
    tenant: Annotated[str | None, typer.Option("--tenant", help="the keys of this tenant, one line each")] = None,
    as_json: Json = False,
) -> None:
    """What is fresh: a line per view, or per key of one tenant."""

    async def act(connection: Connection) -> None:
        if tenant is None:
            rows = await queries.views(connection)
            columns = [
                "view",
                "target",
                "keys",
                "dirty",
                "failing",
                "quarantined",
                "paused",
                "dirty_since",
                "last_refreshed_at",
            ]
        else:
            rows = await queries.freshness(connection, tenant=tenant)
            columns = [
                "view_name",
                "status",
                "version",
                "refreshed_version",
                "dirty_since",
                "refreshed_at",
                "due_at",
                "failures",
            ]
        if as_json:
            console.print_json(rows)
        elif rows:
            console.out.print(console.table(rows, columns))
        else:
            nothing = "no view is registered yet: see listener.create_view" if tenant is None else f"no key of {tenant}"
            console.out.print(nothing)

    with_connection(act)


@app.command()
def explain(view: View, tenant: Tenant, as_json: Json = False) -> None:
    """Why is this key stale: log, dirty since, due when, who holds the lock, last error, what it waits for."""

    async def act(connection: Connection) -> None:
        facts = await recording_refusals(connection, view, tenant, queries.explain_key(connection, view, tenant))
        lines = operations.reasons(facts)
        if as_json:
            console.print_json({**facts, "reasons": lines})
            return
        refreshed = facts["refreshed_age"]
        since = f", refreshed {console.duration(refreshed)} ago" if refreshed is not None else ""
        console.out.print(f"{facts['view_name']} of tenant {facts['tenant']}: {'stale' if lines else 'fresh'}{since}")
        for line in lines:
            console.out.print(f"  - {line}", markup=False)

    with_connection(act)


@app.command()
def verify(view: AnyView = None, as_json: Json = False) -> None:
    """Compares every target with its definition, exactly, tenant by tenant; exit 1 where they differ.

    Tells stale (a known change will be refreshed) from different (the target is wrong).
    """

    async def act(connection: Connection) -> None:
        names = [view] if view is not None else [row["view"] for row in await queries.views(connection)]
        found: list[operations.Difference] = []
        compared = 0
        with console.progress(quiet=as_json) as bar:
            task = bar.add_task("verify", total=None)
            async for compared, total, difference in operations.verify(connection, names):
                bar.update(task, completed=compared, total=total)
                if difference is not None:
                    found.append(difference)
        rows = [
            {"view": d.view, "tenant_id": d.tenant_id, "missing": d.missing, "extra": d.extra,
             "verdict": "stale" if d.stale else "different"} for d in found
        ]  # fmt: skip
        if as_json:
            console.print_json({"compared": compared, "differences": rows})
        elif found:
            console.out.print(console.table(rows, rows[0]))
        if not as_json:
            console.out.print(f"{compared} keys compared, {len(found)} differ")
        if found:
            raise typer.Exit(1)

    with_connection(act)
