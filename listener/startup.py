"""What is checked before the service serves, and how its connections are set up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import structlog

from listener import __version__, queries
from listener.database_url import describe, libpq_url, session_options
from listener.errors import SetupError, from_database
from listener.revisions import head
from listener.version import commit

if TYPE_CHECKING:
    from datetime import timedelta
    from typing import Protocol

    class ServiceSettings(Protocol):
        """The part of the settings that start-up looks at."""

        @property
        def allow_superuser(self) -> bool: ...
        @property
        def workers(self) -> int: ...
        @property
        def statement_timeout(self) -> timedelta: ...
        def effective(self) -> dict[str, str | int | bool]: ...


log = structlog.get_logger("listener")
OLDEST_SERVER = 150000


async def check(url: str, settings: ServiceSettings) -> None:
    """Writes the first log line. Raises SetupError, in one line, for whatever refuses a start."""
    try:
        async with await psycopg.AsyncConnection.connect(
            libpq_url(url), autocommit=True, application_name="listener", connect_timeout=10
        ) as connection:
            facts = await queries.server_facts(connection)
            if facts.server_version_num < OLDEST_SERVER:
                raise SetupError(f"PostgreSQL {facts.server_version} is too old: 15 or newer is needed.")
            if facts.in_recovery:
                raise SetupError("this server is a standby and cannot be written to.", hint="Connect to the primary.")
            if not facts.schema_installed:
                raise SetupError(
                    f"{describe(url)} has no schema listener that role {facts.role} may use.",
                    hint="Run: listener migrate; then see: listener roles",
                )
            revision = await queries.schema_revision(connection)
            computing, unbound = await queries.computing_role(connection)
    except psycopg.Error as error:
        raise from_database(error) from error
    log.info(
        "starting",
        version=__version__,
        commit=commit(),
        database=describe(url),
        migration=revision,
        postgresql=facts.server_version,
        role=facts.role,
        settings=settings.effective(),
    )
    if revision != head():
        raise SetupError(
            f"the schema is at migration {revision}, this release needs {head()}.",
            hint="Run: listener migrate",
        )
    if facts.is_superuser or facts.bypasses_rls or unbound:
        role = facts.role if facts.is_superuser or facts.bypasses_rls else computing
        if not settings.allow_superuser:
            raise SetupError(
                f"role {role} is a superuser or has BYPASSRLS: row-level security would not bind it.",
                hint="Use the role from `listener roles`, or set LISTENER_ALLOW_SUPERUSER=true.",
            )
        log.warning("row-level security does not bind this role: only predicates keep tenants apart", role=role)


def pool_options(url: str, settings: ServiceSettings) -> dict[str, Any]:
    """Arguments for the pool: one connection for each worker, one to drain, one for the sweep and HTTP.

    All three timeouts are needed to free the lock of a holder that died, froze, or lost its client.
    """
    timeout = int(settings.statement_timeout.total_seconds() * 1000)
    return {
        "conninfo": libpq_url(url),
        "min_size": 2,
        "max_size": settings.workers + 2,
        "max_idle": 600,
        "kwargs": {
            "autocommit": True,
            "application_name": "listener",
            "connect_timeout": 10,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "options": session_options(
                url,
                f"-c statement_timeout={timeout}",
                "-c idle_in_transaction_session_timeout=60000",
                "-c client_connection_check_interval=2000",
                # A crash that loses a refresh loses the mark "clean" with it, and the drain before it likewise.
                "-c synchronous_commit=off",
            ),
        },
    }
