"""What can go wrong with a call, as exceptions that carry what the service said."""

import http
import json
from dataclasses import dataclass
from typing import Any


class ShortlistError(Exception):
    """Whatever this client raises by itself, but for a ValueError about what it was given."""


class ConnectionFailedError(ShortlistError):
    """No answer came, in none of the tries; `__cause__` says what the last one met."""


class AnswerError(ShortlistError):
    """An answer came that this client cannot read: another service, or one of another release."""


class RunTimeoutError(ShortlistError, TimeoutError):
    """A training had not ended in the time that was given; it goes on."""


@dataclass(frozen=True, slots=True)
class FieldError:
    """What is wrong with one part of a request."""

    field: str
    message: str


class ProblemError(ShortlistError):
    """The service refused: a problem document (RFC 9457).

    `request_id` finds the request in the service's log; `retry_after` is in seconds.
    """

    def __init__(
        self,
        status: int,
        title: str,
        detail: str,
        errors: tuple[FieldError, ...] = (),
        retry_after: float | None = None,
        request_id: str | None = None,
        document: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(f"{status} {title}: {detail}" if detail else f"{status} {title}")
        self.status = status
        self.title = title
        self.detail = detail
        self.errors = errors
        self.retry_after = retry_after
        self.request_id = request_id
        self.document = document or {}


class UnauthorizedError(ProblemError):
    """401: no key, or one that is unknown, expired or revoked."""


class ForbiddenError(ProblemError):
    """403: the key lacks the scope that this call needs."""


class NotFoundError(ProblemError):
    """404: there is no such user, item, run or version."""


class ConflictError(ProblemError):
    """409: it does not go with what is there, such as another request under the same idempotency key."""


class GoneError(ProblemError):
    """410: a cursor whose version is no longer there; begin with the first page again."""


class InvalidError(ProblemError):
    """422: something in the request is wrong; `errors` names each field."""


class OverloadedError(ProblemError):
    """429: more feedback arrives than can be committed, and the retries did not outlast it."""


class UnavailableError(ProblemError):
    """503: the service or its database is away, and the retries did not outlast it."""


KINDS: dict[int, type[ProblemError]] = {
    401: UnauthorizedError,
    403: ForbiddenError,
    404: NotFoundError,
    409: ConflictError,
    410: GoneError,
    422: InvalidError,
    429: OverloadedError,
    503: UnavailableError,
}


def problem(status: int, content: bytes, retry_after: float | None, request_id: str | None) -> ProblemError:
    """What to raise for an answer that is no success, be it a problem document or whatever a proxy says."""
    try:
        document = json.loads(content)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        document = {}
    phrases = {known.value: known.phrase for known in http.HTTPStatus}
    named = document.get("errors")
    rows = [row for row in named if isinstance(row, dict)] if isinstance(named, list) else []
    return KINDS.get(status, ProblemError)(
        status,
        str(document.get("title") or phrases.get(status, "Unknown status")),
        str(document.get("detail") or ""),
        tuple(FieldError(str(row.get("field", "")), str(row.get("message", ""))) for row in rows),
        retry_after,
        request_id,
        document,
    )
