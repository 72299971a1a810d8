"""By hand: fill a view."""

from __future__ import annotations

from contextlib import aclosing
from typing import Annotated

import anyio
import psycopg
import typer

from listener import connections, console, errors, pooler
from listener.cli.session import Json, View, app, connected, retry_policy
from listener.fill import Progress
from listener.fill import fill as fill_view
from listener.settings import Settings, load
from listener.views import RefreshKey


@app.command()
def fill(
    view: View,
    workers: Annotated[int, typer.Option(min=1, max=100, help="keys at the same time, a connection each")] = 2,
    max_rate: Annotated[
        float | None, typer.Option(min=0.01, help="keys a second, at the most; as many as can be where it is left out")
    ] = None,
    as_json: Json = False,
) -> None:
    """Refreshes every dirty key of a view, with workers of its own beside those of `listener run`, and shows progress.

    A new view, or one whose keys were all marked, is filled by whoever runs; this is for more workers than the service
    has, and for filling without it. It may be killed and started again at any moment: what is done is done, and the
    rest is in the database. Keys that another is at are left to him. How far it is: SELECT * FROM listener.filling.

    Exit 1 where a key failed; it is recorded as the service records it, and the others go on.
    """
    anyio.run(_fill, load(), view, workers, max_rate, as_json)


async def _fill(settings: Settings, view: str, workers: int, max_rate: float | None, as_json: bool) -> None:
    policy = retry_policy(settings)
    url = settings.database_url.get_secret_value()
    async with connected(settings) as connection:
        pooled = await pooler.is_pooled(connection)
    failed: dict[RefreshKey, psycopg.Error] = {}
    last = None
    given = settings.model_copy(update={"workers": workers})
    async with connections.pool(url, given, pooled=pooled) as pool:
        with console.progress(quiet=as_json) as bar:
            task = bar.add_task(view, total=None)
            steps = fill_view(
                pool.connection, view, workers=workers, max_rate=max_rate, policy=policy, on_failure=failed.__setitem__
            )
            async with aclosing(steps):
                async for last in steps:
                    speed = f" at {last.rate:,.0f}/s" if last.rate else ""
                    bar.update(
                        task, description=f"{last.view}{speed}", completed=last.done + last.failed, total=last.total
                    )
    assert last is not None
    _told(last, failed, as_json=as_json)


def _told(last: Progress, failed: dict[RefreshKey, psycopg.Error], *, as_json: bool) -> None:
    if as_json:
        console.print_json(
            {
                "view": last.view,
                "done": last.done,
                "failed": last.failed,
                "remaining": last.remaining,
                "rows_changed": last.rows_changed,
                "keys_per_second": round(last.rate, 1),
                "errors": [
                    {"tenant_id": key.tenant, "sqlstate": error.sqlstate, "error": str(errors.from_database(error))}
                    for key, error in failed.items()
                ],
            }
        )
    else:
        failures = f", {last.failed} failed" if last.failed else ""
        rate = f", {last.rate:,.0f} keys a second" if last.done else ""
        console.out.print(
            f"{last.view}: {console.count(last.done, 'key')} filled{failures}, "
            f"{console.count(last.rows_changed, 'row')} changed{rate}"
        )
    seen = set()
    for key, error in failed.items():
        if error.sqlstate not in seen:
            console.error(f"{key.view} of tenant {key.tenant}: {errors.from_database(error)}")
        seen.add(error.sqlstate)
    if last.paused:
        raise errors.SetupError(f"{last.view} is paused: nothing more is refreshed. Run: listener resume {last.view}")
    if last.failed:
        raise typer.Exit(1)
