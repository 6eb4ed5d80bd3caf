"""Counts of items are kept, and what was taken back is found without reading all events."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

TAKEN_BACK = sa.text("retracts IS NOT NULL")


def upgrade() -> None:
    op.create_table(
        "item_counts",
        sa.Column("part", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("counts", sa.Text, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("part", name="pk_item_counts"),
    )
    op.create_index(
        "ix_events_user_id_retracts",
        "events",
        ["user_id", "retracts"],
        sqlite_where=TAKEN_BACK,
        postgresql_where=TAKEN_BACK,
    )


def downgrade() -> None:
    op.drop_index("ix_events_user_id_retracts", table_name="events")
    op.drop_table("item_counts")
