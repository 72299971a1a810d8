"""Sets the schema up: Alembic makes the tables, then the files of sql/ are applied, in one transaction.

Used by `listener migrate` and, through migrations/env.py, by the alembic command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
from alembic import command
from psycopg import sql
from sqlalchemy import NullPool, create_engine
from sqlalchemy.exc import DBAPIError

from listener.database_url import sqlalchemy_url
from listener.errors import ListenerError, SetupError, from_database
from listener.resources import sql_directory
from listener.revisions import config, head
from listener.settings import Settings, load

if TYPE_CHECKING:
    from alembic.runtime.environment import EnvironmentContext

# The advisory lock that makes two migrations at once wait for each other: "listener" in ASCII.
MIGRATION_LOCK = 0x6C697374656E6572
OLDEST_SERVER = 150000


def upgrade(settings: Settings) -> str:
    """Brings the schema to this release; returns the migration it is at. Doing it twice changes nothing."""
    _run(settings, lambda cfg: command.upgrade(cfg, "head"))
    return head()


def downgrade(settings: Settings, *, drop_targets: bool = False) -> None:
    """Takes everything away but the targets, which stay as plain tables unless `drop_targets`."""
    _run(settings, lambda cfg: command.downgrade(cfg, "base"), drop_targets=drop_targets)


def _run(settings: Settings, act: Any, *, drop_targets: bool = False) -> None:
    cfg = config()
    cfg.attributes.update(settings=settings, drop_targets=drop_targets)
    try:
        act(cfg)
    except DBAPIError as error:
        raise (from_database(error.orig) if isinstance(error.orig, psycopg.Error) else error) from error
    except psycopg.Error as error:
        raise from_database(error) from error


def run_in_context(context: EnvironmentContext) -> None:
    """What migrations/env.py does, for the alembic command and for the functions above."""
    if context.is_offline_mode():
        raise ListenerError("migrations run against a database only, not with --sql.")
    settings: Settings = context.config.attributes.get("settings") or load()
    engine = create_engine(sqlalchemy_url(settings.database_url.get_secret_value()), poolclass=NullPool)
    with engine.connect() as connection, connection.begin():
        driver: psycopg.Connection[Any] = connection.connection.driver_connection  # type: ignore[assignment]
        _prepare(driver, settings)
        context.configure(connection=connection, version_table_schema="listener", transaction_per_migration=False)
        migration = context.get_context()
        if not migration.opts.get("dont_mutate"):
            _create_schema(driver)
        with context.begin_transaction():
            context.run_migrations()
        if not migration.opts.get("dont_mutate") and migration.get_current_heads() == (head(),):
            _apply_functions(driver, settings)


def _prepare(connection: psycopg.Connection[Any], settings: Settings) -> None:
    """One migration at a time, by the role that is to own everything."""
    if connection.info.server_version < OLDEST_SERVER:
        raise SetupError(f"PostgreSQL {connection.info.server_version // 10000} is too old: 15 or newer is needed.")
    connection.execute("SET LOCAL client_min_messages = warning")
    connection.execute("SELECT pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
    found = connection.execute(
        "SELECT pg_has_role(current_user, oid, 'MEMBER') FROM pg_roles WHERE rolname = %s",
        (settings.owner_role,),
    ).fetchone()
    if found is not None and not found[0]:
        raise SetupError(
            f"role {connection.info.user} is no member of {settings.owner_role}, which owns the schema.",
            hint="Run what `listener roles` prints, or set LISTENER_OWNER_ROLE.",
        )
    if found is not None:
        connection.execute("SELECT set_config('role', %s, true)", (settings.owner_role,))


def _create_schema(connection: psycopg.Connection[Any]) -> None:
    row = connection.execute(
        """
        SELECT to_regnamespace('listener') IS NOT NULL, has_database_privilege(current_database(), 'CREATE'),
               current_user::text, current_database()::text
        """
    ).fetchone()
    assert row is not None
    exists, may_create, role, database = row
    if exists:
        return
    if not may_create:
        raise SetupError(
            f"role {role} may not create a schema in {database}.",
            hint=f"Run what `listener roles` prints, or: GRANT CREATE ON DATABASE {database} TO {role};",
        )
    connection.execute("CREATE SCHEMA listener")


def _apply_functions(connection: psycopg.Connection[Any], settings: Settings) -> None:
    """The service's role computes; where it does not exist, or may not be handed functions, the owner does."""
    connection.execute(
        """
        INSERT INTO listener.installation AS i (owner_role, service_role)
        SELECT current_user, coalesce((SELECT r.rolname FROM pg_roles r WHERE r.rolname = %(service)s
                                       AND pg_has_role(current_user, r.oid, 'MEMBER')), current_user)
        ON CONFLICT (only_row) DO UPDATE SET owner_role = excluded.owner_role, service_role = excluded.service_role
        WHERE (i.owner_role, i.service_role) <> (excluded.owner_role, excluded.service_role)
        """,
        {"service": settings.service_role},
    )
    for file in sorted(sql_directory().glob("*.sql")):
        connection.execute(file.read_bytes())
    connection.execute("SELECT listener.regenerate()")


def roles_script(settings: Settings, database: str) -> str:
    """The statements that create the roles and grants, for an administrator to read and run."""
    template = sql.SQL((sql_directory() / "admin" / "roles.sql").read_text())
    return template.format(
        owner=sql.Identifier(settings.owner_role),
        owner_name=sql.Literal(settings.owner_role),
        service=sql.Identifier(settings.service_role),
        service_name=sql.Literal(settings.service_role),
        database=sql.Identifier(database),
    ).as_string(None)
