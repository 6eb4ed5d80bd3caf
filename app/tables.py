"""Every SQL table of the service. `alembic/` changes them; a test fails when the two differ."""

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

MAX_ID_LENGTH = 255
# On SQLite events are indexed by user within blocks of 8,192 positions.
BLOCK_BITS = 13

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC to the microsecond, alike on every database (SQLite keeps no zone)."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone cannot be stored")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class CurrentTransactionId(FunctionElement[int]):
    """The id of the running transaction on PostgreSQL, NULL on SQLite (where commits are in order of position)."""

    type = sa.BigInteger()
    inherit_cache = True


@compiles(CurrentTransactionId, "postgresql")
def _transaction_id_postgresql(_element: CurrentTransactionId, _compiler: SQLCompiler, **_options: Any) -> str:
    return "(pg_current_xact_id()::text::bigint)"


@compiles(CurrentTransactionId)
def _transaction_id_elsewhere(_element: CurrentTransactionId, _compiler: SQLCompiler, **_options: Any) -> str:
    return "NULL"


# Ids compare byte by byte on both databases, so that lists and cursors have one order.
Identifier = sa.String(MAX_ID_LENGTH).with_variant(sa.String(MAX_ID_LENGTH, collation="C"), "postgresql")

# The transaction id of events whose own is another cluster's: below all that PostgreSQL hands out.
SETTLED = 0

# SQLite counts rows in INTEGER PRIMARY KEY alone, which is 64 bits wide there.
Position = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _time(name: str, **options: Any) -> sa.Column[datetime]:
    return sa.Column(name, UtcDateTime(), **options)


def _id(name: str, **options: Any) -> sa.Column[str]:
    return sa.Column(name, Identifier, **options)


users = sa.Table(
    "users",
    metadata,
    _id("user_id", primary_key=True),
    sa.Column("metadata", sa.JSON, nullable=False),
    _time("created_at", nullable=False),
    _time("updated_at", nullable=False, index=True),
)

items = sa.Table(
    "items",
    metadata,
    _id("item_id", primary_key=True),
    sa.Column("title", sa.String(1000)),
    sa.Column("categories", sa.JSON, nullable=False),  # a list of strings
    sa.Column("hidden", sa.Boolean, nullable=False),
    sa.Column("metadata", sa.JSON, nullable=False),
    _time("created_at", nullable=False),
    _time("updated_at", nullable=False),
    # The serving caches follow the catalogue by this column, which a trigger fills in: a number of `catalog_state`.
    sa.Column("change", sa.BigInteger, nullable=False, server_default=sa.text("0"), index=True),
)

# One row. Whoever changes an item counts here first, and holds the row until the commit: what has a lower number than
# this is there to see, whatever any clock says.
catalog_state = sa.Table(
    "catalog_state",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("changes", sa.BigInteger, nullable=False),
)

# Append-only, but for erasure. Users and items are not foreign keys: each insert would pay for the look-ups,
# and an erased subject leaves no row behind in either table.
events = sa.Table(
    "events",
    metadata,
    sa.Column("position", Position, primary_key=True, autoincrement=True),
    _id("user_id", nullable=False),
    _id("event_id", nullable=False),
    _id("item_id", nullable=False),
    sa.Column("type", sa.String(64), nullable=False),
    sa.Column("value", sa.Double),
    _time("occurred_at", nullable=False),
    _time("received_at", nullable=False),
    sa.Column("recommendation_id", sa.String(64)),
    sa.Column("context", sa.JSON(none_as_null=True)),
    # The event_id (of the same user) that a `retract` takes back.
    _id("retracts"),
    # PostgreSQL's transaction id at the insert: what a snapshot's watermark is made of. Empty on SQLite.
    # Never name it in an insert: the database fills it in.
    sa.Column("transaction_id", sa.BigInteger, server_default=CurrentTransactionId()),
    sa.Index("ix_events_transaction_id", "transaction_id", sqlite_where=sa.text("transaction_id IS NOT NULL")),
    sa.UniqueConstraint("user_id", "event_id"),
    # What is newer of a user's history. SQLite has one on ((position >> BLOCK_BITS), user_id) instead, which grows at
    # its end alone; Alembic cannot compare such a one, so it stands in the migrations only.
    sa.Index("ix_events_user_id_transaction_id", "user_id", "transaction_id").ddl_if("postgresql"),
    # What was taken back; other events have no entry.
    sa.Index(
        "ix_events_user_id_retracts",
        "user_id",
        "retracts",
        sqlite_where=sa.text("retracts IS NOT NULL"),
        postgresql_where=sa.text("retracts IS NOT NULL"),
    ),
    sqlite_autoincrement=True,
)

# How often each item was chosen, in parts that `app/serving/saved_counts.py` writes and reads, so that a process that
# starts counts only what came since. An erasure takes them away: they can always be counted anew.
item_counts = sa.Table(
    "item_counts",
    metadata,
    sa.Column("part", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("state", sa.Text, nullable=False),  # JSON: of what they are the counts; the same in all parts
    sa.Column("counts", sa.Text, nullable=False),  # JSON: {item_id: count}
    sa.Column("sha256", sa.String(64), nullable=False),  # of the row
)

recommendation_log = sa.Table(
    "recommendation_log",
    metadata,
    sa.Column("recommendation_id", sa.String(64), primary_key=True),
    _id("user_id", nullable=False, index=True),
    sa.Column("surface", sa.String(64), nullable=False),
    sa.Column("policy", sa.String(64), nullable=False),
    sa.Column("experiment", sa.String(64)),
    sa.Column("variant", sa.String(64)),
    sa.Column("model_version", sa.String(128)),
    sa.Column("source", sa.String(16), nullable=False),
    sa.Column("feedback_through", Position),  # position of the newest event of the user that was known
    sa.Column("filters", sa.JSON, nullable=False),
    sa.Column("candidate_count", sa.Integer, nullable=False),
    sa.Column("item_ids", sa.JSON, nullable=False),
    sa.Column("scores", sa.JSON, nullable=False),
    sa.Column("propensities", sa.JSON, nullable=False),
    sa.Column("explorations", sa.JSON, nullable=False),
    _time("created_at", nullable=False, index=True),
)

# What this database has put into snapshots so far: the newest row is what the next one continues. It lives here,
# and not in the store, so that a database that was restored from a backup goes on from its own past.
snapshots = sa.Table(
    "snapshots",
    metadata,
    sa.Column("sequence", Position, primary_key=True, autoincrement=True),
    sa.Column("hash", sa.String(64), nullable=False),
    # The cluster that its transaction ids belong to; empty on SQLite.
    sa.Column("cluster", sa.String(128), nullable=False),
    _time("created_at", nullable=False),
    sqlite_autoincrement=True,
)

RUN_STATES = ("queued", "running", "succeeded", "failed", "cancelled")

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("run_id", sa.String(64), primary_key=True),
    sa.Column("recipe", sa.String(128), nullable=False),
    sa.Column("overrides", sa.JSON, nullable=False),
    sa.Column("promote", sa.String(16), nullable=False),  # guarded, always or never
    sa.Column("warm_start", sa.Boolean, nullable=False),
    sa.Column("state", sa.Enum(*RUN_STATES, name="state", native_enum=False, create_constraint=True), nullable=False),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    sa.Column("idempotency_key", sa.String(255), unique=True),
    sa.Column("requested_by", sa.String(64)),
    # The fence: each claim raises it, and a write that names an older one changes nothing.
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("worker", sa.String(255)),
    _time("lease_until"),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("progress", sa.JSON(none_as_null=True)),
    sa.Column("snapshot", sa.String(64)),
    sa.Column("version", sa.String(128)),
    sa.Column("promoted", sa.Boolean),
    sa.Column("message", sa.Text),  # why it failed, or why it was or was not promoted
    _time("created_at", nullable=False, index=True),
    _time("started_at"),
    _time("finished_at"),
    sa.Index("ix_runs_state_created_at", "state", "created_at"),
)

run_events = sa.Table(
    "run_events",
    metadata,
    sa.Column("sequence", Position, primary_key=True, autoincrement=True),
    sa.Column("run_id", sa.String(64), sa.ForeignKey("runs.run_id", ondelete="CASCADE"), nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("details", sa.JSON, nullable=False),
    _time("created_at", nullable=False),
    sa.Index("ix_run_events_run_id_sequence", "run_id", "sequence"),
    sqlite_autoincrement=True,
)

VERSION_STATES = ("candidate", "active", "shadow", "retired")

model_versions = sa.Table(
    "model_versions",
    metadata,
    sa.Column("version", sa.String(128), primary_key=True),
    sa.Column("recipe", sa.String(128), nullable=False),
    sa.Column(
        "state",
        sa.Enum(*VERSION_STATES, name="state", native_enum=False, create_constraint=True),
        nullable=False,
    ),
    sa.Column("manifest", sa.JSON, nullable=False),
    sa.Column("run_id", sa.String(64)),
    _time("created_at", nullable=False, index=True),
    sa.Index(
        "uq_model_versions_active",
        "state",
        unique=True,
        sqlite_where=sa.text("state = 'active'"),
        postgresql_where=sa.text("state = 'active'"),
    ),
)

# A linked list that a rollback walks back: the newest row tells what is active and what it replaced.
activations = sa.Table(
    "activations",
    metadata,
    sa.Column("sequence", Position, primary_key=True, autoincrement=True),
    sa.Column("version", sa.String(128), nullable=False),
    # The activation to return to on a rollback; empty when nothing was active before.
    sa.Column("previous", Position),
    _time("created_at", nullable=False),
    sqlite_autoincrement=True,
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("key_id", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False, unique=True),
    sa.Column("scopes", sa.JSON, nullable=False),
    _time("created_at", nullable=False),
    _time("expires_at"),
    _time("revoked_at"),
)

# What the processes on a database share and nobody else may know, in the open only here.
secrets = sa.Table(
    "secrets",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.String(255), nullable=False),
    _time("created_at", nullable=False),
)

audit_log = sa.Table(
    "audit_log",
    metadata,
    sa.Column("sequence", Position, primary_key=True, autoincrement=True),
    sa.Column("actor", sa.String(128), nullable=False),  # a key_id, `cli`, or `worker`
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("subject", sa.String(300), nullable=False),
    sa.Column("details", sa.JSON, nullable=False),
    _time("created_at", nullable=False, index=True),
    sqlite_autoincrement=True,
)

# What was erased, by hash alone: snapshots and loaded versions drop a subject that stands here.
erasures = sa.Table(
    "erasures",
    metadata,
    sa.Column("sequence", Position, primary_key=True, autoincrement=True),
    sa.Column("kind", sa.String(4), nullable=False),  # user or item
    sa.Column("subject_sha256", sa.String(64), nullable=False),
    # Events of the subject up to here are gone; later ones, should it come back, count again.
    sa.Column("through_position", Position, nullable=False),
    _time("erased_at", nullable=False),
    sa.Index("ix_erasures_kind_subject_sha256", "kind", "subject_sha256"),
    sqlite_autoincrement=True,
)
