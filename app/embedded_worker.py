"""The training worker beside `shortlist serve`: a process of its own, started again if it dies, gone when we are."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping

import structlog

from app.settings import Settings
from app.telemetry import configure_logging

log = structlog.get_logger(__name__)

# A worker that cannot start is tried again at growing intervals.
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
# Time to tell its trainer and hand the run back.
STOP_SECONDS = 10.0


class EmbeddedWorker:
    """Keeps one worker process running until stopped."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="embedded-worker", daemon=True)

    @property
    def pid(self) -> int | None:
        """The process id of the worker that runs now."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask the worker to end, and see to it that it does."""
        self._stopping.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        self._thread.join()

    def _run(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not self._stopping.is_set():
            # It ends when its standard input does: with us, even if we are killed.
            process = subprocess.Popen(
                [sys.executable, "-m", "app.embedded_worker"],
                env={**os.environ, **self._environment},
                stdin=subprocess.PIPE,
                # Not ours to answer: an interrupt at the terminal reaches us, and `stop` reaches the worker.
                start_new_session=True,
            )
            self._process = process
            if self._stopping.is_set():  # `stop` came before there was a process to stop
                process.terminate()
            log.info("worker_started", pid=process.pid)
            status = process.wait()
            if process.stdin is not None:
                process.stdin.close()
            if self._stopping.is_set():
                return
            log.warning("worker_died", status=status, again_in_seconds=pause)
            self._stopping.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _end_with_parent() -> None:
    # Not by `sys.stdin`, whose lock this thread would still hold when the interpreter ends.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Be the worker: `python -m app.embedded_worker`, with a pipe from the service as standard input."""
    from app.training.commands import worker_command

    settings = Settings()
    configure_logging(settings)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    worker_command(settings=settings)


if __name__ == "__main__":
    main()
