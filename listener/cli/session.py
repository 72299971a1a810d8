"""What every command shares: the application, its common arguments, a connection, refusals."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import anyio
import psycopg
import typer
from typer.core import TyperGroup

from listener import dead_letters, errors, queries
from listener.database_url import describe, libpq_url, session_options
from listener.settings import Settings, load


class InReadingOrder(TyperGroup):
    """Lists the commands in the order in which one needs them."""

    ORDER = "demo roles migrate run status explain verify refresh sweep pause resume dead-letters uninstall"

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=self.ORDER.split().index)


app = typer.Typer(
    name="listener",
    cls=InReadingOrder,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Keeps per-tenant dashboards on PostgreSQL fresh, within a moment of the write that made them stale.\n\n"
    "See it work: [bold]listener demo[/]. On your own database: [bold]listener roles[/] (an administrator runs what "
    "it prints), [bold]listener migrate[/], SELECT listener.create_view(…), [bold]listener run[/].",
    epilog="Settings are environment variables, LISTENER_DATABASE_URL first: see [bold]listener run --help[/].",
)

Connection = psycopg.AsyncConnection[Any]
View = Annotated[str, typer.Argument(help="name of a managed view, as `listener status` shows it")]
Tenant = Annotated[str, typer.Option("--tenant", help="the tenant's id")]
AnyView = Annotated[str | None, typer.Argument(help="a managed view; all of them where it is left out")]
Json = Annotated[bool, typer.Option("--json", help="print JSON, for machines")]


@asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[Connection]:
    """An autocommit connection. Raises SetupError where the schema is missing."""
    url = libpq_url(settings.database_url.get_secret_value())
    async with await psycopg.AsyncConnection.connect(
        url, autocommit=True, application_name="listener cli", connect_timeout=10, options=session_options(url)
    ) as connection:
        facts = await queries.server_facts(connection)
        if not facts.schema_installed:
            raise errors.SetupError(
                f"{describe(url)} has no schema listener that role {facts.role} may use.",
                hint="Run: listener migrate",
            )
        yield connection


def with_connection(act: Callable[[Connection], Awaitable[None]]) -> None:
    """Runs the command on a connection to LISTENER_DATABASE_URL, where the schema must be."""
    settings = load()

    async def go() -> None:
        async with connected(settings) as connection:
            await act(connection)

    anyio.run(go)


async def recording_refusals(connection: Connection, view: str, tenant: str, act: Awaitable[Any]) -> Any:
    """A call that named no valid tenant is refused, and stands in the dead letters as validation_error."""
    try:
        return await act
    except psycopg.Error as error:
        known = errors.from_database(error)
        if isinstance(known, errors.RefusedError) and known.is_validation:
            await dead_letters.record_refusal(connection, view, tenant, str(known))
        raise known from error
