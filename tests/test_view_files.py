"""Definitions in files: what differs from the database is shown and made so, and the second time nothing is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from psycopg import AsyncConnection

from command import listener
from conftest import Database
from listener.errors import SetupError
from listener.view_files import read_directory, read_file, written
from shop import ANNA, application, create_view, one, order, rows, settle

pytestmark = pytest.mark.anyio

FILE = """
-- What was sold, by product.
-- key_columns = ["product"]
-- tenants_query = "SELECT id FROM shop.tenants"
-- quiet_period = "100 ms"
-- readers = ["shop_app"]
SELECT tenant_id, product, sum(quantity)::bigint AS quantity -- all of it
FROM shop.orders GROUP BY 1, 2;
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "views"
    made.mkdir()
    (made / "sales.sql").write_text(FILE)
    return made


def views(shop: Database, *arguments: str) -> Any:
    return listener("views", *arguments, url=shop.url("listener_migrator"))


async def test_the_first_time_it_is_made_and_the_second_nothing_is_done(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], directory: Path
) -> None:
    planned = views(shop, "plan", str(directory), "--exit-code")
    assert (planned.returncode, planned.stdout.splitlines()) == (1, ["create sales", "1 to do, 0 as the files say"])
    assert await one(superuser, "SELECT count(*) FROM listener.managed_view") == 0
    applied = views(shop, "apply", str(directory))
    assert (applied.returncode, applied.stdout) == (0, "created sales: the service fills it\n"), applied.stderr
    async with application(shop, ANNA) as app:
        await order(app, ANNA, "a")
        await settle(service)
        assert await rows(app, "SELECT product FROM sales") == [("a",)]
    before = await rows(superuser, "SELECT v::text FROM listener.managed_view v")
    assert views(shop, "apply", str(directory)).stdout == "nothing to do\n"
    planned = views(shop, "plan", str(directory), "--exit-code")
    assert (planned.returncode, planned.stdout) == (0, "0 to do, 1 as the files say\n")
    assert await rows(superuser, "SELECT v::text FROM listener.managed_view v") == before


async def test_a_query_that_is_only_written_otherwise_is_the_same(
    shop: Database, superuser: AsyncConnection[Any], directory: Path
) -> None:
    assert views(shop, "apply", str(directory)).returncode == 0
    (directory / "sales.sql").write_text(
        FILE.replace("-- all of it\n", "\n\n").replace("100 ms", "0.1 s").replace("sum(", "pg_catalog.SUM (")
    )
    assert views(shop, "apply", str(directory)).stdout == "nothing to do\n"


async def test_each_difference_is_named_and_made_so(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], directory: Path
) -> None:
    assert views(shop, "apply", str(directory)).returncode == 0
    async with application(shop, ANNA) as app:
        await order(app, ANNA, "a", 7)
    await settle(service)
    changed = (
        FILE.replace("sum(quantity)::bigint", "2 * sum(quantity)::bigint")
        .replace('"100 ms"', '"1 s"\n-- max_age = "1 hour"')
        .replace('"shop_app"', '"shop_app", "listener_reader"')
    )
    (directory / "sales.sql").write_text(changed)
    (directory / "count.sql").write_text(
        '-- name = "shop.\\"Counted\\""\n-- whole = true\n-- key_columns = ["n"]\n'
        "SELECT count(*) AS n FROM shop.prices\n"
    )
    await superuser.execute("GRANT CREATE, USAGE ON SCHEMA shop TO listener_owner")
    planned = json.loads(views(shop, "plan", str(directory), "--json").stdout)["steps"]
    assert [(step["view"], step["action"]) for step in planned] == [('shop."Counted"', "create"), ("sales", "alter")]
    assert planned[1]["changes"] == [
        "the query",
        "quiet_period: 00:00:00.1 -> 00:00:01",
        "max_age: none -> 01:00:00",
        "listener_reader is to read it",
    ]
    assert "-SELECT tenant_id, product, sum(quantity)::bigint AS quantity -- all of it" in planned[1]["diff"]
    applied = views(shop, "apply", str(directory))
    assert applied.returncode == 0, applied.stderr
    assert "altered sales: readers were locked out for" in applied.stdout
    assert await one(superuser, "SELECT quantity FROM sales") == 14
    window = "SELECT quiet_period::text, max_wait::text, max_age::text FROM listener.managed_view WHERE name = 'sales'"
    assert await rows(superuser, window) == [("00:00:01", "00:00:02", "01:00:00")]
    assert await one(superuser, "SELECT has_table_privilege('listener_reader', 'sales', 'SELECT')") is True
    assert views(shop, "apply", str(directory)).stdout == "nothing to do\n"
    (directory / "sales.sql").write_text(changed.replace('-- max_age = "1 hour"\n', ""))
    assert views(shop, "apply", str(directory)).stdout == "set max_age of sales\n"
    assert views(shop, "plan", str(directory)).stdout == "0 to do, 2 as the files say\n"


async def test_what_is_in_no_file_is_named_and_left_alone(
    shop: Database, superuser: AsyncConnection[Any], directory: Path
) -> None:
    await create_view(shop, "others", "SELECT tenant_id, count(*) AS n FROM shop.orders GROUP BY 1", ["tenant_id"])
    assert views(shop, "apply", str(directory)).returncode == 0
    assert views(shop, "plan", str(directory)).stdout.splitlines()[-1] == "in no file, and left alone: others"
    assert await one(superuser, "SELECT count(*) FROM listener.managed_view") == 2


async def test_what_is_exported_is_what_is_there(
    shop: Database, superuser: AsyncConnection[Any], directory: Path, tmp_path: Path
) -> None:
    assert views(shop, "apply", str(directory)).returncode == 0
    await create_view(shop, "odd", "SELECT tenant_id, product FROM shop.orders", [],
                      max_age="2 hours", timezone="Europe/Berlin", target_rls=True, edge="trailing")  # fmt: skip
    await create_view(shop, "alone", "SELECT tenant_id, count(*) AS n FROM shop.orders GROUP BY 1", ["tenant_id"])
    there = tmp_path / "exported"
    exported = views(shop, "export", str(there))
    assert exported.returncode == 0, exported.stderr
    assert sorted(path.name for path in there.iterdir()) == ["alone.sql", "odd.sql", "sales.sql"]
    assert views(shop, "plan", str(there)).stdout == "0 to do, 3 as the files say\n"
    assert "readers" in (there / "sales.sql").read_text()
    again = views(shop, "export", str(there))
    assert again.stderr.count("is there already, and is kept") == 3


async def test_a_failure_in_one_file_is_told_before_anything_is_done(
    shop: Database, superuser: AsyncConnection[Any], directory: Path
) -> None:
    (directory / "wrong.sql").write_text("-- key_colums = []\nSELECT 1\n")
    refused = views(shop, "apply", str(directory))
    assert refused.returncode == 1
    assert "wrong.sql:1: there is no setting key_colums" in refused.stderr
    assert await one(superuser, "SELECT count(*) FROM listener.managed_view") == 0
    (directory / "wrong.sql").write_text("SELECT tenant_id FROM shop.nothing\n")
    refused = views(shop, "apply", str(directory))
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert 'relation "shop.nothing" does not exist' in refused.stderr


async def test_the_tenant_column_of_a_view_stays(shop: Database, directory: Path) -> None:
    assert views(shop, "apply", str(directory)).returncode == 0
    (directory / "sales.sql").write_text(
        FILE.replace('-- tenants_query = "SELECT id FROM shop.tenants"', "-- whole = true")
    )
    assert (
        "the tenant column of sales is tenant_id, and cannot become None" in views(shop, "plan", str(directory)).stderr
    )


async def test_views_that_read_each_other_are_made_in_the_order_that_they_need(
    shop: Database, superuser: AsyncConnection[Any], directory: Path
) -> None:
    (directory / "a.sql").write_text(
        '-- key_columns = ["tenant_id"]\n-- tenants_query = "SELECT id FROM shop.tenants"\n'
        "SELECT tenant_id, sum(quantity) AS quantity FROM public.sales GROUP BY 1"
    )
    (directory / "wrong.sql").write_text("SELECT tenant_id FROM shop.nothing\n")
    applied = views(shop, "apply", str(directory))
    assert applied.stdout.splitlines() == [f"created {name}: the service fills it" for name in ("sales", "a")]
    assert (applied.returncode, len(applied.stderr.splitlines())) == (1, 1)
    assert 'relation "shop.nothing" does not exist' in applied.stderr
    (directory / "wrong.sql").unlink()
    assert views(shop, "apply", str(directory)).stdout == "nothing to do\n"


async def test_what_is_exported_under_an_odd_name_is_what_is_there(
    shop: Database, superuser: AsyncConnection[Any], tmp_path: Path
) -> None:
    await create_view(shop, 'public."Ünï q"', "SELECT tenant_id, product FROM shop.orders", [])
    assert views(shop, "export", str(tmp_path / "views")).returncode == 0
    assert views(shop, "plan", str(tmp_path / "views")).stdout == "0 to do, 1 as the files say\n"
    (tmp_path / "views" / "again.sql").write_text('-- name = "Ünï q"\nSELECT 1')
    assert "are both of the view Ünï q" in views(shop, "plan", str(tmp_path / "views")).stderr
    refused = views(shop, "export", str(tmp_path / "views" / "again.sql"))
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert "the files cannot be written" in refused.stderr


def test_what_other_editors_write_is_read_as_it_was_meant(tmp_path: Path) -> None:
    file = tmp_path / "x.sql"
    # A mark at the beginning, two characters at the ends of the lines; and in a literal what is no end of a line.
    query = "SELECT 'a\u2028b\x0cc\x85d' AS odd\nFROM t"
    file.write_bytes(f'\ufeff-- key_columns = ["a"]\n{query}\n'.replace("\n", "\r\n").encode())
    found = read_file(file)
    assert (found.query, found.options) == (query, {"key_columns": ["a"]})


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("SELECT '\0'", "holds a NUL byte"),
        ("-- key_columns = product\nSELECT 1", "cannot be read"),
        ('-- key_columns = "product"\nSELECT 1', "must be a list of strings"),
        ("-- key_columns = [1]\nSELECT 1", "must be a list of strings"),
        ("-- target_rls = 1\nSELECT 1", "must be true or false"),
        ('-- name = "a"\n-- name = "b"\nSELECT 1', ":2: name is given twice"),
        ("-- only a comment\n", "has no query"),
        ("", "has no query"),
    ],
)
def test_what_a_file_cannot_say_is_told_with_its_place(tmp_path: Path, text: str, what: str) -> None:
    file = tmp_path / "x.sql"
    file.write_text(text)
    with pytest.raises(SetupError, match=what):
        read_file(file)


def test_a_directory_must_have_files_and_one_for_each_view(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"no \.sql file"):
        read_directory(tmp_path)
    with pytest.raises(SetupError, match="is no directory"):
        read_directory(tmp_path / "none")
    (tmp_path / "a.sql").write_text("SELECT 1")
    (tmp_path / "b.sql").write_text('-- name = "a"\nSELECT 1')
    with pytest.raises(SetupError, match="both of the view a"):
        read_directory(tmp_path)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "x.sql"
    query = 'SELECT \'a\\b\' AS "x"\n-- key_columns = ["not a setting"]'
    odd = {"key_columns": ['a"b', "c\\d"], "tenants_query": "SELECT 1\n\tFROM t", "target_rls": True}
    file.write_text(written('"Odd"', query, odd, ["r"]))
    found = read_file(file)
    assert (found.name, found.query, found.options, found.readers) == ('"Odd"', query, odd, ("r",))
