"""The models, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ml.models.caser import Caser, CaserConfig
from ml.models.matrix_factorization import MatrixFactorization, MatrixFactorizationConfig
from ml.models.neumf import NeuMF, NeuMFConfig
from ml.models.popularity import Popularity, PopularityConfig
from ml.models.ranking_model import FewEncoder, InnerProducts, RankingModel

__all__ = [
    "CONFIGS",
    "MODELS",
    "Caser",
    "CaserConfig",
    "FewEncoder",
    "InnerProducts",
    "MatrixFactorization",
    "MatrixFactorizationConfig",
    "ModelConfig",
    "NeuMF",
    "NeuMFConfig",
    "Popularity",
    "PopularityConfig",
    "RankingModel",
    "build_model",
    "grown_from",
    "read_config",
]

ModelConfig = NeuMFConfig | CaserConfig | MatrixFactorizationConfig | PopularityConfig

MODELS: dict[str, type[RankingModel]] = {
    "neumf": NeuMF,
    "caser": Caser,
    "matrix_factorization": MatrixFactorization,
    "popularity": Popularity,
}

CONFIGS: dict[str, type[ModelConfig]] = {
    "neumf": NeuMFConfig,
    "caser": CaserConfig,
    "matrix_factorization": MatrixFactorizationConfig,
    "popularity": PopularityConfig,
}


def read_config(name: str, values: Mapping[str, Any]) -> ModelConfig:
    """Make a model's configuration from a mapping, as read from JSON."""
    if name not in CONFIGS:
        raise ValueError(f"unknown model {name!r}; the models are {', '.join(CONFIGS)}")
    kind: Any = CONFIGS[name]
    if name == "caser" and "window_length" in values:
        # Versions from before horizontal filters had a length of their own: they saw the whole window.
        values = {"horizontal_length": values["window_length"], **values}
    valid = [field.name for field in fields(kind)]
    if unknown := sorted(set(values) - set(valid)):
        raise ValueError(f"{name} has no {', '.join(unknown)}; it has {', '.join(valid) or 'nothing to set'}")
    config: ModelConfig = kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    return config


def build_model(
    name: str, num_users: int, num_items: int, config: ModelConfig | Mapping[str, Any] | None = None
) -> RankingModel:
    """Make a model with fresh weights, from its configuration or the same as a mapping."""
    if config is None or isinstance(config, Mapping):
        config = read_config(name, config or {})
    if name not in MODELS or not isinstance(config, CONFIGS[name]):
        raise ValueError(f"there is no model {name!r} that takes a {type(config).__name__}")
    return MODELS[name](num_users, num_items, config)


def grown_from(
    previous: RankingModel, fresh: RankingModel, user_rows: npt.NDArray[np.int64], item_rows: npt.NDArray[np.int64]
) -> RankingModel:
    """Start a fresh model from an earlier one's weights; rows that the earlier one lacks stay as they are.

    `user_rows` (num_users,) and `item_rows` (num_items,) say which row of the earlier model a user or item had, -1
    for none. Rows past those (padding, the unknown user) are carried over. Returns `fresh`.
    """
    if type(previous) is not type(fresh) or previous.config != fresh.config:
        raise ValueError("a warm start needs the same model with the same configuration")
    old = previous.state_dict()
    state = fresh.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            if name in (*fresh.user_tables, *fresh.item_tables):
                is_user = name in fresh.user_tables
                rows = torch.as_tensor(user_rows if is_user else item_rows, dtype=torch.int64)
                known = rows >= 0
                value[: len(rows)][known] = old[name][rows[known]]
                size, before = (
                    (fresh.num_users, previous.num_users) if is_user else (fresh.num_items, previous.num_items)
                )
                value[size:] = old[name][before:]
            elif value.shape == old[name].shape:
                value.copy_(old[name])
    return fresh
