"""Definitions: one that changes, and all of them in files."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

import psycopg
import typer
from rich.progress import Progress

from listener import alter, console, definitions, errors, view_files, view_queries
from listener.cli.session import Connection, Json, View, app, connected, retry_policy, with_connection
from listener.definitions import Step
from listener.settings import load
from listener.swap import Swapped

views_app = typer.Typer(
    no_args_is_help=True, help="Definitions: alter one, or keep all of them in files: plan, apply, export."
)
app.add_typer(views_app, name="views")

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="a directory with a .sql file per view")]
SHOWN = 20  # tenants in a table


@views_app.command("alter")
def alter_view(
    view: View,
    query: Annotated[Path | None, typer.Option(metavar="FILE", help="the new query; - reads it from stdin")] = None,
    key: Annotated[str | None, typer.Option(metavar="COL,COL", help="new key columns")] = None,
    tenants_query: Annotated[str | None, typer.Option(help="a new tenants query")] = None,
    max_age: Annotated[str | None, typer.Option(help="refresh each key at least so often: '1 hour'")] = None,
    timezone: Annotated[str | None, typer.Option(help="that the query is computed in")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask before the swap")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="compare, then take it back")] = False,
    as_json: Json = False,
) -> None:
    """Changes a view's definition: builds the new one beside the old, compares them, and swaps at once.

    Dashboards read the old rows until the swap, which locks them out for milliseconds. Columns may come, go and change
    their type, unless a view on top reads them. Whatever goes wrong before the swap leaves the view as it was.
    """
    arguments: dict[str, Any] = {}
    if query is not None:
        arguments["query"] = _text(query)
    if key is not None:
        arguments["key_columns"] = [column.strip() for column in key.split(",") if column.strip()]
    others = {"tenants_query": tenants_query, "max_age": max_age, "timezone": timezone}
    arguments |= {name: value for name, value in others.items() if value is not None}
    if not arguments:
        raise errors.SetupError("nothing is to change.", hint="Give --query FILE, for one.")
    if as_json and not (yes or dry_run):
        raise errors.SetupError("--json does not ask: give --yes or --dry-run.")

    async def act(connection: Connection) -> None:
        _tell_notices(connection)
        name = await view_queries.view_name(connection, view)
        await _alter(connection, name, arguments, yes=yes, dry_run=dry_run, as_json=as_json)

    with_connection(act, as_owner=True)


def _text(path: Path) -> str:
    return typer.get_text_stream("stdin").read() if str(path) == "-" else view_files.read_text(path)


def _tell_notices(connection: Connection) -> None:
    def tell(diagnostic: psycopg.errors.Diagnostic) -> None:
        hint = f" {diagnostic.message_hint}" if diagnostic.message_hint else ""
        console.warning(f"{diagnostic.message_primary}{hint}")

    connection.add_notice_handler(tell)


async def _alter(
    connection: Connection, view: str, arguments: dict[str, Any], *, yes: bool, dry_run: bool, as_json: bool
) -> None:
    async with alter.begun(connection, view, arguments) as beside:
        columns = await alter.column_changes(connection, view)
        with console.progress(quiet=as_json) as bar:
            await _fill(bar, view, beside)
            task = bar.add_task("compare", total=None)
            changes = []
            tenants = 0
            async for done, tenants, change in alter.compare(connection, view, beside):
                bar.update(task, completed=done, total=tenants)
                if change is not None and not change.is_none:
                    changes.append(change)
        if not as_json:
            _print_changes(view, columns, changes, tenants)
        swapped: Swapped | None = None
        if dry_run or not (yes or typer.confirm("Put it in place?", default=False)):
            await alter.abort(connection, view)
        else:
            swapped = await alter.finish(connection, view, beside, console.warning)
    if as_json:
        console.print_json(_as_json(view, columns, changes, tenants, swapped))
    elif swapped is None:
        console.out.print(f"taken back: {view} is as it was")
    else:
        console.out.print(f"{view} is altered: readers were locked out for {console.duration(swapped.locked)}")
    if swapped is None and not dry_run:
        raise typer.Exit(1)


async def _fill(bar: Progress, view: str, beside: alter.Beside) -> None:
    settings = load()
    task = bar.add_task(f"fill {view}", total=None)
    steps = alter.fill(lambda: connected(settings), beside, retry_policy(settings))
    async with aclosing(steps):
        async for step in steps:
            bar.update(task, completed=step.done, total=step.total)


def _print_changes(view: str, columns: list[Any], changes: list[alter.TenantChange], tenants: int) -> None:
    for column in columns:
        kept = {"added": column["after"], "removed": column["before"]}
        types = kept.get(column["change"], f"{column['before']} -> {column['after']}")
        console.out.print(f"column {column['name']} {column['change']}: {types}")
    if changes:
        rows = [
            {"tenant": c.tenant_id or "-", "added": c.added, "removed": c.removed, "changed": c.changed}
            for c in changes[:SHOWN]
        ]
        console.out.print(console.table(rows, rows[0]))
        if len(changes) > SHOWN:
            console.out.print(f"and {len(changes) - SHOWN} more")
    console.out.print(f"{view}: {_summed(changes)}, in {len(changes)} of {console.count(tenants, 'key')}")


def _summed(changes: list[alter.TenantChange]) -> str:
    parts = ("added", "removed", "changed")
    return ", ".join(f"{sum(getattr(c, part) for c in changes)} rows {part}" for part in parts)


def _as_json(
    view: str, columns: list[Any], changes: list[alter.TenantChange], tenants: int, swapped: Swapped | None
) -> dict[str, Any]:
    return {
        "view": view,
        "swapped": swapped is not None,
        "locked_seconds": swapped.locked if swapped else None,
        "columns": columns,
        "keys": tenants,
        "changes": [
            {"tenant_id": c.tenant_id, "added": c.added, "removed": c.removed, "changed": c.changed} for c in changes
        ],
    }


@views_app.command()
def plan(
    directory: Directory,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="exit 1 where something is to be done")] = False,
    as_json: Json = False,
) -> None:
    """Shows what `apply` would do: which views are to be made, and what differs in those that are there."""

    async def act(connection: Connection) -> None:
        steps = await definitions.plan(connection, view_files.read_directory(directory))
        if as_json:
            console.print_json({"steps": [_step_row(step) for step in steps]})
        else:
            _print_plan(steps)
        if exit_code and any(step.action in {"create", "alter", "set"} for step in steps):
            raise typer.Exit(1)

    with_connection(act, as_owner=True)


def _step_row(step: Step) -> dict[str, Any]:
    return {"view": step.view, "action": step.action, "changes": step.changes, "diff": step.diff}


def _print_plan(steps: list[Step]) -> None:
    for step in steps:
        if step.action in {"create", "alter", "set"}:
            console.out.print(f"{step.action} {step.view}")
        for line in [*step.changes, *step.diff]:
            console.out.print(f"    {line}")
    todo = sum(step.action in {"create", "alter", "set"} for step in steps)
    same = sum(step.action == "none" for step in steps)
    console.out.print(f"{todo} to do, {same} as the files say")
    if others := [step.view for step in steps if step.action == "not in files"]:
        console.out.print(f"in no file, and left alone: {', '.join(others)}")


@views_app.command()
def apply(directory: Directory, as_json: Json = False) -> None:
    """Makes the database's views those of the files: creates, alters, sets windows, grants. The second time: nothing.

    A view that no file is of is left alone: listener.drop_view takes it away. A changed query is built beside the old
    one and swapped, as `listener views alter` does.
    """

    async def act(connection: Connection) -> None:
        _tell_notices(connection)
        steps = await definitions.plan(connection, view_files.read_directory(directory))
        new = [step.file for step in steps if step.file is not None and step.action == "create"]
        async with aclosing(definitions.create_all(connection, new)) as created:
            async for file in created:
                if not as_json:
                    console.out.print(f"created {file.name}: the service fills it")
                await definitions.grant(connection, file.name, list(file.readers))
        for step in steps:
            if step.action in {"alter", "set"}:
                await _apply(connection, step, as_json=as_json)
        done = [_step_row(step) for step in steps if step.action in {"create", "alter", "set"}]
        if as_json:
            console.print_json({"done": done})
        elif not done:
            console.out.print("nothing to do")

    with_connection(act, as_owner=True)


async def _apply(connection: Connection, step: Step, *, as_json: bool) -> None:
    if step.rebuild:
        async with alter.begun(connection, step.view, step.rebuild) as beside:
            with console.progress(quiet=as_json) as bar:
                await _fill(bar, step.view, beside)
            swapped = await alter.finish(connection, step.view, beside, console.warning)
        if not as_json:
            console.out.print(f"altered {step.view}: readers were locked out for {console.duration(swapped.locked)}")
    if step.settings:
        await definitions.set_settings(connection, step)
        if not as_json:
            console.out.print(f"set {', '.join(step.settings)} of {step.view}")
    await definitions.grant(connection, step.view, step.readers)


@views_app.command()
def export(directory: Directory) -> None:
    """Writes the files of the views that are there, to begin with. Files that are there already are kept."""

    async def act(connection: Connection) -> None:
        rows = [row for row in await definitions.registered(connection) if row["strategy"] != "materialized view"]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for row in rows:
                path = directory / f"{row['name'].replace('/', '_')}.sql"
                if path.exists():
                    console.warning(f"{path} is there already, and is kept")
                    continue
                path.write_text(definitions.file_of(row), encoding="utf-8")
                console.out.print(str(path))
        except OSError as error:
            raise errors.SetupError(f"the files cannot be written: {error}.") from error

    with_connection(act, as_owner=True)
