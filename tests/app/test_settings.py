"""Settings are documented one by one with their defaults, validated, and never shown with their secrets."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import Settings
from ml.snapshots import DEFAULT_MEANINGS, EventMeaning

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
ROW = re.compile(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", re.MULTILINE)


def shown(default: object) -> str:
    if default is None:
        return "unset"
    return f"`{str(default).lower()}`" if isinstance(default, bool) else f"`{default}`"


def test_every_setting_is_documented_with_its_default() -> None:
    documented = {name: (default, text) for name, default, text in ROW.findall(PAGE.read_text().split("## ")[0])}
    expected = {
        name: ("see below" if name == "event_meanings" else shown(field.default), field.description)
        for name, field in Settings.model_fields.items()
    }
    assert documented == expected


def test_the_meanings_shown_are_the_defaults() -> None:
    for event_type, meaning in DEFAULT_MEANINGS.items():
        flags = f"{str(meaning.in_history).lower()} | {str(meaning.excludes).lower()} |"
        minimum = "null" if meaning.minimum_value is None else meaning.minimum_value
        row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{event_type}`"))
        assert row.endswith(f"| {meaning.weight} | {minimum} | {flags}")


def test_the_environment_sets_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHORTLIST_PORT", "9000")
    monkeypatch.setenv("SHORTLIST_HOST", "")
    (tmp_path / ".env").write_text("SHORTLIST_PORT=9001\nSHORTLIST_MAX_HISTORY=7\n")
    settings = Settings()
    assert (settings.port, settings.host, settings.max_history) == (9000, "127.0.0.1", 7)


def test_meanings_are_laid_over_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORTLIST_EVENT_MEANINGS", '{"rating": {"minimum_value": 4}, "dislike": {"excludes": false}}')
    assert Settings().event_meanings == {
        "*": EventMeaning(),
        "impression": EventMeaning(in_history=False, excludes=False),
        "dislike": EventMeaning(excludes=False),
        "rating": EventMeaning(minimum_value=4),
    }


@pytest.mark.parametrize(
    ("meanings", "message"),
    [
        ('{"retract": {}}', "always takes an event back"),
        ('{"a b": {}}', "cannot be an event type"),
        ('{"like": {"weight": 0}}', "positive number"),
        ('{"like": {"weight": NaN}}', "positive number"),
        ('{"like": {"minimum_value": Infinity}}', "finite number"),
        ('{"like": {"wieght": 2}}', "unknown property 'wieght'"),
        ('{"like": 2}', "dictionary or an instance"),
        ("[]", "dictionary"),
    ],
)
def test_meanings_that_make_no_sense_are_refused(meanings: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORTLIST_EVENT_MEANINGS", meanings)
    with pytest.raises(ValidationError, match=message):
        Settings()


def test_secrets_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(database_url="postgresql://shortlist:hunter2@db/shortlist")
    assert "hunter2" not in repr(settings) + str(settings) + settings.model_dump_json()
    assert settings.resolved_database_url == "postgresql://shortlist:hunter2@db/shortlist"
    monkeypatch.setenv("SHORTLIST_PORT", "hunter2")
    with pytest.raises(ValidationError) as raised:
        Settings()
    assert "port" in str(raised.value)
    assert "hunter2" not in str(raised.value)
