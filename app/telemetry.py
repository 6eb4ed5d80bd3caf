"""Logs, metrics and request ids. Whatever is logged goes through `redact` first: no key or password gets out."""

import logging
import os
import re
import sys
import time
from collections.abc import Iterable, MutableMapping
from random import getrandbits
from typing import Any, TextIO

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import unexpected
from app.settings import Settings

log = structlog.get_logger(__name__)

# --- redaction -----------------------------------------------------------------------------------------------------

REDACTED = "[redacted]"
_SECRET_NAMES = re.compile(
    r"authorization|api[-_]?key|password|passwd|passphrase|secret|token|cookie|credential", re.IGNORECASE
)
_SECRETS = (
    (re.compile(r"sl_[A-Za-z0-9]{4,}_[A-Za-z0-9_%-]+"), REDACTED),
    (re.compile(r"\b(bearer|basic)\s+[A-Za-z0-9._~+/=%-]{6,}", re.IGNORECASE), rf"\1 {REDACTED}"),
    # user:password@host in the URL of a database or store
    (re.compile(r"(?<=://)([^/\s:@'\"]*):[^/\s'\"]*@"), rf"\1:{REDACTED}@"),
    # password=… in a connection string, ?token=… in a URL, 'x-api-key': '…' in a printed dictionary. Bounded, so that
    # a long text takes a time in proportion: callers choose what stands in a path.
    (
        re.compile(
            r"((?:password|passwd|passphrase|secret|token|api[-_]?key|credential|authorization|cookie)[\w-]{0,64}"
            r"[\"']?(?:%3D|\s{0,8}[=:]\s{0,8})[\"']?)(?!\[redacted\])(?!(?:bearer|basic)\s)([^\s\"'&;,)}\]]+)",
            re.IGNORECASE,
        ),
        rf"\1{REDACTED}",
    ),
)


def redact(text: str) -> str:
    """A text without keys, tokens and passwords."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def _redact_event(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {
        name: REDACTED
        if _SECRET_NAMES.search(name)
        # Tracebacks have lines of their own; nothing else may begin a line, or a caller could forge one.
        else redact(value)
        if name == "exception" and isinstance(value, str)
        else _redact_value(value)
        for name, value in event.items()
    }


def _redact_value(value: Any) -> Any:
    if isinstance(value, str):
        return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], redact(value))
    if isinstance(value, bool | int | float | None):
        return value
    if isinstance(value, dict):
        return {
            str(key): REDACTED if _SECRET_NAMES.search(str(key)) else _redact_value(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple | set):
        return [_redact_value(inner) for inner in value]
    return redact(str(value))


# --- logs ----------------------------------------------------------------------------------------------------------


def _drop_colours(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event.pop("color_message", None)  # uvicorn's second copy of its message
    return event


def configure_logging(settings: Settings, stream: TextIO | None = None) -> None:
    """Send our log, and that of every library, through one redacting formatter to standard error.

    Call it once a process, before anything logs; start uvicorn with `log_config=None` and `access_log=False`.
    """
    stream = stream or sys.stderr
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        _drop_colours,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        # Tracebacks become text here, so that what they quote is redacted as well.
        structlog.processors.format_exc_info,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=stream.isatty())
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _redact_event, renderer],
        )
    )
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(settings.log_level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"  # it would log query strings
    # It tells the kind of database at every look at its revision.
    logging.getLogger("alembic.runtime.migration").setLevel(max(logging.WARNING, logging.root.level))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


# --- metrics -------------------------------------------------------------------------------------------------------

# With several serving processes Prometheus reaches one of them at a time. With this variable set (to an empty
# folder, before the processes start) they keep their counts in files there, and each answers for all.
MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """One application's metrics. Names get the prefix `shortlist_`; asking for one again gives the same one."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._made: dict[str, Counter | Gauge | Histogram] = {}
        self.requests = self.counter("requests", "Requests answered.", ("method", "route", "status"))
        self.request_seconds = self.histogram("request_seconds", "Time to the end of an answer.", ("method", "route"))

    def counter(self, name: str, description: str, labels: Iterable[str] = ()) -> Counter:
        """A count that only rises; shown as `shortlist_NAME_total`."""
        if name not in self._made:
            self._made[name] = Counter(f"shortlist_{name}", description, tuple(labels), registry=self._registry)
        made = self._made[name]
        assert isinstance(made, Counter)
        return made

    def gauge(self, name: str, description: str, labels: Iterable[str] = ()) -> Gauge:
        """A value that rises and falls; of several processes, the newest counts."""
        if name not in self._made:
            self._made[name] = Gauge(
                f"shortlist_{name}", description, tuple(labels), registry=self._registry, multiprocess_mode="mostrecent"
            )
        made = self._made[name]
        assert isinstance(made, Gauge)
        return made

    def histogram(self, name: str, description: str, labels: Iterable[str] = ()) -> Histogram:
        """A distribution of seconds."""
        if name not in self._made:
            self._made[name] = Histogram(
                f"shortlist_{name}", description, tuple(labels), registry=self._registry, buckets=_BUCKETS
            )
        made = self._made[name]
        assert isinstance(made, Histogram)
        return made

    def render(self) -> bytes:
        """All of them in Prometheus' text format."""
        if os.environ.get(MULTIPROCESS_VARIABLE):
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            return generate_latest(registry)
        return generate_latest(self._registry)


# --- requests ------------------------------------------------------------------------------------------------------

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


# Of a request whose caller went away before its end, as proxies count it; nobody hears an answer.
GONE = 499


def request_id_of(scope: Scope) -> str:
    """The caller's own id of the request, if it can be taken over, or a new one; the same each time."""
    request_id: str | None = scope.get("request_id")
    if request_id is None:
        request_id = scope["request_id"] = _given_id(scope) or f"{getrandbits(128):032x}"
    return request_id


def _given_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given: str = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(given) and redact(given) == given:
                return given
            break
    return None


class RequestCounts:
    """Counts requests and their times by route, and tells the log of each if it shall."""

    def __init__(self, metrics: Metrics, access_log: bool = False) -> None:
        self._metrics = metrics
        self._access_log = access_log
        self._series: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def add(self, scope: Scope, route: str | None, status: int, seconds: float, request_id: str) -> None:
        """`route` is its template, never a path: the number of series must not grow with the number of users."""
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = route or "unmatched"
        series = self._series.get((method, route, status))
        if series is None:
            metrics = self._metrics
            series = metrics.requests.labels(method, route, str(status)), metrics.request_seconds.labels(method, route)
            self._series[method, route, status] = series
        series[0].inc()
        series[1].observe(seconds)
        if self._access_log:
            path = scope["path"]
            log.info(
                "request", request_id=request_id, method=method, path=path, status=status, seconds=round(seconds, 6)
            )


class RequestTelemetry:
    """Outermost around the application: request ids, counts and times by route, and the answer to the unexpected."""

    def __init__(self, app: ASGIApp, counts: RequestCounts) -> None:
        self.app = app
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = request_id_of(scope)
        token = structlog.contextvars.bind_contextvars(request_id=request_id)
        status, gone = 0, False
        encoded_id = request_id.encode()

        async def heard() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or (message["type"] == "http.disconnect" and not status)
            return message

        async def with_request_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", encoded_id)]
            await send(message)

        try:
            await self.app(scope, heard, with_request_id)
        except Exception as error:
            if gone:
                return
            # The path alone: a query string may hold what a caller should have sent in a header.
            log.error("unexpected error", method=scope["method"], path=scope["path"], exc_info=error)
            if status:
                raise  # half an answer is out already: all that is left is to break the connection
            await unexpected()(scope, receive, with_request_id)
        finally:
            route = getattr(scope.get("route"), "path", None)
            self._counts.add(scope, route, GONE if gone else status, time.perf_counter() - started, request_id)
            structlog.contextvars.reset_contextvars(**token)
