"""The version that answers: SQL names it, a new one is loaded beside the old, and one reference is swapped."""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Connection

from app.erasure import subject_sha256
from app.serving.catalog import Catalog
from app.tables import model_versions
from ml.ids import IdMap
from ml.recommender import Recommender
from ml.registry import Manifest, Registry
from ml.store import Store

log = structlog.get_logger(__name__)

Mask = npt.NDArray[np.bool_]

# A version that failed to load may have been hidden by an outage of the store: it is tried again this often.
RETRY_SECONDS = 30.0
REMEMBERED_CATEGORIES = 64
REMEMBERED_ITEMS = 100_000
MANY_IDS = 500

_POINTER = sa.select(model_versions.c.version).where(model_versions.c.state == "active")


class ItemIndices:
    """Items as a version knows them. Those seen lately are kept, so that a request need not search the id map."""

    def __init__(self, items: IdMap) -> None:
        self._items = items
        self._known: dict[str, int] = {}

    def __call__(self, item_ids: Iterable[str]) -> npt.NDArray[np.int64]:
        """The indices in the given order, without those of items that the version does not know."""
        known = self._known
        wanted = list(item_ids)
        missing = [item_id for item_id in wanted if item_id not in known]
        if len(missing) > MANY_IDS:  # one pass over the whole map; not kept, or a caller's list would push out the rest
            indices = self._items.indices(wanted)
            return indices[indices >= 0]
        if len(known) + len(missing) > REMEMBERED_ITEMS:
            known = self._known = {}  # a new one: other threads may be in the middle of reading the old
            missing = wanted
        for item_id in missing:
            known[item_id] = self._items.index(item_id)
        indices = np.fromiter((known[item_id] for item_id in wanted), np.int64, len(wanted))
        return indices[indices >= 0]


class Candidates:
    """Which items of one version may be shown now: in the catalogue, not hidden, not erased since its training."""

    def __init__(self, items: IdMap, catalog: Catalog, erasures_through: int) -> None:
        self._items = items
        self._catalog = catalog
        self._lock = threading.Lock()
        self._dropped: Mask = np.zeros(len(items), np.bool_)
        self._revision = -1
        self._allowed: Mask = self._dropped
        self._of_category: OrderedDict[str, tuple[int, Mask]] = OrderedDict()
        erased = {subject for subject, sequence in catalog.erased_items.copy().items() if sequence > erasures_through}
        if erased:
            indices = range(len(items))
            self._dropped[[index for index in indices if subject_sha256(items.id(index)) in erased]] = True
        self.allowed(None)

    def allowed(self, category: str | None) -> Mask:
        """A mask over the version's items that the caller must not change."""
        with self._lock:
            if self._revision != self._catalog.revision:
                self._follow()
            if category is None:
                return self._allowed
            revision, mask = self._of_category.get(category, (-1, self._allowed))
            if revision != self._revision:
                mask = np.zeros(len(self._items), np.bool_)
                members = self._items.indices(self._catalog.in_category(category))
                mask[members[members >= 0]] = True
                mask &= self._allowed
                self._of_category[category] = (self._revision, mask)
                if len(self._of_category) > REMEMBERED_CATEGORIES:
                    self._of_category.popitem(last=False)
            self._of_category.move_to_end(category)
            return mask

    def _follow(self) -> None:
        revision = self._catalog.revision
        changes = self._catalog.changes_since(self._revision) if self._revision >= 0 else None
        if changes is None:
            visible = [item_id for item_id, entry in self._catalog.entries.copy().items() if not entry.hidden]
            allowed = np.zeros(len(self._items), np.bool_)
            indices = self._items.indices(visible)
            allowed[indices[indices >= 0]] = True
        else:
            allowed = self._allowed.copy()
            item_ids = [change.item_id for change in changes]
            indices = self._items.indices(item_ids)
            for change, index in zip(changes, indices.tolist(), strict=True):
                if index >= 0:
                    self._dropped[index] |= change.erased
                    allowed[index] = self._catalog.visible(change.item_id)
        self._allowed = allowed & ~self._dropped
        self._revision = revision


@dataclass(frozen=True)
class Active:
    """One version as it serves. A request takes this object once and asks nothing else of the model."""

    version: str
    recommender: Recommender
    manifest: Manifest
    candidates: Candidates
    item_indices: ItemIndices
    erasures_through: int  # what was erased up to here was not in the training data

    @property
    def data_through(self) -> str | None:
        return self.manifest.trained_through


@dataclass(frozen=True)
class LoadFailure:
    """Why the version that should be active is not."""

    version: str
    reason: str
    at: float  # monotonic


class ActiveModels:
    """Follows the active version. `current` is one reference; `poll` may be called from any thread."""

    def __init__(self, registry: Registry, store: Store, catalog: Catalog) -> None:
        self.current: Active | None = None
        self.failure: LoadFailure | None = None
        self.swaps = 0
        self._registry = registry
        self._store = store
        self._catalog = catalog
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
        active = Active(version, recommender, manifest, candidates, ItemIndices(recommender.items), through)
        # The first ranking allocates and touches every page: no request should wait for it.
        if recommender.num_items and (recommender.num_users or recommender.folds_in):
            user = 0 if recommender.num_users else -1
            recommender.top_k([user], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 1)
        return active

    def _erasures_through(self, manifest: Manifest) -> int:
        if manifest.snapshot is None:
            return 0
        try:
            watermark = json.loads(self._store.get(f"snapshots/{manifest.snapshot}.json"))["watermark"]
            return int(watermark["erasures_through"])
        except (KeyError, ValueError, TypeError, OSError):  # collected, or made elsewhere: drop all that was erased
            return 0

    def user_index(self, active: Active, user_id: str) -> int:
        """The user's index in a version; -1 if the version was not trained on it, or it was erased since."""
        if self._catalog.erased_users:
            erased = self._catalog.erased_users.get(subject_sha256(user_id))
            if erased is not None and erased > active.erasures_through:
                return -1
        return active.recommender.users.index(user_id)
