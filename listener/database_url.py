"""Database URLs: libpq's form and SQLAlchemy's are both taken; what is shown never carries a password."""

from __future__ import annotations

import re
from collections.abc import Mapping

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from listener.errors import SetupError


def libpq_url(url: str, name: str = "the database URL") -> str:
    """`postgresql+psycopg://…` or `+asyncpg` as libpq takes it; key=value pairs are taken as well.

    Raises SetupError, with the name of the setting, where libpq does not understand it.
    """
    plain = re.sub(r"^postgres(?:ql)?(?:\+\w+)?://", "postgresql://", url)
    try:
        conninfo_to_dict(plain)
    except ProgrammingError as error:
        # libpq quotes the part it stumbled over, which can be the password.
        raise SetupError(f"{name} is malformed.", hint="Its form: postgresql://user@host:5432/database") from error
    return plain


def describe(url: str) -> str:
    """`user@host:port/database`, for people and log lines."""
    parts = conninfo_to_dict(libpq_url(url))
    return (
        f"{parts.get('user', '')}@{parts.get('host', 'localhost')}:{parts.get('port', 5432)}/{parts.get('dbname', '')}"
    )


def with_defaults(url: str, **defaults: str | int) -> str:
    """The URL with parameters that it does not have itself."""
    return make_conninfo("", **{**defaults, **conninfo_to_dict(libpq_url(url))})


def session_options(url: str, settings: Mapping[str, str]) -> str:
    """The `options` of a connection: the URL's own, then these, and READ COMMITTED, whatever the database's default."""
    given = str(conninfo_to_dict(libpq_url(url)).get("options", ""))
    set_here = {"default_transaction_isolation": r"read\ committed", **settings}
    return " ".join([given, *(f"-c {name}={value}" for name, value in set_here.items())]).strip()
