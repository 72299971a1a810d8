"""Dead letters: list, show, retry, discard."""

from __future__ import annotations

from typing import Annotated, Any

import psycopg
import typer

from listener import console, dead_letters, errors, operations
from listener.cli.session import Connection, Json, app, with_connection

letters_app = typer.Typer(
    no_args_is_help=True, help="Refreshes that failed again and again: list, show, retry, discard."
)
app.add_typer(letters_app, name="dead-letters")

OneLetter = Annotated[str | None, typer.Argument(metavar="[ID]", help="a letter's id")]
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
        rows = await dead_letters.letters(connection, view=view, tenant=tenant, status=None if closed else "open")
        if as_json:
            console.print_json(rows)
        elif not rows:
            console.out.print("no dead letters")
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
def show(letter_id: Annotated[str, typer.Argument(metavar="ID")], as_json: Json = False) -> None:
    """One letter whole, with its traceback."""

    async def act(connection: Connection) -> None:
        (row,) = await _chosen(connection, letter_id, None, None, everything=False, status=None)
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
        for row in [] if as_json else rows:
            changed = f", {console.count(row['rows'], 'row')} changed" if row["rows"] is not None else ""
            console.out.print(f"{_key(row['view'], row['tenant_id'])}: {row['outcome']}{changed}", soft_wrap=True)
        for skipped_id in skipped:
            console.error(f"letter {skipped_id} has no key to retry. Run: listener dead-letters discard {skipped_id}")
        if (letter_id and skipped) or any(row["outcome"] not in {"refreshed", "expanded"} for row in rows):
            raise typer.Exit(1)

    with_connection(act)


@letters_app.command()
def discard(letter_id: OneLetter = None, view: OfView = None, tenant: OfTenant = None, everything: All = False) -> None:
    """Closes these letters without a retry. A key that still fails gets a new one."""

    async def act(connection: Connection) -> None:
        chosen = await _chosen(connection, letter_id, view, tenant, everything=everything)
        closed = [await dead_letters.discard(connection, letter["id"]) for letter in chosen]
        console.out.print(f"{console.count(sum(closed), 'letter')} discarded")

    with_connection(act)


async def _chosen(
    connection: Connection,
    letter_id: str | None,
    view: str | None,
    tenant: str | None,
    *,
    everything: bool,
    status: str | None = "open",
) -> list[dict[str, Any]]:
    if not (letter_id or view or tenant or everything):
        raise errors.SetupError("say which letters: an ID, --view, --tenant or --all.")
    found = await dead_letters.letters(connection, letter_id=letter_id, view=view, tenant=tenant, status=status)
    if not found:
        raise errors.SetupError("there is no such letter.", hint="See: listener dead-letters list --closed")
    return found


async def _retry(connection: Connection, letter: dict[str, Any]) -> dict[str, Any]:
    row = {"id": letter["id"], "view": letter["view_name"], "tenant_id": letter["tenant_id"]}
    try:
        outcome = await operations.refresh_one(connection, letter["view_name"], letter["tenant_id"])
    except psycopg.Error as error:
        return {**row, "outcome": f"failed: {errors.from_database(error)}", "rows": None}
    changed = outcome.inserted + outcome.updated + outcome.deleted
    return {**row, "outcome": outcome.outcome, "rows": changed if outcome.outcome == "refreshed" else None}
