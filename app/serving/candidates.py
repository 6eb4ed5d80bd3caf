"""Which items of a loaded version may be shown now, and how the version numbers them."""

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.erasure import subject_sha256
from app.serving.catalog import Catalog, Change
from app.serving.filters import EVERY_CATEGORY, CategoryFilter
from app.serving.history import ItemNumbers, Numbers
from ml.ids import IdMap

Mask = npt.NDArray[np.bool_]

REMEMBERED_ITEMS = 100_000
MANY_IDS = 500
LOOKED_UP_AT_ONCE = 5_000
# Masks are kept up to this size in all, and never more than so many.
REMEMBERED_MASK_BYTES = 64_000_000
REMEMBERED_MASKS = 256
# After more changes than that at once, masks of categories are made anew when asked for.
MANY_CHANGES = 1_000


class ItemIndices:
    """Items as a version knows them. Those seen lately are kept, so that a request need not search the id map.

    An item that was erased since the training is not known: what stands under its id now is another thing.
    """

    def __init__(self, items: IdMap, candidates: "Candidates") -> None:
        self._items = items
        self._candidates = candidates
        self._known: dict[str, int] = {}
        self._named: dict[int, str] = {}
        self._of_number: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._numbered = 0
        # Taken together, an array of many texts would be made without letting the event loop in between; on the other
        # hand each look-up takes a pass over the version's.
        self._step = max(LOOKED_UP_AT_ONCE, len(items))
        self._lock = threading.Lock()

    def names(self, indices: npt.NDArray[np.int64]) -> list[str]:
        """The ids of items."""
        known, wanted = self._named, indices.tolist()
        if missing := [index for index in wanted if index not in known]:
            if len(known) + len(missing) > REMEMBERED_ITEMS:
                known, missing = {}, wanted  # a new one: other threads may be in the middle of reading the old
            known.update(zip(missing, self._items.ids(missing), strict=True))
            self._named = known
        return [known[index] for index in wanted]

    def of_numbers(self, items: ItemNumbers, numbers: Numbers) -> npt.NDArray[np.int64]:
        """The indices of those that the version knows, by histories' numbers; of one ItemNumbers always."""
        if len(items) > self._numbered and len(numbers) and int(numbers.max()) >= self._numbered:
            self.keep_up(items)
        indices = self._of_number[numbers]
        return self._candidates.not_erased(indices[indices >= 0])

    def latest_of_numbers(self, items: ItemNumbers, numbers: Numbers, count: int) -> npt.NDArray[np.int64]:
        """The last `count` of those, at least one."""
        count = max(count, 1)
        found = self.of_numbers(items, numbers[-2 * count :])
        if len(found) < count and len(numbers) > 2 * count:
            found = self.of_numbers(items, numbers)
        return found[-count:]

    def keep_up(self, items: ItemNumbers) -> None:
        """Look up the items that histories named since the last time."""
        with self._lock:
            first, last = self._numbered, len(items)
            if first == last:
                return
            if last > len(self._of_number):
                # A new one, with room: other threads may be in the middle of reading the old.
                larger = np.full(max(2 * last, 1_024), -1, np.int64)
                larger[:first] = self._of_number[:first]
                self._of_number = larger
            for start in range(first, last, self._step):
                end = min(start + self._step, last)
                self._of_number[start:end] = self._items.indices(items.item_ids[start:end])
                self._numbered = end

    def __call__(self, item_ids: Collection[str]) -> npt.NDArray[np.int64]:
        """The indices of those that the version knows; of more than MANY_IDS in any order, and each once."""
        if len(item_ids) > MANY_IDS:  # not kept, or a caller's list would push out the rest
            return self._candidates.not_erased(self._items.members(item_ids))
        known = self._known
        missing = [item_id for item_id in item_ids if item_id not in known]
        if len(known) + len(missing) > REMEMBERED_ITEMS:
            known = self._known = {}  # a new one: other threads may be in the middle of reading the old
            missing = list(item_ids)
        for item_id in missing:
            known[item_id] = self._items.index(item_id)
        indices = np.fromiter((known[item_id] for item_id in item_ids), np.int64, len(item_ids))
        return self._candidates.not_erased(indices[indices >= 0])

    def in_order(self, item_ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """The indices of those that the version knows, in the order given and each as often."""
        if len(item_ids) <= MANY_IDS:
            return self(item_ids)
        indices = self._items.indices(item_ids)
        return self._candidates.not_erased(indices[indices >= 0])

    def of_each(self, item_ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """The index of each, -1 where the version does not know it."""
        indices = self._items.indices(item_ids)
        known = indices >= 0
        known[known] = ~self._candidates.erased(indices[known])
        return np.where(known, indices, -1)


@dataclass(frozen=True, slots=True)
class Allowed:
    """The items of a version that may be shown: a mask that nobody may change, and how many it lets through."""

    mask: Mask
    count: int
    revision: int  # of the catalogue


class Candidates:
    """Which items of one version may be shown now: in the catalogue, not hidden, not erased since its training."""

    def __init__(self, items: IdMap, catalog: Catalog, erasures_through: int) -> None:
        self._items = items
        self._catalog = catalog
        self._lock = threading.Lock()
        self._erasures_through = erasures_through
        self._dropped: Mask = np.zeros(len(items), np.bool_)
        self._every = Allowed(self._dropped, 0, revision=-1)
        # Members of a category, hidden ones included: changed in place as the catalogue changes.
        self._of_category: OrderedDict[str, Mask] = OrderedDict()
        self._of_filter: OrderedDict[CategoryFilter, Allowed] = OrderedDict()
        # In the catalogue and visible, but none of the version's: in the order they came.
        self._unseen: dict[str, None] = {}
        self._capacity = min(REMEMBERED_MASKS, max(4, REMEMBERED_MASK_BYTES // max(2 * len(items), 1)))
        self._any_dropped = False
        self.allowed()

    def allowed(self, categories: CategoryFilter = EVERY_CATEGORY) -> Allowed:
        """What may be shown of these categories; kept until an item of the version changes."""
        every = self._every
        if not categories and every.revision == self._catalog.revision:
            return every
        with self._lock:
            if self._every.revision != self._catalog.revision:
                self._follow()
            if not categories:
                return self._every
            found = self._of_filter.get(categories)
            if found is None:
                mask = self._filtered(categories)
                found = Allowed(mask, int(np.count_nonzero(mask)), self._every.revision)
                self._of_filter[categories] = found
                if len(self._of_filter) > self._capacity:
                    self._of_filter.popitem(last=False)
            self._of_filter.move_to_end(categories)
            return found

    def erased(self, indices: npt.NDArray[np.int64]) -> Mask:
        """Which of these items were erased since the training, (n,)."""
        self.allowed()
        return self._dropped[indices]

    def not_erased(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The others of them."""
        self.allowed()
        return indices[~self._dropped[indices]] if self._any_dropped else indices

    @property
    def changes_behind(self) -> int:
        """How many changes of the catalogue the next request has to follow."""
        return self._catalog.revision - self._every.revision

    @property
    def unseen_count(self) -> int:
        """How many of `unseen` there were at the last request."""
        return len(self._unseen)

    def unseen(self) -> list[str]:
        """Items that may be shown and that the version was not trained on, in the order they came."""
        self.allowed()
        with self._lock:
            return list(self._unseen)

    def _filtered(self, categories: CategoryFilter) -> Mask:
        mask = self._every.mask.copy()
        for category in categories.all:
            mask &= self._members(category)
        for category in categories.none:
            mask &= ~self._members(category)
        if categories.any:
            some = np.zeros(len(self._items), np.bool_)
            for category in categories.any:
                some |= self._members(category)
            mask &= some
        return mask

    def _members(self, category: str) -> Mask:
        mask = self._of_category.get(category)
        if mask is None:
            mask = np.zeros(len(self._items), np.bool_)
            members = self._items.indices(self._catalog.in_category(category))
            mask[members[members >= 0]] = True
            self._of_category[category] = mask
            if len(self._of_category) > self._capacity:
                self._of_category.popitem(last=False)
        self._of_category.move_to_end(category)
        return mask

    def _follow(self) -> None:
        before, revision = self._every, self._catalog.revision
        changes = self._catalog.changes_since(before.revision) if before.revision >= 0 else None
        if changes is None:
            self._drop_erased()
            visible = [item_id for item_id, entry in self._catalog.entries.copy().items() if not entry.hidden]
            mask = np.zeros(len(self._items), np.bool_)
            indices = self._items.indices(visible)
            mask[indices[indices >= 0]] = True
            numbered = zip(visible, indices.tolist(), strict=True)
            self._unseen = {item_id: None for item_id, index in numbered if index < 0 or self._dropped[index]}
            self._of_category.clear()
        else:
            indices = self._items.indices([change.item_id for change in changes])
            known: list[tuple[Change, int]] = []
            entries, unseen = self._catalog.entries, self._unseen
            for change, index in zip(changes, indices.tolist(), strict=True):
                if index >= 0:
                    known.append((change, index))
                    self._dropped[index] |= change.erasure > self._erasures_through
                entry = entries.get(change.item_id)
                if entry is not None and not entry.hidden and (index < 0 or self._dropped[index]):
                    unseen[change.item_id] = None
                else:
                    unseen.pop(change.item_id, None)
            if not known:  # items that the version does not know change nothing here
                self._every = Allowed(before.mask, before.count, revision)
                return
            self._any_dropped = bool(self._dropped.any())
            mask = before.mask.copy()
            for change, index in known:
                mask[index] = self._catalog.visible(change.item_id)
            self._move_between_categories(known)
        mask &= ~self._dropped
        self._of_filter.clear()
        self._every = Allowed(mask, int(np.count_nonzero(mask)), revision)

    def _drop_erased(self) -> None:
        """Look through all ids: only hashes are kept of what was erased."""
        through, erasures = self._erasures_through, self._catalog.erased_items.copy()
        if erased := {subject for subject, sequence in erasures.items() if sequence > through}:
            indices = range(len(self._items))
            self._dropped[[index for index in indices if subject_sha256(self._items.id(index)) in erased]] = True
        self._any_dropped = bool(self._dropped.any())

    def _move_between_categories(self, changes: list[tuple[Change, int]]) -> None:
        if len(changes) > MANY_CHANGES:
            self._of_category.clear()
            return
        indices = [index for _, index in changes]
        entries = [self._catalog.entries.get(change.item_id) for change, _ in changes]
        for category, mask in self._of_category.items():
            mask[indices] = [entry is not None and category in entry.categories for entry in entries]
