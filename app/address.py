"""Refuses addresses whose percent-encoded bytes are no UTF-8: read with replacements, they name something else."""

from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import FieldError, Problem

REPLACEMENT = "\ufffd"


class ReadableAddress:
    """Answer 422 to a path or query string that is no UTF-8."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # Servers decode a path with replacements; only such a one can have been something else.
            path = scope.get("raw_path") or b""
            if REPLACEMENT in scope["path"] and not _is_utf8(path):
                await _unreadable("path")(scope, receive, send)
                return
            query: bytes = scope["query_string"]
            if b"%" in query and not _is_utf8(query):
                await _unreadable("query")(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _is_utf8(encoded: bytes) -> bool:
    try:
        unquote_to_bytes(encoded).decode()
    except UnicodeDecodeError:
        return False
    return True


def _unreadable(part: str) -> ASGIApp:
    message = "is not UTF-8: percent-encode the bytes of UTF-8 text"
    errors = [FieldError(field=part, message=message)]
    return Problem(422, "The request is not valid", f"{part}: {message}", errors=errors).response()
