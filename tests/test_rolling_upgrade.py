"""The schema is upgraded, or goes, under services that run: they go on where they can, and say so where they cannot."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from books import ANNA, BEN, LEDGER_VIEW, book, open_books, transaction
from command import PATIENCE, ROOT, environment, listener
from conftest import Database, eventually
from listener import view_queries
from listener.revisions import head
from process import service_process

pytestmark = pytest.mark.anyio

NEXT = "9001"
MIGRATION = f'''"""One more migration: a table gets a column, as a release to come would do it."""

from alembic import op

revision = "{NEXT}"
down_revision = "{head()}"


def upgrade() -> None:
    op.execute("ALTER TABLE listener.dirty_key ADD COLUMN note text DEFAULT 'of the next release'")
    op.execute("ALTER TABLE listener.change_log ADD COLUMN note text")


def downgrade() -> None:
    op.execute("ALTER TABLE listener.dirty_key DROP COLUMN note")
    op.execute("ALTER TABLE listener.change_log DROP COLUMN note")
'''


@pytest.fixture
async def books(sample: Database) -> Database:
    await open_books(sample)
    return sample


@pytest.fixture
def following(tmp_path: Path) -> Path:
    """A clone of the next release: this one, one more migration, and functions that are not the same."""
    clone = tmp_path / "next"
    for directory in ("listener", "migrations", "sql"):
        shutil.copytree(ROOT / directory, clone / directory)
    (clone / "migrations/versions/9001_note.py").write_text(MIGRATION)
    drain = clone / "sql/09_drain.sql"
    drain.write_text(
        drain.read_text().replace("batch text := gen_random_uuid()", "batch text := 'next ' || gen_random_uuid()")
    )
    assert "'next '" in drain.read_text()
    return clone


def serves_from(clone: Path, migration: str) -> None:
    """Raises the bound: the release in the clone does not serve services from before this migration."""
    names = clone / "sql/01_names.sql"
    raised = re.sub(r"(SELECT migration >= )'\w+'", rf"\1'{migration}'", names.read_text())
    assert raised != names.read_text()
    names.write_text(raised)


async def run(clone: Path, url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`listener …` of the release in the clone."""
    return await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, "-m", "listener", *arguments],
            env=environment(LISTENER_DATABASE_URL=url),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
            cwd=clone,
        )
    )


@asynccontextmanager
async def load(books: Database) -> AsyncIterator[None]:
    """Two tenants' bookings, one after the other, as long as it lasts; none of them fails."""
    is_over = anyio.Event()

    async def write(tenant: uuid.UUID) -> None:
        async with books.connect("listener_app") as application:
            await application.execute("SELECT set_config('app.current_tenant_id', %s, false)", (str(tenant),))
            while not is_over.is_set():
                await book(application, tenant, random.randint(1, 1000))
                with anyio.move_on_after(0.01):
                    await is_over.wait()

    async with anyio.create_task_group() as writers:
        writers.start_soon(write, ANNA)
        writers.start_soon(write, BEN)
        try:
            yield
        finally:
            is_over.set()


async def all_is_shown(books: Database) -> None:
    """Until the log is consumed and nothing is dirty; then every target equals its definition."""
    async with books.connect() as superuser:
        await eventually(lambda: view_queries.all_fresh(superuser))
    verified = await anyio.to_thread.run_sync(lambda: listener("verify", url=books.url()))
    assert verified.returncode == 0, verified.stdout
    async with books.connect() as superuser:
        cursor = await superuser.execute(
            "SELECT (SELECT sum(revenue_cents) * 0.01 FROM revenue_ledger) - (SELECT sum(total_revenue)"
            " FROM dashboard.mv_realtime_revenue), (SELECT count(*) FROM listener.dead_letter)"
        )
        assert await cursor.fetchone() == (0, 0)


async def test_services_of_two_releases_work_beside_each_other_while_the_schema_is_upgraded(
    books: Database, following: Path
) -> None:
    migrator = books.url("listener_migrator")
    brisk = {"sweep_interval": "300ms"}
    async with service_process(books.url(), **brisk) as this:
        async with load(books):
            await this.until("refreshed")
            early = await run(following, books.url(), "run")
            assert early.returncode == 1
            assert early.stderr.splitlines()[-1] == (
                f"listener: the schema is at migration {head()}, older than this release, which needs {NEXT}. "
                "Run: listener migrate"
            )
            migrated = await run(following, migrator, "migrate")
            assert (migrated.returncode, migrated.stderr) == (0, "")
            await this.until("the schema is newer than this service, and serves it", schema=NEXT, service=head())
        async with service_process(books.url(), following, **brisk) as other:
            async with load(books):
                assert (await other.until("starting"))["migration"] == NEXT
                await other.until("serving")
                before = {service: len(service.logged("refreshed")) for service in (this, other)}
                await eventually(lambda: all(len(s.logged("refreshed")) > n for s, n in before.items()))
                await eventually(
                    lambda: any(line["correlation_id"].startswith("next ") for line in this.logged("refreshed"))
                )
                ready = await this.get("/health/ready")
                assert ready.status_code == 200, ready.text
                # A command of this release is served, too; but it does not take the schema back.
                assert listener("status", url=books.url()).returncode == 0
                for command in (["migrate"], ["uninstall", "--yes"]):
                    refused = listener(*command, url=migrator)
                    assert refused.returncode == 1
                    assert refused.stderr == (
                        f"listener: the schema listener is at migration {NEXT}, which this release does not know. "
                        "Use the release that made it, or a newer one.\n"
                    )
                assert await this.end() == 0
            await all_is_shown(books)
            assert await other.end() == 0


async def test_a_service_that_the_new_schema_does_not_serve_stops_refreshing_and_says_so(
    books: Database, following: Path
) -> None:
    serves_from(following, NEXT)
    async with (
        service_process(books.url(), sweep_interval="300ms", max_attempts="1") as this,
        load(books),
    ):
        await this.until("refreshed")
        migrated = await run(following, books.url("listener_migrator"), "migrate")
        assert (migrated.returncode, migrated.stderr) == (0, "")
        async with books.connect() as superuser:
            cursor = await superuser.execute("SELECT max(id) FROM listener.drain_log")
            drains = await cursor.fetchone()
            cursor = await superuser.execute("SELECT max(refreshed_at) FROM listener.refresh_state")
            refreshed = await cursor.fetchone()
        too_old = f"the schema is at migration {NEXT} and no longer serves a release of {head()}. Upgrade this service."
        await this.until("not draining; trying again", reason=too_old)
        ready = await this.get("/health/ready")
        assert ready.status_code == 503
        assert f"not draining: {too_old}" in ready.json()["reasons"]
        assert (await this.get("/health")).status_code == 200
        async with books.connect() as superuser:
            # It was the last that this service did.
            cursor = await superuser.execute("SELECT max(id) FROM listener.drain_log")
            assert await cursor.fetchone() == drains
            cursor = await superuser.execute("SELECT max(refreshed_at) FROM listener.refresh_state")
            assert await cursor.fetchone() == refreshed
        for command in ("run", "status", "sweep"):
            refused = listener(command, url=books.url())
            assert refused.returncode == 1
            assert refused.stderr.splitlines()[-1] == (
                f"listener: the schema is at migration {NEXT} and no longer serves this release, which is of {head()}. "
                "Upgrade this service: use the release that migrated the schema, or a newer one."
            )
    async with service_process(books.url(), following) as other:
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        # What was left of either release's time.
        await other.until("refreshed", view=LEDGER_VIEW, tenant_id=str(ANNA))
        async with books.connect() as superuser:
            await eventually(lambda: view_queries.all_fresh(superuser))
        verified = await run(following, books.url(), "verify")
        assert verified.returncode == 0, verified.stdout
        async with books.connect() as superuser:
            # Refused is not failed: no key was counted against.
            cursor = await superuser.execute("SELECT count(*) FROM listener.dead_letter")
            assert await cursor.fetchone() == (0,)
        assert await other.end() == 0


async def test_the_schema_can_go_while_two_services_run_and_come_back(books: Database) -> None:
    migrator = books.url("listener_migrator")
    brisk = {"sweep_interval": "200ms"}
    async with (
        service_process(books.url(), **brisk) as one,
        service_process(books.url(), **brisk) as two,
    ):
        async with load(books):
            for service in (one, two):
                await service.until("refreshed")
            gone = await anyio.to_thread.run_sync(lambda: listener("uninstall", "--yes", url=migrator))
            assert (gone.returncode, gone.stderr) == (0, "")
            for service in (one, two):
                await service.until("sweep failed; the next one tries again")
                ready = await service.get("/health/ready")
                assert (ready.status_code, (await service.get("/health")).status_code) == (503, 200)
                assert "the database cannot be asked: InvalidSchemaName" in ready.text
        # The writers were not disturbed, and what is left is theirs.
        async with books.connect() as superuser:
            cursor = await superuser.execute(
                "SELECT to_regnamespace('listener'), (SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'listener%'),"
                " (SELECT count(*) > 0 FROM dashboard.mv_realtime_revenue)"
            )
            assert await cursor.fetchone() == (None, 0, True)
            await superuser.execute(f'GRANT CREATE ON DATABASE "{books.name}" TO listener_owner'.encode())
        assert listener("migrate", url=migrator).returncode == 0

        async def are_ready() -> bool:
            return {(await service.get("/health/ready")).status_code for service in (one, two)} == {200}

        await eventually(are_ready)
        assert [await service.end() for service in (one, two)] == [0, 0]
