"""The way of most requests for recommendations: past the routing, parsing and dependencies of the framework.

Those take several times what the answer itself does. Nothing is judged here that was not judged before: the key was
looked up lately, and the same query string has passed the framework's validation. Whatever is otherwise - every error
first of all - goes the whole way, and both ways end in `recommendations.answer`.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from app.identifiers import id_problem
from app.routes import recommendations
from app.serving.service import Service

_BEFORE, _AFTER = "/users/", "/recommendations"


class Shortcut:
    """Answers what it can; `app` answers the rest."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "GET":
            path: str = scope["path"]
            if path.startswith(_BEFORE) and path.endswith(_AFTER):
                query = self._service.known_queries.get(scope["query_string"])
                if query is not None and self._may(scope):
                    user_id = path[len(_BEFORE) : -len(_AFTER)]
                    if id_problem(user_id) is None:
                        scope["route"] = recommendations.GET
                        body = await recommendations.answer(self._service, user_id, query)
                        await _send_json(send, body)
                        return
        await self.app(scope, receive, send)

    def _may(self, scope: Scope) -> bool:
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
        return caller is not None and caller.may("recommend")


async def _send_json(send: Send, body: bytes) -> None:
    length = str(len(body)).encode()
    headers = [(b"content-length", length), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
