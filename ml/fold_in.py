"""Folding in: a vector for a user whom the model was never trained on, fitted to their few events, items frozen."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ml.interactions import Interactions
from ml.models.ranking_model import RankingModel

# How much the crowd speaks against the events of one user where nobody has chosen; how far the crowd's centre may move
# to what it chooses.
PRIOR_STRENGTH = 3.0
CENTRE_STRENGTH = 0.03
# What `chosen_strength` chooses from, by what came after so many events of so many users. The crowd counts most at
# first; above 4, ten events say too little.
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
CHOSEN_AFTER, CHOSEN_BY, FEWEST_TO_CHOOSE = (1, 3), 500, 50
# An event that n of the user's are newer than weighs (1 + n) ** -RECENCY of what all of n events weigh, n ** EVIDENCE.
RECENCY, EVIDENCE = 1.0, 0.8
# How far the events since the training move a user who has a row, in steps of what they say of a stranger.
NEWS_WEIGHT = 4.0
# The directions in which users differ that are fitted; in all others a stranger is like everybody.
DIRECTIONS = 32
# Only the latest events count, which bounds the time of a fit however long a history is.
MAX_EVENTS = 100
# Newton's steps, at most, until they are smaller than a thousandth of how far users differ; four do for most strangers.
MOST_STEPS, SMALL_STEP = 30, 1e-3
# Users that the crowd is measured by, and items that stand for the catalogue beside which events were chosen.
CROWD = 65_536
MAX_ITEMS = 4_096
# Strangers that are fitted side by side.
CHUNK = 16


class FoldIn:
    """Fits strangers to the frozen items of one model; safe to call from several threads at once.

    Events are taken for draws from the softmax of the scores over the catalogue, and a stranger for a draw from a
    normal distribution: its covariance is that of the trained users, its centre is where the scores come nearest to
    what all of them chose. The fit is the most likely vector: a logistic regression with a prior, which Newton's
    method solves, always alike. Scores that are not linear in what a model knows of a user (NeuMF's tower) follow
    their tangent at the mean user while fitting.
    Source: maximum a posteriori with an empirical prior and Newton's method (Bishop 2006, 4.3.3 to 4.4 and 3.5).
    """

    def __init__(
        self,
        model: RankingModel,
        trained_users: npt.NDArray[np.bool_] | None = None,
        *,
        strength: float = PRIOR_STRENGTH,
    ) -> None:
        """`trained_users` (num_users,) are those whose rows the training has seen; all of them if None."""
        self._model = model
        self._strength = strength
        with torch.no_grad():
            crowd = self._crowd(trained_users)
            mean = crowd.mean(0)
            spread = (crowd - mean) / len(crowd) ** 0.5
            items, shares = self._stand_ins(mean.float())
            slopes, offsets = (part.double() for part in model.linear_scores(mean.float(), items))
            offsets = offsets - shares.log()
            # Steps of length one along the basis are as wide as the crowd is there.
            basis = _root(spread.T @ spread)
            mean = mean + basis @ self._centre(slopes @ basis, offsets + slopes @ mean, items, shares)
            logits = offsets + slopes @ mean
            # Turned so that what moves the scores of likely items most comes first.
            _, turned = torch.linalg.eigh(_curvature(slopes @ basis, logits.softmax(0)))
            basis = basis @ turned.flip(1)[:, :DIRECTIONS]
            self._tangent_at = crowd.mean(0).float()
            self._mean, self._basis = mean.float(), basis.float()
            self._slopes, self._logits = (slopes @ basis).float(), logits.float()

    def encode(self, windows: Tensor) -> Tensor:
        """Fit strangers to their latest items (batch, length), padded in front with `num_items`: (batch, width)."""
        encoded: Tensor = self._mean + self._fitted(windows, self._strength) @ self._basis.T
        return encoded

    def moved(self, encoded: Tensor, windows: Tensor) -> Tensor:
        """Move users that were trained on (batch, width) by their latest items since then (batch, length), as above."""
        # A stranger who did nothing is at the mean, and how far news move was chosen for this one strength.
        moved: Tensor = encoded + NEWS_WEIGHT * self._fitted(windows, PRIOR_STRENGTH) @ self._basis.T
        return moved

    def log_chances(self, windows: Tensor, items: Tensor, strength: float) -> Tensor:
        """How likely strangers with these latest items (batch, length) were to take an item (batch,): logarithms."""
        fitted = self._fitted(windows, strength)
        with torch.no_grad():
            slopes, offsets = self._model.linear_scores(self._tangent_at, items)
            scores: Tensor = offsets + (slopes * (self._mean + fitted @ self._basis.T)).sum(1)
            chances: Tensor = scores - (fitted @ self._slopes.T + self._logits).logsumexp(1)
            return chances

    def _crowd(self, trained_users: npt.NDArray[np.bool_] | None) -> Tensor:
        """What the model knows of its users, or of as many as are needed, spread evenly: (users, width)."""
        model = self._model
        known = np.arange(model.num_users) if trained_users is None else np.flatnonzero(trained_users)
        known = known[:: -(-len(known) // CROWD)] if len(known) else np.arange(model.num_users)
        users = torch.from_numpy(known).to(model.counts.device)
        crowd: Tensor = model.encode(users, users.new_full((len(users), model.window_length), model.num_items))
        return crowd.double()

    def _stand_ins(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Items that stand for the catalogue, and the chance by which each got among them.

        Half are those of the highest scores, the others are spread evenly over the rest.
        """
        size, device = self._model.num_items, mean.device
        if size <= MAX_ITEMS:
            return torch.arange(size, device=device), torch.ones(size, device=device, dtype=torch.float64)
        order = self._model.score_all(mean.unsqueeze(0))[0].argsort(descending=True, stable=True)
        best, others = order[: MAX_ITEMS // 2], order[MAX_ITEMS // 2 :]
        step = -(-len(others) // (MAX_ITEMS // 2))
        rest = others[::step]
        shares = torch.ones(len(best) + len(rest), device=device, dtype=torch.float64)
        shares[len(best) :] = len(rest) / len(others)
        return torch.cat((best, rest)), shares

    def _centre(self, slopes: Tensor, logits: Tensor, items: Tensor, shares: Tensor) -> Tensor:
        """Where along the basis the softmax comes nearest to what all users chose: (directions,)."""
        chosen = self._model.counts[items].double() / shares
        where = slopes.new_zeros(slopes.shape[1])
        if not float(chosen.sum()) > 0:
            return where
        wanted = slopes.T @ (chosen / chosen.sum())

        def likelihood(place: Tensor) -> Tensor:
            return wanted @ place - (logits + slopes @ place).logsumexp(0) - CENTRE_STRENGTH / 2 * place.square().sum()

        for _ in range(MOST_STEPS):
            chances = (logits + slopes @ where).softmax(0)
            gradient = wanted - slopes.T @ chances - CENTRE_STRENGTH * where
            curvature = _curvature(slopes, chances)
            curvature.diagonal().add_(CENTRE_STRENGTH)
            step = torch.linalg.solve(curvature, gradient)
            # Halved as in a stranger's fit.
            while step.abs().amax() > SMALL_STEP and likelihood(where + step) < likelihood(where):
                step = step / 2
            where = where + step
            if step.abs().amax() <= SMALL_STEP:
                break
        return where

    def _fitted(self, windows: Tensor, strength: float) -> Tensor:
        """Where along the basis strangers are, (batch, directions)."""
        with torch.no_grad():
            return torch.cat([self._fit(part, strength) for part in torch.split(windows, CHUNK)])

    def _fit(self, windows: Tensor, strength: float) -> Tensor:
        windows = windows[:, -MAX_EVENTS:]
        known = windows < self._model.num_items
        age = known.flip(1).cumsum(1).flip(1).to(self._mean.dtype)  # 1 for the newest
        weights = torch.where(known, age.clamp(min=1) ** -RECENCY, 0.0)
        number = known.sum(1, keepdim=True).clamp(min=1)
        weights *= number**EVIDENCE / weights.sum(1, keepdim=True).clamp(min=1)
        taken = self._model.linear_scores(self._tangent_at, windows[known])[0] @ self._basis
        rows = known.nonzero()[:, 0]
        pull = taken.new_zeros(len(windows), self._basis.shape[1])
        pull.index_add_(0, rows, taken * weights[known].unsqueeze(1))
        total = weights.sum(1, keepdim=True)
        fitted = torch.zeros_like(pull)
        likelihood, logits = self._likelihood(fitted, pull, total, strength)
        moving = torch.ones_like(likelihood, dtype=torch.bool)
        for _ in range(MOST_STEPS):
            chances = logits.softmax(1)
            expected = chances @ self._slopes
            gradient = pull - total * expected - strength * fitted
            squares = torch.stack([(self._slopes * row.unsqueeze(1)).T @ self._slopes for row in chances])
            curvature = total.unsqueeze(2) * (squares - expected.unsqueeze(2) * expected.unsqueeze(1))
            curvature.diagonal(dim1=1, dim2=2).add_(strength)
            # Who has arrived stays there, so that nobody's fit depends on who else is fitted.
            step = torch.linalg.solve(curvature, gradient) * moving.unsqueeze(1)
            moving &= step.abs().amax(1) > SMALL_STEP
            likelihood_before = likelihood
            likelihood, logits = self._likelihood(fitted + step, pull, total, strength)
            # Far from the maximum a step can overshoot: it is halved until it leads upwards.
            while (is_worse := moving & (likelihood < likelihood_before)).any():
                step = torch.where(is_worse.unsqueeze(1), step / 2, step)
                likelihood, logits = self._likelihood(fitted + step, pull, total, strength)
                moving &= step.abs().amax(1) > SMALL_STEP
            fitted = fitted + step
            if not moving.any():
                break
        return fitted

    def _likelihood(self, fitted: Tensor, pull: Tensor, total: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """What the fit maximises, the likelihood's logarithm but for a constant (batch,), and the logits there."""
        logits = fitted @ self._slopes.T + self._logits
        prior = strength / 2 * fitted.square().sum(1)
        return (pull * fitted).sum(1) - total.squeeze(1) * logits.logsumexp(1) - prior, logits


def chosen_strength(model: RankingModel, interactions: Interactions, seed: int) -> float:
    """The strength under which, taken for strangers, users of the training most likely did what they did next.

    That they were trained on matters little: strangers choose much the same (docs/experiments.md). With too few users
    it is the usual one; of several processes, one chooses by its own users.
    """
    fitting, lengths = FoldIn(model.eval()), np.diff(interactions.offsets)
    device, drawn = model.counts.device, np.random.default_rng(seed)
    gained = dict.fromkeys(STRENGTHS, 0.0)
    for number in CHOSEN_AFTER:
        users = np.flatnonzero(lengths > number)
        if len(users) < FEWEST_TO_CHOOSE:
            break
        users = drawn.choice(users, min(CHOSEN_BY, len(users)), replace=False)
        taken = np.stack([interactions.history(user)[: number + 1] for user in users.tolist()]).astype(np.int64)
        items = torch.from_numpy(taken).to(device)
        for strength in STRENGTHS:
            gained[strength] += float(fitting.log_chances(items[:, :-1], items[:, -1], strength).mean())
    return max(gained, key=gained.__getitem__) if any(gained.values()) else PRIOR_STRENGTH


def _root(covariance: Tensor) -> Tensor:
    """A square root R of a covariance: R @ R.T is the covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root


def _curvature(slopes: Tensor, chances: Tensor) -> Tensor:
    """The covariance of the slopes where items are drawn by their chances."""
    mean = chances @ slopes
    covariance: Tensor = (slopes * chances.unsqueeze(1)).T @ slopes - mean.unsqueeze(1) * mean
    return covariance
