"""Database URLs: libpq's form and SQLAlchemy's are both taken; what is shown never carries a password."""

from __future__ import annotations

import re
from collections.abc import Mapping

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from listener.errors import SetupError, one_line

FORM = "Its form: postgresql://user@host:5432/database"


def libpq_url(url: str, name: str = "the database URL") -> str:
    """`postgresql+psycopg://…` or `+asyncpg` as libpq takes it; key=value pairs are taken as well.

    Raises SetupError, with the name of the setting, where libpq does not understand it.
    """
    plain = re.sub(r"^postgres(?:ql)?(?:\+\w+)?://", "postgresql://", url)
    try:
        parts = conninfo_to_dict(plain)
    except ProgrammingError:
        # libpq quotes the part it stumbled over, which can be the password.
        raise SetupError(f"{name} is malformed.", hint=FORM) from None
    # A password that was not escaped: libpq takes a part of it for the host, the port or the database, and names that.
    address, _, database = plain.removeprefix("postgresql://").partition("?")[0].partition("/")
    is_torn = plain.startswith("postgresql://") and (address.count("@") > 1 or "@" in database)
    hosts, ports = (str(parts.get(part, "")).split(",") for part in ("host", "port"))
    if is_torn or not all(map(_is_host, hosts)) or not all(map(_is_port, ports)):
        raise SetupError(f"{name} is malformed.", hint=f"{FORM}; in a password @ is written %40, and / is %2F")
    return plain


def _is_host(text: str) -> bool:
    """Whether it is a directory, or can be asked for: a name that cannot be encoded raises what is no psycopg.Error."""
    try:
        return text.startswith(("/", "@")) or text.encode("idna") is not None
    except UnicodeError:
        return False


def _is_port(text: str) -> bool:
    return text == "" or (re.fullmatch("[0-9]{1,5}", text) is not None and 0 < int(text) < 65536)  # noqa: PLR2004


def describe(url: str) -> str:
    """`user@host:port/database`, for people and log lines."""
    parts = conninfo_to_dict(libpq_url(url))
    return one_line(
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
