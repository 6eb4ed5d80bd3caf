"""On SQLite, what is newer of a user is found by blocks of positions: an index that grows at its end alone."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.execute("CREATE INDEX ix_events_block_user_id ON events ((position >> 13), user_id)")
        op.drop_index("ix_events_user_id_transaction_id", table_name="events")


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.create_index("ix_events_user_id_transaction_id", "events", ["user_id", "transaction_id"])
        op.execute("DROP INDEX ix_events_block_user_id")
