"""What a production training leaves on disk, so that it goes on where it was when it is started again."""

import json
import os
from pathlib import Path
from typing import Any

from ml.distributed import ALONE, Processes


class Workspace:
    """The folder in which a training leaves what it has done; nothing is kept without one.

    Of several processes all know it, and the first one keeps it.
    """

    def __init__(self, folder: Path | None, identity: str, processes: Processes = ALONE) -> None:
        self._folder = folder
        self._processes = processes
        self._identity = identity
        self._finished: dict[str, Any] = {"identity": identity}
        if folder is None or not processes.is_first:
            return
        folder.mkdir(parents=True, exist_ok=True)
        try:
            found = json.loads((folder / "finished.json").read_bytes())
        except (FileNotFoundError, ValueError):
            found = None
        if isinstance(found, dict) and found.get("identity") == identity:
            self._finished = found
        else:
            self.remove_checkpoints()  # of another training
            self._save()

    def checkpoint(self, phase: str) -> Path | None:
        """Return where a phase keeps its state."""
        return None if self._folder is None else self._folder / f"{phase}.checkpoint"

    def finished(self, phase: str) -> dict[str, Any] | None:
        """Return what a phase gave if it is over."""
        found: dict[str, Any] | None = self._processes.gather_values(self._finished.get(phase))[0]
        return found

    def finish(self, phase: str, outcome: dict[str, Any]) -> None:
        """Remember what a phase gave."""
        self._finished[phase] = outcome
        self._save()

    def remove_checkpoints(self) -> None:
        """Remove the state of phases; it is as large as the model, several times."""
        for phase in ("fit", "refit") if self._processes.is_first else ():
            path = self.checkpoint(phase)
            if path is not None:
                path.unlink(missing_ok=True)

    def _save(self) -> None:
        if self._folder is None or not self._processes.is_first:
            return
        temporary = self._folder / f"finished.json.{os.getpid()}.temporary"  # several may use one folder
        try:
            with temporary.open("wb") as file:
                file.write(json.dumps(self._finished, allow_nan=False).encode())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._folder / "finished.json")
        finally:
            temporary.unlink(missing_ok=True)
