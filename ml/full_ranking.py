"""What evaluation reads from the scores of a batch of users: where targets stand, and which items come first.

Scores are float32 (users, items), minus infinity where an item is not ranked.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ml.metrics import ABSENT
from ml.recommender import Indices, best
from ml.screening import ScoresNotNumbers, best_of_each

_NEVER = float("-inf")
# Classes of items, for each item of a list, whose highest scores put a floor under the list's last.
_CLASSES = 8


def take_out(scores: Tensor, rows: npt.NDArray[Any], items: npt.NDArray[Any]) -> None:
    """Rank no item of a (row, item) pair."""
    places = rows * scores.shape[1] + items
    flat = scores.view(-1)
    if scores.device.type == "cpu":
        flat.numpy()[places] = _NEVER
    else:
        flat[_on(places, scores)] = _NEVER


def counts_of_ranked(scores: Tensor) -> Indices:
    """Count the items that are ranked, for each row."""
    counts: Indices = _count(torch.gt, scores, scores.new_full((len(scores),), _NEVER)).cpu().numpy()
    return counts


def ranks_of(scores: Tensor, rows: Indices, items: Indices) -> Indices:
    """Count what stands above each (row, item): higher scores, and equal ones of a lower index; rows are sorted.

    ABSENT where the item is not ranked. Raises ScoresNotNumbers.
    """
    row, item = _on(rows, scores), _on(items, scores)
    own = scores[row, item]
    if bool(own.isnan().any()):
        raise ScoresNotNumbers
    if len(rows) == len(scores):  # one target a user, as after leave-one-out: no sorting
        above, at_least = _count(torch.gt, scores, own), _count(torch.ge, scores, own)
    else:
        above, at_least = _counts_by_sorting(scores, row, own)
    tied = torch.nonzero((at_least > above + 1) & (own > _NEVER)).flatten()
    places = torch.arange(scores.shape[1], device=scores.device)
    for part in torch.split(tied, len(scores)) if len(tied) else ():
        same = scores[row[part]] == own[part].unsqueeze(1)
        above[part] += (same & (places < item[part].unsqueeze(1))).sum(1)
    above[own == _NEVER] = ABSENT
    ranks: Indices = above.cpu().numpy()
    return ranks


def first_items(scores: Tensor, k: int) -> Indices:
    """The k items that rank first in each row, best first: (rows, k), -1 where fewer are ranked."""
    if scores.device.type != "cpu":
        found: Indices = best(scores, min(k, scores.shape[1]))[1].cpu().numpy()
        return found
    return _first_of_many(scores, k)


def _first_of_many(scores: Tensor, k: int) -> Indices:
    """The same on a CPU: the k-th highest among the highest scores of many classes of items lets few items through."""
    rows, size = scores.shape
    values, classes = scores.numpy(), _CLASSES * k
    if size < 2 * classes:
        return best_of_each(values, k)[0]
    whole = size // classes * classes
    highest = scores[:, :whole].view(rows, -1, classes).amax(1)
    rest = highest[:, : size - whole]
    torch.maximum(rest, scores[:, whole:], out=rest)
    floors = np.partition(highest.numpy(), classes - k, axis=1)
    highest_of_all = floors[:, classes - k :]
    if np.isnan(highest_of_all).any():  # the highest of all to partition, in any order
        raise ScoresNotNumbers
    lowest = np.maximum(highest_of_all[:, 0], np.finfo(np.float32).min)
    found = np.flatnonzero(values >= lowest[:, None])
    row, item = np.divmod(found, size)
    counts = np.bincount(row, minlength=rows)
    if counts.max(initial=0) > classes:  # many tie, or few have a score
        return best_of_each(values, k)[0]
    place = np.arange(len(found)) - (np.cumsum(counts) - counts)[row]
    few = np.full((rows, max(int(counts.max(initial=0)), k)), np.float32(_NEVER))
    items = np.full(few.shape, -1, np.int64)
    few[row, place], items[row, place] = values.reshape(-1)[found], item
    # Places are in the order of items, so that ties are settled as they should be.
    return np.take_along_axis(items, np.argsort(-few, axis=1, kind="stable")[:, :k], axis=1)


def _count(compare: Callable[[Tensor, Tensor], Tensor], scores: Tensor, bounds: Tensor) -> Tensor:
    """Count the scores of each row that compare to the row's bound as asked: torch.gt or torch.ge."""
    if scores.device.type != "cpu":
        return compare(scores, bounds.unsqueeze(1)).view(torch.uint8).sum(1, dtype=torch.int32).long()
    # numpy compares twice as fast, and counts bits ten times as fast as torch sums booleans.
    in_numpy = np.greater if compare is torch.gt else np.greater_equal
    bits = np.packbits(in_numpy(scores.numpy(), bounds.numpy()[:, None]), axis=1)
    return torch.from_numpy(np.bitwise_count(bits).sum(1, dtype=np.int64))


def _counts_by_sorting(scores: Tensor, row: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Count, for several targets a row, the scores above and those not below each.

    Sorting bare values once a row and searching each target in them costs less than a pass for every target.
    """
    on_cpu = scores.device.type == "cpu"
    ascending = torch.from_numpy(np.sort(scores.numpy(), axis=1)) if on_cpu else scores.sort(dim=1)[0]
    counts = torch.bincount(row, minlength=len(scores))
    column = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    wanted = scores.new_zeros(len(scores), int(counts.max()))
    wanted[row, column] = own
    size = scores.shape[1]
    above = size - torch.searchsorted(ascending, wanted, right=True)[row, column]
    at_least = size - torch.searchsorted(ascending, wanted)[row, column]
    return above, at_least


def _on(indices: npt.NDArray[Any], like: Tensor) -> Tensor:
    return torch.from_numpy(indices.astype(np.int64)).to(like.device)
