"""The code in the pages by task runs, against a service on this machine, and answers look as the pages show them."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from app.security import create_key
from app.tables import events
from shortlist_client import Client, Event

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("clients/*/*.md")]
FILMS = {
    "alien": ["horror", "science fiction"],
    "aliens": ["horror", "science fiction"],
    "dune": ["science fiction"],
    "solaris": ["science fiction"],
    "stalker": ["science fiction"],
    "psycho": ["horror", "thriller"],
    "vertigo": ["thriller"],
    "memento": ["thriller"],
    "heat": ["crime", "thriller"],
    "fargo": ["comedy", "crime"],
    "clue": ["comedy"],
    "airplane": ["comedy"],
}


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """The pages are the same on either database."""
    return sqlite_url


class Page:
    """The code blocks of a page, run one after another as its reader would."""

    def __init__(self, path: Path, address: str, key: str) -> None:
        text = path.read_text(encoding="utf-8").replace("http://127.0.0.1:8000", address)
        # What a page may not wait for, a busy machine may well need.
        text = text.replace("timeout=0.5", "timeout=60")
        self.blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
        self.key = key
        self.names: dict[str, Any] = {"key": key}

    def run(self) -> None:
        answered = None
        for language, code in self.blocks:
            match language:
                case "sh":
                    answered = self._shell(code)
                case "json":
                    assert alike(json.loads(code), answered), f"the page shows {code}, and this came: {answered}"
                case "python":
                    exec(compile(code, "page", "exec"), self.names)
                case _:
                    raise AssertionError(f"nothing runs {language}")

    def _shell(self, code: str) -> Any:
        environment = {"PATH": os.environ["PATH"], "KEY": self.key, "no_proxy": "127.0.0.1"}
        command = ["bash", "-euo", "pipefail", "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        answer = json.loads(done.stdout)
        assert "status" not in answer, answer  # a problem document
        return answer

    def close(self) -> None:
        for client in self.names.values():
            if isinstance(client, Client):
                client.close()


def alike(shown: Any, came: Any) -> bool:
    """Whether two answers have the same names and kinds of values, whatever the values; anything may be null."""
    if shown is None or came is None:
        return True
    if isinstance(shown, dict) and isinstance(came, dict):
        return shown.keys() == came.keys() and all(alike(part, came[name]) for name, part in shown.items())
    if isinstance(shown, list) and isinstance(came, list):
        return all(alike(part, came[0]) for part in shown) if came else not shown
    numbers = (int, float)
    return type(shown) is type(came) or (type(shown) in numbers and type(came) in numbers)


@pytest.fixture
def films(publish: Any) -> None:
    publish.catalogue(FILMS, FILMS)
    publish("v1", list(FILMS))


@pytest.fixture
def page(
    films: None, address: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], dict[str, Any]]]:
    """`page("log-a-click.md")` runs its code and gives the names that it made."""
    pages: list[Page] = []

    def run(path: str) -> dict[str, Any]:
        key = create_key(engine, "shop", ["admin"]).key
        monkeypatch.setenv("SHORTLIST_KEY", key)
        pages.append(Page(ROOT / path, address, key))
        pages[-1].run()
        return pages[-1].names

    yield run
    for one in pages:
        one.close()


def stored(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(sa.select(events).order_by(events.c.position)))


def test_show_recommendations(page: Callable[[str], dict[str, Any]]) -> None:
    names = page("docs/tasks/show-recommendations.md")
    recommendation_id, items = names["shelf"]("anna", ["alien", "dune"])
    assert recommendation_id
    assert len(items) == 6
    assert not {"alien", "dune"} & set(items)
    assert {"thriller"} <= {category for item in names["thrillers"].items for category in FILMS[item.item_id]}
    assert len({item.item_id for part in (names["first"], names["more"]) for item in part.items}) == 12


def test_log_a_click(page: Callable[[str], dict[str, Any]], engine: Engine) -> None:
    names = page("docs/tasks/log-a-click.md")
    rows = [(row.user_id, row.item_id, row.type) for row in stored(engine)]
    assert rows == [
        ("anna", "alien", "click"),
        ("anna", "solaris", "view"),
        ("anna", "stalker", "purchase"),
        ("ben", "dune", "purchase"),
        ("anna", "dune", "click"),
        ("anna", "dune", "retract"),
    ]
    assert stored(engine)[0].recommendation_id == "8128e386-bc20-4ef0-b725-f5213adba9a9"
    shown = {item.item_id for item in names["shortlist"].recommendations("anna", k=12).items}
    assert shown == FILMS.keys() - {"alien", "solaris", "stalker"}


def test_a_visitor_without_an_account(page: Callable[[str], dict[str, Any]], address: str, engine: Engine) -> None:
    with Client(address) as client:  # no key was made yet
        client.feedback_many(Event("ben", item_id, "view") for item_id in ("alien", "heat"))
        while len(client.popular(window_hours=1).items) < 2:  # counted within `model_poll_seconds`
            continue
    names = page("docs/tasks/visitor-without-account.md")
    assert (names["for_you"].source, len(names["for_you"].items)) == ("folded_in", 6)
    assert (names["beside"].source, len(names["beside"].items)) == ("model", 4)
    assert not [item for item in names["new"].items if "horror" in FILMS[item.item_id]]
    assert (names["before"].source, names["after"].source) == ("popular", "folded_in")
    assert not {"alien", "solaris"} & {item.item_id for item in names["after"].items}
    kept = [(row.user_id, row.item_id) for row in stored(engine) if row.user_id != "ben"]
    assert kept == [("anna", "alien"), ("anna", "solaris")]


def test_why_this_item(page: Callable[[str], dict[str, Any]], address: str, engine: Engine) -> None:
    chosen = ["alien", "stalker", "heat", "clue"]
    with Client(address) as client:  # no key was made yet
        client.feedback_many(Event("anna", item_id, "view") for item_id in chosen)
    names = page("docs/tasks/why-this-item.md")
    assert len(names["lines"]) == 2
    assert all(line.startswith("Because you chose") for line in names["lines"].values())
    named = {one.item_id for item in names["shown"].items for one in item.reason.because}
    assert named <= set(chosen)


def test_the_readme_of_the_client(page: Callable[[str], dict[str, Any]], engine: Engine) -> None:
    page("clients/python/README.md")
    assert [row.item_id for row in stored(engine)] == ["dune"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    )
    inside = [link.partition("#")[0] for link in links if "://" not in link]
    assert [link for link in inside if link and not (path.parent / link).exists()] == []
