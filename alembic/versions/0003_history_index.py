"""An index by which a user's newest events are read."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_events_user_id_transaction_id", "events", ["user_id", "transaction_id"])


def downgrade() -> None:
    op.drop_index("ix_events_user_id_transaction_id", table_name="events")
