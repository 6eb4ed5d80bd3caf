"""The way of most requests for recommendations, and of feedback: past the routing, parsing and dependencies of the
framework.

Those take several times what the answer itself does. Nothing is judged here that was not judged before: the key was
looked up lately, and the same query string has passed the framework's validation. Whatever is otherwise - every error
that is found before the answer is begun - goes the whole way, and both ways end in `recommendations.answer` or
`feedback.answer`.
"""

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import DATABASE_ERRORS, Problem, database_problem
from app.identifiers import id_problem
from app.routes import feedback, recommendations
from app.security import Scope as KeyScope
from app.serving.service import Service

_BEFORE, _AFTER = "/users/", "/recommendations"
_LONGEST_NUMBER = 18  # digits


class Shortcut:
    """Answers what it can; `app` answers the rest."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path: str = scope["path"]
            if scope["method"] == "GET":
                if path.startswith(_BEFORE) and path.endswith(_AFTER):
                    query = self._service.known_queries.get(scope["query_string"])
                    if query is not None and self._may(scope, "recommend"):
                        user_id = path[len(_BEFORE) : -len(_AFTER)]
                        if id_problem(user_id) is None:
                            scope["route"] = recommendations.GET
                            body = await recommendations.answer(self._service, user_id, query)
                            await _send_json(send, body)
                            return
            elif (
                scope["method"] == "POST"
                and path == "/feedback"
                and self._is_plain(scope)
                and self._may(scope, "feedback")
            ):
                scope["route"] = feedback.POST
                sent = await _read(receive)
                if sent is not None:
                    response = await self._store(scope, sent)
                    await response(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _may(self, scope: Scope, wanted: KeyScope) -> bool:
        """Whether the request brings one key, in the usual header, that was looked up lately and has the scope."""
        key = None
        for name, value in scope["headers"]:
            if name == b"authorization":
                if key is not None or not value.startswith(b"Bearer "):
                    return False
                key = value[7:]
            elif name == b"x-api-key":
                return False
        if key is None:
            return False
        caller = self._service.keys.known(key.decode("latin-1"))
        return caller is not None and caller.may(wanted)

    def _is_plain(self, scope: Scope) -> bool:
        """Whether the body is said to be JSON, and of a length that is allowed."""
        length = content_type = None
        for name, value in scope["headers"]:
            if name == b"content-length":
                length = value
            elif name == b"content-type":
                content_type = value
        return (
            content_type == b"application/json"
            and length is not None
            and len(length) <= _LONGEST_NUMBER
            and length.isdigit()
            and int(length) <= self._service.settings.max_body_bytes
        )

    async def _store(self, scope: Scope, body: bytes) -> Response:
        try:
            return await feedback.answer(self._service, body)
        except Problem as problem:
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


async def _send_json(send: Send, body: bytes) -> None:
    length = str(len(body)).encode()
    headers = [(b"content-length", length), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
