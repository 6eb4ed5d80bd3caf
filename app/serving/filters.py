"""What a caller wants of the items: which categories, which items not."""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CategoryFilter:
    """Which items may come, by their categories; the empty filter admits every item."""

    any: frozenset[str] = frozenset()  # at least one of these
    all: frozenset[str] = frozenset()  # every one of these
    none: frozenset[str] = frozenset()  # not one of these

    def __bool__(self) -> bool:
        return bool(self.any or self.all or self.none)

    def admits(self, categories: Collection[str]) -> bool:
        """Whether an item of these categories may come."""
        return (
            (not self.any or not self.any.isdisjoint(categories))
            and self.all.issubset(categories)
            and self.none.isdisjoint(categories)
        )

    def as_logged(self) -> dict[str, list[str]]:
        """The filter as the recommendation log keeps it."""
        return {
            "categories_any": sorted(self.any),
            "categories_all": sorted(self.all),
            "categories_none": sorted(self.none),
        }

    def __str__(self) -> str:
        parts = [
            f"{word} the categories {', '.join(map(repr, sorted(categories)))}"
            for word, categories in (("any of", self.any), ("all of", self.all), ("none of", self.none))
            if categories
        ]
        return " and ".join(parts)


EVERY_CATEGORY = CategoryFilter()
