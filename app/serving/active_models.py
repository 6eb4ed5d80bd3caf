"""The version that answers: SQL names it, a new one is loaded beside the old, and one reference is swapped."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property

import numpy as np
import pyarrow as pa
import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Connection

from app.erasure import subject_sha256
from app.serving.candidates import Candidates, ItemIndices
from app.serving.catalog import Catalog
from app.serving.cursors import digest
from app.serving.history import ItemNumbers
from app.tables import model_versions
from ml import retrieval
from ml.prepared import Way
from ml.recommender import Recommender
from ml.registry import Manifest, Registry
from ml.store import Store

log = structlog.get_logger(__name__)

# A version that failed to load may have been hidden by an outage of the store: it is tried again this often.
RETRY_SECONDS = 30.0
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FIRST_RANKINGS = 4
FIRST_K = 100
REMEMBERED_USERS = 20_000

_POINTER = sa.select(model_versions.c.version).where(model_versions.c.state == "active")


@dataclass(frozen=True)
class Active:
    """One version as it serves. A request takes this object once and asks nothing else of the model."""

    version: str
    recommender: Recommender
    manifest: Manifest
    candidates: Candidates
    item_indices: ItemIndices
    erasures_through: int  # what was erased up to here was not in the training data
    seconds: float  # that one ranking takes
    known_users: dict[str, int] = field(default_factory=dict)  # indices of those asked for lately

    @property
    def data_through(self) -> str | None:
        return self.manifest.trained_through

    @cached_property
    def digest(self) -> bytes:
        """What stands for the version in cursors."""
        return digest(self.version)

    @cached_property
    def microseconds_through(self) -> int | None:
        """The same in microseconds since 1970, as histories count."""
        if self.data_through is None:
            return None
        return (datetime.fromisoformat(self.data_through) - EPOCH) // timedelta(microseconds=1)


@dataclass(frozen=True)
class LoadFailure:
    """Why the version that should be active is not."""

    version: str
    reason: str
    at: float  # monotonic


class ActiveModels:
    """Follows the active version. `current` is one reference; `poll` may be called from any thread."""

    def __init__(
        self,
        registry: Registry,
        store: Store,
        catalog: Catalog,
        *,
        retrieval_from: int,
        on_ranked: Callable[[Way], None],
    ) -> None:
        """`retrieval_from` items are ranked through an index; `on_ranked` hears how each ranking found its items."""
        self.current: Active | None = None
        self.failure: LoadFailure | None = None
        self.swaps = 0
        self._registry = registry
        self._store = store
        self._catalog = catalog
        self._retrieval_from = retrieval_from
        self._on_ranked = on_ranked
        self._lock = threading.Lock()

    def poll(self, connection: Connection) -> None:
        """Load the version that SQL names, if it is another one; a version that cannot be loaded changes nothing."""
        wanted = connection.execute(_POINTER).scalar_one_or_none()
        connection.rollback()  # loading takes long; the database need not wait
        with self._lock:
            self._follow(wanted)

    def _follow(self, wanted: str | None) -> None:
        current = self.current
        if wanted == (current.version if current is not None else None):
            self.failure = None
            return
        if wanted is None:
            self.current, self.failure = None, None
            log.info("no_active_version")
            return
        failure = self.failure
        if failure is not None and failure.version == wanted and time.monotonic() - failure.at < RETRY_SECONDS:
            return
        try:
            loaded = self._load(wanted)
        except Exception as error:  # whatever is wrong with a version, the one that serves goes on
            self.failure = LoadFailure(wanted, f"{type(error).__name__}: {error}", time.monotonic())
            log.error("version_not_loaded", version=wanted, serving=current and current.version, reason=str(error))
            return
        self.current, self.failure = loaded, None
        self.swaps += 1
        log.info("version_active", version=wanted, before=current and current.version)

    def _load(self, version: str) -> Active:
        recommender, manifest = self._registry.load(version)
        through = self._erasures_through(manifest)
        candidates = Candidates(recommender.items, self._catalog, through)
        recommender.prepare(probes=self._probes(recommender, manifest), on_ranked=self._on_ranked)
        seconds = _ranking_seconds(recommender)
        # What the texts of all items took meanwhile: kept for later, it is 100 bytes an item.
        pa.default_memory_pool().release_unused()
        return Active(
            version, recommender, manifest, candidates, ItemIndices(recommender.items, candidates), through, seconds
        )

    def _probes(self, recommender: Recommender, manifest: Manifest) -> int | None:
        """How many lists of an index to look into; None where the exact path serves."""
        if recommender.num_items < self._retrieval_from or manifest.retrieval is None:
            return None
        probes = retrieval.probes_worth(manifest.retrieval)
        if probes is None:
            log.warning("retrieval_falls_short", version=manifest.version, recall=manifest.retrieval.get("recall"))
        elif not retrieval.is_installed():
            log.warning(
                "retrieval_not_installed", version=manifest.version, advice="pip install 'shortlist[retrieval]'"
            )
            return None
        return probes

    def _erasures_through(self, manifest: Manifest) -> int:
        if manifest.snapshot is None:
            return 0
        try:
            watermark = json.loads(self._store.get(f"snapshots/{manifest.snapshot}.json"))["watermark"]
            return int(watermark["erasures_through"])
        except (KeyError, ValueError, TypeError, OSError):  # collected, or made elsewhere: drop all that was erased
            return 0

    def keep_up(self, items: ItemNumbers) -> None:
        """Take in what is new of the catalogue, and of items that histories name, so that no request has to."""
        active = self.current
        if active is not None:
            active.candidates.allowed()
            active.item_indices.keep_up(items)

    def look_up(self, user_ids: Sequence[str]) -> None:
        """Find users in the version before they ask."""
        active = self.current
        if active is not None:
            for user_id in user_ids:
                self.user_index(active, user_id)

    def user_index(self, active: Active, user_id: str) -> int:
        """The user's index in a version; -1 if the version was not trained on it, or it was erased since."""
        if self._catalog.erased_users:
            erased = self._catalog.erased_users.get(subject_sha256(user_id))
            if erased is not None and erased > active.erasures_through:
                return -1
        known = active.known_users
        index = known.get(user_id)
        if index is None:
            if len(known) >= REMEMBERED_USERS:
                known.clear()
            index = known[user_id] = active.recommender.users.index(user_id)
        return index


def _ranking_seconds(recommender: Recommender) -> float:
    """Rank a few times: the first one allocates and touches every page, which no request should wait for."""
    if not recommender.num_items or not (recommender.num_users or recommender.folds_in):
        return 0.0
    user, nothing = 0 if recommender.num_users else -1, np.zeros(0, np.int64)
    taken = []
    for _ in range(FIRST_RANKINGS):
        began = time.perf_counter()
        recommender.top_k([user], [nothing], [nothing], min(FIRST_K, recommender.num_items))
        taken.append(time.perf_counter() - began)
    return min(taken)
