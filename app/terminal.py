"""What commands say to people: tables, and the one line with which they fail."""

from collections.abc import Iterable, Sequence
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table

WIDTH_ELSEWHERE = 500  # a line a row where nobody looks at a terminal


def fail(message: str) -> NoReturn:
    """End the command with this line on standard error and exit status 1."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


def print_table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows below their headings, as they are: brackets in them are no markup."""
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*["" if cell is None else str(cell) for cell in row])
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH_ELSEWHERE
    console.print(table)
