"""Ranking losses over raw scores of one observed item and its sampled ones.

Shapes, everywhere: `positive` (..., 1) and `negative` (..., samples) broadcast against each other; `valid`, where
given, is False for a sampled score that must not count; `weight` (..., 1) weighs examples. Each returns a scalar, the
weighted mean over examples, in nats where it is a likelihood. An example without any valid sample has loss
zero, except with `bce_loss`, where the observed item counts by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def bpr_loss(positive: Tensor, negative: Tensor, valid: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Rank observed items above sampled ones: the mean of -log sigmoid(positive - negative).

    Source: Rendle et al. 2009, BPR-OPT (the prior is the optimiser's L2 over the rows of the batch).
    """
    return _example_mean(_sample_mean(functional.softplus(negative - positive), valid), weight)


def weighted_bpr_loss(
    positive: Tensor, negative: Tensor, valid: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """BPR with each sample weighed by the softmax of the samples' scores, which no gradient passes through.

    Source: Rendle et al. 2009 for the pair; Sun et al. 2019 (RotatE, self-adversarial sampling) for the
    weights, with temperature one.
    """
    scores = negative.detach()
    if valid is not None:
        # A finite floor: were all samples invalid, -inf would give NaN.
        scores = scores.masked_fill(~valid, torch.finfo(scores.dtype).min)
    shares = scores.softmax(-1)
    if valid is not None:
        shares = shares * valid
    return _example_mean((shares * functional.softplus(negative - positive)).sum(-1, keepdim=True), weight)


def hinge_loss(
    positive: Tensor,
    negative: Tensor,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    margin: float = 1.0,
) -> Tensor:
    """Push sampled items a margin below observed ones: the mean of max(margin - positive + negative, 0).

    Source: Dive into Deep Learning, Personalized Ranking (hinge loss); Weston et al. 2010 without the rank weight.
    """
    return _example_mean(_sample_mean((margin - positive + negative).relu(), valid), weight)


def softmax_loss(
    positive: Tensor, negative: Tensor, valid: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Pick the observed item out of the list: the mean of -log softmax(positive over itself and its samples).

    Source: the top-one likelihood of Cao et al. 2007 (ListNet) with one relevant item, over samples as in
    Jean et al. 2015.
    """
    if valid is not None:
        # A finite floor counts as nothing beside a real score, and gives zero, not NaN, when no sample is valid.
        negative = negative.masked_fill(~valid, torch.finfo(negative.dtype).min / 2)
    others = _log_sum_exp(negative)
    return _example_mean(functional.softplus(others - positive), weight)


def bce_loss(positive: Tensor, negative: Tensor, valid: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Tell observed from sampled items one by one: the mean of the cross-entropies of label 1 and of labels 0.

    The mean is over all samples of an example, the observed one included.
    Source: He et al. 2017, equation 7.
    """
    observed, sampled = functional.softplus(-positive), functional.softplus(negative)
    if valid is None:
        means = (observed + sampled.sum(-1, keepdim=True)) / (1 + sampled.shape[-1])
    else:
        total = observed + sampled.masked_fill(~valid, 0.0).sum(-1, keepdim=True)
        means = total / (1 + valid.sum(-1, keepdim=True))
    return _example_mean(means, weight)


def triplet_loss(
    positive: Tensor,
    negative: Tensor,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    margin: float = 1.0,
) -> Tensor:
    """Bring observed items nearer than sampled ones by a margin: the mean of max(d(u, i) - d(u, j) + margin, 0),
    where d is the squared distance of the user's and the item's vectors.

    Takes minus the squared distances as scores, which is what a model with `similarity="distance"` gives.
    Source: Schroff et al. 2015 (FaceNet); for users and items Hsieh et al. 2017, without the rank weight.
    """
    return hinge_loss(positive, negative, valid, weight, margin=margin)


# Losses that take a margin are called with it.
LOSSES = {"bpr": bpr_loss, "weighted_bpr": weighted_bpr_loss, "softmax": softmax_loss, "bce": bce_loss}
MARGIN_LOSSES = {"hinge": hinge_loss, "triplet": triplet_loss}


def _log_sum_exp(values: Tensor) -> Tensor:
    """torch.logsumexp over the last dimension, (..., 1), several times as fast where some values are far below others.

    On a CPU the plain exponential is slow where it underflows, as at scores that must not count; log_softmax is not.
    """
    highest = values.detach().argmax(-1, keepdim=True)
    return values.gather(-1, highest) - values.log_softmax(-1).gather(-1, highest)


def _sample_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """The mean over valid samples, (..., 1); zero where there is none."""
    if valid is None:
        return values.mean(-1, keepdim=True)
    valid = valid.expand_as(values)
    return values.masked_fill(~valid, 0.0).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)


def _example_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return values.mean()
    weight = weight.expand_as(values)
    return (values * weight).sum() / weight.sum().clamp(min=torch.finfo(values.dtype).tiny)
