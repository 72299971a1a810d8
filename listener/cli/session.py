"""What every command shares: the application, its common arguments, a connection, refusals."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import anyio
import psycopg
import typer
from typer.core import TyperGroup

from listener import connections, dead_letters, errors, view_queries
from listener.dead_letters import RetryPolicy
from listener.settings import Settings, load
from listener.startup import schema_facts
from listener.views import EVERYBODY


class InReadingOrder(TyperGroup):
    """Lists the commands in the order in which one needs them."""

    ORDER = (
        "demo roles migrate doctor inventory adopt unadopt views fill run status explain verify refresh sweep "
        "pause resume dead-letters forget uninstall"
    )

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=self.ORDER.split().index)


app = typer.Typer(
    name="listener",
    cls=InReadingOrder,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Keeps per-tenant dashboards on PostgreSQL fresh, within a moment of the write that made them stale.\n\n"
    "See it work: [bold]listener demo[/]. On your own database: [bold]listener roles[/] (an administrator runs what "
    "it prints), [bold]listener migrate[/], SELECT listener.create_view(…), [bold]listener run[/].",
    epilog="Settings are environment variables, LISTENER_DATABASE_URL first: see [bold]listener run --help[/]. It "
    "names listener_service to run and to look; a member of listener_owner for migrate, adopt, unadopt, views, pause, "
    "resume, forget and uninstall; an administrator for inventory.",
)

Connection = psycopg.AsyncConnection[Any]
View = Annotated[str, typer.Argument(help="name of a managed view, as `listener status` shows it")]
Tenant = Annotated[str, typer.Option("--tenant", help="the tenant's id")]
MaybeTenant = Annotated[
    str | None, typer.Option("--tenant", help="the tenant's id; not for a view that has no tenants")
]
AnyView = Annotated[str | None, typer.Argument(help="a managed view; all of them where it is left out")]
Json = Annotated[bool, typer.Option("--json", help="print JSON, for machines")]


@asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[Connection]:
    """An autocommit connection, through a transaction pooler or not.

    Raises SetupError where the schema is missing, or of another release.
    """
    url = settings.database_url.get_secret_value()
    async with await connections.direct(url, "listener cli") as connection:
        await schema_facts(connection, url, settings)
        yield connection


def retry_policy(settings: Settings) -> RetryPolicy:
    """What is done with a key that fails, as the service does it."""
    return RetryPolicy(settings.max_attempts, settings.retry_base, settings.retry_cap, settings.retry_quarantined)


def with_connection(act: Callable[[Connection], Awaitable[None]], *, as_owner: bool = False) -> None:
    """Runs the command on a connection to LISTENER_DATABASE_URL, where the schema must be.

    `as_owner`: it is for the owner's members, not for the service's role; an error of privileges says so.
    """
    settings = load()
    needed = f"a member of {settings.owner_role}" if as_owner else settings.service_role

    async def go() -> None:
        async with connected(settings) as connection:
            try:
                await act(connection)
            except psycopg.Error as error:
                raise errors.from_database(error, role=connection.info.user, needed=needed) from error

    anyio.run(go)


async def known_key(connection: Connection, view: str, tenant: str | None, *, looking: bool = False) -> tuple[str, str]:
    """The names of a view and of one of its tenants. Raises SetupError where the view has no such tenant.

    None is for a view that has no tenants, and whose one key is ''.

    A call that named no valid tenant is refused, and stands in the dead letters as validation_error, unless it is one
    that is `looking` and writes nothing; a view or tenant that is merely not there is a slip of the hand, and does not.
    """
    if tenant is None:
        if await view_queries.has_tenants(connection, view):
            raise errors.SetupError(f"{view} has tenants: give --tenant ID.")
        tenant = EVERYBODY
    try:
        name, canonical, known = await view_queries.tenant_of_view(connection, view, tenant)
    except psycopg.Error as error:
        refused = errors.from_database(error)
        if not looking and isinstance(refused, errors.RefusedError) and refused.is_validation:
            await dead_letters.record_refusal(connection, view, tenant, f"validation_error: {refused}")
        raise
    if not known:
        raise errors.SetupError(
            f"{name} has no tenant {canonical}.",
            hint="A view's tenants are those of its tenants query, its keys and its target.",
        )
    return name, canonical
