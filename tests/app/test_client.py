"""The Python client against a running service: every call, synchronous (on SQLite) and asynchronous (on PostgreSQL)."""

import asyncio
import dataclasses
import inspect
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

import shortlist_client
from app.openapi import description
from app.security import create_key
from app.tables import events
from shortlist_client import (
    AsyncClient,
    ChartOptions,
    Client,
    ConflictError,
    Event,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    ProblemError,
    RecommendationOptions,
    RunTimeoutError,
    SimilarOptions,
    UnauthorizedError,
    answers,
)

ITEMS = [f"item-{number:02}" for number in range(30)]


class Blocking:
    """An AsyncClient whose calls are waited for, and whose pages are read to their end."""

    def __init__(self, runner: asyncio.Runner, client: AsyncClient) -> None:
        self.runner = runner
        self.client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            found = getattr(self.client, name)(*args, **options)
            return self.runner.run(listed(found) if inspect.isasyncgen(found) else found)

        return call


async def listed(found: AsyncIterator[Any]) -> list[Any]:
    return [one async for one in found]


@pytest.fixture
def catalogue(publish: Any) -> None:
    """Thirty items and a version that ranks them, there before the service starts."""
    publish.catalogue(ITEMS, {item: ["odd" if int(item[-2:]) % 2 else "even"] for item in ITEMS})
    publish("v1", ITEMS)


@pytest.fixture
def connected(database_url: str, address: str) -> Iterator[Callable[..., Any]]:
    """`connected(key)` is a client of the running service: on one database of one kind, on the other of the other."""
    with asyncio.Runner() as runner:
        closing: list[Callable[[], object]] = []

        def make(key: str | None = None) -> Any:
            if database_url.startswith("sqlite"):
                client = Client(address, key)
                closing.append(client.close)
                return client
            blocking = Blocking(runner, AsyncClient(address, key))
            closing.append(blocking.aclose)
            return blocking

        yield make
        for close in closing:
            close()


@pytest.fixture
def shortlist(connected: Callable[..., Any]) -> Any:
    return connected()


def stored(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(sa.select(events).order_by(events.c.position)))


def test_recommendations_follow_feedback(catalogue: None, shortlist: Any, engine: Engine) -> None:
    shown = shortlist.recommendations("anna", k=5)
    assert (shown.user_id, shown.source, shown.model_version) == ("anna", "model", "v1")
    assert [item.rank for item in shown.items] == [1, 2, 3, 4, 5]
    clicked = shown.items[0].item_id
    click = Event("anna", clicked, "click", recommendation_id=shown.recommendation_id)
    assert shortlist.feedback(click).outcome == "stored"
    assert shortlist.feedback(click).outcome == "duplicate"  # the same object has the same id
    after = shortlist.recommendations("anna", k=30)
    assert clicked not in {item.item_id for item in after.items}
    assert len(after.items) == 29
    assert after.feedback_through > (shown.feedback_through or 0)
    assert clicked in {item.item_id for item in shortlist.recommendations("anna", k=30, include_seen=True).items}
    odd = shortlist.recommendations("anna", k=30, category="odd")
    assert {int(item.item_id[-2:]) % 2 for item in odd.items} == {1}
    (row,) = stored(engine)
    assert (row.event_id, row.recommendation_id) == (click.event_id, shown.recommendation_id)
    assert shortlist.feedback(click.retraction()).outcome == "stored"
    assert clicked in {item.item_id for item in shortlist.recommendations("anna", k=30).items}


def test_items_are_left_out_in_the_address_or_in_a_body(catalogue: None, shortlist: Any) -> None:
    for number_of_others in (0, 400):  # the second list is longer than addresses can be
        left_out = [*ITEMS[:20], *(f"other-{number}" for number in range(number_of_others))]
        found = shortlist.recommendations("anna", k=30, exclude=left_out)
        assert sorted(item.item_id for item in found.items) == ITEMS[20:]
    with pytest.raises(ValueError, match="exclude must be a list"):
        shortlist.recommendations("anna", exclude="item-01")


def test_pages_go_on_where_the_one_before_ended(catalogue: None, shortlist: Any) -> None:
    every = [item.item_id for item in shortlist.recommendations("anna", k=30, diversity=0.3, category="odd").items]
    pages = list(shortlist.recommendation_pages("anna", k=4, diversity=0.3, category="odd"))
    assert [len(page.items) for page in pages] == [4, 4, 4, 3]
    assert sorted(item.item_id for page in pages for item in page.items) == sorted(every)
    first = shortlist.recommendations("anna", k=4)
    second = shortlist.recommendations("anna", k=4, cursor=first.next_cursor)
    assert not {item.item_id for item in first.items} & {item.item_id for item in second.items}
    left_out = [f"other-{number}" for number in range(400)]  # in a body
    assert sum(len(page.items) for page in shortlist.recommendation_pages("anna", k=20, exclude=left_out)) == 30
    with pytest.raises(InvalidError, match=r"cursor"):
        shortlist.recommendations("anna", cursor="forged")


def test_filters_hold_together(catalogue: None, shortlist: Any) -> None:
    asked = {"k": 30, "categories_any": ["odd", "even"], "categories_none": ("odd",), "max_per_category": 7}
    found = shortlist.recommendations("anna", **asked)
    assert len(found.items) == 7
    assert {int(item.item_id[-2:]) % 2 for item in found.items} == {0}
    assert shortlist.recommendations("anna", categories_all={"odd", "even"}).source == "empty"


def test_an_empty_answer_says_why(shortlist: Any) -> None:
    found = shortlist.recommendations("anna")
    assert (found.source, found.items, found.model_version) == ("empty", (), None)
    assert found.reason


def test_charts_are_for_everybody(catalogue: None, shortlist: Any) -> None:
    popular = shortlist.popular(k=3)
    assert (popular.source, [item.item_id for item in popular.items]) == ("popular", ["item-00", "item-01", "item-02"])
    assert popular.recommendation_id
    assert [item.item_id for item in shortlist.popular(category="odd", k=2).items] == ["item-01", "item-03"]
    trending = shortlist.trending(window_hours=2, categories_any=["odd"])
    assert (trending.source, trending.items) == ("empty", ())
    assert trending.reason
    assert len(shortlist.latest(k=30, window_hours=2, categories_none=["odd"]).items) == 15


def test_a_session_is_ranked_by_what_it_brings(catalogue: None, shortlist: Any) -> None:
    found = shortlist.session_recommendations(["item-01", "item-02"], k=5, explain=True, categories_none=["odd"])
    assert (found.source, found.model_version, len(found.items)) == ("folded_in", "v1", 5)
    assert not {"item-02"} & {item.item_id for item in found.items}
    assert {influence.item_id for item in found.items for influence in item.reason.because} <= {"item-01", "item-02"}
    unknown = shortlist.session_recommendations(["nobody-knows"])
    assert (unknown.source, unknown.model_version) == ("popular", None)
    assert unknown.reason
    with pytest.raises(ValueError, match="items must be a list"):
        shortlist.session_recommendations("item-01")


def test_similar_items_and_reasons(catalogue: None, shortlist: Any) -> None:
    found = shortlist.similar("item-01", k=3, categories_all=["odd"])
    assert (found.item_id, found.source, [item.rank for item in found.items]) == ("item-01", "model", [1, 2, 3])
    assert "item-01" not in {item.item_id for item in found.items}
    with pytest.raises(NotFoundError):
        shortlist.similar("nobody-knows")
    shortlist.feedback(Event("anna", "item-01", "click"))
    (item,) = shortlist.recommendations("anna", k=1, explain=True).items
    assert (item.reason.method, {one.item_id for one in item.reason.because} <= {"item-01"}) == ("leave_one_out", True)


def test_events_carry_all_they_say(shortlist: Any, engine: Engine) -> None:
    at = datetime(2026, 1, 2, 3, 4, 5, 123456, timezone(timedelta(hours=2)))
    event = Event("änna 1", "dune", "rating", 4.5, at, "r-1", {"page": "home", "place": [1, None]}, event_id="e-1")
    assert shortlist.feedback(event).outcome == "stored"
    (row,) = stored(engine)
    assert (row.user_id, row.item_id, row.type, row.value) == ("änna 1", "dune", "rating", 4.5)
    assert row.occurred_at == datetime(2026, 1, 2, 1, 4, 5, 123456, UTC)
    assert (row.event_id, row.recommendation_id, row.context) == ("e-1", "r-1", {"page": "home", "place": [1, None]})
    with pytest.raises(ValueError, match="time zone"):
        Event("anna", "dune", "click", occurred_at=datetime(2026, 1, 2))


def test_a_rejected_event_is_an_error_and_in_a_list_an_outcome(shortlist: Any, engine: Engine) -> None:
    good, bad = Event("anna", "dune", "click"), Event("anna", "du/ne", "click")
    with pytest.raises(InvalidError) as caught:
        shortlist.feedback(bad)
    assert (caught.value.status, caught.value.errors[0].field) == (422, "body.item_id")
    assert caught.value.detail in str(caught.value)
    assert caught.value.document["results"][0]["outcome"] == "rejected"
    for sent, expected in (([bad, good], ["rejected", "stored"]), ([bad, bad], ["rejected", "rejected"]), ([], [])):
        results = shortlist.feedback_many(sent)
        assert [result.outcome for result in results] == expected
        assert [result.index for result in results] == list(range(len(sent)))
    assert [row.event_id for row in stored(engine)] == [good.event_id]


def test_long_lists_of_events_go_in_parts(shortlist: Any, engine: Engine) -> None:
    many = [Event(f"u{number % 7}", f"i{number}", "view", event_id=f"e{number}") for number in range(2_100)]
    large = [Event("anna", f"i{number}", "view", context={"text": "x" * 15_000}) for number in range(150)]
    results = shortlist.feedback_many(iter(many + large))  # the large ones are longer than a body may be
    assert [result.index for result in results] == list(range(2_250))
    assert {result.outcome for result in results} == {"stored"}
    rows = stored(engine)  # each user's in the order in which they were sent
    for user_id in {event.user_id for event in many + large}:
        sent = [event.event_id for event in many + large if event.user_id == user_id]
        assert [row.event_id for row in rows if row.user_id == user_id] == sent


def test_any_id_finds_its_way(shortlist: Any) -> None:
    for identifier in ("a b%41?#é+&=", "...", "日本語;,:@!$'()*", "x" * 255):
        shortlist.put_item(identifier, title=identifier, categories=[identifier])
        assert shortlist.item(identifier).title == identifier
        found = shortlist.recommendations(identifier, category=identifier)
        assert (found.user_id, [item.item_id for item in found.items]) == (identifier, [identifier])
        assert shortlist.recommendations("anna", category=identifier, exclude=[identifier]).items == ()
    for identifier in ("", ".", "..", "a/b"):  # what cannot be an id is not sent
        for call in (shortlist.recommendations, shortlist.item, shortlist.delete_user):
            with pytest.raises(ValueError, match="cannot be an id"):
                call(identifier)


def test_items_and_users_come_and_go(shortlist: Any) -> None:
    item = shortlist.put_item("alien", title="Alien", categories=["Horror"], metadata={"year": 1979})
    assert item == shortlist.item("alien")
    assert (item.title, item.categories, item.hidden, item.metadata) == ("Alien", ("Horror",), False, {"year": 1979})
    assert datetime.now(UTC) - item.created_at < timedelta(minutes=1)
    assert shortlist.put_item("alien", hidden=True).categories == ()
    user = shortlist.put_user("anna", metadata={"plan": "free"})
    assert (user, user.metadata) == (shortlist.user("anna"), {"plan": "free"})
    for number in range(5):
        shortlist.put_item(f"i{number}")
        shortlist.put_user(f"u{number}")
    assert [one.item_id for one in shortlist.items(page_size=2)] == ["alien", "i0", "i1", "i2", "i3", "i4"]
    assert [one.user_id for one in shortlist.users(page_size=3)] == ["anna", "u0", "u1", "u2", "u3", "u4"]
    shortlist.delete_item("alien")
    shortlist.delete_item("alien")
    shortlist.delete_user("anna")
    for call, name in ((shortlist.item, "alien"), (shortlist.user, "anna")):
        with pytest.raises(NotFoundError) as caught:
            call(name)
        assert caught.value.status == 404
        assert caught.value.request_id


def test_trainings_are_asked_for_followed_and_cancelled(shortlist: Any, address: str) -> None:
    with pytest.raises(InvalidError, match="recipe"):
        shortlist.retrain("nonsense")
    run = shortlist.retrain("caser", overrides={"epochs": 2}, promote="never", idempotency_key="k1")
    assert (run.state, run.set, run.promote, run.finished) == ("queued", {"epochs": "2"}, "never", False)
    again = shortlist.retrain("caser", overrides={"epochs": 2}, promote="never", idempotency_key="k1")
    assert again.run_id == run.run_id
    with pytest.raises(ConflictError):
        shortlist.retrain("neumf", idempotency_key="k1")
    second = shortlist.retrain("neumf")
    assert [one.run_id for one in shortlist.runs(page_size=1)] == [second.run_id, run.run_id]
    assert [one.run_id for one in shortlist.runs(state="failed")] == []
    with pytest.raises(RunTimeoutError, match="queued"):
        shortlist.wait_for_run(run.run_id, poll=0.01, timeout=0.05)

    def cancel() -> None:
        with Client(address) as other:
            other.cancel_run(run.run_id)

    thread = threading.Thread(target=cancel)
    thread.start()
    ended = shortlist.wait_for_run(run.run_id, poll=0.01)
    thread.join()
    assert (ended.state, ended.finished, ended.version) == ("cancelled", True, None)


def test_versions_are_listed_activated_and_rolled_back(catalogue: None, shortlist: Any, publish: Any) -> None:
    with pytest.raises(ConflictError):
        shortlist.rollback()
    publish("v2", ITEMS, activate=False)
    assert {model.version: model.state for model in shortlist.models(page_size=1)} == {
        "v1": "active",
        "v2": "candidate",
    }
    activated = shortlist.activate("v2")
    assert (activated.state, activated.version, len(activated.activated_at)) == ("active", "v2", 1)
    assert shortlist.recommendations("anna").model_version == "v2"
    back = shortlist.rollback()
    assert (back.version, back.replaced) == ("v1", "v2")
    assert len(shortlist.model("v1").activated_at) == 2
    assert shortlist.model("v1").manifest["version"] == "v1"


def test_keys_decide_and_are_never_shown(
    connected: Callable[..., Any], engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = create_key(engine, "shop", ["recommend"]).key
    client = connected(key)
    assert client.recommendations("anna").source == "empty"
    said = [repr(client), repr(getattr(client, "client", client))]
    with pytest.raises(ForbiddenError) as forbidden:
        client.feedback(Event("anna", "dune", "click"))
    with pytest.raises(UnauthorizedError) as unknown:
        connected("sl_000000000000_" + "x" * 43).popular()
    with pytest.raises(UnauthorizedError):
        connected().popular()
    with pytest.raises(ValueError, match="the key must be") as unusable:
        connected(key + "\n")
    said += [repr(error.value) + str(error.value) for error in (forbidden, unknown, unusable)]
    assert "HTTP Request: GET" in caplog.text
    assert not [text for text in [*said, caplog.text] if key in text or key[-20:] in text]


@pytest.mark.parametrize("wrong", ["127.0.0.1:8000", "localhost", "", "ftp://here", "http://"])
def test_an_address_must_be_one(wrong: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="address"):
            kind(wrong)


def test_both_clients_have_the_same_calls() -> None:
    def signatures(kind: type) -> dict[str, str]:
        methods = {name: method for name, method in vars(kind).items() if inspect.isfunction(method)}
        return {name: str(inspect.signature(method).replace(return_annotation="")) for name, method in methods.items()}

    renamed = {"aclose": "close", "__aenter__": "__enter__", "__aexit__": "__exit__"}
    asynchronous = {renamed.get(name, name): signature for name, signature in signatures(AsyncClient).items()}
    assert asynchronous == signatures(Client)
    for name, method in vars(AsyncClient).items():
        same = vars(Client).get(name)
        assert same is None or name == "__doc__" or not inspect.isfunction(method) or method.__doc__ == same.__doc__


# Answers whose schemas have another name in the OpenAPI description.
SCHEMAS = {
    "Run": "RunAnswer",
    "Runs": "RunPage",
    "Model": "ModelAnswer",
    "Models": "ModelPage",
    "Rollback": "RollbackAnswer",
}


def kinds(annotation: Any) -> set[str]:
    """A type of the client in the words of JSON Schema; the values of a Literal, and what a tuple holds."""
    plain = {str: "string", datetime: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
    if annotation in plain:
        return {plain[annotation]}
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(kinds, get_args(annotation)))
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    if get_origin(annotation) is tuple:
        return {f"array of {kind}" for kind in kinds(get_args(annotation)[0])}
    return {"object"}


def schema_kinds(schema: dict[str, Any]) -> set[str]:
    """The same of a schema."""
    if "anyOf" in schema:
        return set().union(*map(schema_kinds, schema["anyOf"]))
    if schema.get("type") == "array":
        return {f"array of {kind}" for kind in schema_kinds(schema["items"])}
    return set(schema.get("enum", [schema.get("type", "object")]))


def test_answers_have_the_fields_of_the_service() -> None:
    schemas = description()["components"]["schemas"]
    answered = {name: kind for name, kind in vars(answers).items() if dataclasses.is_dataclass(kind)}
    assert len(answered) > 10
    for name, kind in answered.items():
        schema = schemas[SCHEMAS.get(name, name)]
        expected = {field: schema_kinds(one) for field, one in schema["properties"].items()}
        assert {field: kinds(annotation) for field, annotation in get_type_hints(kind).items()} == expected, name
        optional = {field.name for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}
        assert not optional & set(schema["required"]), name


def test_options_are_those_of_the_service() -> None:
    described = description()
    gets = {path: queried(methods["get"]) for path, methods in described["paths"].items() if "get" in methods}
    options = get_type_hints(RecommendationOptions).keys()
    assert gets["/users/{user_id}/recommendations"] == options | {"cursor"}
    assert described["components"]["schemas"]["SessionRequest"]["properties"].keys() == options | {"items"}
    assert gets["/items/{item_id}/similar"] == get_type_hints(SimilarOptions).keys()
    for chart in ("/popular", "/trending", "/latest"):
        assert gets[chart] == get_type_hints(ChartOptions).keys()


def queried(operation: dict[str, Any]) -> set[str]:
    return {parameter["name"] for parameter in operation.get("parameters", ()) if parameter["in"] == "query"}


def test_everything_public_is_described() -> None:
    for name in shortlist_client.__all__:
        kind = getattr(shortlist_client, name)
        for member, value in [(name, kind), *vars(kind).items()] if inspect.isclass(kind) else []:
            public = inspect.isfunction(value) and not member.startswith("_")
            assert not public or value.__doc__, f"{name}.{member}"
    assert issubclass(NotFoundError, ProblemError)
