"""A number for each change to an item, in the order of the commits: what serving follows the catalogue by."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_SQLITE = [
    f"""
    CREATE TRIGGER items_{name} AFTER {event} ON items BEGIN
        UPDATE catalog_state SET changes = changes + 1;
        UPDATE items SET change = (SELECT changes FROM catalog_state) WHERE item_id = NEW.item_id;
    END
    """  # noqa: S608 - no part of it comes from outside
    for name, event in (
        ("inserted", "INSERT"),
        # All but `change` itself.
        ("updated", "UPDATE OF item_id, title, categories, hidden, metadata, created_at, updated_at"),
    )
]
# A transaction takes one number, and with it the row that the next one waits for: numbers are committed in their order.
_POSTGRESQL = [
    """
    CREATE FUNCTION items_change() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE number bigint;
    BEGIN
        IF coalesce(current_setting('shortlist.change', true), '') = '' THEN
            UPDATE catalog_state SET changes = changes + 1 RETURNING changes INTO number;
            PERFORM set_config('shortlist.change', number::text, true);
        END IF;
        RETURN NULL;
    END $$
    """,
    """
    CREATE FUNCTION items_number() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        NEW.change = current_setting('shortlist.change')::bigint;
        RETURN NEW;
    END $$
    """,
    "CREATE TRIGGER items_change BEFORE INSERT OR UPDATE ON items FOR EACH STATEMENT EXECUTE FUNCTION items_change()",
    "CREATE TRIGGER items_number BEFORE INSERT OR UPDATE ON items FOR EACH ROW EXECUTE FUNCTION items_number()",
]


def _is_sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


def upgrade() -> None:
    state = op.create_table(
        "catalog_state",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("changes", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_catalog_state"),
    )
    op.bulk_insert(state, [{"id": 1, "changes": 0}])
    op.add_column("items", sa.Column("change", sa.BigInteger, nullable=False, server_default=sa.text("0")))
    op.create_index("ix_items_change", "items", ["change"])
    op.drop_index("ix_items_updated_at", table_name="items")
    for statement in _SQLITE if _is_sqlite() else _POSTGRESQL:
        op.execute(statement)


def downgrade() -> None:
    if _is_sqlite():
        op.execute("DROP TRIGGER items_inserted")
        op.execute("DROP TRIGGER items_updated")
    else:
        op.execute("DROP TRIGGER items_change ON items")
        op.execute("DROP TRIGGER items_number ON items")
        op.execute("DROP FUNCTION items_change()")
        op.execute("DROP FUNCTION items_number()")
    op.create_index("ix_items_updated_at", "items", ["updated_at"])
    op.drop_index("ix_items_change", table_name="items")
    op.drop_column("items", "change")
    op.drop_table("catalog_state")
