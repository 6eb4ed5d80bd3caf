"""Progress of long commands: a bar on a terminal, plain lines elsewhere; always on standard error."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import typer

SECONDS_BETWEEN_LINES = 5.0

# How far (0 to 1, None where nobody knows), and figures to show beside it.
Report = Callable[[float | None, str], None]


@contextmanager
def shown(title: str) -> Iterator[Report]:
    """Show how a step goes on while the block runs; call what is yielded as often as you like."""
    with shown_together([title]) as (report,):
        yield report


@contextmanager
def shown_together(titles: Sequence[str]) -> Iterator[list[Report]]:
    """Show several steps that go on side by side."""
    if not sys.stderr.isatty():
        yield [_lines(title) for title in titles]
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def bar(title: str) -> Report:
            task = bars.add_task(title, total=None, figures="")

            def report(fraction: float | None, figures: str) -> None:
                if fraction is None:
                    bars.update(task, figures=figures)
                else:
                    bars.update(task, total=1.0, completed=fraction, figures=figures)

            return report

        yield [bar(title) for title in titles]


def _lines(title: str) -> Report:
    typer.echo(f"{title} …", err=True)
    begun = last = time.monotonic()

    def report(fraction: float | None, figures: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        share = ""
        if fraction:
            left = (now - begun) * (1 - fraction) / fraction
            share = f"{fraction:.0%}, {left:.0f} s left, "
        typer.echo(f"{title}: {share}{figures}", err=True)

    return report
