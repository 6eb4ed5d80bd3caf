import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from app.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def commands(command: Any, path: tuple[str, ...] = ("shortlist",)) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for name, below in command.commands.items():
            yield from commands(below, (*path, name))
    else:
        yield " ".join(path), command


def sections() -> dict[str, str]:
    parts = re.split(r"^#{2,3} (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_command_and_option_is_documented() -> None:
    described = sections()
    undocumented = []
    for name, command in commands(typer.main.get_command(app)):
        for parameter in command.params:
            options = parameter.opts if parameter.param_type_name == "option" else []
            undocumented += [f"{name} {option}" for option in options if f"`{option}" not in described.get(name, "")]
        if name not in described:
            undocumented.append(name)
    assert not undocumented


def test_the_page_names_no_option_that_is_not_there() -> None:
    known = {
        name: {o for p in command.params for o in p.opts} for name, command in commands(typer.main.get_command(app))
    }
    for name, text in sections().items():
        if name in known:
            assert set(re.findall(r"^\| `(--[a-z-]+)", text, flags=re.MULTILINE)) <= known[name], name


def test_help_answers_without_loading_the_service() -> None:
    script = """
import sys
from typer.testing import CliRunner
from app.cli import app
result = CliRunner().invoke(app, ["--help"])
assert result.exit_code == 0, result.output
heavy = {"torch", "sqlalchemy", "fastapi", "pyarrow", "numpy", "pydantic"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_module_is_the_command_too() -> None:
    result = subprocess.run([sys.executable, "-m", "app.cli", "--help"], capture_output=True, text=True, check=True)
    for name in (
        "demo",
        "serve",
        "worker",
        "import",
        "export",
        "keys",
        "retrain",
        "models",
        "runs",
        "fetch",
        "migrate",
    ):
        assert f" {name} " in result.stdout
