"""What holds for all of the project's SQL: checked statically, bound to pinned names, and no source is written."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Database
from shop import BALANCE, SALES, create_view, one, open_shop, rows

ROOT = Path(__file__).parent.parent
# These play the application that the sample stands for; the service imports none of them.
APPLICATION = {"demo", "load", "replay", "sample"}


@pytest.fixture
async def shop(database: Database) -> Database:
    await open_shop(database)
    await create_view(database, "sales", SALES, ["product"])
    await create_view(database, "balance", BALANCE, ["product"], target_rls=True)
    return database


@pytest.mark.anyio
async def test_every_function_passes_plpgsql_check(shop: Database) -> None:
    async with shop.connect() as superuser:
        functions = await one(
            superuser,
            """SELECT count(*) FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
               WHERE pronamespace = 'listener'::regnamespace AND lanname = 'plpgsql' AND prosrc <> ''""",
        )
        assert functions > 30, "what could not be parsed would not be there"
        if await one(superuser, "SELECT count(*) FROM pg_available_extensions WHERE name = 'plpgsql_check'"):
            await superuser.execute("CREATE EXTENSION plpgsql_check")
            found = await rows(
                superuser,
                """
                SELECT p.oid::regprocedure::text, c.level, c.message, c.lineno
                FROM pg_proc p
                JOIN pg_language l ON l.oid = p.prolang AND l.lanname = 'plpgsql'
                CROSS JOIN LATERAL plpgsql_check_function_tb(
                    p.oid, CASE WHEN p.prorettype = 'trigger'::regtype THEN 'shop.orders'::regclass ELSE 0 END,
                    oldtable => CASE WHEN p.prorettype = 'trigger'::regtype THEN 'old_rows' END,
                    newtable => CASE WHEN p.prorettype = 'trigger'::regtype THEN 'new_rows' END,
                    extra_warnings => false, performance_warnings => false) c
                WHERE p.pronamespace = 'listener'::regnamespace
                """,
            )
            # It reads a text as a value of any type, by the input function of that: no cast does so for all of them.
            assert [f for f in found if f[0] != "listener.exact_value(text,anyelement)"] == []


@pytest.mark.anyio
async def test_every_security_definer_function_has_a_pinned_path_and_no_public_execute(shop: Database) -> None:
    async with shop.connect() as superuser:
        definers = await rows(
            superuser,
            """
            SELECT p.oid::regprocedure::text,
                   'search_path=pg_catalog, pg_temp' = ANY (coalesce(p.proconfig, '{}')),
                   has_function_privilege('shop_app', p.oid, 'EXECUTE'),
                   o.rolsuper
            FROM pg_proc p JOIN pg_roles o ON o.oid = p.proowner
            WHERE p.pronamespace = 'listener'::regnamespace AND p.prosecdef
            """,
        )
    assert len(definers) > 15
    # Each calls one function, in which the path is pinned, and gives the caller's path back.
    known = {
        "listener.check_drift(text,text)",
        "listener.refresh(text,text)",
        "listener.refresh_all_for_tenant(text)",
    }
    assert [
        name for name, pinned, public, superuser in definers if not (pinned or name in known) or public or superuser
    ] == []


@pytest.mark.anyio
async def test_every_function_of_more_than_one_line_has_a_pinned_path(shop: Database) -> None:
    async with shop.connect() as superuser:
        unpinned = await rows(
            superuser,
            """
            SELECT p.proname FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang AND l.lanname = 'plpgsql'
            WHERE p.pronamespace = 'listener'::regnamespace
              AND NOT 'search_path=pg_catalog, pg_temp' = ANY (coalesce(p.proconfig, '{}'))
            ORDER BY 1
            """,
        )
    # create_view has the caller's path for the caller's queries, and pins its own once it is read. The others give a
    # session its path back, which a SET clause cannot: all that they call is qualified.
    assert unpinned == [
        ("check_drift",),
        ("create_view",),
        ("forget",),
        ("refresh",),
        ("refresh_all_for_tenant",),
        ("refresh_key",),
        ("restore_path",),
    ]


@pytest.mark.anyio
async def test_no_function_and_no_table_is_open_to_everybody(shop: Database) -> None:
    async with shop.connect() as superuser:
        public = await rows(
            superuser,
            """
            SELECT p.oid::regprocedure::text FROM pg_proc p
            WHERE p.pronamespace = 'listener'::regnamespace AND has_function_privilege('shop_app', p.oid, 'EXECUTE')
            UNION ALL
            SELECT c.oid::regclass::text FROM pg_class c
            WHERE c.relnamespace = 'listener'::regnamespace AND c.relkind IN ('r', 'v', 'S')
              AND has_any_column_privilege('shop_app', c.oid, 'SELECT, INSERT, UPDATE')
            """,
        )
    assert public == []


WRITE = re.compile(
    r"\b(?:INSERT\s+INTO|DELETE\s+FROM|TRUNCATE(?:\s+TABLE)?|MERGE\s+INTO|(?<!DO )(?<!FOR )(?<!, )UPDATE(?! OR\b))\s+"
    r"(?:ONLY\s+)?([^\s(;,']+)",
)
# Ours; in the difference, the target; and the temporary tables that stand in for sources.
ALLOWED = re.compile(r"listener\.\w+$|%6\$s$|pg_temp\.%I$")
# It tells an operator what to run, of the target too, and runs nothing.
TELLS = "18_readiness.sql"


def statements(source: str) -> str:
    """SQL without its comments and its trigger events."""
    without_comments = re.sub(r"--[^\n]*", "", source)
    return re.sub(r"\b(?:AFTER|BEFORE)\b[^\n]*", "", without_comments)


def python_strings(file: Path) -> Iterator[str]:
    tree = ast.parse(file.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def writes() -> Iterator[tuple[str, str]]:
    for file in sorted((ROOT / "sql").rglob("*.sql")):
        if "sample" not in file.relative_to(ROOT).parts:
            yield from ((file.name, found) for found in WRITE.findall(statements(file.read_text())))
    for file in sorted((ROOT / "listener").rglob("*.py")):
        if file.stem not in APPLICATION:
            for text in python_strings(file):
                yield from ((file.name, found) for found in WRITE.findall(statements(text)))


def test_nothing_of_ours_writes_a_source() -> None:
    found = list(writes())
    assert len(found) > 25, "the scan reads the files"
    others = [(file, table) for file, table in found if file != TELLS and not ALLOWED.match(table)]
    assert others == []
    assert "EXECUTE" not in (ROOT / "sql" / TELLS).read_text(), "it tells, and does not run"


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO public.orders VALUES (1)",
        "WITH x AS (DELETE FROM orders) SELECT 1",
        "UPDATE public.orders SET a = 1",
        "TRUNCATE orders",
        "MERGE INTO\n orders o",
        "UPDATE %2$s SET a = 1",
    ],
)
def test_the_scan_knows_a_write_when_it_sees_one(statement: str) -> None:
    assert [table for table in WRITE.findall(statements(statement)) if not ALLOWED.match(table)]


def test_the_service_imports_nothing_that_plays_the_application() -> None:
    seen: set[str] = set()
    waiting = ["service"]
    while waiting:
        module = waiting.pop()
        file = ROOT / "listener" / f"{module}.py"
        file = file if file.exists() else ROOT / "listener" / module / "__init__.py"
        seen.add(module)
        if not file.exists():
            continue  # a name, not a module
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "listener":
                parts = (node.module or "").split(".")[1:]
                names = ["/".join([*parts, alias.name]) for alias in node.names] + ["/".join(parts)] * bool(parts)
                waiting += [name for name in names if name not in seen]
    assert {"changes", "refresh", "queries", "debounce"} <= seen
    assert not seen & APPLICATION
