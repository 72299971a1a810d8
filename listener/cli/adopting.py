"""Materialized views that a team has: adopt, and unadopt."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any

import typer
from psycopg.errors import Diagnostic

from listener import adopt as adopting
from listener import adoption_script, adoptions, console
from listener.adopt import By
from listener.adoptions import Request
from listener.cli.session import Connection, Json, app, connected, retry_policy, with_connection
from listener.errors import SetupError
from listener.settings import load

DryRun = Annotated[bool, typer.Option("--dry-run", help="print the SQL that would run, and change nothing")]
Wait = Annotated[float, typer.Option("--wait", min=0, help="seconds that the swap is tried behind long readers")]


class Strategy(StrEnum):
    """As the option spells them."""

    TENANT = "tenant"
    WHOLE = "whole"
    MATERIALIZED_VIEW = "materialized-view"


@app.command()
def adopt(
    name: Annotated[str, typer.Argument(help="the materialized view, with its schema")],
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            metavar="COL,COL",
            help="columns that tell two rows of a tenant apart; left out: those of its unique index; '': the whole row",
        ),
    ] = None,
    tenant_column: Annotated[str, typer.Option("--tenant-column", help="the column with the tenant")] = "tenant_id",
    tenants_query: Annotated[
        str | None,
        typer.Option("--tenants-query", help="lists every tenant: 'SELECT id FROM app.tenants'; needed under RLS"),
    ] = None,
    strategy: Annotated[
        Strategy | None,
        typer.Option("--strategy", help="left out: tenant where that gives the same rows, else whole, else as it is"),
    ] = None,
    depends_on: Annotated[
        str | None,
        typer.Option("--depends-on", metavar="TABLE,TABLE", help="what functions in its query read; '' nothing"),
    ] = None,
    quiet_period: Annotated[
        str | None, typer.Option("--quiet-period", help="shortest time between two refreshes of a key")
    ] = None,
    max_wait: Annotated[str | None, typer.Option("--max-wait", help="longest time that a change waits")] = None,
    max_age: Annotated[
        str | None,
        typer.Option("--max-age", help="longest time between two refreshes of a key; left out: what `inventory` shows"),
    ] = None,
    timezone: Annotated[
        str | None,
        typer.Option("--timezone", help="time zone in which the query is evaluated; left out: the database's"),
    ] = None,
    target_rls: Annotated[
        bool, typer.Option("--target-rls", help="readers see the rows of app.current_tenant_id alone")
    ] = False,
    owner: Annotated[
        str | None,
        typer.Option(
            "--owner", metavar="ROLE", help="owner of the table; left out: the owner of the materialized view"
        ),
    ] = None,
    compute_role: Annotated[
        str | None,
        typer.Option(
            "--compute-role", metavar="ROLE", help="role that computes the view, where teams share one service"
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=100, help="keys filled at the same time")] = 2,
    wait: Wait = 600.0,
    abort: Annotated[bool, typer.Option("--abort", help="take back what an interrupted run left")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Puts a table that is kept fresh in the place of a materialized view, while it is read and written.

    Its columns, indexes, grants, comments, owner and the views on top stay. A table of the same query is filled beside
    it, compared, and put in its place within milliseconds; until then the materialized view is as it was. Where its
    rows are others by tenant it is refreshed as a whole, or stays a materialized view that is refreshed when something
    changes; the reason is printed. Interrupted, the same command goes on. `listener unadopt` turns it back.
    """
    request = Request(
        name,
        strategy.value.replace("-", " ") if strategy else None,
        _names(key),
        tenant_column,
        tenants_query,
        _names(depends_on),
        quiet_period,
        max_wait,
        max_age,
        timezone,
        target_rls,
        owner,
        compute_role,
    )

    async def act(connection: Connection) -> None:
        told = _listen(connection, name, quiet=as_json or dry_run)
        if abort:
            await _abort(connection, name)
        elif dry_run:
            await _show(connection, request, told, as_json=as_json)
        else:
            adopted = await _adopt(connection, request, told, workers, wait, quiet=as_json)
            _tell_locks(adopted, quiet=as_json)
            if as_json:
                console.print_json(_row(adopted) | {"notices": told})
            elif adopted.strategy == adopting.KEPT:
                console.out.print(f"{name} stays a materialized view, refreshed when what it reads changes")
            else:
                console.out.print(f"adopted: {name} is kept fresh as {adopted.view}, {_by(adopted)}")

    with_connection(act, as_owner=True)


async def _adopt(
    connection: Connection, request: Request, told: list[str], workers: int, wait: float, *, quiet: bool
) -> adopting.Adopted:
    def tell(line: str) -> None:
        told.append(line)
        if not quiet:
            console.err.print(line)

    settings = load()
    with console.progress(quiet=quiet) as bar:
        task = bar.add_task(request.name, total=None)
        by = By(
            lambda: connected(settings),
            workers,
            retry_policy(settings),
            lambda done, total: bar.update(task, completed=done, total=total),
        )
        return await adopting.adopt(connection, request, tell, by, wait)


async def _show(connection: Connection, request: Request, told: list[str], *, as_json: bool) -> None:
    def tell(line: str) -> None:
        told.append(line)
        if not as_json:
            console.err.print(line)

    given = await adopting.rehearse(connection, request, tell)
    if given.strategy == adopting.KEPT:
        script = adoptions.keep_statement(given)
    else:
        plan = await adoptions.plan(connection, given)
        script = adoption_script.script(given, plan, adoptions.begin_statement(given).as_string(connection))
    _print_script(script, as_json=as_json)


async def _abort(connection: Connection, name: str) -> None:
    view = await adoptions.under_way(connection, name)
    if view is None:
        raise SetupError(f"no adoption of {name} is under way.")
    await adoptions.abort(connection, view)
    console.out.print(f"taken back: {name} is as it was")


@app.command()
def unadopt(
    name: Annotated[str, typer.Argument(help="the view, as `listener status` shows it, or with its schema")],
    wait: Wait = 600.0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Gives a materialized view back that was adopted: filled, with its indexes, grants, comments and views on top.

    Nothing refreshes it any more.
    """

    async def act(connection: Connection) -> None:
        told = _listen(connection, name, quiet=as_json or dry_run)

        def tell(line: str) -> None:
            told.append(line)
            if not as_json:
                console.err.print(line)

        if dry_run:
            _print_script(await _script_back(connection, name), as_json=as_json)
            return
        adopted = await adopting.unadopt(connection, name, tell, wait)
        _tell_locks(adopted, quiet=as_json)
        if as_json:
            console.print_json(_row(adopted) | {"notices": told})
        else:
            state = "stays" if adopted.strategy == adopting.KEPT else "is again"
            console.out.print(f"{name} {state} a materialized view, and nothing refreshes it")

    with_connection(act, as_owner=True)


async def _script_back(connection: Connection, name: str) -> str:
    view, strategy, _ = await adoptions.state(connection, name)
    if strategy == adopting.KEPT:
        return f"SELECT listener.drop_view({adoptions.literal(view)}, keep_target => true);"
    return adoption_script.script_back(await adoptions.plan_back(connection, view))


def _names(given: str | None) -> tuple[str, ...] | None:
    return None if given is None else tuple(name.strip() for name in given.split(",") if name.strip())


def _listen(connection: Connection, name: str, *, quiet: bool) -> list[str]:
    """The server's notices, shown as they come; the list that they are added to."""
    told: list[str] = []

    def hear(notice: Diagnostic) -> None:
        # Nobody knows the view by the name that its target has for the time being.
        message = re.sub(r"\blistener_new_\d+\b", name, str(notice.message_primary))
        told.append(message)
        if not quiet:
            console.warning(message)

    connection.add_notice_handler(hear)
    return told


def _tell_locks(adopted: adopting.Adopted, *, quiet: bool) -> None:
    if adopted.locks and not quiet:
        console.err.print(
            f"ACCESS EXCLUSIVE on {', '.join(adopted.locks)}, for {console.duration(adopted.locked)}: "
            f"the swap, at attempt {adopted.attempts}"
        )


def _by(adopted: adopting.Adopted) -> str:
    return "as a whole" if adopted.strategy == adopting.WHOLE else f"by tenant ({console.count(adopted.keys, 'key')})"


def _row(adopted: adopting.Adopted) -> dict[str, Any]:
    return {
        "view": adopted.view,
        "strategy": adopted.strategy,
        "keys": adopted.keys,
        "locks": list(adopted.locks),
        "locked_seconds": adopted.locked,
        "attempts": adopted.attempts,
    }


def _print_script(script: str, *, as_json: bool) -> None:
    if as_json:
        console.print_json({"script": script})
    else:
        # As it is: a console would take tabs and long lines for its own.
        print(script)  # noqa: T201
