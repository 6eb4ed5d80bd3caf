"""What the service answers, as frozen dataclasses. docs/http.md of the service says what the fields mean."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol

Source = Literal["model", "folded_in", "popular", "degraded", "empty"]
RunState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Promote = Literal["guarded", "always", "never"]


class Page(Protocol):
    """A part of a list that is too long for one answer."""

    @property
    def next_cursor(self) -> str | None:
        """What the next page is asked for with; None on the last one."""


@dataclass(frozen=True, slots=True)
class Influence:
    """An item of the history, and by how much the score is higher than without it."""

    item_id: str
    effect: float


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an item is there: how that was found, and what of the history raised its score, most first."""

    method: Literal["leave_one_out", "fold_in", "popularity", "unseen", "exploration"]
    because: tuple[Influence, ...]


@dataclass(frozen=True, slots=True)
class RecommendedItem:
    """One place in a list; `score` compares within one list and nothing else. `reason` comes where it was asked for."""

    item_id: str
    score: float | None
    rank: int
    exploration: bool
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class Recommendations:
    """A ranked list for one user. Send `recommendation_id` with the events that it leads to."""

    user_id: str
    recommendation_id: str
    items: tuple[RecommendedItem, ...]
    source: Source
    model_version: str | None
    data_through: datetime | None
    feedback_through: int | None
    next_cursor: str | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class SessionRecommendations:
    """A ranked list for a visitor without an id; `reason` says why no version ranked, or why the list is empty."""

    recommendation_id: str
    items: tuple[RecommendedItem, ...]
    source: Literal["folded_in", "popular", "empty"]
    model_version: str | None
    data_through: datetime | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class SimilarItem:
    """One place among the similar; what `score` is depends on the `source` of the list."""

    item_id: str
    score: float
    rank: int


@dataclass(frozen=True, slots=True)
class SimilarItems:
    """What is like an item, the most alike first."""

    item_id: str
    recommendation_id: str
    items: tuple[SimilarItem, ...]
    source: Literal["model", "categories", "popular", "empty"]
    model_version: str | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ChartItem:
    """One place in a chart; what `score` is depends on the chart."""

    item_id: str
    score: float
    rank: int


@dataclass(frozen=True, slots=True)
class Chart:
    """A list for everybody alike; empty with a reason. Send `recommendation_id` with the events that it leads to."""

    recommendation_id: str
    items: tuple[ChartItem, ...]
    source: Literal["popular", "trending", "latest", "empty"]
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class EventResult:
    """What became of one event: `stored`, `duplicate` (known already) or `rejected`, with its reason."""

    index: int
    event_id: str | None
    outcome: Literal["stored", "duplicate", "rejected"]
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class FeedbackResults:
    """An outcome for every event, in their order."""

    results: tuple[EventResult, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """What the catalogue knows of an item."""

    item_id: str
    title: str | None
    categories: tuple[str, ...]
    hidden: bool
    metadata: dict[str, Any]
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Items:
    """One page of items in order of their ids."""

    items: tuple[Item, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class User:
    """What is known of a user beside the events."""

    user_id: str
    metadata: dict[str, Any]
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Users:
    """One page of users in order of their ids."""

    users: tuple[User, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Run:
    """A training: what it was asked for, how far it is and what came of it; `set` holds the changed settings."""

    run_id: str
    recipe: str
    set: dict[str, str]
    promote: Promote
    warm_start: bool
    state: RunState
    cancel_requested: bool
    requested_by: str | None
    attempts: int
    worker: str | None
    progress: dict[str, Any] | None
    snapshot: str | None
    version: str | None
    promoted: bool | None
    message: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def finished(self) -> bool:
        """Whether it has ended, however it did."""
        return self.state not in ("queued", "running")


@dataclass(frozen=True, slots=True)
class Runs:
    """One page of runs, newest first."""

    runs: tuple[Run, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Model:
    """A version and what the service does with it."""

    version: str
    recipe: str
    state: Literal["candidate", "active", "shadow", "retired"]
    run_id: str | None
    created_at: datetime
    snapshot: str | None
    trained_through: datetime | None
    metrics: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ModelDetails(Model):
    """A version with its manifest and the times it became active."""

    manifest: dict[str, Any] = field(kw_only=True)
    activated_at: tuple[datetime, ...] = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class Models:
    """One page of versions, newest first, and the one that answers."""

    active: str | None
    models: tuple[Model, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Rollback:
    """The version that answers now, and the one that did."""

    version: str
    replaced: str | None
