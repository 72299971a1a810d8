"""Alembic's entry: the work is in listener.migrate, so that `listener migrate` and `alembic` do the same."""

from alembic import context

from listener.migrate import run_in_context

run_in_context(context)  # type: ignore[arg-type]
