"""The tables of the schema listener.

Revision ID: 0001
Revises:
"""

from pathlib import Path

from alembic import context, op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _execute(file: str, **parameters: str) -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    for name, value in parameters.items():
        connection.execute("SELECT set_config(%s, %s, true)", (name, value))
    connection.execute((Path(__file__).parent / file).read_bytes())


def upgrade() -> None:
    """Creates the tables."""
    _execute("0001_tables.sql")


def downgrade() -> None:
    """Drops triggers, definitions, functions and tables; targets only with `-x drop_targets=true`."""
    told = context.get_x_argument(as_dictionary=True).get("drop_targets") == "true"
    drop = told or context.config.attributes.get("drop_targets", False)
    _execute("0001_drop.sql", **{"listener.drop_targets": str(bool(drop)).lower()})
