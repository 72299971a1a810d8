"""Set-up and service: demo, roles, migrate, uninstall, run."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import anyio
import psycopg
import typer
from pydantic_core import PydanticUndefined

from listener import console, logs, service
from listener.cli.session import app
from listener.database_url import describe, libpq_url
from listener.migrate import downgrade, roles_script, upgrade
from listener.settings import Settings, duration_text, load


@app.command()
def demo(
    seconds: Annotated[
        float | None, typer.Option(min=0.1, help="end by itself after so many seconds, with a summary")
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(help="feed a recorded ledger (CSV, may be .gz) instead of a live load")
    ] = None,
    tenants: Annotated[int, typer.Option(min=1, max=10000, help="tenants of the live load")] = 50,
    rate: Annotated[float, typer.Option(min=0.1, help="transactions a second of the live load")] = 100,
    seed: Annotated[int | None, typer.Option(help="of the live load's random numbers")] = None,
) -> None:
    """Shows it at work: a server of its own, the sample schema, a live load, the service, a live table per view.

    Nothing is left behind. With --seconds or --replay it ends by `verify`: exit 0 only if every target is exact.
    """
    from listener import demo as demonstration  # the embedded server's wheel may not be installed

    exact = anyio.run(demonstration.run, demonstration.Options(seconds, replay, tenants, rate, seed))
    raise typer.Exit(0 if exact else 1)


@app.command()
def roles(
    database: Annotated[
        str | None, typer.Option(help="database name; else that of LISTENER_DATABASE_URL, or postgres")
    ] = None,
) -> None:
    """Prints the SQL that creates the roles and grants; an administrator reads it, then runs it with psql."""
    # Nothing is connected to: without a URL the script is for the database `postgres`.
    settings = load(database_url="postgresql:///postgres")
    parts = psycopg.conninfo.conninfo_to_dict(libpq_url(settings.database_url.get_secret_value()))
    print(roles_script(settings, database or str(parts.get("dbname") or "postgres")))  # noqa: T201


@app.command()
def migrate() -> None:
    """Sets the schema `listener` up, or brings it to this release. Doing it twice changes nothing."""
    console.out.print(f"the schema listener is at migration {upgrade(load())}")


@app.command()
def uninstall(
    drop_targets: Annotated[
        bool, typer.Option("--drop-targets", help="drop the targets too; else they stay as tables")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Takes triggers, definitions, functions and tables of the schema away; targets stay as plain tables."""
    settings = load()
    url = describe(settings.database_url.get_secret_value())
    if not yes:
        typer.confirm(f"Uninstall listener from {url}{', with all targets' if drop_targets else ''}?", abort=True)
    downgrade(settings, drop_targets=drop_targets)
    console.out.print("uninstalled")


def _settings_help() -> str:
    lines = [
        f"LISTENER_{name.upper()}: {field.description or name.replace('_', ' ')}"
        + ("" if field.default in (None, PydanticUndefined) else f" (default {_default(field.default)})")
        for name, field in Settings.model_fields.items()
    ]
    return "Settings (environment variables; durations as 250ms, 5s, 2min, 1h):\n\n" + "\n\n".join(lines)


def _default(value: object) -> str:
    return duration_text(value) if isinstance(value, timedelta) else str(value)


@app.command(epilog=_settings_help())
def run() -> None:
    """Runs the service: listens, drains, debounces, refreshes, sweeps. SIGTERM ends it within the grace period.

    A database that cannot be reached, or is a standby, is waited for; what no waiting mends ends it at once, exit 1.
    """
    settings = load()
    logs.configure(settings.log_level, settings.log_format)
    anyio.run(service.run, settings)
