"""`shortlist openapi`: the OpenAPI description as a file, and what in it breaks callers of an older one."""

import json
import tempfile
from pathlib import Path
from typing import Any

import typer

from app.api_changes import breaking_changes
from app.main import create_app
from app.settings import Settings
from app.terminal import fail


def description() -> dict[str, Any]:
    """What `/openapi.json` answers, without a database and whatever the settings are."""
    with tempfile.TemporaryDirectory(prefix="shortlist-openapi-") as folder:
        app = create_app(
            Settings(_env_file=None, data_dir=Path(folder), database_url=f"sqlite:///{folder}/none.sqlite3")
        )
        try:
            return app.openapi()
        finally:
            app.state.service.engine.dispose()


def as_text(described: dict[str, Any]) -> str:
    """The description as it stands in docs/openapi.json."""
    return json.dumps(described, indent=2, ensure_ascii=False) + "\n"


def openapi_command(*, out: str, against: Path | None) -> None:
    """Write the description; with `against`, print what breaks callers of that one instead, and exit with 1 if any."""
    if against is None:
        text = as_text(description())
        if out == "-":
            typer.echo(text, nl=False)
        else:
            Path(out).write_text(text, encoding="utf-8")
        return
    try:
        older = json.loads(against.read_text(encoding="utf-8"))
        changes = breaking_changes(older, description())
    except OSError as error:
        fail(f"cannot read {against}: {error.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError):
        fail(f"{against} is no OpenAPI description in JSON")
    for change in changes:
        typer.echo(change)
    if changes:
        raise typer.Exit(1)
