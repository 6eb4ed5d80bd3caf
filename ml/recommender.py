"""A model with its id maps: the one object that ranks, in evaluation and in the service alike."""

import threading
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ml.fold_in import MAX_EVENTS, PRIOR_STRENGTH, FoldIn
from ml.ids import IdMap
from ml.interactions import Interactions
from ml.models import RankingModel
from ml.prepared import MOST_TOGETHER, Prepared, Way
from ml.screening import AnyIndices, ScoresNotNumbers

__all__ = ["Ranker", "Recommender", "ScoresNotNumbers", "best", "windows_from_histories", "windows_from_interactions"]

Indices: TypeAlias = npt.NDArray[np.int64]

UNKNOWN = -1
_NEVER = float("-inf")


def windows_from_histories(histories: Sequence[AnyIndices], length: int, padding: int) -> Indices:
    """Cut the last `length` items of each history, oldest first, padded on the left; negative items are left out.

    Shape (len(histories), length).
    """
    windows = np.full((len(histories), length), padding, np.int64)
    if length == 0:
        return windows
    for window, history in zip(windows, histories, strict=True):
        if count := min(len(history), length):
            window[-count:] = history[-count:]
    for row in np.flatnonzero(windows.min(1) < 0).tolist() if len(windows) else ():
        whole = np.asarray(histories[row], np.int64)
        known = whole[whole >= 0][-length:]
        windows[row, : length - len(known)], windows[row, length - len(known) :] = padding, known
    return windows


def windows_from_interactions(interactions: Interactions, users: AnyIndices, length: int) -> Indices:
    """Cut the last `length` items of each user's interactions, as `windows_from_histories` does, without a loop."""
    rows = np.asarray(users, np.int64)
    padding = interactions.num_items
    if length == 0 or len(interactions) == 0:
        return np.full((len(rows), length), padding, np.int64)
    starts, ends = interactions.offsets[rows], interactions.offsets[rows + 1]
    positions = ends[:, None] - length + np.arange(length)
    inside = positions >= starts[:, None]
    return np.where(inside, interactions.item_index[np.where(inside, positions, 0)], padding).astype(np.int64)


def best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k highest of each row, best first, the lower index first where scores tie.

    Scores of minus infinity are never chosen: such places hold index -1. Raises ScoresNotNumbers.
    """
    count = min(k + 1, scores.shape[1])
    values, indices = torch.topk(scores, count, dim=1)
    if count == 0:
        return values, indices
    if bool(torch.isnan(values[:, 0]).any()):  # the largest of all to topk
        raise ScoresNotNumbers
    # One more than asked for shows a tie across the end of the list, which topk settles as it likes.
    finite = values > _NEVER
    tied = ((values[:, 1:] == values[:, :-1]) & finite[:, 1:]).any(dim=1)
    if not bool(tied.any()):
        return values[:, :k], indices[:, :k].masked_fill(~finite[:, :k], UNKNOWN)
    rows = torch.nonzero(tied).flatten()
    chosen = _settle(scores[rows], values[rows], indices[rows], k)
    values, indices = values[:, :k].clone(), indices[:, :k].clone()
    values[rows], indices[rows] = chosen
    return values, indices.masked_fill(values == _NEVER, UNKNOWN)


def _settle(scores: Tensor, values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose among equal scores the lower indices, and list them in that order."""
    if values.shape[1] > k:
        last = values[:, k - 1 : k]
        places = torch.arange(scores.shape[1], device=scores.device, dtype=torch.int32)
        # The lowest indices among those that tie for the end of the list, in order.
        ends = torch.topk(torch.where(scores == last, -places, -scores.shape[1]), k, dim=1)[1]
        above = (values[:, :k] > last).sum(1, keepdim=True)
        place = torch.arange(k, device=scores.device)
        indices = torch.where(place < above, indices[:, :k], ends.gather(1, (place - above).clamp(min=0)))
    indices = indices.sort(dim=1)[0]
    values, order = scores.gather(1, indices).sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)


class Ranker(Protocol):
    """What evaluation asks of a recommender."""

    @property
    def num_items(self) -> int: ...

    @property
    def window_length(self) -> int: ...

    @property
    def folds_in(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...

    def encode_windows(self, user_index: Indices, windows: Indices) -> Tensor: ...

    def score_all(self, encoded: Tensor) -> Tensor: ...

    def score_items(self, encoded: Tensor, items: Indices) -> npt.NDArray[np.float32]: ...


class Recommender:
    """Rank a model's whole catalogue for users; safe to call from several threads at once."""

    def __init__(
        self,
        model: RankingModel,
        users: IdMap,
        items: IdMap,
        *,
        trained_users: npt.NDArray[np.bool_] | None = None,
        prior_strength: float = PRIOR_STRENGTH,
    ) -> None:
        """`trained_users` (num_users,) are those whose rows the training has seen; all of them if None.

        `prior_strength` is that of folding in, which `ml.fold_in.chosen_strength` chooses.
        """
        if len(users) != model.num_users or len(items) != model.num_items:
            raise ValueError(
                f"the model has {model.num_users} users and {model.num_items} items, "
                f"its id maps {len(users)} and {len(items)}"
            )
        self.model = model.eval()
        self.users = users
        self.items = items
        tensor = next(chain[Tensor](model.parameters(), model.buffers()), None)
        self.device = torch.device("cpu") if tensor is None else tensor.device
        self._trained_users = trained_users
        self.prior_strength = prior_strength
        self._prepared: Prepared | None = None
        self._fold_in: FoldIn | None = None
        self._fold_in_lock = threading.Lock()

    def prepare(
        self,
        *,
        screened_from: int | None = None,
        probes: int | None = None,
        on_ranked: Callable[[Way], None] = lambda way: None,  # noqa: ARG005
    ) -> None:
        """Build what ranking for one user at a time needs to be fast, once the weights are final; see Prepared.

        Without it, every item is scored for every ranking. Without `probes`, the lists are the same, ties within
        rounding aside.
        """
        if self.model.fits_strangers:
            self._folding_in()
        if self.device.type == "cpu":
            self._prepared = Prepared(self.model, screened_from=screened_from, probes=probes, on_ranked=on_ranked)

    @property
    def retrieves(self) -> bool:
        """Whether candidates come from an approximate index."""
        return self._prepared is not None and self._prepared.retrieves

    @property
    def num_users(self) -> int:
        """The number of users the model was trained on."""
        return self.model.num_users

    @property
    def num_items(self) -> int:
        """The size of the catalogue that is ranked."""
        return self.model.num_items

    @property
    def window_length(self) -> int:
        """How many of the latest items of a history count; 0 if none. To some models only those of strangers do."""
        return max(self.model.window_length, MAX_EVENTS if self.model.fits_strangers else 0)

    @property
    def folds_in(self) -> bool:
        """Whether a user the model was not trained on can be ranked for from the history alone."""
        return bool(self.model.folds_in)

    def encode(
        self, user_index: AnyIndices, histories: Sequence[AnyIndices], fresh: Sequence[int] | None = None
    ) -> Tensor:
        """Compute what the model knows of each user, (batch, width), for `top` and `score_items`.

        `histories` are item indices, oldest first; negative ones (items the model does not know) are passed over.
        `user_index` -1 is a user unknown to the model; ValueError unless the model folds in. `fresh` counts the latest
        items of each history that came after the training: they move users of a model that looks at no window.
        """
        whole = windows_from_histories(histories, self.window_length, self.num_items)
        encoded = self.encode_windows(user_index, whole)
        if fresh is None or not self.model.fits_strangers:
            return encoded
        moved = [row for row, count in enumerate(fresh) if count > 0 and user_index[row] >= 0]
        if not moved:
            return encoded
        news = [np.asarray(histories[row], np.int64)[-fresh[row] :] for row in moved]
        windows = torch.from_numpy(windows_from_histories(news, self.window_length, self.num_items)).to(self.device)
        with torch.inference_mode():
            encoded = encoded.clone()
            encoded[moved] = self._folding_in().moved(encoded[moved], windows)
            return encoded

    def top(
        self,
        encoded: Tensor,
        excluded: Sequence[AnyIndices],
        k: int,
        allowed: npt.NDArray[np.bool_] | None = None,
    ) -> tuple[Indices, npt.NDArray[np.float32]]:
        """Choose the k best items for each encoded user, best first, the lower index first where scores tie.

        `excluded` are item indices never returned; `allowed` (num_items,) limits the catalogue. Items are -1 and scores
        minus infinity where fewer than k remain. Returns items (batch, k) and scores (batch, k).
        """
        if k < 1:
            raise ValueError("k must be at least 1")
        if self._prepared is not None and self._prepared.is_exhaustive and len(encoded) <= MOST_TOGETHER:
            return self._prepared.top_of_all(encoded, excluded, k, allowed)
        outs = [np.asarray(items, np.int64) for items in excluded]
        outs = [out if not len(out) or out.min() >= 0 else out[out >= 0] for out in outs]
        with torch.inference_mode():
            chosen = np.full((len(encoded), k), UNKNOWN, np.int64)
            kept = np.full((len(encoded), k), _NEVER, np.float32)
            if self._prepared is not None and not self._prepared.is_exhaustive:
                for row, out in enumerate(outs):
                    found, values = self._prepared.top(encoded[row : row + 1], out, k, allowed)
                    chosen[row, : len(found)], kept[row, : len(found)] = found, values
                return chosen, kept
            scores = self.score_all(encoded)
            for row, out in enumerate(outs):
                if len(out):
                    scores[row, torch.from_numpy(out).to(self.device)] = _NEVER
            if allowed is not None:
                scores.masked_fill_(torch.from_numpy(~allowed).to(self.device), _NEVER)
            best_values, indices = best(scores, k)
            chosen[:, : indices.shape[1]] = indices.cpu().numpy()
            kept[:, : best_values.shape[1]] = best_values.cpu().numpy()
            return chosen, kept

    def top_k(
        self,
        user_index: AnyIndices,
        histories: Sequence[AnyIndices],
        excluded: Sequence[AnyIndices],
        k: int,
        allowed: npt.NDArray[np.bool_] | None = None,
    ) -> tuple[Indices, npt.NDArray[np.float32]]:
        """Choose the k best items for each user: `top` of what `encode` gives."""
        return self.top(self.encode(user_index, histories), excluded, k, allowed)

    def score_items(self, encoded: Tensor, items: AnyIndices) -> npt.NDArray[np.float32]:
        """Score `items` (batch, n) or (n,) for encoded users: (batch, n); minus infinity where an item is negative."""
        asked = np.asarray(items, np.int64)
        with torch.inference_mode():
            scores = self.model.score(encoded, torch.from_numpy(np.maximum(asked, 0)).to(self.device))
            return np.where(asked < 0, np.float32(_NEVER), scores.float().cpu().numpy())

    def item_vectors(self, items: AnyIndices) -> npt.NDArray[np.float32]:
        """Vectors (n, d) of `items` (n,) whose cosine says how alike they are; ValueError for popularity."""
        with torch.inference_mode():
            indices = torch.from_numpy(np.asarray(items, np.int64)).to(self.device)
            vectors: npt.NDArray[np.float32] = self.model.item_vectors(indices).float().cpu().numpy()
            return vectors

    def score_all(self, encoded: Tensor) -> Tensor:
        """Score the whole catalogue: float32 (batch, num_items), for the caller to change within inference mode."""
        with torch.inference_mode():
            scores: Tensor = self.model.score_all(encoded)
            # An expanded row (popularity) must not be written to.
            return scores.float().contiguous() if scores.stride(0) else scores.float().clone()

    def encode_windows(self, user_index: AnyIndices, windows: Indices) -> Tensor:
        """The same as `encode`, from the windows that `windows_from_interactions` cuts."""
        users = np.array(user_index, np.int64)
        strangers = users < 0
        if strangers.any():
            if not self.folds_in:
                raise ValueError("this model cannot rank for a user it was not trained on")
            if self.model.fits_strangers:
                return self._encode_strangers(users, windows, strangers)
            users = np.where(strangers, self.num_users, users)
        if self._prepared is not None and (few := self._prepared.encode(users, windows)) is not None:
            return few
        with torch.inference_mode():
            encoded: Tensor = self.model.encode(
                torch.from_numpy(users).to(self.device), torch.from_numpy(windows).to(self.device)
            )
            return encoded

    def _encode_strangers(self, users: Indices, windows: Indices, strangers: npt.NDArray[np.bool_]) -> Tensor:
        """The same where some are strangers, whose vectors are fitted."""
        with torch.inference_mode():
            fitted = self._folding_in().encode(torch.from_numpy(windows[strangers]).to(self.device))
            if strangers.all():
                return fitted
            encoded: Tensor = self.model.encode(
                torch.from_numpy(np.maximum(users, 0)).to(self.device), torch.from_numpy(windows).to(self.device)
            )
            encoded[torch.from_numpy(strangers).to(self.device)] = fitted
            return encoded

    def _folding_in(self) -> FoldIn:
        """Made when the first stranger comes, and kept: the model's weights do not change any more."""
        if self._fold_in is None:
            with self._fold_in_lock:
                if self._fold_in is None:
                    self._fold_in = FoldIn(self.model, self._trained_users, strength=self.prior_strength)
        return self._fold_in
