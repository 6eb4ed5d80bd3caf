"""Users and items: one by one, in lists, in bulk; and the audit trail of who changed them."""

import base64
import io
import json
import tempfile
from collections.abc import Iterator
from itertools import chain
from typing import IO, Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response, status
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.engine import RowMapping
from starlette.concurrency import run_in_threadpool

from app import audit, catalog_rows, erasure, exporting
from app.bulk_import import MAX_CATEGORIES, ImportOutcome, import_lines
from app.catalog_rows import Kind
from app.database import writing
from app.errors import Problem, responses
from app.identifiers import Category, ItemId, Metadata, Title, UserId, id_problem
from app.security import Admin, Recommend
from app.serving.service import Service, ServiceDep
from app.times import UtcTime

router = APIRouter()

MAX_PAGE = 1_000
IMPORT_PATHS = ("/items:import", "/users:import")
# Bodies of an import up to here stay in memory; longer ones wait in a file until they are whole.
SPOOL_BYTES = 1_000_000

MEDIA_TYPES = {
    "application/x-ndjson": "jsonl",
    "application/jsonl": "jsonl",
    "application/json-lines": "jsonl",
    "text/csv": "csv",
}
EXPORT_TYPES = {"jsonl": "application/x-ndjson", "csv": "text/csv; charset=utf-8"}

Format = Literal["jsonl", "csv"]

UserPath = Annotated[UserId, Path(description="The caller's id of the user.")]
ItemPath = Annotated[ItemId, Path(description="The caller's id of the item.")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Rows in one answer.")]
Cursor = Annotated[
    str | None, Query(max_length=1_000, description="`next_cursor` of the answer before; the first page without it.")
]


class UserBody(BaseModel):
    """What is known of a user beside the events."""

    model_config = ConfigDict(extra="forbid")

    metadata: Metadata = Field(default={}, description="Free JSON, kept as it is.")


class User(UserBody):
    user_id: str
    created_at: UtcTime
    updated_at: UtcTime


class ItemBody(BaseModel):
    """What is known of an item."""

    model_config = ConfigDict(extra="forbid")

    title: Title | None = None
    categories: list[Category] = Field(default=[], max_length=MAX_CATEGORIES)
    hidden: bool = Field(default=False, description="A hidden item is never recommended; its events still count.")
    metadata: Metadata = Field(default={}, description="Free JSON, kept as it is.")


class Item(ItemBody):
    item_id: str
    created_at: UtcTime
    updated_at: UtcTime


class Users(BaseModel):
    """One page of users in order of their ids."""

    users: list[User]
    next_cursor: str | None = Field(description="For the next page; null on the last one.")


class Items(BaseModel):
    """One page of items in order of their ids."""

    items: list[Item]
    next_cursor: str | None = Field(description="For the next page; null on the last one.")


class AuditEntry(BaseModel):
    """One action of an admin."""

    sequence: int
    actor: str = Field(description="The id of a key, `cli`, `worker`, or `loopback` while no key exists.")
    action: str
    subject: str
    details: dict[str, Any]
    created_at: UtcTime


class AuditTrail(BaseModel):
    """One page of the audit trail, the newest first."""

    entries: list[AuditEntry]
    next_cursor: str | None = Field(description="For the next page; null on the last one.")


_TEXT = {"schema": {"type": "string"}}
_LINES = {"application/x-ndjson": _TEXT, "text/csv": _TEXT}
_IMPORT_BODY = {
    "requestBody": {
        "required": True,
        "description": "JSON Lines, or CSV with a header; `|` between categories, metadata as JSON.",
        "content": _LINES,
    }
}
_EXPORT = {
    **responses(422),
    200: {
        "description": "One row a line.",
        "content": _LINES,
    },
}
_IMPORT = responses(415)


# --- items ---------------------------------------------------------------------------------------------------------


@router.get("/items", tags=["items"])
def list_items(service: ServiceDep, _: Admin, limit: Limit = 100, cursor: Cursor = None) -> Items:
    """List items in order of their ids."""
    rows, following = _page(service, "item", limit, cursor)
    return Items.model_validate({"items": rows, "next_cursor": following})


@router.get("/items:export", tags=["items"], response_class=StreamingResponse, responses=_EXPORT)
def export_items(service: ServiceDep, _: Admin, format: Format = "jsonl") -> StreamingResponse:  # noqa: A002
    """Export all items, as `POST /items:import` takes them."""
    return _export(service, "items", format)


@router.post("/items:import", tags=["items"], openapi_extra=_IMPORT_BODY, responses=_IMPORT)
async def import_items(request: Request, service: ServiceDep, caller: Admin) -> ImportOutcome:
    """Add or change many items, one a line; what a line leaves out stays as it is."""
    return await _import(request, service, "item", caller.key_id)


@router.get("/items/{item_id}", tags=["items"], responses=responses(404))
def read_item(item_id: ItemPath, service: ServiceDep, _: Recommend) -> Item:
    """Read one item."""
    return Item.model_validate(_read(service, "item", item_id))


@router.put(
    "/items/{item_id}",
    tags=["items"],
    responses={201: {"model": Item, "description": "Created"}},
)
def put_item(item_id: ItemPath, body: ItemBody, response: Response, service: ServiceDep, caller: Admin) -> Item:
    """Create an item, or replace what is known of it: what the body leaves out takes its default."""
    return Item.model_validate(_put(service, "item", item_id, body, response, caller.key_id))


@router.delete("/items/{item_id}", tags=["items"], status_code=204)
def delete_item(item_id: ItemPath, service: ServiceDep, caller: Admin) -> None:
    """Erase an item and all events about it; the answer is the same when there is nothing left to erase."""
    _erase(service, "item", item_id, caller.key_id)


# --- users ---------------------------------------------------------------------------------------------------------


@router.get("/users", tags=["users"])
def list_users(service: ServiceDep, _: Admin, limit: Limit = 100, cursor: Cursor = None) -> Users:
    """List users in order of their ids."""
    rows, following = _page(service, "user", limit, cursor)
    return Users.model_validate({"users": rows, "next_cursor": following})


@router.get("/users:export", tags=["users"], response_class=StreamingResponse, responses=_EXPORT)
def export_users(service: ServiceDep, _: Admin, format: Format = "jsonl") -> StreamingResponse:  # noqa: A002
    """Export all users, as `POST /users:import` takes them."""
    return _export(service, "users", format)


@router.post("/users:import", tags=["users"], openapi_extra=_IMPORT_BODY, responses=_IMPORT)
async def import_users(request: Request, service: ServiceDep, caller: Admin) -> ImportOutcome:
    """Add or change many users, one a line; what a line leaves out stays as it is."""
    return await _import(request, service, "user", caller.key_id)


@router.get("/users/{user_id}", tags=["users"], responses=responses(404))
def read_user(user_id: UserPath, service: ServiceDep, _: Recommend) -> User:
    """Read one user."""
    return User.model_validate(_read(service, "user", user_id))


@router.put(
    "/users/{user_id}",
    tags=["users"],
    responses={201: {"model": User, "description": "Created"}},
)
def put_user(user_id: UserPath, body: UserBody, response: Response, service: ServiceDep, caller: Admin) -> User:
    """Create a user, or replace what is known of them."""
    return User.model_validate(_put(service, "user", user_id, body, response, caller.key_id))


@router.delete("/users/{user_id}", tags=["users"], status_code=204)
def delete_user(user_id: UserPath, service: ServiceDep, caller: Admin) -> None:
    """Erase a user with all their events, their history and what they were shown; 204 also when nothing is left."""
    _erase(service, "user", user_id, caller.key_id)


# --- audit trail ---------------------------------------------------------------------------------------------------


@router.get("/admin/audit", tags=["admin"])
def audit_trail(service: ServiceDep, _: Admin, limit: Limit = 100, cursor: Cursor = None) -> AuditTrail:
    """What admins did, the newest first."""
    before = _decode(cursor, "audit")
    with service.engine.connect() as connection:
        rows = audit.read(connection, before=before, limit=limit)
    following = _encode("audit", rows[-1]["sequence"]) if len(rows) == limit else None
    return AuditTrail.model_validate({"entries": rows, "next_cursor": following})


# --- what users and items have in common -----------------------------------------------------------------------------


def _read(service: Service, kind: Kind, identifier: str) -> RowMapping:
    with service.engine.connect() as connection:
        row = catalog_rows.read(connection, kind, identifier)
    if row is None:
        raise Problem(404, detail=f"There is no such {kind}.", field=f"path.{kind}_id")
    return row


def _put(
    service: Service, kind: Kind, identifier: str, body: BaseModel, response: Response, actor: str
) -> RowMapping | None:
    with writing(service.engine) as connection:
        created = catalog_rows.replace(connection, kind, identifier, body.model_dump())
        audit.record(connection, actor, f"{kind}.put", _subject(kind, identifier))
        row = catalog_rows.read(connection, kind, identifier)
    service.poll()
    response.status_code = status.HTTP_201_CREATED if created else status.HTTP_200_OK
    return row


def _subject(kind: Kind, identifier: str) -> str:
    # The trail outlives the erasure of a user, so it never holds the id itself.
    return f"sha256:{erasure.subject_sha256(identifier)}" if kind == "user" else identifier


def _erase(service: Service, kind: Kind, identifier: str, actor: str) -> None:
    if erasure.erase(service.engine, kind, identifier, actor=actor).is_new:
        service.poll()


def _page(service: Service, kind: Kind, limit: int, cursor: str | None) -> tuple[list[RowMapping], str | None]:
    after = _decode(cursor, kind)
    with service.engine.connect() as connection:
        rows = catalog_rows.page(connection, kind, after=after, limit=limit)
    return rows, _encode(kind, rows[-1][f"{kind}_id"]) if len(rows) == limit else None


def _encode(what: str, last: str | int) -> str:
    return base64.urlsafe_b64encode(json.dumps([what, last]).encode()).decode().rstrip("=")


def _decode(cursor: str | None, what: str) -> Any:
    """Where the page before ended: an id, or a sequence of the audit trail; None at the first page."""
    if cursor is None:
        return None
    try:
        named, last = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
    except (ValueError, TypeError, RecursionError):
        named, last = None, None
    valid = (type(last) is int and 0 < last < 2**63) if what == "audit" else id_problem(last) is None
    if named != what or not valid:
        raise Problem(422, detail="must be the `next_cursor` of an answer of this list", field="query.cursor")
    return last


async def _import(request: Request, service: Service, kind: Kind, actor: str) -> ImportOutcome:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in MEDIA_TYPES:
        detail = f"The Content-Type must be one of {', '.join(MEDIA_TYPES)}."
        raise Problem(415, detail=detail, field="header.content-type")
    # Nothing is imported before the body is whole: a connection that breaks leaves no half behind.
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as body:
        async for chunk in request.stream():
            body.write(chunk)
        body.seek(0)
        return await run_in_threadpool(_import_file, service, kind, MEDIA_TYPES[media_type], body, actor)


def _import_file(service: Service, kind: Kind, format: str, body: IO[bytes], actor: str) -> ImportOutcome:  # noqa: A002
    try:
        outcome = import_lines(service.engine, kind, format, body)
        if outcome.created or outcome.updated:
            with writing(service.engine) as connection:
                counts = outcome.model_dump(include={"created", "updated", "rejected"})
                audit.record(connection, actor, f"{kind}.import", f"{kind}s", counts)
    finally:
        service.poll()
    return outcome


def _export(service: Service, what: str, format: Format) -> StreamingResponse:  # noqa: A002
    pages = exporting.rows(service.engine, what)
    # Read before the answer begins, so that a database that is gone is a 503 and not half an answer.
    first = next(pages, [])

    def text() -> Iterator[bytes]:
        out = io.BytesIO()
        sink = exporting.SINKS[format](out, exporting.SCHEMAS[what])
        for page in chain([first], pages):
            if page:
                sink.write(page)
            yield out.getvalue()
            out.seek(0)
            out.truncate()

    names = {"Content-Disposition": f'attachment; filename="{what}.{format}"'}
    return StreamingResponse(text(), media_type=EXPORT_TYPES[format], headers=names)
