"""Where the schema's SQL and the migrations are: inside an installed package, or beside it in a clone."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def sql_directory() -> Path:
    return _directory("sql")


def migrations_directory() -> Path:
    return _directory("migrations")


def _directory(name: str) -> Path:
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name
