"""What is fresh, and why not: status, explain, verify. They change nothing."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from listener import console, errors, operations, queries, view_queries
from listener.cli.session import AnyView, Connection, Json, MaybeTenant, View, app, known_key, with_connection


@app.command()
def status(
    tenant: Annotated[str | None, typer.Option("--tenant", help="the keys of this tenant, one line each")] = None,
    exit_code: Annotated[
        bool,
        typer.Option("--exit-code", help="exit 1 where a key is dirty, failing or quarantined, or a change undrained"),
    ] = False,
    as_json: Json = False,
) -> None:
    """What is fresh: a line per view, or per key of one tenant."""

    async def act(connection: Connection) -> None:
        rows = await view_queries.views(connection) if tenant is None else await _keys(connection, tenant)
        undrained, oldest = await queries.undrained(connection)
        filling = await view_queries.filling(connection) if tenant is None else []
        if as_json:
            what = "views" if tenant is None else "keys"
            more = {"filling": filling} if tenant is None else {}
            console.print_json({what: rows, **more, "undrained": undrained, "oldest_undrained_seconds": oldest})
        elif rows:
            shown = [_view_line(row) for row in rows] if tenant is None else [_key_line(row) for row in rows]
            columns = [name for name in shown[0] if any(line[name] != SELDOM.get(name, ...) for line in shown)]
            console.out.print(console.table(shown, columns))
        elif tenant is None:
            console.out.print("no view is registered yet: see listener.create_view")
        else:
            console.out.print(f"no change of tenant {tenant} was ever captured, and nothing of it was refreshed")
        for row in [] if as_json else filling:
            console.out.print(_filling_line(row))
        if undrained and not as_json:
            are, old = ("is", "") if undrained == 1 else ("are", "the oldest ")
            console.out.print(
                f"{console.count(undrained, 'change')} {are} logged and not drained, {old}"
                f"{console.duration(oldest or 0)} old: is `listener run` up?"
            )
        if exit_code and (undrained or any(_needs_care(row) for row in rows)):
            raise typer.Exit(1)

    with_connection(act)


def _filling_line(row: dict[str, Any]) -> str:
    """How far one view is."""
    if row["total"] is None:
        return f"{row['view_name']}: all tenants are marked, and not written out yet"
    left = row["time_left"]
    when = f", {console.duration(left.total_seconds())} left at {row['rate']:,.1f} keys a second" if left else ""
    failing = f", {row['failing']} of them failing" if row["failing"] else ""
    return f"{row['view_name']}: {row['done']:,} of {row['total']:,} keys are filled{failing}{when}"


# Columns that are left out where all of their cells say only this: a line must fit a terminal.
SELDOM = {
    "schema": "public", "failing": 0, "quarantined": 0, "paused": False, "failures": 0, "due": None, "reads": None,
    "waits_for": None, "limit": None,
}  # fmt: skip


def _view_line(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "view": row["view"],
        "schema": row["target"].partition(".")[0],
        "reads": row["reads"],
        **{name: row[name] for name in ("keys", "dirty", "failing", "quarantined", "paused", "dirty_since")},
        "limit": _limit(row),
        "refreshed": row["last_refreshed_at"],
    }


def _limit(row: dict[str, Any]) -> str | None:
    """How stale the view may be, and whether it is staler than that."""
    if row["max_staleness"] is None:
        return None
    return f"{console.text(row['max_staleness'])}{', passed' if row['too_stale'] else ''}"


def _key_line(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "view": row["view_name"],
        "status": row["status"],
        "version": row["version"],
        "dirty_since": row["dirty_since"],
        "refreshed": row["refreshed_at"],
        "due": row["due_at"],
        "failures": row["failures"] or 0,
        "waits_for": row["waits_for"],
    }


def _needs_care(row: dict[str, Any]) -> bool:
    if "status" in row:
        return row["dirty_since"] is not None or row["status"] in {"dirty", "failing", "quarantined"}
    return row["dirty_since"] is not None or any(row[name] for name in ("dirty", "failing", "quarantined"))


async def _keys(connection: Connection, tenant: str) -> list[dict[str, Any]]:
    if not tenant:
        raise errors.SetupError("the tenant is missing.", hint="Give one: --tenant ID")
    rows = await view_queries.freshness(connection, tenant)
    if not rows and not await view_queries.is_tenant_of_any_view(connection, tenant):
        raise errors.SetupError(f"no view has a tenant {tenant!r}.")
    return rows


@app.command()
def explain(view: View, tenant: MaybeTenant = None, as_json: Json = False) -> None:
    """Why is this key stale: log, dirty since, due when, who holds the lock, last error, what it waits for.

    Also what somebody did to the tables of the view, and the statement that mends it.
    """

    async def act(connection: Connection) -> None:
        facts = await operations.explain(connection, *await known_key(connection, view, tenant, looking=True))
        lines = operations.reasons(facts)
        if as_json:
            console.print_json({**facts, "reasons": lines})
            return
        refreshed = facts["refreshed_age"]
        since = f", refreshed {console.duration(refreshed)} ago" if refreshed is not None else ""
        whose = f" of tenant {facts['tenant']}" if facts["tenant"] else ""
        console.out.print(f"{facts['view_name']}{whose}: {'stale' if lines else 'fresh'}{since}")
        for line in [*facts["troubles"], *lines]:
            console.out.print(f"  - {line}")

    with_connection(act)


VERDICTS = ("stale", "different", "not determined", "failed", "moved")


@app.command()
def verify(view: AnyView = None, as_json: Json = False) -> None:
    """Compares every target with its definition, exactly, tenant by tenant; exit 1 where they differ.

    Says why a key differs. stale: a known change will be refreshed. different: the target is wrong. not determined: the
    definition has more than one right result. failed: the comparison raised an error; the others go on. moved: the
    query has now() in it, and only the time has gone on; that alone does not exit 1. Rows without a tenant are counted,
    too: no target has them.
    """

    async def act(connection: Connection) -> None:
        if view is not None:
            names = [await view_queries.view_name(connection, view)]
        else:
            names = [row["view"] for row in await view_queries.views(connection)]
        found: list[operations.Difference] = []
        done = 0
        with console.progress(quiet=as_json) as bar:
            task = bar.add_task("verify", total=None)
            async for done, total, difference in operations.verify(connection, names):
                bar.update(task, completed=done, total=total)
                if difference is not None:
                    found.append(difference)
        verdicts = Counter(difference.verdict for difference in found)
        counts = {
            "compared": done - sum(d.verdict == "failed" and d.tenant_id is not None for d in found),
            **{verdict: verdicts[verdict] for verdict in VERDICTS},
            "rows_without_tenant": sum(d.missing for d in found if d.untenanted),
        }
        rows = [
            {"view": d.view, "tenant_id": d.tenant_id, "missing": d.missing, "extra": d.extra, "verdict": d.verdict,
             "error": d.error} for d in found
        ]  # fmt: skip
        if as_json:
            console.print_json({**counts, "differences": rows})
        elif found:
            console.out.print(console.table(rows, [n for n in rows[0] if n != "error" or verdicts["failed"]]))
        if not as_json:
            always = {"stale", "different", "failed"}
            told = [
                f"{counts[v]} {'moved with the time' if v == 'moved' else v}"
                for v in VERDICTS
                if counts[v] or v in always
            ]
            if counts["rows_without_tenant"]:
                told.append(f"{console.count(counts['rows_without_tenant'], 'row')} without a tenant")
            console.out.print(f"{console.count(counts['compared'], 'key')} compared, {', '.join(told)}")
        if any(difference.verdict != "moved" for difference in found):
            raise typer.Exit(1)

    with_connection(act)
