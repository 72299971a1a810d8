"""What is checked before the service serves, and how it waits for a database that can be used.

What passes by itself (no answer, a standby, no connection free) is waited for; what no waiting mends (a password, a
role, the schema) refuses the start: `errors.passes` decides.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio
import psycopg
import structlog
from psycopg_pool import PoolTimeout

from listener import __version__, connections, pooler, queries, server_queries
from listener.backoff import Backoff
from listener.database_url import describe, libpq_url
from listener.errors import SetupError, UnavailableError, from_database, passes, reason
from listener.revisions import head, known
from listener.settings import Settings
from listener.version import commit

log = structlog.get_logger("listener")
OLDEST_SERVER = 150000
SAME_REASON_AGAIN = 60.0  # seconds until the log is told again what it was told

Usable = TypeVar("Usable")


def refuse_old_server(version: int) -> None:
    """Raises SetupError for a PostgreSQL below 15; `version` as server_version_num has it."""
    if version < OLDEST_SERVER:
        raise SetupError(f"PostgreSQL {version // 10000} is too old: 15 or newer is needed.")


async def schema_facts(
    connection: psycopg.AsyncConnection[Any], url: str, settings: Settings
) -> server_queries.ServerFacts:
    """What the server says of itself. Raises SetupError where the role cannot use a schema of this release."""
    facts = await server_queries.server_facts(connection)
    refuse_old_server(facts.server_version_num)
    if facts.schema_owner is None:
        raise SetupError(
            f"{describe(url)} has no schema listener.",
            hint="Run: listener roles, which prints what an administrator runs, then: listener migrate",
        )
    if not facts.may_use_schema:
        usual = facts.schema_owner == settings.owner_role
        raise SetupError(
            f"the schema listener of {describe(url)} belongs to {facts.schema_owner}, and role {facts.role} may not "
            "use it.",
            hint=f"Connect as {settings.service_role}, or GRANT {settings.service_role} TO {facts.role}."
            if usual
            else owned_by_another(facts.schema_owner),
        )
    if not facts.schema_installed:
        raise SetupError(f"the schema listener of {describe(url)} lacks its tables.", hint="Run: listener migrate")
    await _check_revision(connection)
    return facts


async def _check_revision(connection: psycopg.AsyncConnection[Any]) -> None:
    """Raises SetupError for a schema that is older than this release, and for a newer one that does not serve it."""
    revision = await server_queries.schema_revision(connection)
    if revision is None or (revision in known() and revision != head()):
        raise SetupError(
            f"the schema is at migration {revision or 'none'}, older than this release, which needs {head()}.",
            hint="Run: listener migrate",
        )
    if revision != head() and not await server_queries.serves(connection, head()):
        raise SetupError(
            f"the schema is at migration {revision} and no longer serves this release, which is of {head()}.",
            hint="Upgrade this service: use the release that migrated the schema, or a newer one.",
        )


def owned_by_another(owner: str) -> str:
    """How to mend a schema that somebody made before the roles were there."""
    return (
        f"Work as {owner} with LISTENER_OWNER_ROLE={owner}; or, with the same setting, run `listener uninstall`, and "
        "start again with `listener roles` and `listener migrate`."
    )


async def until_usable(attempt: Callable[[], Awaitable[Usable]], on_trouble: Callable[[str], None]) -> Usable:
    """What the first attempt brings that finds a database that can be used.

    `on_trouble` is told why the last one did not. The log is told the same thing once a minute at the most, however
    often it is tried. Raises SetupError for what no waiting mends.
    """
    backoff = Backoff(base=0.5, cap=connections.LONGEST_PAUSE)
    said, said_at = "", 0.0
    while True:
        try:
            return await attempt()
        except UnavailableError as trouble:
            why = str(trouble)
        on_trouble(why)
        delay = backoff.next_delay()
        now = anyio.current_time()
        if why != said or now - said_at >= SAME_REASON_AGAIN:
            log.warning("waiting for the database", reason=why, retry_in=round(delay, 2))
            said, said_at = why, now
        await anyio.sleep(delay)


def unavailable(error: psycopg.Error | PoolTimeout) -> UnavailableError | None:
    """The error that is waited out; None where no waiting mends it."""
    return UnavailableError(reason(error)) if isinstance(error, PoolTimeout) or passes(error) else None


async def check(url: str, settings: Settings) -> bool:
    """Writes the first log line; whether the database is reached through a pooler.

    Raises SetupError, in one line, for whatever refuses a start, and UnavailableError for what may pass.
    """
    listen_name, listen_at = listen_url(settings)
    # Before the first is waited for: what is malformed is no better later.
    libpq_url(listen_at, listen_name)
    try:
        async with await connections.direct(url) as connection:
            # A standby may lag behind: only what can be written to has the schema that counts.
            if await server_queries.only_reads(connection):
                raise UnavailableError(f"{describe(url)} is a standby, or read-only, and cannot be written to.")
            facts = await schema_facts(connection, url, settings)
            computing = await server_queries.computing_role(connection)
            if computing is None:
                raise SetupError(
                    f"{describe(url)} has no schema listener that is whole: listener.refresh is not there.",
                    hint="Run: listener migrate",
                )
            pooled = await pooler.is_pooled(connection)
            lost = await queries.lost_guarantees(connection)
            await _check_listening(connection, settings)
    except psycopg.Error as error:
        raise unavailable(error) or from_database(error) from error
    log.info(
        "starting",
        version=__version__,
        commit=commit(),
        database=describe(url),
        migration=head(),
        postgresql=facts.server_version,
        role=facts.role,
        connections=connections.most(settings),
        pooler=pooled,
        settings=settings.effective(),
    )
    if lost:
        log.warning("roles are shared: guarantees fall away", guarantees=lost)
    computing_role, unbound = computing
    if facts.is_superuser or facts.bypasses_rls or unbound:
        role = facts.role if facts.is_superuser or facts.bypasses_rls else computing_role
        if not settings.allow_superuser:
            raise SetupError(
                f"role {role} is a superuser or has BYPASSRLS: row-level security would not bind it.",
                hint="Use the role from `listener roles`, or set LISTENER_ALLOW_SUPERUSER=true.",
            )
        log.warning("row-level security does not bind this role: only predicates keep tenants apart", role=role)
    return pooled


def listen_url(settings: Settings) -> tuple[str, str]:
    """Where to listen, after the name of the setting that says so."""
    if settings.listen_database_url is None:
        return "LISTENER_DATABASE_URL", settings.database_url.get_secret_value()
    return "LISTENER_LISTEN_DATABASE_URL", settings.listen_database_url.get_secret_value()


async def _check_listening(connection: psycopg.AsyncConnection[Any], settings: Settings) -> None:
    """Raises SetupError where nothing would ever be heard: the way leads to another database, or through a pooler."""
    name, url = listen_url(settings)
    patience = settings.probe_timeout.total_seconds()
    async with await connections.direct(url) as listening:
        if settings.listen_database_url is not None and await server_queries.database_identity(
            listening
        ) != await server_queries.database_identity(connection):
            raise SetupError(
                f"{name} reaches {describe(url)}, which is not the database of LISTENER_DATABASE_URL.",
                hint="Both must lead to one database, this one without a pooler between.",
            )
        if await pooler.hears(listening, connection, uuid.uuid4().hex, patience):
            return
        if not await pooler.is_pooled(listening):
            raise UnavailableError(f"{describe(url)}: a notification did not arrive within {patience:g} s.")
    raise SetupError(
        f"{name} goes through a transaction pooler ({describe(url)}): no notification is ever heard there.",
        hint="Set LISTENER_LISTEN_DATABASE_URL to a direct connection to the same database.",
    )
