"""What a caller asks for."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from app.serving.filters import EVERY_CATEGORY, CategoryFilter

# Longer lists of excluded items enter the log as their length.
LOGGED_EXCLUDES = 100
# Asking for more items than this, or leaving out more, takes time.
FEW = 100


@dataclass(frozen=True)
class Query:
    """What a caller wants to be shown; all but `k`, `cursor` and `explain` stay the same from page to page."""

    k: int = 10
    categories: CategoryFilter = EVERY_CATEGORY
    exclude: frozenset[str] = frozenset()
    include_seen: bool = False
    diversity: float = 0.0
    max_per_category: int | None = None
    cursor: str | None = None
    explain: bool = False

    # Of a query string that comes again and again there is one object: what it is like is worked out once.
    @cached_property
    def is_diverse(self) -> bool:
        """Whether the order depends on more than the items' scores."""
        return self.diversity > 0 or self.max_per_category is not None

    @cached_property
    def is_simple(self) -> bool:
        """Whether it asks for nothing that takes time of its own."""
        few = self.k <= FEW and len(self.exclude) <= FEW
        by_category = bool(self.categories.any or self.categories.none)
        return few and self.cursor is None and not self.explain and not self.is_diverse and not by_category

    def filters_digest(self) -> bytes:
        """Eight bytes that two queries share if and only if their pages may follow one another."""
        unbounded = not self.categories and not self.exclude and not self.include_seen
        if unbounded and not self.is_diverse:
            return _NO_FILTERS
        return _digest(
            [
                *self.categories.as_logged().values(),
                sorted(self.exclude),
                self.include_seen,
                self.diversity,
                self.max_per_category,
            ]
        )

    def as_logged(self) -> dict[str, Any]:
        """The filters as the recommendation log keeps them."""
        return {
            "k": self.k,
            **self.categories.as_logged(),
            "exclude": sorted(self.exclude) if len(self.exclude) <= LOGGED_EXCLUDES else len(self.exclude),
            "include_seen": self.include_seen,
            "diversity": self.diversity,
            "max_per_category": self.max_per_category,
        }


def _digest(filters: list[Any]) -> bytes:
    return hashlib.blake2b(json.dumps(filters).encode(), digest_size=8).digest()


_NO_FILTERS = _digest([])
