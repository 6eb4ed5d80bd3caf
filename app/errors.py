"""Errors as callers see them: problem documents (RFC 9457) that name the field and show nothing of the inside."""

import http
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from app.database import is_outage, outage_reason
from app.identifiers import explain
from ml.store import StoreUnavailable

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 2
DATABASE_ERRORS = (DBAPIError, PoolTimeout)
MAX_ERRORS_SHOWN = 100

log = structlog.get_logger(__name__)


class FieldError(BaseModel):
    """What is wrong with one part of a request."""

    field: str = Field(description="Where: `body.3.user_id`, `query.k`, `path.item_id`, `header.…`.")
    message: str


class ProblemDocument(BaseModel):
    """What every error answers with (RFC 9457)."""

    type: str = Field(description="`about:blank`: the status says what kind of problem it is.")
    title: str
    status: int
    detail: str
    errors: list[FieldError] = Field(default_factory=list)


class Problem(Exception):  # noqa: N818 - what it is called in RFC 9457
    """An error to answer a request with; raise it anywhere below a route."""

    def __init__(
        self,
        status: int,
        title: str | None = None,
        detail: str = "",
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
        errors: Sequence[FieldError] = (),
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.title = title or http.HTTPStatus(status).phrase
        self.detail = detail
        self.headers = dict(headers or {})
        self.errors = [FieldError(field=field, message=detail)] if field is not None else list(errors)

    def response(self) -> Response:
        document = ProblemDocument(
            type="about:blank", title=self.title, status=self.status, detail=self.detail, errors=self.errors
        )
        return JSONResponse(
            jsonable_encoder(document), status_code=self.status, headers=self.headers, media_type=MEDIA_TYPE
        )


def unavailable(detail: str = "The database cannot be reached now; try again.") -> Problem:
    """The answer while something the service needs is gone."""
    return Problem(503, detail=detail, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


def unexpected() -> Response:
    """The answer to an error nobody foresaw; what happened stands in the log, under the answer's X-Request-ID."""
    detail = "Something went wrong here. The log tells what, under this answer's X-Request-ID."
    return Problem(500, detail=detail).response()


def too_large(limit: object) -> Problem:
    """The answer to a body above the bound."""
    return Problem(413, detail=f"The body is larger than {limit} bytes: send it in parts.", field="body")


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route may answer beside success, for its OpenAPI description: `responses=responses(404)`.

    `install` adds what goes without saying: 500; 401, 403 and 503 where a key is checked; 413 where there is a body;
    404 where the path has a part to fill in; 422 where there is anything to get wrong.
    """
    return {status: {**_description(status), "model": ProblemDocument} for status in sorted({*statuses, 500})}


def _description(status: int) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/ProblemDocument"}
    return {"description": http.HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": schema}}}


def install(app: FastAPI) -> None:
    """Make every error of an application a problem document."""
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    for kind in DATABASE_ERRORS:
        app.add_exception_handler(kind, database_problem)
    app.add_exception_handler(StoreUnavailable, _store)
    app.add_exception_handler(Exception, _unexpected)
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _describe_as_problems(describe())
        return describe()

    app.openapi = openapi  # type: ignore[method-assign]


def _describe_as_problems(description: dict[str, Any]) -> None:
    """Describe every error as a problem document, and those that go without saying."""
    schemas = description.setdefault("components", {}).setdefault("schemas", {})
    for model in (ProblemDocument, FieldError):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schema.pop("$defs", None)
        schemas[model.__name__] = schema
    operations = [(path, it) for path, methods in description["paths"].items() for it in methods.values()]
    for path, operation in operations:
        answers = operation["responses"]
        if "HTTPValidationError" in str(answers.get("422")):
            answers["422"] = _description(422)
        expected = [500]
        if operation.get("security"):
            expected += [401, 403, 503]
        if "requestBody" in operation:
            expected += [413, 422]
        if "{" in path:
            expected += [404]
        for status in expected:
            answers.setdefault(str(status), _description(status))
        for answer in answers.values():
            if MEDIA_TYPE in answer.get("content", {}):
                # FastAPI adds its own media type to every answer with a model; errors have one alone.
                answer["content"].pop("application/json", None)
        operation["responses"] = dict(sorted(answers.items()))
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)


def let_go(error: BaseException | None) -> None:
    """Take the tracebacks off an error that has its answer, and off those that it came of.

    They lead to the frames that held the request's body, and from there back to the error: a circle that only a look
    for garbage undoes, which for all that a long request left behind comes every ten minutes (`app/garbage.py`).
    """
    while error is not None and error.__traceback__ is not None:  # errors may come of each other in a circle
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


async def _problem(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    let_go(error)
    return error.response()


async def _invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    let_go(error)
    found = error.errors()
    errors = [FieldError(field=_field(e), message=_message(e)) for e in found[:MAX_ERRORS_SHOWN]]
    detail = f"{errors[0].field}: {errors[0].message}" + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
    return Problem(422, "The request is not valid", detail, errors=errors).response()


def _field(error: Mapping[str, Any]) -> str:
    location = error.get("loc", ())
    if error.get("type") == "json_invalid":
        return "body"
    # Types within a union (`body.list[Event].3`) are ours, not the caller's: the caller's path has none of them.
    parts = [str(part) for part in location if not (isinstance(part, str) and not _is_name(part))]
    return ".".join(parts) or "body"


def _is_name(part: str) -> bool:
    return not any(character in part for character in "[](){}<> ")


def _message(error: Mapping[str, Any]) -> str:
    if error.get("type") == "json_invalid":
        position = error.get("loc", ("body", 0))[-1]
        return f"is not valid JSON: {error.get('ctx', {}).get('error', 'it cannot be read')} at character {position}"
    return explain(dict(error))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    let_go(error)
    status, headers = error.status_code, error.headers
    if status == 404:
        return Problem(404, detail=f"There is nothing at {request.url.path}; GET /docs lists what there is.").response()
    if status == 405:
        allowed = (headers or {}).get("Allow", "other methods")
        return Problem(405, detail=f"{request.method} does not work here; {allowed} does.", headers=headers).response()
    if status == 413:
        return too_large(error.detail).response()
    if status == 400 and "parsing the body" in str(error.detail):
        # What json.loads refuses without a position: text that is not UTF-8, numbers of thousands of digits, depth.
        return Problem(
            422, "The request is not valid", "The body is not JSON that can be read: check its encoding.", field="body"
        ).response()
    return Problem(status, detail=str(error.detail), headers=headers).response()


async def database_problem(request: Request, error: Exception) -> Response:
    """What a request is answered that met one of DATABASE_ERRORS."""
    if is_outage(error):
        names = {"error": type(error).__name__, "reason": outage_reason(error)}
        await log.awarning("database unavailable", path=request.url.path, **names)
        let_go(error)
        return unavailable().response()
    return await _unexpected(request, error)


async def _store(request: Request, error: Exception) -> Response:
    await log.awarning("store unavailable", path=request.url.path, reason=str(error))
    return unavailable("The store of versions cannot be used now; try again.").response()


async def _unexpected(request: Request, error: Exception) -> Response:
    await log.aerror("unexpected error", path=request.url.path, method=request.method, exc_info=error)
    return unexpected()
