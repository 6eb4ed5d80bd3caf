"""Recipes: named, typed training configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ml.models import (
    CONFIGS,
    CaserConfig,
    MatrixFactorizationConfig,
    ModelConfig,
    NeuMFConfig,
    PopularityConfig,
    read_config,
)

Loss = Literal["bpr", "weighted_bpr", "hinge", "triplet", "softmax", "bce"]
Sampling = Literal["uniform", "popularity", "semi_hard", "hard"]
Schedule = Literal["constant", "cosine"]
Precision = Literal["float32", "bfloat16"]
# The smallest value of every number in a recipe or a model's configuration, and whether it may be reached.
_MINIMUM: dict[str, tuple[float, bool]] = {
    "margin": (0, True), "negatives": (1, True), "pool": (0, True), "popularity_power": (0, True), "targets": (1, True),
    "learning_rate": (0, False), "l2": (0, True), "batch_size": (1, True), "epochs": (1, True), "patience": (1, True),
    "factors": (1, True), "tower_factors": (1, True), "hidden": (1, True), "window_length": (1, True),
    "horizontal_length": (1, True), "horizontal_filters": (1, True), "vertical_filters": (1, True),
    "dropout": (0, True), "initial_scale": (0, False), "embedding_dropout": (0, True), "unknown_user_share": (0, True),
    "recency": (0, True), "user_balance": (0, True),
}  # fmt: skip
# The largest value of those that take memory or time or leave the range of float32; what is above is a mistake.
_MAXIMUM = {
    "window_length": 1_000, "horizontal_length": 1_000, "factors": 65_536, "tower_factors": 65_536, "hidden": 65_536,
    "horizontal_filters": 65_536, "vertical_filters": 65_536, "targets": 65_536, "epochs": 100_000, "patience": 100_000,
    "negatives": 1_000_000, "pool": 1_000_000, "batch_size": 10_000_000, "margin": 1_000_000, "popularity_power": 10,
    "l2": 1_000, "initial_scale": 1_000, "recency": 10, "user_balance": 10,
}  # fmt: skip
_MAXIMUM_CHARACTERS = 200
# A warm start's shares of the epochs and of the learning rate; chosen on validation, docs/experiments.md.
_WARM_EPOCHS, _WARM_RATE = 1 / 8, 0.2
_BELOW_ONE = ("dropout", "embedding_dropout", "unknown_user_share")


def _values(settings: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(settings, field.name)) for field in fields(settings)]


def _check_number(key: str, value: Any) -> None:
    minimum, reachable = _MINIMUM[key]
    for number in value if isinstance(value, tuple) else (value,):
        # Written so that NaN fails too.
        if not (number >= minimum if reachable else number > minimum) or number == float("inf"):
            raise ValueError(f"{key} must be {'at least' if reachable else 'more than'} {minimum:g}, not {number}")
        if key in _MAXIMUM and number > _MAXIMUM[key]:
            raise ValueError(f"{key} must be at most {_MAXIMUM[key]:,}, not {number:,}")
        if key in _BELOW_ONE and not number < 1:
            raise ValueError(f"{key} must be below 1, not {number}")


@dataclass(frozen=True)
class Recipe:
    """How a model is made and trained.

    `negatives` sampled items an example, `shared_negatives` one draw for the whole batch, which is the catalogue itself
    where that is no larger; "hard" and "semi_hard" choose them from `pool` uniform ones by the model's own scores.
    `targets` items after a window are learnt at once, against the same samples; without a window, that many of a
    user's items. `batch_size` counts targets. An epoch shows each item as a target once.
    An example that n of its user's are newer than weighs (1 + n) ** -recency, where the data are in order; one of m
    examples of its user weighs m ** -user_balance.
    With the "cosine" schedule the learning rate falls to nothing over all `epochs`.
    On a CPU, `precision` is that of the training's products; a GPU multiplies in bfloat16 whatever it says.
    Training stops after `patience` epochs without a better validation, or after `epochs`.
    """

    name: str
    model: str
    config: ModelConfig
    loss: Loss = "softmax"
    margin: float = 1.0
    negatives: int = 1
    shared_negatives: bool = False
    sampling: Sampling = "uniform"
    pool: int = 0
    popularity_power: float = 0.75
    recency: float = 0.0
    user_balance: float = 0.0
    targets: int = 1
    learning_rate: float = 0.001
    schedule: Schedule = "constant"
    l2: float = 0.0
    batch_size: int = 1024
    precision: Precision = "float32"
    epochs: int = 20
    patience: int = 3

    def __post_init__(self) -> None:
        if self.model not in CONFIGS:
            raise ValueError(f"unknown model {self.model!r}; the models are {', '.join(CONFIGS)}")
        if not isinstance(self.config, CONFIGS[self.model]):
            raise ValueError(f"{self.model} takes a {CONFIGS[self.model].__name__}")
        for key, value in [*_values(self), *_values(self.config)]:
            if key in _MINIMUM:
                _check_number(key, value)
        kinds = (("loss", Loss), ("sampling", Sampling), ("schedule", Schedule), ("precision", Precision))
        for key, kind in kinds:
            if (value := dict(_values(self))[key]) not in get_args(kind):
                raise ValueError(f"{key} must be one of {', '.join(get_args(kind))}, not {value!r}")
        if isinstance(self.config, NeuMFConfig) and self.loss == "triplet":
            raise ValueError("the triplet loss compares vectors and NeuMF has none: use caser or matrix_factorization")
        if self.sampling in ("hard", "semi_hard") and self.pool < self.negatives:
            raise ValueError(f"{self.sampling} sampling chooses from a pool: set pool to {self.negatives} or more")
        if self.loss == "triplet" and isinstance(self.config, CaserConfig | MatrixFactorizationConfig):
            # The triplet loss trains distances, so the model must rank by them.
            object.__setattr__(self, "config", replace(self.config, similarity="distance"))

    def warm(self) -> Recipe:
        """How to go on from weights that this recipe trained: an eighth of the epochs, at a small and falling rate."""
        epochs = max(1, round(self.epochs * _WARM_EPOCHS))
        return replace(self, epochs=epochs, learning_rate=self.learning_rate * _WARM_RATE, schedule="cosine")

    def as_dict(self) -> dict[str, Any]:
        """The recipe as JSON takes it; `from_dict` reads it back."""
        values = asdict(self)
        return values | {"config": {k: list(v) if isinstance(v, tuple) else v for k, v in values["config"].items()}}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Recipe:
        """Read a recipe from what `as_dict` wrote."""
        try:
            return Recipe(**{**values, "config": read_config(values["model"], values["config"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a recipe of this version: {error}") from error


RECIPES: dict[str, Recipe] = {
    # Trained as the plain factorisation is: one target at a time, L2 on the factors.
    "neumf": Recipe(
        name="neumf",
        model="neumf",
        config=NeuMFConfig(tower_factors=8, hidden=(16, 8), embedding_dropout=0.0, weigh_factors=False),
        negatives=512,
        shared_negatives=True,
        recency=0.8,
        learning_rate=0.002,
        l2=1e-4,
        epochs=25,
    ),
    "caser": Recipe(
        name="caser",
        model="caser",
        config=CaserConfig(),
        negatives=512,
        shared_negatives=True,
        learning_rate=0.005,
        schedule="cosine",
        batch_size=512,
        epochs=10,
    ),
    "matrix_factorization": Recipe(
        name="matrix_factorization",
        model="matrix_factorization",
        config=MatrixFactorizationConfig(),
        negatives=512,
        shared_negatives=True,
        recency=0.8,
        learning_rate=0.002,
        l2=1e-4,
        epochs=30,
    ),
    "popularity": Recipe(name="popularity", model="popularity", config=PopularityConfig(), epochs=1),
    # Many targets of a user against one draw: a few times as fast, and ranks less well.
    "neumf-fast": Recipe(
        name="neumf-fast",
        model="neumf",
        config=NeuMFConfig(),
        negatives=512,
        shared_negatives=True,
        recency=0.8,
        targets=64,
        learning_rate=0.005,
        schedule="cosine",
        batch_size=1024,
        epochs=25,
        patience=5,
    ),
    # For many interactions an item: wider vectors, more of which are dropped, against all items of a small catalogue.
    "caser-large": Recipe(
        name="caser-large",
        model="caser",
        config=CaserConfig(factors=128, embedding_dropout=0.5, unknown_user_share=0.2),
        negatives=4096,
        shared_negatives=True,
        recency=0.3,
        learning_rate=0.005,
        schedule="cosine",
        batch_size=1024,
        precision="bfloat16",
        epochs=8,
    ),
    # As the seed texts set the two models up; hinge by overriding the loss.
    "neumf-seeds": Recipe(
        name="neumf-seeds",
        model="neumf",
        config=NeuMFConfig(factors=10, tower_factors=10, hidden=(10, 10, 10), embedding_dropout=0.0, item_bias=False),
        loss="bpr",
        learning_rate=0.01,
        l2=1e-5,
        epochs=10,
        patience=10,
    ),
    "caser-seeds": Recipe(
        name="caser-seeds",
        model="caser",
        config=CaserConfig(
            factors=10,
            window_length=5,
            shared_items=False,
            dropout=0.05,
            embedding_dropout=0.0,
            unknown_user_share=0.0,
        ),
        loss="bpr",
        learning_rate=0.04,
        l2=1e-5,
        epochs=8,
        patience=8,
    ),
}


def recipe_named(name: str) -> Recipe:
    """Find a recipe by name; the error lists them."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; the recipes are {', '.join(RECIPES)}")
    return RECIPES[name]


def apply_overrides(recipe: Recipe, overrides: Mapping[str, str]) -> Recipe:
    """Change a recipe by `key=value` texts, typed by the key: a setting of the recipe or of its model."""
    own = {key: kind for key, kind in get_type_hints(Recipe).items() if key not in ("name", "model", "config")}
    inner = get_type_hints(type(recipe.config))
    changes: dict[str, Any] = {}
    inner_changes: dict[str, Any] = {}
    for key, text in overrides.items():
        if key in own:
            changes[key] = _parse(key, text, own[key])
        elif key in inner:
            inner_changes[key] = _parse(key, text, inner[key])
        else:
            raise ValueError(
                f"unknown setting {key!r} for {recipe.name}; it takes {', '.join(sorted({**own, **inner}))}"
            )
    return replace(recipe, config=replace(recipe.config, **inner_changes), **changes)


def _parse(key: str, text: str, kind: Any) -> Any:
    if len(text) > _MAXIMUM_CHARACTERS:
        raise ValueError(f"{key} must be at most {_MAXIMUM_CHARACTERS} characters long, not {len(text):,}")
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(f"{key} must be one of {', '.join(get_args(kind))}, not {text!r}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{key} must be true or false, not {text!r}")
        return text.lower() == "true"
    try:
        if get_origin(kind) is tuple:
            return tuple(int(part) for part in text.replace("-", ",").split(","))
        return int(text) if kind is int else float(text)
    except ValueError:
        wanted = (
            "widths such as 64,32" if get_origin(kind) is tuple else "a whole number" if kind is int else "a number"
        )
        raise ValueError(f"{key} must be {wanted}, not {text!r}") from None
