"""What is checked before the service serves, and how its connections are set up."""

from __future__ import annotations

from typing import Any

import psycopg
import structlog
from psycopg_pool import AsyncConnectionPool

from listener import __version__, queries
from listener.database_url import describe, libpq_url, session_options
from listener.errors import SetupError, from_database
from listener.revisions import head
from listener.settings import Settings
from listener.silence import PatientConnection, configured
from listener.version import commit

log = structlog.get_logger("listener")
OLDEST_SERVER = 150000
RECONNECT_PAUSE = 0.25  # seconds


def refuse_old_server(version: int) -> None:
    """Raises SetupError for a PostgreSQL below 15; `version` as server_version_num has it."""
    if version < OLDEST_SERVER:
        raise SetupError(f"PostgreSQL {version // 10000} is too old: 15 or newer is needed.")


async def schema_facts(connection: psycopg.AsyncConnection[Any], url: str, settings: Settings) -> queries.ServerFacts:
    """What the server says of itself. Raises SetupError where the role cannot use a schema of this release."""
    facts = await queries.server_facts(connection)
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
    revision = await queries.schema_revision(connection)
    if revision != head():
        raise SetupError(
            f"the schema is at migration {revision}, this release needs {head()}.", hint="Run: listener migrate"
        )
    return facts


def owned_by_another(owner: str) -> str:
    """How to mend a schema that somebody made before the roles were there."""
    return (
        f"Work as {owner} with LISTENER_OWNER_ROLE={owner}; or, with the same setting, run `listener uninstall`, and "
        "start again with `listener roles` and `listener migrate`."
    )


async def check(url: str, settings: Settings) -> None:
    """Writes the first log line. Raises SetupError, in one line, for whatever refuses a start."""
    try:
        async with await _connect(url) as connection:
            facts = await schema_facts(connection, url, settings)
            if facts.in_recovery:
                raise SetupError("this server is a standby and cannot be written to.", hint="Connect to the primary.")
            computing = await queries.computing_role(connection)
            if computing is None:
                raise SetupError(
                    f"{describe(url)} has no schema listener that is whole: listener.refresh is not there.",
                    hint="Run: listener migrate",
                )
            if settings.listen_database_url is not None:
                await _check_listening(connection, settings.listen_database_url.get_secret_value())
    except psycopg.Error as error:
        raise from_database(error) from error
    log.info(
        "starting",
        version=__version__,
        commit=commit(),
        database=describe(url),
        migration=head(),
        postgresql=facts.server_version,
        role=facts.role,
        settings=settings.effective(),
    )
    computing_role, unbound = computing
    if facts.is_superuser or facts.bypasses_rls or unbound:
        role = facts.role if facts.is_superuser or facts.bypasses_rls else computing_role
        if not settings.allow_superuser:
            raise SetupError(
                f"role {role} is a superuser or has BYPASSRLS: row-level security would not bind it.",
                hint="Use the role from `listener roles`, or set LISTENER_ALLOW_SUPERUSER=true.",
            )
        log.warning("row-level security does not bind this role: only predicates keep tenants apart", role=role)


async def _check_listening(connection: psycopg.AsyncConnection[Any], url: str) -> None:
    """Raises SetupError where LISTENER_LISTEN_DATABASE_URL leads to another database: nothing would ever be heard."""
    libpq_url(url, "LISTENER_LISTEN_DATABASE_URL")
    async with await _connect(url) as listening:
        same = await queries.database_identity(listening) == await queries.database_identity(connection)
    if not same:
        raise SetupError(
            f"LISTENER_LISTEN_DATABASE_URL reaches {describe(url)}, which is not the database of "
            "LISTENER_DATABASE_URL.",
            hint="Both must lead to one database, this one without a pooler between.",
        )


async def _connect(url: str) -> psycopg.AsyncConnection[Any]:
    return await psycopg.AsyncConnection.connect(
        libpq_url(url), autocommit=True, application_name="listener", connect_timeout=10, client_encoding="utf8"
    )


def pool_options(url: str, settings: Settings) -> dict[str, Any]:
    """Arguments for the pool: one connection for each worker, one to drain, one for the sweep and HTTP.

    The server's three timeouts are needed to free the lock of a holder that died, froze, or lost its client.
    """
    timeout = int(settings.statement_timeout.total_seconds() * 1000)
    probe_timeout = settings.probe_timeout.total_seconds()
    return {
        "conninfo": libpq_url(url),
        "min_size": 2,
        "max_size": settings.workers + 2,
        "connection_class": PatientConnection,
        "configure": configured(probe_timeout),
        # A connection that could not be had is tried once more, and then given up; else the pool doubles its pauses,
        # and would come back as long after an outage as that took. As long as nothing is there it tries anew.
        "reconnect_timeout": RECONNECT_PAUSE,
        "reconnect_failed": AsyncConnectionPool.check,
        "kwargs": {
            "autocommit": True,
            "application_name": "listener",
            "connect_timeout": max(2, int(probe_timeout)),
            "client_encoding": "utf8",
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": int(probe_timeout * 1000),
            "options": session_options(
                url,
                f"-c statement_timeout={timeout}",
                "-c idle_in_transaction_session_timeout=60000",
                "-c client_connection_check_interval=2000",
                # A backend that cannot send its answer looks at none of those. Over TCP alone; elsewhere no effect.
                "-c tcp_user_timeout=15000",
                # A crash that loses a refresh loses the mark "clean" with it, and the drain before it likewise.
                "-c synchronous_commit=off",
            ),
        },
    }
