"""Dead letters: list, show, retry, discard."""

from __future__ import annotations

from typing import Annotated, Any

import psycopg
import typer

from listener import console, dead_letters, errors, operations, view_queries
from listener.cli.session import Connection, Json, app, with_connection

letters_app = typer.Typer(
    no_args_is_help=True, help="Refreshes that failed again and again: list, show, retry, discard."
)
app.add_typer(letters_app, name="dead-letters")

NONE = "no dead letters"
OneLetter = Annotated[str | None, typer.Argument(metavar="[ID]", help="a letter's id, as list shows it")]
OfView = Annotated[str | None, typer.Option("--view", help="letters of this view")]
OfTenant = Annotated[str | None, typer.Option("--tenant", help="letters of this tenant")]
All = Annotated[bool, typer.Option("--all", help="every open letter")]


@letters_app.command("list")
def list_letters(
    view: OfView = None,
    tenant: OfTenant = None,
    closed: Annotated[bool, typer.Option("--closed", help="resolved and discarded ones too")] = False,
    as_json: Json = False,
) -> None:
    """The open dead letters, newest first."""

    async def act(connection: Connection) -> None:
        rows = await _of(connection, view, tenant, status=None if closed else "open")
        if as_json:
            console.print_json(rows)
        elif not rows:
            console.out.print(NONE)
        for row in [] if as_json else rows:
            _print_letter(row)

    with_connection(act)


def _print_letter(row: dict[str, Any]) -> None:
    """Three lines: an id and a tenant are too long to share one with what they are about."""
    attempts = f", {console.count(row['retry_count'], 'attempt')}" if row["retry_count"] else ""
    message = errors.one_line(row["error_message"]).removeprefix(f"{row['error_type']}: ")
    console.out.print(f"{row['id']}  {row['status']}, {console.text(row['failed_at'])}{attempts}", soft_wrap=True)
    console.out.print(f"  {_key(row['view_name'], row['tenant_id'])}", soft_wrap=True)
    console.out.print(f"  {row['error_type']}: {message}", no_wrap=True, overflow="ellipsis")


def _key(view: str | None, tenant: str | None) -> str:
    return f"{view or 'no view'} of {'all tenants' if tenant == '' else f'tenant {tenant}' if tenant else 'no tenant'}"


@letters_app.command()
def show(
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="a letter's id, as list shows it")],
    as_json: Json = False,
) -> None:
    """One letter whole, with its traceback."""

    async def act(connection: Connection) -> None:
        row = await _one(connection, letter_id)
        if as_json:
            console.print_json(row)
            return
        for name, value in row.items():
            console.out.print(f"{name.replace('_', ' ')}: {value if value is not None else '-'}", soft_wrap=True)

    with_connection(act)


@letters_app.command()
def retry(
    letter_id: OneLetter = None, view: OfView = None, tenant: OfTenant = None, everything: All = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Refreshes the keys of these letters now, and shows what came of it; exit 1 where one failed again.

    A letter without a key, of a call that was refused, has nothing to retry: it is skipped.
    """

    async def act(connection: Connection) -> None:
        chosen = await _chosen(connection, letter_id, view, tenant, everything=everything)
        rows = [await _retry(connection, letter) for letter in chosen if letter["view_id"] is not None]
        skipped = [letter["id"] for letter in chosen if letter["view_id"] is None]
        if as_json:
            console.print_json(rows)
        elif not chosen:
            console.out.print(NONE)
        for row in [] if as_json else rows:
            changed = f", {console.count(row['rows'], 'row')} changed" if row["rows"] is not None else ""
            console.out.print(f"{_key(row['view'], row['tenant_id'])}: {row['outcome']}{changed}", soft_wrap=True)
        for skipped_id in skipped:
            console.error(f"letter {skipped_id} has no key to retry. Run: listener dead-letters discard {skipped_id}")
        if (letter_id and skipped) or any(row["outcome"] not in {"refreshed", "expanded"} for row in rows):
            raise typer.Exit(1)

    with_connection(act)


@letters_app.command()
def discard(
    letter_id: OneLetter = None, view: OfView = None, tenant: OfTenant = None, everything: All = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Closes these letters without a retry. A key that still fails gets a new one."""

    async def act(connection: Connection) -> None:
        chosen = await _chosen(connection, letter_id, view, tenant, everything=everything)
        discarded = [letter["id"] for letter in chosen if await dead_letters.discard(connection, letter["id"])]
        if as_json:
            console.print_json({"discarded": discarded})
        else:
            console.out.print(f"{console.count(len(discarded), 'letter')} discarded")

    with_connection(act)


async def _one(connection: Connection, letter_id: str) -> dict[str, Any]:
    found = await dead_letters.letters(connection, letter_id=letter_id, status=None)
    if not found:
        raise errors.SetupError(f"there is no letter {letter_id}.", hint="See: listener dead-letters list --closed")
    return found[0]


async def _of(
    connection: Connection, view: str | None, tenant: str | None, *, status: str | None = "open"
) -> list[dict[str, Any]]:
    """Letters of a view, with or without its schema, and of a tenant. Raises RefusedError for no such view."""
    found = await dead_letters.letters(connection, view=view, tenant=tenant, status=status)
    if not found and view is not None and not await dead_letters.letters(connection, view=view, status=None):
        # One that was dropped has letters, too; one that has none must be there.
        name = await view_queries.view_name(connection, view)
        found = await dead_letters.letters(connection, view=name, tenant=tenant, status=status)
    return found


async def _chosen(
    connection: Connection, letter_id: str | None, view: str | None, tenant: str | None, *, everything: bool
) -> list[dict[str, Any]]:
    """The open letters that are meant. Raises SetupError where nothing is said, too much, or a letter is closed."""
    given = [letter_id is not None, view is not None or tenant is not None, everything]
    if sum(given) != 1:
        raise errors.SetupError("say which letters: an ID, or --view and --tenant, or --all.")
    if letter_id is None:
        return await _of(connection, view, tenant)
    letter = await _one(connection, letter_id)
    if letter["status"] != "open":
        raise errors.SetupError(f"letter {letter['id']} is {letter['status']} already.")
    return [letter]


async def _retry(connection: Connection, letter: dict[str, Any]) -> dict[str, Any]:
    row = {"id": letter["id"], "view": letter["view_name"], "tenant_id": letter["tenant_id"]}
    try:
        outcome = await operations.refresh_one(connection, letter["view_name"], letter["tenant_id"])
    except psycopg.Error as error:
        if connection.closed:
            raise
        return {**row, "outcome": f"failed: {errors.from_database(error)}", "rows": None, "seconds": None}
    changed = outcome.inserted + outcome.updated + outcome.deleted
    rows = changed if outcome.outcome == "refreshed" else None
    return {**row, "outcome": outcome.outcome, "rows": rows, "seconds": outcome.duration}
