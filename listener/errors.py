"""The errors that a caller can catch. Each message is one line that says what is wrong, and where possible the mend."""

from __future__ import annotations

import re

import psycopg


class ListenerError(Exception):
    """Base of the errors raised on purpose; `hint` says how to mend it, where that is known."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        """Message and hint, in one line."""
        message = " ".join(str(self.args[0]).split())
        return f"{message} {self.hint}" if self.hint else message


class SetupError(ListenerError):
    """The database, its schema, a role or a setting is not as the service needs it."""


class RefusedError(ListenerError):
    """The database refused a call: unknown view, missing tenant, wrong definition. `sqlstate` tells which."""

    def __init__(self, message: str, *, sqlstate: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.sqlstate = sqlstate

    @property
    def is_validation(self) -> bool:
        """Whether the call named no valid key: an unknown view, or a tenant that is missing or malformed."""
        return self.sqlstate in {"LSN01", "LSN02"}


class ConnectionLostError(ListenerError):
    """No answer from the database: refused, broken, timed out."""


SECRET = re.compile(r"(password=|://[^:/@\s]*:)[^@\s]+(?=@|\s|$)")


def from_database(error: psycopg.Error) -> ListenerError:
    """The error of ours that says in one line, without secrets, what the database said."""
    message = SECRET.sub(r"\1***", " ".join((error.diag.message_primary or str(error)).split()))
    hint = error.diag.message_hint
    if error.sqlstate is None or error.sqlstate[:2] in {"08", "57"}:
        return ConnectionLostError(f"the database does not answer: {message}")
    if error.sqlstate in {"3F000", "42P01", "42883"} and "listener" in message:
        return SetupError(message, hint="Is the schema there? Run: listener migrate")
    return RefusedError(message, sqlstate=error.sqlstate, hint=hint)
