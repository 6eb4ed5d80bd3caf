"""A typed client of the recommendation service Shortlist: `Client` and, for asyncio, `AsyncClient`."""

from shortlist_client.answers import (
    Chart,
    ChartItem,
    EventResult,
    Item,
    Model,
    ModelDetails,
    Recommendations,
    RecommendedItem,
    Rollback,
    Run,
    User,
)
from shortlist_client.async_client import AsyncClient
from shortlist_client.calls import ChartOptions, RecommendationOptions
from shortlist_client.client import Client
from shortlist_client.errors import (
    AnswerError,
    ConflictError,
    ConnectionFailedError,
    FieldError,
    ForbiddenError,
    GoneError,
    InvalidError,
    NotFoundError,
    OverloadedError,
    ProblemError,
    RunTimeoutError,
    ShortlistError,
    UnauthorizedError,
    UnavailableError,
)
from shortlist_client.events import Event
from shortlist_client.retries import NO_RETRIES, Retries

__all__ = [
    "NO_RETRIES",
    "AnswerError",
    "AsyncClient",
    "Chart",
    "ChartItem",
    "ChartOptions",
    "Client",
    "ConflictError",
    "ConnectionFailedError",
    "Event",
    "EventResult",
    "FieldError",
    "ForbiddenError",
    "GoneError",
    "InvalidError",
    "Item",
    "Model",
    "ModelDetails",
    "NotFoundError",
    "OverloadedError",
    "ProblemError",
    "RecommendationOptions",
    "Recommendations",
    "RecommendedItem",
    "Retries",
    "Rollback",
    "Run",
    "RunTimeoutError",
    "ShortlistError",
    "UnauthorizedError",
    "UnavailableError",
    "User",
]
