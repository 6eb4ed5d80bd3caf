"""`shortlist serve`: migrate, check that the address is safe, and answer requests; the training worker runs beside."""

import http
import http.client
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import typer
import uvicorn
from fastapi import FastAPI
from sqlalchemy.exc import SQLAlchemyError
from uvicorn.supervisors import Multiprocess

from app import garbage
from app.database import create_engine, is_outage, outage_reason
from app.embedded_worker import EmbeddedWorker
from app.main import create_app
from app.migrations import MigrationError, migrate
from app.security import UnsafeAddressError, ensure_safe_to_listen
from app.settings import Settings
from app.telemetry import MULTIPROCESS_VARIABLE, configure_logging

# Requests under way when the service is told to stop get this long; a stream of progress would never end.
GRACE_SECONDS = 10
# How long a thread keeps Python's lock while the event loop waits for it, as when what was posted is counted; by
# default 5 ms, many times what an answer takes.
LOCK_SECONDS = 0.001
ANSWER_POLL_SECONDS = 0.1


def serve_command(
    *,
    host: str | None = None,
    port: int | None = None,
    workers: int | None = None,
    settings: Settings | None = None,
) -> None:
    """Serve until interrupted; options given here go before the settings."""
    settings = settings or Settings()
    given = {"host": host, "port": port, "workers": workers}
    settings = settings.model_copy(update={name: value for name, value in given.items() if value is not None})
    configure_logging(settings)
    try:
        prepare(settings)
    except (MigrationError, UnsafeAddressError) as error:
        typer.echo(f"shortlist serve: {error}", err=True)
        raise typer.Exit(1) from None
    except SQLAlchemyError as error:
        if not is_outage(error):
            raise
        reason = f"the database cannot be reached or written ({outage_reason(error)})"
        typer.echo(f"shortlist serve: {reason}: check SHORTLIST_DATABASE_URL and the space on its disk", err=True)
        raise typer.Exit(1) from None
    with suppress(KeyboardInterrupt):
        run(settings)


def prepare(settings: Settings) -> None:
    """Bring the database to this release, and refuse an address that would open it to others."""
    engine = create_engine(settings.resolved_database_url)
    try:
        migrate(engine)
        ensure_safe_to_listen(engine, settings.host)
    finally:
        engine.dispose()


def run(settings: Settings, on_ready: Callable[[str], None] | None = None) -> None:
    """Answer requests until a signal comes. `on_ready` is told the address once requests are answered."""
    announce = on_ready or _announce
    # uvicorn ends by raising the signal again, which would skip what is left to do here.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with _listening(settings) as listener, _training(settings):
        url = _address(listener, settings)
        if settings.workers == 1:
            _Server(_config(create_app(settings), settings), lambda: announce(url)).run(sockets=[listener])
        else:
            _run_several(settings, listener, lambda: announce(url))


def served_app() -> FastAPI:
    """The application of one of several serving processes, which has its settings from its parent's environment."""
    settings = Settings()
    configure_logging(settings)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    app = create_app(settings)
    _settle()
    return app


def _settle() -> None:
    garbage.settle()
    sys.setswitchinterval(LOCK_SECONDS)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "uvicorn starts the processes by multiprocessing"
    parent.join()  # by a pipe: it may have ended before anything could be asked of its id
    os.kill(os.getpid(), signal.SIGTERM)


def _run_several(settings: Settings, listener: socket.socket, on_ready: Callable[[], None]) -> None:
    with tempfile.TemporaryDirectory(prefix="shortlist-metrics-") as folder:
        os.environ.update(settings.as_environment())
        os.environ[MULTIPROCESS_VARIABLE] = folder
        config = _config("app.serve:served_app", settings)
        threading.Thread(target=_tell_when_answering, args=(listener, on_ready), daemon=True).start()
        Multiprocess(config, sockets=[listener]).run()


def _tell_when_answering(listener: socket.socket, on_ready: Callable[[], None]) -> None:
    host, port = listener.getsockname()[:2]
    while listener.fileno() >= 0:
        connection = http.client.HTTPConnection(host, port, timeout=1)
        try:
            connection.request("GET", "/health/live")
            if connection.getresponse().status == http.HTTPStatus.OK:
                on_ready()
                return
        except OSError:
            time.sleep(ANSWER_POLL_SECONDS)
        finally:
            connection.close()


def _address(listener: socket.socket, settings: Settings) -> str:
    """The address for people: a listener on every interface is reached by this machine's own."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)  # noqa: S104
    return f"http://{host}:{listener.getsockname()[1]}"


def _announce(url: str) -> None:
    typer.echo(f"Serving on {url} - its HTTP interface: {url}/docs - Ctrl+C stops it")


@contextmanager
def _training(settings: Settings) -> Iterator[None]:
    if not settings.embedded_worker:
        yield
        return
    worker = EmbeddedWorker(settings.as_environment())
    worker.start()
    try:
        yield
    finally:
        worker.stop()


@contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        where = f"{settings.host}:{settings.port}"
        typer.echo(f"shortlist serve: cannot listen on {where} ({error.strerror}): choose another --port", err=True)
        raise typer.Exit(1) from None
    listener.set_inheritable(True)
    with listener:
        yield listener


def _config(app: FastAPI | str, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        factory=isinstance(app, str),
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        lifespan="on",
        log_config=None,  # ours is set already
        access_log=False,
        server_header=False,
        # Who calls from this machine is decided by the connection, not by what a header says.
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


class _Server(uvicorn.Server):
    """Tells when it answers."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            _settle()
            self._on_ready()
