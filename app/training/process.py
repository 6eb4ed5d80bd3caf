"""The process that trains: `python -m ml train … --json`, its lines, and its end."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Any

PATIENCE_SECONDS = 1.0  # between asking a process to end and killing it
# What the training needs nothing of; it works on files alone.
WITHHELD = ("SHORTLIST_DATABASE_URL",)


class TrainingProcess:
    """A training that runs in a process group of its own and dies with this process.

    It ends itself when its standard input closes, which the operating system sees to even after a `kill -9`.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        command = [sys.executable, "-m", "ml", "train", *arguments, "--json", "--exit-with-stdin"]
        environment = {name: value for name, value in os.environ.items() if name not in WITHHELD}
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter; the arguments are no shell's
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=environment,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._complaints: deque[str] = deque(maxlen=20)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read_lines, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._read_complaints, args=(self._process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        """The id of the process and of its group."""
        return self._process.pid

    def _read_lines(self, stream: IO[str]) -> None:
        for line in stream:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if isinstance(message, dict) and isinstance(message.get("kind"), str):
                self._lines.put(message)
            else:
                self._complaints.append(line.rstrip())
        self._lines.put(None)

    def _read_complaints(self, stream: IO[str]) -> None:
        for line in stream:
            if line.strip():
                self._complaints.append(line.rstrip())

    def next_line(self, timeout: float) -> dict[str, Any]:
        """The next message. Raises TimeoutError if none came in time and EOFError after the last one."""
        try:
            message = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError from None
        if message is None:
            raise EOFError
        return message

    def end(self) -> tuple[int, str]:
        """Wait for a process that closed its output: its exit status and its last words."""
        status = self._process.wait()
        for reader in self._readers:
            reader.join()
        return status, self._complaints[-1] if self._complaints else ""

    def stop(self) -> None:
        """End the process and all that it started, with force if it takes too long."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> "TrainingProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        for reader in self._readers:
            reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
