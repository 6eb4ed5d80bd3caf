"""The container files name only what exists, and run only commands that the command line knows."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from app.cli import app
from app.settings import Settings

ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Each instruction and its arguments, continued lines joined and comments left out."""
    text = re.sub(r"\\\n", " ", dockerfile.read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def assert_command_exists(command: list[str]) -> None:
    assert command[0] == "shortlist"
    result = CliRunner().invoke(app, [*command[1:], "--help"])
    assert result.exit_code == 0, result.output


def assert_setting_exists(variable: str) -> None:
    assert variable.removeprefix("SHORTLIST_").lower() in Settings.model_fields, variable


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_names_what_exists(dockerfile: Path) -> None:
    for name, arguments in instructions(dockerfile):
        match name:
            case "COPY":
                for source in shlex.split(arguments)[:-1]:
                    assert (ROOT / source).exists(), f"{dockerfile.name} copies {source}"
            case "ENV":
                for assignment in shlex.split(arguments):
                    variable = assignment.split("=")[0]
                    if variable.startswith("SHORTLIST_"):
                        assert_setting_exists(variable)
            case "CMD":
                assert_command_exists(json.loads(arguments))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_installs_extras_that_exist(dockerfile: Path) -> None:
    import tomllib

    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (extras,) = re.findall(r"'\.\[([a-z0-9,]+)\]'", dockerfile.read_text())
    assert set(extras.split(",")) <= set(known)


@pytest.mark.parametrize("name", ["service", "worker"])
def test_compose_service_is_built_and_started_from_what_exists(name: str) -> None:
    service = COMPOSE["services"][name]
    assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).resolve() in DOCKERFILES
    assert_command_exists(service["command"])
    for variable in service["environment"]:
        if variable.startswith("SHORTLIST_"):
            assert_setting_exists(variable)
    for dependency in service["depends_on"]:
        assert dependency in COMPOSE["services"]


def test_compose_volumes_are_declared() -> None:
    used = {volume.split(":")[0] for service in COMPOSE["services"].values() for volume in service.get("volumes", [])}
    assert used == set(COMPOSE["volumes"])


def test_compose_asks_for_every_secret_and_the_example_names_them_all() -> None:
    text = (ROOT / "docker" / "compose.yaml").read_text()
    asked = set(re.findall(r"\$\{([A-Z_]+):\?", text))
    example = (ROOT / "docker" / "compose.env.example").read_text()
    assert asked == set(re.findall(r"^([A-Z_]+)=", example, flags=re.MULTILINE))


def test_compose_comment_commands_exist() -> None:
    for line in (ROOT / "docker" / "compose.yaml").read_text().splitlines():
        if match := re.search(r"run --rm service (shortlist .*)", line):
            command = shlex.split(match[1])
            assert_command_exists(command[:3])
