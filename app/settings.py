"""Settings: the only reader of the environment. Each is described in docs/settings.md (a test holds it)."""

import dataclasses
import json
import math
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.identifiers import event_type_problem
from ml.snapshots import ANY_TYPE, DEFAULT_MEANINGS, RETRACT, EventMeaning


class Settings(BaseSettings):
    """Where the parts live and how they behave; `SHORTLIST_DATABASE_URL=…` sets `database_url`."""

    model_config = SettingsConfigDict(
        env_prefix="SHORTLIST_",
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        validate_default=True,
        # A wrong value may be a misplaced password: an error names the setting and never shows what it was.
        hide_input_in_errors=True,
    )

    data_dir: Path = Field(Path("data"), description="Folder of the database, snapshots, versions and run files.")
    database_url: SecretStr | None = Field(
        None,
        description="SQLAlchemy URL, `postgresql+psycopg://…` or `sqlite:///…`; SQLite under data_dir if unset.",
    )
    store_url: str | None = Field(
        None, description="Folder or `s3://bucket/prefix` of snapshots and versions; data_dir/store if unset."
    )
    host: str = Field("127.0.0.1", description="Address to listen on; other than loopback only once a key exists.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on.")
    workers: int = Field(1, ge=1, le=256, description="Serving processes; more than one needs PostgreSQL or one host.")
    embedded_worker: bool = Field(True, description="Run a training worker beside `shortlist serve`.")
    log_format: Literal["console", "json"] = Field("console", description="How log lines look: `console` or `json`.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least level logged.")
    access_log: bool = Field(False, description="Log every request (method, path, status, time); costs some speed.")
    max_body_bytes: int = Field(2_000_000, ge=1_000, description="Larger request bodies get 413.")
    max_import_bytes: int = Field(
        50_000_000,
        ge=1_000,
        description="Larger bodies of a bulk import over HTTP get 413; the command line has no bound.",
    )
    unknown_items: Literal["create", "hold", "reject"] = Field(
        "create",
        description="Feedback on an item not in the catalogue: create it, create it hidden, or reject the event.",
    )
    feedback_queue: int = Field(1_000, ge=1, description="Requests waiting for a commit before feedback gets 429.")
    event_meanings: dict[str, EventMeaning] = Field(
        default=dict(DEFAULT_MEANINGS),
        description="What event types mean, as JSON laid over the defaults; `*` is any type not listed.",
    )
    max_history: int = Field(1_000, ge=1, description="Newest interactions of a user that ranking looks at.")
    resurface_after_days: float | None = Field(
        None, ge=0, description="Items that a user has seen may come again after so many days; never if unset."
    )
    resurface_discount: float = Field(
        0.5, ge=0, le=1, description="Share of its lead over an average item that a returning item loses."
    )
    exploration_share: float = Field(
        0.0, ge=0, le=0.5, description="Share of the places in recommendations that is given to rarely chosen items."
    )
    exploration_below: int = Field(
        5, ge=1, description="Items with fewer interactions than this count as rarely chosen."
    )
    retrieval_from: int = Field(
        1_000_000,
        ge=100_000,
        description="From so many items on, candidates come from an approximate index where the version measured that "
        "it finds 99 % of the exact first 100.",
    )
    model_poll_seconds: float = Field(1.0, gt=0, description="How often a process looks for a new active version.")
    key_cache_seconds: float = Field(5.0, gt=0, le=10, description="How long a checked key is trusted without SQL.")
    lease_seconds: float = Field(30.0, gt=0, description="A run whose worker is silent this long is taken up again.")
    max_attempts: int = Field(3, ge=1, description="Claims of a run before it counts as failed.")
    retention_days: float = Field(30.0, ge=0, description="Age at which unused parts and retired versions are removed.")

    @field_validator("event_meanings", mode="before")
    @classmethod
    def _without_typos(cls, given: object) -> object:
        known = [field.name for field in dataclasses.fields(EventMeaning)]
        for event_type, meaning in given.items() if isinstance(given, dict) else ():
            for name in meaning if isinstance(meaning, dict) else ():
                if name not in known:
                    raise ValueError(f"{event_type!r} has an unknown property {name!r}; known are {', '.join(known)}")
        return given

    @field_validator("event_meanings")
    @classmethod
    def _over_the_defaults(cls, given: dict[str, EventMeaning]) -> dict[str, EventMeaning]:
        for event_type, meaning in given.items():
            if event_type == RETRACT:
                raise ValueError(f"`{RETRACT}` always takes an event back and cannot mean anything else")
            if event_type != ANY_TYPE and (problem := event_type_problem(event_type)):
                raise ValueError(f"{event_type!r} cannot be an event type: it {problem}")
            if not (math.isfinite(meaning.weight) and meaning.weight > 0):
                raise ValueError(f"the weight of {event_type!r} must be a positive number")
            if meaning.minimum_value is not None and not math.isfinite(meaning.minimum_value):
                raise ValueError(f"the minimum value of {event_type!r} must be a finite number")
        return {**DEFAULT_MEANINGS, **given}

    @cached_property
    def resolved_database_url(self) -> str:
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{(self.data_dir / 'shortlist.sqlite3').absolute()}"

    @cached_property
    def resolved_store_url(self) -> str:
        return self.store_url or str((self.data_dir / "store").absolute())

    def as_environment(self) -> dict[str, str]:
        """The variables that give a child process the same settings."""
        plain = self.model_dump(mode="json", include=self.model_fields_set)
        if self.database_url is not None:
            plain["database_url"] = self.database_url.get_secret_value()
        return {
            f"SHORTLIST_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
            for name, value in plain.items()
            if value is not None
        }

    @property
    def runs_dir(self) -> Path:
        return self.data_dir / "runs"
