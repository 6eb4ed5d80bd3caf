import json

import pytest

from ml.models import CaserConfig
from ml.recipes import RECIPES, Recipe, apply_overrides, recipe_named


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_back_from_json(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.name == name
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe


def test_overrides_are_typed_by_their_key() -> None:
    recipe = apply_overrides(
        RECIPES["neumf"],
        {"learning_rate": "0.1", "negatives": "7", "hidden": "8,4", "item_bias": "false", "loss": "hinge"},
    )
    assert (recipe.learning_rate, recipe.negatives, recipe.loss) == (0.1, 7, "hinge")
    assert recipe.config == RECIPES["neumf"].config.__class__(
        **{**RECIPES["neumf"].as_dict()["config"], "hidden": (8, 4), "item_bias": False}
    )
    assert apply_overrides(RECIPES["neumf"], {"hidden": "10-10-10"}).as_dict()["config"]["hidden"] == [10, 10, 10]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "learning_rates",
            "1",
            "unknown setting 'learning_rates' for caser; it takes batch_size, dropout, embedding_dropout, epochs",
        ),
        ("hidden", "8,4", "unknown setting 'hidden'"),
        ("learning_rate", "-0.1", "learning_rate must be more than 0, not -0.1"),
        ("learning_rate", "nan", "learning_rate must be more than 0"),
        ("learning_rate", "inf", "learning_rate must be more than 0"),
        ("learning_rate", "fast", "learning_rate must be a number, not 'fast'"),
        ("epochs", "2.5", "epochs must be a whole number"),
        ("epochs", "0", "epochs must be at least 1"),
        ("dropout", "1", "dropout must be below 1"),
        ("window_length", "0", "window_length must be at least 1"),
        ("window_length", "1001", "window_length must be at most 1,000, not 1,001"),
        ("factors", "65537", "factors must be at most 65,536"),
        ("horizontal_filters", "100000", "horizontal_filters must be at most 65,536"),
        ("epochs", "9" * 150, "epochs must be at most 100,000"),
        ("epochs", "9" * 5_000, "epochs must be at most 200 characters long, not 5,000"),
        ("negatives", "1000001", "negatives must be at most 1,000,000"),
        ("batch_size", "10000001", "batch_size must be at most 10,000,000"),
        ("user_balance", "1e300", "user_balance must be at most 10, not"),
        ("l2", "1e30", "l2 must be at most 1,000, not"),
        ("item_bias", "maybe", "item_bias must be true or false"),
        ("schedule", "daily", "schedule must be one of constant, cosine"),
        ("precision", "float16", "precision must be one of float32, bfloat16"),
        ("loss", "magic", "loss must be one of bpr, weighted_bpr, hinge, triplet, softmax, bce"),
        ("sampling", "hard", "hard sampling chooses from a pool: set pool"),
        ("name", "mine", "unknown setting 'name'"),
    ],
)
def test_wrong_overrides_name_what_is_right(key: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_overrides(RECIPES["caser"], {key: value})


def test_widths_have_bounds() -> None:
    with pytest.raises(ValueError, match="hidden must be at most 65,536"):
        apply_overrides(RECIPES["neumf"], {"hidden": "8,65537"})


def test_neumf_refuses_the_triplet_loss() -> None:
    with pytest.raises(ValueError, match="use caser or matrix_factorization"):
        apply_overrides(RECIPES["neumf"], {"loss": "triplet"})


def test_the_triplet_loss_makes_the_model_rank_by_distance() -> None:
    config = apply_overrides(RECIPES["caser"], {"loss": "triplet"}).config
    assert isinstance(config, CaserConfig)
    assert config.similarity == "distance"


def test_an_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(ValueError, match=f"the recipes are {', '.join(RECIPES)}"):
        recipe_named("nemf")


def test_a_foreign_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="not a recipe"):
        Recipe.from_dict({**RECIPES["caser"].as_dict(), "temperature": 3})
