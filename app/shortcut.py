"""The way of most requests for recommendations, and of feedback: past the framework.

Its middleware, routing, parsing and dependencies take several times what the answer itself does. Nothing is judged here
that was not judged before: the key was looked up lately, and the same query string has passed the framework's
validation. Whatever is otherwise - every error that is found before the answer is begun - goes the whole way, and both
ways end in `Rounds.answer` or `feedback.answer`.
"""

import time

import structlog
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.address import REPLACEMENT
from app.errors import DATABASE_ERRORS, Problem, database_problem, let_go
from app.identifiers import id_problem
from app.routes import feedback
from app.routes.recommendations import PATH
from app.security import Scope as KeyScope
from app.serving.service import Service
from app.telemetry import RequestCounts, RequestTelemetry, request_id_of

_BEFORE, _AFTER = PATH.split("{user_id}")
_LONGEST_NUMBER = 18  # digits
# What is judged on the whole way: a key in another header, and a body where none is expected.
_ODD: dict[KeyScope, frozenset[bytes]] = {
    "recommend": frozenset((b"x-api-key", b"content-length")),
    "feedback": frozenset((b"x-api-key",)),
}


class Application(FastAPI):
    """The framework's application, with a way past it."""

    shortcut: "Shortcut | None" = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.shortcut is None or not await self.shortcut.answers(scope, receive, send):
            await super().__call__(scope, receive, send)


class Shortcut:
    """Answers what it can."""

    def __init__(self, service: Service, counts: RequestCounts) -> None:
        self._service = service
        self._counts = counts
        self._feedback = RequestTelemetry(self._take_feedback, counts)

    async def answers(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Answer a request and return True, or leave it as it is."""
        if scope["type"] != "http":
            return False
        path: str = scope["path"]
        if scope["method"] == "GET":
            if path.startswith(_BEFORE) and path.endswith(_AFTER):
                return await self._recommends(scope, path[len(_BEFORE) : -len(_AFTER)], send)
        elif (
            scope["method"] == "POST" and path == "/feedback" and self._is_plain(scope) and self._may(scope, "feedback")
        ):
            await self._feedback(scope, receive, send)
            return True
        return False

    def _may(self, scope: Scope, wanted: KeyScope) -> bool:
        """Whether the request brings one key, in the usual header, that was looked up lately and has the scope."""
        key, odd = None, _ODD[wanted]
        for name, value in scope["headers"]:
            if name == b"authorization":
                if key is not None or not value.startswith(b"Bearer "):
                    return False
                key = value[7:]
            elif name in odd:
                return False
        if key is None:
            return False
        caller = self._service.keys.known(key.decode("latin-1"))
        return caller is not None and caller.may(wanted)

    # --- recommendations -----------------------------------------------------------------------------------------

    async def _recommends(self, scope: Scope, user_id: str, send: Send) -> bool:
        service = self._service
        query = service.known_queries.get(scope["query_string"])
        if query is None or not service.ranker.is_quick(query) or not self._may(scope, "recommend"):
            return False
        if REPLACEMENT in user_id or id_problem(user_id) is not None:
            return False
        started = time.perf_counter()
        request_id = request_id_of(scope)
        structlog.contextvars.bind_contextvars(request_id=request_id)  # for this task, which is the request's own
        try:
            body = await service.rounds.answer(user_id, query)
        except Exception:
            body = None  # the whole way meets it again, and reports it
        if body is None:
            return False
        headers = [
            (b"content-length", b"%d" % len(body)),
            (b"content-type", b"application/json"),
            (b"x-request-id", request_id.encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        self._counts.add(scope, PATH, 200, time.perf_counter() - started, request_id)
        return True

    # --- feedback ------------------------------------------------------------------------------------------------

    def _is_plain(self, scope: Scope) -> bool:
        """Whether the body is said, once, to be JSON, and of a length that is allowed."""
        if b"%" in scope["query_string"]:  # it may be no UTF-8
            return False
        length = content_type = None
        for name, value in scope["headers"]:
            if name == b"transfer-encoding":  # then the length says nothing
                return False
            if name == b"content-length":
                length = value
            elif name == b"content-type":
                if content_type is not None:
                    return False
                content_type = value
        return (
            content_type == b"application/json"
            and length is not None
            and len(length) <= _LONGEST_NUMBER
            and length.isdigit()
            and int(length) <= self._service.settings.max_body_bytes
        )

    async def _take_feedback(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = feedback.POST
        sent = await _read(receive)
        if sent is not None:
            response = await self._store(scope, sent)
            await response(scope, receive, send)

    async def _store(self, scope: Scope, body: bytes) -> Response:
        try:
            return await feedback.answer(self._service, body)
        except Problem as problem:
            let_go(problem)
            return problem.response()
        except DATABASE_ERRORS as error:
            return await database_problem(Request(scope), error)


async def _read(receive: Receive) -> bytes | None:
    """The body of a request; None if the caller went away before its end."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        part: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            return b"".join([*parts, part]) if parts else part
        parts.append(part)
