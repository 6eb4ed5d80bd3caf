"""How a training goes on: for people a bar on a terminal and plain lines elsewhere, for programs JSON lines."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ml.train import Progress

SECONDS_BETWEEN_LINES = 10.0

Report = Callable[["Progress"], None]


@contextmanager
def shown(title: str) -> Iterator[Report]:
    """Show how a training goes on while the block runs; call what is yielded with each Progress."""
    if not sys.stderr.isatty():
        yield _Lines(title).report
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(title, total=1.0, figures="")

        def report(progress: "Progress") -> None:
            if progress.epoch_ended:
                bars.console.print(f"{title}: {epoch_line(progress)}", highlight=False)
            figures = f"epoch {progress.epoch}/{progress.epochs}, {progress.examples_per_second:,.0f} examples/s"
            bars.update(task, completed=progress.fraction, figures=figures)

        yield report


class _Lines:
    def __init__(self, title: str) -> None:
        self.title = title
        self.last = time.monotonic()

    def report(self, progress: "Progress") -> None:
        now = time.monotonic()
        if progress.epoch_ended:
            typer.echo(f"{self.title}: {epoch_line(progress)}", err=True)
        elif now - self.last >= SECONDS_BETWEEN_LINES:
            typer.echo(
                f"{self.title}: {progress.fraction:.0%}, {progress.examples_per_second:,.0f} examples/s, "
                f"{progress.seconds_left:.0f} s left",
                err=True,
            )
        else:
            return
        self.last = now


def epoch_line(progress: "Progress") -> str:
    """Describe an epoch that ended."""
    line = f"epoch {progress.epoch}/{progress.epochs}, loss {progress.loss:.4f}"
    if progress.validation is not None:
        line += f", validation ndcg@10 {progress.validation['ndcg@10']:.4f}"
    return f"{line}, {progress.examples_per_second:,.0f} examples/s"


def as_json(progress: "Progress") -> dict[str, Any]:
    """Return the figures of a Progress as JSON values."""
    return {
        "epoch": progress.epoch,
        "epochs": progress.epochs,
        "fraction": progress.fraction,
        "loss": progress.loss,
        "examples_per_second": progress.examples_per_second,
        "seconds_left": progress.seconds_left,
        **({} if progress.validation is None else {"validation": progress.validation}),
    }


class Reporter:
    """Tells whoever started the training how it goes: JSON lines on standard output, or text for people."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def emit(self, kind: str, text: str, **values: Any) -> None:
        """Write one line at once."""
        if self.as_json:
            typer.echo(json.dumps({"kind": kind, **values}, allow_nan=False))
            sys.stdout.flush()
        else:
            typer.echo(text, err=kind != "published")

    def phase(self, name: str, **values: Any) -> None:
        """Say which phase starts."""
        self.emit("phase", f"{name} …", phase=name, **values)

    def training(self, phase: str) -> Any:
        """Show a training while a block runs; yields the callback for its progress."""
        return nullcontext(lambda step: self._step(phase, step)) if self.as_json else shown(phase)

    def _step(self, phase: str, step: "Progress") -> None:
        self.emit("epoch" if step.epoch_ended else "progress", "", phase=phase, **as_json(step))


class Silent(Reporter):
    """Says nothing: of several processes, only the first reports."""

    def __init__(self) -> None:
        super().__init__(as_json=True)

    def emit(self, kind: str, text: str, **values: Any) -> None:
        """Write nothing."""

    def training(self, phase: str) -> Any:  # noqa: ARG002
        """Follow no training."""
        return nullcontext()
