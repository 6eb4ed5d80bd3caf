"""The calls of the service: what to send for each, and how to read its answer. Nothing here sends anything."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Generic, Literal, TypedDict, TypeVar
from urllib.parse import quote, urlencode, urlsplit
from uuid import uuid4

import httpx2

from shortlist_client.answers import (
    Chart,
    EventResult,
    FeedbackResults,
    Item,
    Items,
    ModelDetails,
    Models,
    Promote,
    Recommendations,
    Rollback,
    Run,
    Runs,
    RunState,
    SessionRecommendations,
    SimilarItems,
    User,
    Users,
)
from shortlist_client.errors import AnswerError, InvalidError, ProblemError, problem
from shortlist_client.events import Event, bodies
from shortlist_client.reading import read

T_co = TypeVar("T_co", covariant=True)

# Longer lists (characters in all) travel in a body: addresses have no room for them.
MAX_LISTS_IN_URL = 1_000
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Call(Generic[T_co]):
    """One request, and what its answer means.

    `repeatable` says whether it may be sent again when nobody knows what became of it. `recover` turns a refusal that
    is an answer all the same into one, or raises it.
    """

    method: str
    path: str
    read: Callable[[Any], T_co]
    content: bytes | None = None
    headers: Mapping[str, str] | None = None
    repeatable: bool = True
    recover: Callable[[ProblemError], T_co] | None = None

    def result(self, response: httpx2.Response) -> T_co:
        """The answer. Raises ProblemError for a refusal, and AnswerError for what cannot be read."""
        if not response.is_success:
            request_id = response.headers.get("x-request-id")
            refused = problem(response.status_code, response.content, retry_after(response), request_id)
            if self.recover is None:
                raise refused
            return self.recover(refused)
        try:
            document = json.loads(response.content) if response.content else None
        except ValueError:
            raise AnswerError(f"{self.method} {self.path} was not answered with JSON") from None
        return self.read(document)


def retry_after(response: httpx2.Response) -> float | None:
    """The header `Retry-After` in seconds from now, whether it came as seconds or as a date."""
    text = response.headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def base_url(address: str) -> str:
    """Where the service answers. Raises ValueError unless it is an address like `http://127.0.0.1:8000`."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("the address must begin with http:// or https:// and name a host")
    return address


def headers(key: str | None) -> dict[str, str]:
    """What every request carries. Raises ValueError, which does not show it, for a key that no header can hold."""
    own = {"Accept": "application/json", "User-Agent": "shortlist-client"}
    if key is None:
        return own
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError("the key must be as it was made: printable characters without spaces")
    return own | {"Authorization": f"Bearer {key}"}


# --- recommendations and feedback ------------------------------------------------------------------------------------


class CategoryOptions(TypedDict, total=False):
    """Only items of this category, with at least one of these, with each of these, with none of these."""

    category: str | None
    categories_any: Iterable[str]
    categories_all: Iterable[str]
    categories_none: Iterable[str]


class RecommendationOptions(CategoryOptions, total=False):
    """What a list of recommendations may be asked for with; the service decides about what is left out.

    `k`: how many items at most. `exclude`: items to leave out, up to 10,000. `include_seen`: whether items come again
    that the user has interacted with. `diversity`: how much the items shall differ from one another, from 0 to 1.
    `max_per_category`: how many items of any one category at most. `explain`: whether each item comes with its reason.
    """

    k: int
    exclude: Iterable[str]
    include_seen: bool
    diversity: float
    max_per_category: int | None
    explain: bool


class SimilarOptions(CategoryOptions, total=False):
    """What similar items may be asked for with: `k` at most."""

    k: int


class ChartOptions(CategoryOptions, total=False):
    """What a chart may be asked for with: `k` items at most, by what happened in the last `window_hours`."""

    k: int
    window_hours: int | None


LISTS = ("categories_any", "categories_all", "categories_none", "exclude")


def recommendations(user_id: str, options: RecommendationOptions, cursor: str | None = None) -> Call[Recommendations]:
    path = f"/users/{_part(user_id)}/recommendations"
    asked = _given(options) | ({} if cursor is None else {"cursor": cursor})
    if sum(len(text) for value in asked.values() if isinstance(value, list) for text in value) > MAX_LISTS_IN_URL:
        return Call("POST", path, partial(read, Recommendations), content=_json(asked), headers=JSON)
    return Call("GET", _with(path, asked), partial(read, Recommendations))


def session_recommendations(items: Iterable[str], options: RecommendationOptions) -> Call[SessionRecommendations]:
    body = {"items": _list("items", items)} | _given(options)
    path = "/sessions/recommendations"
    return Call("POST", path, partial(read, SessionRecommendations), content=_json(body), headers=JSON)


def similar(item_id: str, options: SimilarOptions) -> Call[SimilarItems]:
    return Call("GET", _with(f"/items/{_part(item_id)}/similar", _given(options)), partial(read, SimilarItems))


def chart(name: Literal["popular", "trending", "latest"], options: ChartOptions) -> Call[Chart]:
    return Call("GET", _with(f"/{name}", _given(options)), partial(read, Chart))


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those that are None, their lists as lists."""
    given = {name: value for name, value in options.items() if value is not None}
    return given | {name: _list(name, given[name]) for name in LISTS if name in given}


def feedback(event: Event) -> Call[EventResult]:
    def only(document: Any) -> EventResult:
        (result,) = read(FeedbackResults, document).results
        return result

    return Call("POST", "/feedback", only, content=event.as_json().encode(), headers=JSON)


def feedback_many(events: Iterable[Event]) -> Iterator[Call[list[EventResult]]]:
    for before, body in bodies(events):
        own, refused = partial(_results, before), partial(_rejected, before)
        yield Call("POST", "/feedback", own, content=body, headers=JSON, recover=refused)


def _results(before: int, document: Any) -> list[EventResult]:
    return [replace(result, index=before + result.index) for result in read(FeedbackResults, document).results]


def _rejected(before: int, refused: ProblemError) -> list[EventResult]:
    # Every event of the list was judged and none was good: that is an outcome for each, too.
    if isinstance(refused, InvalidError) and refused.document.get("results"):
        return _results(before, refused.document)
    raise refused


# --- catalogue -------------------------------------------------------------------------------------------------------


def item(item_id: str) -> Call[Item]:
    return Call("GET", f"/items/{_part(item_id)}", partial(read, Item))


def put_item(
    item_id: str, *, title: str | None, categories: Iterable[str], hidden: bool, metadata: Mapping[str, Any]
) -> Call[Item]:
    body = {"title": title, "categories": _list("categories", categories), "hidden": hidden, "metadata": dict(metadata)}
    return Call("PUT", f"/items/{_part(item_id)}", partial(read, Item), content=_json(body), headers=JSON)


def delete_item(item_id: str) -> Call[None]:
    return Call("DELETE", f"/items/{_part(item_id)}", _nothing)


def items(limit: int, cursor: str | None) -> Call[Items]:
    return Call("GET", _with("/items", {"limit": limit, "cursor": cursor}), partial(read, Items))


def user(user_id: str) -> Call[User]:
    return Call("GET", f"/users/{_part(user_id)}", partial(read, User))


def put_user(user_id: str, *, metadata: Mapping[str, Any]) -> Call[User]:
    body = {"metadata": dict(metadata)}
    return Call("PUT", f"/users/{_part(user_id)}", partial(read, User), content=_json(body), headers=JSON)


def delete_user(user_id: str) -> Call[None]:
    return Call("DELETE", f"/users/{_part(user_id)}", _nothing)


def users(limit: int, cursor: str | None) -> Call[Users]:
    return Call("GET", _with("/users", {"limit": limit, "cursor": cursor}), partial(read, Users))


# --- trainings and models --------------------------------------------------------------------------------------------


def retrain(
    recipe: str,
    *,
    overrides: Mapping[str, str | bool | int | float],
    warm_start: bool,
    promote: Promote,
    idempotency_key: str | None,
) -> Call[Run]:
    body = {"recipe": recipe, "set": dict(overrides), "warm_start": warm_start, "promote": promote}
    # Made before the first try, so that a repeated request names the run that the first one made.
    own = JSON | {"Idempotency-Key": idempotency_key or str(uuid4())}
    return Call("POST", "/admin/retrain", partial(read, Run), content=_json(body), headers=own)


def run(run_id: str) -> Call[Run]:
    return Call("GET", f"/admin/runs/{_part(run_id)}", partial(read, Run))


def runs(limit: int, cursor: str | None, state: RunState | None) -> Call[Runs]:
    return Call("GET", _with("/admin/runs", {"limit": limit, "cursor": cursor, "state": state}), partial(read, Runs))


def cancel_run(run_id: str) -> Call[Run]:
    return Call("POST", f"/admin/runs/{_part(run_id)}/cancel", partial(read, Run))


def models(limit: int, cursor: str | None) -> Call[Models]:
    return Call("GET", _with("/admin/models", {"limit": limit, "cursor": cursor}), partial(read, Models))


def model(version: str) -> Call[ModelDetails]:
    return Call("GET", f"/admin/models/{_part(version)}", partial(read, ModelDetails))


def activate(version: str) -> Call[ModelDetails]:
    return Call("POST", f"/admin/models/{_part(version)}/activate", partial(read, ModelDetails))


def rollback() -> Call[Rollback]:
    # Sent twice it would go back twice.
    return Call("POST", "/admin/models/rollback", partial(read, Rollback), repeatable=False)


# --- what they have in common ----------------------------------------------------------------------------------------


def _part(identifier: str) -> str:
    if not identifier or identifier in (".", "..") or "/" in identifier:
        raise ValueError(f"{identifier!r} cannot be an id: 1 to 255 characters without '/', other than '.' and '..'")
    return quote(identifier, safe="")


def _list(name: str, given: Iterable[str]) -> list[str]:
    if isinstance(given, str):  # it would count as a list of its characters
        raise ValueError(f"{name} must be a list of texts, not one text")
    return list(given)


def _with(path: str, parameters: Mapping[str, str | float | list[str] | None]) -> str:
    """A path with its query; what is None is left out, a list is repeated."""
    given = {name: _plain(value) for name, value in parameters.items() if value is not None}
    query = urlencode(given, doseq=True, quote_via=quote)
    return f"{path}?{query}" if query else path


def _plain(value: str | float | list[str]) -> str | list[str]:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, list) else str(value)


def _json(body: object) -> bytes:
    return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()


def _nothing(_document: Any) -> None:
    return None
