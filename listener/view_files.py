"""Definitions in files: a `.sql` file per view, whose first comment lines say how it is registered.

    -- key_columns = ["tenant_id", "currency"]
    -- tenants_query = "SELECT id FROM tenants"
    -- readers = ["dashboard"]
    SELECT tenant_id, currency, sum(cents) AS cents FROM orders GROUP BY tenant_id, currency

A line `-- name = value` before the query is a setting, its value as TOML writes it; any other comment is one.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from listener.errors import SetupError

SETTING = re.compile(r"--\s*([a-z_]+)\s*=")
# What a setting may be, as create_view takes it; `readers` are granted SELECT on the target.
KINDS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "key_columns": list,
    "tenant_column": str,
    "tenants_query": str,
    "depends_on": list,
    "quiet_period": str,
    "max_wait": str,
    "edge": str,
    "max_age": str,
    "max_staleness": str,
    "timezone": str,
    "target_rls": bool,
    "compute_role": str,
    "whole": bool,
    "search_path": str,
    "readers": list,
}
WORDS: dict[Any, str] = {str: "a string", list: "a list of strings", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class ViewFile:
    """One view as its file has it: the arguments of create_view that are given, the query, who reads the target."""

    path: Path
    name: str
    query: str
    options: dict[str, Any] = field(default_factory=dict)
    readers: tuple[str, ...] = ()


def read_directory(directory: Path) -> list[ViewFile]:
    """The views of all `.sql` files in a directory, by their file names. Raises SetupError."""
    if not directory.is_dir():
        raise SetupError(f"{directory} is no directory.")
    files = [read_file(path) for path in sorted(directory.glob("*.sql"))]
    if not files:
        raise SetupError(f"there is no .sql file in {directory}.")
    seen: dict[str, Path] = {}
    for file in files:
        if file.name in seen:
            raise SetupError(f"{seen[file.name]} and {file.path} are both of the view {file.name}.")
        seen[file.name] = file.path
    return files


def read_file(path: Path) -> ViewFile:
    """Raises SetupError, naming file and line."""
    settings: dict[str, Any] = {}
    # Not splitlines(): a literal may hold what that takes for the end of a line, too.
    lines = read_text(path).split("\n")
    body = 0
    for number, line in enumerate(lines, start=1):
        stripped = line.strip()
        if stripped and not stripped.startswith("--"):
            break
        body = number
        if SETTING.match(stripped):
            name, value = _setting(f"{path}:{number}", stripped.removeprefix("--").strip())
            if name in settings:
                raise SetupError(f"{path}:{number}: {name} is given twice.")
            settings[name] = value
    query = "\n".join(lines[body:]).strip()
    if not query:
        raise SetupError(f"{path} has no query.")
    if settings.pop("whole", False):
        settings["tenant_column"] = None
    return ViewFile(
        path, settings.pop("name", path.stem), query, readers=tuple(settings.pop("readers", ())), options=settings
    )


def read_text(path: Path) -> str:
    """A file in UTF-8, without the mark that some editors begin one with. Raises SetupError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if "\0" in text:
        raise SetupError(f"{path} cannot be read: it holds a NUL byte.")
    return text


def _setting(place: str, text: str) -> tuple[str, Any]:
    try:
        ((name, value),) = tomllib.loads(text).items()
    except tomllib.TOMLDecodeError as error:
        raise SetupError(
            f"{place}: {text} cannot be read: {error}.",
            hint='Strings stand in quotes: -- max_age = "1 hour"',
        ) from error
    if name not in KINDS:
        raise SetupError(f"{place}: there is no setting {name}.", hint=f"There are {', '.join(KINDS)}.")
    wanted = KINDS[name]
    if not isinstance(value, wanted) or (isinstance(value, list) and not all(isinstance(i, str) for i in value)):
        raise SetupError(f"{place}: {name} must be {WORDS[wanted]}.")
    return name, value


def written(name: str, query: str, options: dict[str, Any], readers: list[str]) -> str:
    """The text of a view's file. Options that are None are left out."""
    settings = {"name": name, **options, "readers": readers or None}
    lines = [f"-- {key} = {_toml(value)}" for key, value in settings.items() if value is not None]
    return "\n".join([*lines, query.strip().rstrip(";"), ""])


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    # A basic string stands in one line.
    return '"' + escaped.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") + '"'
