import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ml import train as training
from ml.examples import Examples
from ml.interactions import Interactions
from ml.models import RankingModel
from ml.optimizer import RowAdam
from ml.recipes import RECIPES, Recipe, apply_overrides
from ml.train import Progress, TrainResult, train

ROOT = Path(__file__).parents[2]
# The checkerboard has no order in time, so no example is newer than another.
SIZES = {"recency": "0", "factors": "8", "negatives": "12", "batch_size": "64", "epochs": "4", "learning_rate": "0.02"}


def recipe(name: str = "caser", **overrides: str) -> Recipe:
    sizes = dict(SIZES)
    if name == "popularity":
        sizes = {}
    elif name == "caser":
        sizes |= {"embedding_dropout": "0.1"}
    elif name.startswith("neumf"):
        sizes |= {"tower_factors": "4", "hidden": "8,4"}
    return apply_overrides(RECIPES[name], sizes | overrides)


def checkerboard(users: int = 30, items: int = 24, each: int = 8, seed: int = 0) -> Interactions:
    """Users of one colour take only items of that colour, each some of them, in random order."""
    random = np.random.default_rng(seed)
    rows = [
        (f"u{user:02}", f"i{2 * item + user % 2:02}")
        for user in range(users)
        for item in random.permutation(items // 2)[:each]
    ]
    return Interactions.from_arrays([user for user, _ in rows], [item for _, item in rows])


def own_colour(model: RankingModel, data: Interactions) -> float:
    """The share of unseen items of a user's colour among the first that are recommended; chance is below a half."""
    users = torch.arange(data.num_users)
    windows = Examples(data, torch.device("cpu")).windows(torch.as_tensor(data.offsets[1:]) - 1, model.window_length)
    with torch.no_grad():
        scores = model.score_catalogue(users, windows)
    scores[torch.as_tensor(data.user_index).long(), torch.as_tensor(data.item_index).long()] = -torch.inf
    best = scores.topk(3, dim=1).indices
    return float((best % 2 == (users % 2).unsqueeze(1)).float().mean())


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return result.model.state_dict()


def same(first: TrainResult, second: TrainResult) -> bool:
    a, b = weights(first), weights(second)
    losses = [[row["loss"] for row in result.history] for result in (first, second)]
    return losses[0] == losses[1] and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


BOARD = checkerboard(60, 40, 12)
LOSSES = ["bpr", "weighted_bpr", "hinge", "triplet", "softmax", "bce"]
LEARNERS = [
    (name, loss)
    for name in ("neumf", "caser", "matrix_factorization")
    for loss in LOSSES
    if (name, loss) != ("neumf", "triplet")
]


@pytest.mark.parametrize(("name", "loss"), LEARNERS)
def test_every_model_learns_the_checkerboard_with_every_loss(name: str, loss: str) -> None:
    result = train(recipe(name, loss=loss, epochs="10", schedule="constant"), BOARD)
    assert own_colour(result.model, BOARD) > 0.9
    assert result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize("sampling", ["uniform", "popularity", "semi_hard", "hard"])
@pytest.mark.parametrize("is_shared", ["true", "false"])
def test_every_sampling_learns_the_checkerboard(sampling: str, is_shared: str) -> None:
    settings = recipe(
        "matrix_factorization", sampling=sampling, shared_negatives=is_shared, pool="20", negatives="4", epochs="10"
    )
    assert own_colour(train(settings, BOARD).model, BOARD) > 0.9


@pytest.mark.parametrize("name", ["neumf", "caser", "matrix_factorization"])
def test_several_targets_learn_too(name: str) -> None:
    assert own_colour(train(recipe(name, targets="5", epochs="10"), BOARD).model, BOARD) > 0.9


@pytest.mark.parametrize("name", ["neumf", "caser", "matrix_factorization"])
def test_products_in_half_precision_learn_too(name: str) -> None:
    assert own_colour(train(recipe(name, precision="bfloat16"), BOARD).model, BOARD) > 0.9


def test_groups_hold_every_example_once_and_only_their_users() -> None:
    data = replace(BOARD, weight=np.arange(len(BOARD), dtype=np.float32))
    examples = Examples(data, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        starts = examples.group(5, generator)
        assert len(starts) == data.num_users * 3  # twelve items each: five, five, two
        targets, is_there = examples.targets(starts, 5)
        weight = examples.weight(starts, 5)
        assert weight is not None
        rows = weight[is_there].long().numpy()
        assert sorted(rows) == list(range(len(data)))
        users = examples.users[starts].unsqueeze(1).expand(-1, 5)[is_there].numpy()
        assert (data.user_index[rows] == users).all()
        assert (data.item_index[rows] == targets[is_there].numpy()).all()


def test_popularity_is_counted() -> None:
    data = Interactions.from_arrays(["a", "a", "b"], ["x", "y", "y"])
    reports: list[Progress] = []
    result = train(RECIPES["popularity"], data, on_progress=reports.append)
    assert result.model.score_catalogue(torch.tensor([0]), torch.empty(1, 0)).tolist() == [[1, 2]]
    assert reports[-1].fraction == 1.0


@pytest.mark.parametrize("name", ["neumf", "caser", "matrix_factorization"])
def test_a_seed_reproduces_to_the_last_digit(name: str) -> None:
    data = checkerboard()
    assert same(train(recipe(name), data, seed=3), train(recipe(name), data, seed=3))
    assert not same(train(recipe(name), data, seed=3), train(recipe(name), data, seed=4))


def test_training_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(recipe(), checkerboard())
    assert torch.equal(torch.rand(3), expected)


class Scores:
    """A validation that follows a script."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def __call__(self, model: RankingModel) -> dict[str, float]:
        assert not model.training
        return {"ndcg@10": self.values.pop(0)}


def test_early_stopping_keeps_the_best_weights() -> None:
    data = checkerboard()
    settings = recipe(epochs="9", patience="2")
    stopped = train(settings, data, Scores(0.1, 0.3, 0.2, 0.3, 0.9))
    assert (stopped.best_epoch, stopped.epochs_run) == (2, 4)
    assert [row["ndcg@10"] for row in stopped.history] == [0.1, 0.3, 0.2, 0.3]
    two = train(settings, data, epochs=2)
    assert (two.best_epoch, two.epochs_run) == (2, 2)
    assert all(torch.equal(weights(stopped)[name], weights(two)[name]) for name in weights(two))
    assert not stopped.model.training


class Interrupted(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("name", ["neumf", "neumf-fast", "caser", "matrix_factorization"])
@pytest.mark.parametrize(("stop_after", "targets"), [(1, "1"), (3, "4")])
def test_a_resumed_training_is_the_same_to_the_last_digit(
    tmp_path: Path, name: str, stop_after: int, targets: str
) -> None:
    data, settings, checkpoint = checkerboard(), recipe(name, targets=targets), tmp_path / "run" / "state.pt"
    scores = (0.1, 0.4, 0.2, 0.3)

    def interrupt(progress: Progress) -> None:
        if progress.epoch_ended and progress.epoch == stop_after + 1:
            raise Interrupted

    straight = train(settings, data, Scores(*scores), seed=1)
    with pytest.raises(Interrupted):
        train(settings, data, Scores(*scores), seed=1, checkpoint=checkpoint, on_progress=interrupt)
    resumed = train(settings, data, Scores(*scores[stop_after:]), seed=1, checkpoint=checkpoint)
    assert same(straight, resumed)
    assert (resumed.best_epoch, resumed.epochs_run) == (straight.best_epoch, straight.epochs_run) == (2, 4)
    # A finished training comes back from its checkpoint without another epoch.
    assert same(straight, train(settings, data, Scores(), seed=1, checkpoint=checkpoint))


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_train import checkerboard, recipe
from ml.train import train

def report(progress):
    # The checkpoint of an epoch is written after its last report, so epoch 2's stands when epoch 3 has ended.
    if progress.epoch_ended and progress.epoch == 3:
        print("trained", flush=True)
        sys.stdin.read()

train(recipe(), checkerboard(), seed=1, checkpoint=Path({checkpoint!r}), on_progress=report)
"""


def test_a_killed_training_goes_on_where_it_was(tmp_path: Path) -> None:
    checkpoint = tmp_path / "state.pt"
    program = textwrap.dedent(CHILD).format(tests=str(Path(__file__).parent), checkpoint=str(checkpoint))
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "trained\n"
        os.kill(child.pid, signal.SIGKILL)
    epochs: list[int] = []
    resumed = train(
        recipe(),
        checkerboard(),
        seed=1,
        checkpoint=checkpoint,
        on_progress=lambda progress: epochs.append(progress.epoch),
    )
    assert epochs[0] == 3
    assert same(train(recipe(), checkerboard(), seed=1), resumed)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "state.pt"
    train(recipe(), checkerboard(), checkpoint=checkpoint)
    for settings, data, seed in (
        (recipe(factors="4"), checkerboard(), 0),
        (recipe(), checkerboard(seed=1), 0),
        (recipe(), checkerboard(), 1),
    ):
        with pytest.raises(ValueError, match="belongs to a training with other data, recipe, seed or device"):
            train(settings, data, seed=seed, checkpoint=checkpoint)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "half"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, content: bytes | str) -> None:
    checkpoint = tmp_path / "state.pt"
    train(recipe(), checkerboard(), checkpoint=checkpoint)
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        train(recipe(), checkerboard(), checkpoint=checkpoint)


def test_nothing_but_the_checkpoint_is_left_behind(tmp_path: Path) -> None:
    train(recipe(), checkerboard(), checkpoint=tmp_path / "state.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_is_not_finite_stops_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"not finite at epoch \d+, step \d+, with learning rate 1e\+30"):
        train(recipe("matrix_factorization", learning_rate="1e30"), checkerboard())


def test_progress_says_how_far_and_how_fast() -> None:
    reports: list[Progress] = []
    train(recipe(), checkerboard(), Scores(0.1, 0.2, 0.3, 0.4), on_progress=reports.append)
    ended = [report for report in reports if report.epoch_ended]
    assert [(report.epoch, report.epochs, report.fraction) for report in ended] == [
        (1, 4, 0.25), (2, 4, 0.5), (3, 4, 0.75), (4, 4, 1.0)
    ]  # fmt: skip
    assert [report.validation for report in ended] == [{"ndcg@10": value} for value in (0.1, 0.2, 0.3, 0.4)]
    assert all(report.examples_per_second > 0 for report in reports)
    assert ended[0].seconds_left > 0
    assert ended[-1].seconds_left == 0
    json.dumps([vars(report) for report in reports])


def test_windows_and_targets_stay_within_a_users_history() -> None:
    data = Interactions.from_arrays(["a", "a", "a", "b", "b"], ["v", "w", "x", "y", "z"])
    examples = Examples(data, torch.device("cpu"))
    positions = torch.arange(5)
    pad = data.num_items
    assert examples.windows(positions, 2).tolist() == [[pad, pad], [pad, 0], [0, 1], [pad, pad], [pad, 3]]
    targets, is_there = examples.targets(positions, 2)
    assert targets[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert is_there.tolist() == [[True, True], [True, True], [True, False], [True, True], [True, False]]
    assert targets[~is_there].tolist() == [2, 4]


def test_runs_of_targets_hold_every_example_once_behind_the_window_before_them() -> None:
    data = Interactions.from_arrays([*"aaaaaaabbc"], [*"tuvwxyzuvt"])
    examples = Examples(data, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    cuts = set()
    for _ in range(20):
        starts = examples.cut(3, generator)
        rows = starts.unsqueeze(1) + torch.arange(3)
        targets, is_there = examples.targets(starts, 3)
        assert rows[is_there].tolist() == list(range(len(data)))
        assert torch.equal(targets[is_there], examples.items)
        assert {0, 7, 9} <= set(starts.tolist())
        cuts.add(tuple(starts[starts < 7].tolist()))
    assert cuts == {(0, 3, 6), (0, 2, 5), (0, 1, 4)}


def test_a_heavier_event_pulls_harder() -> None:
    data = Interactions.from_arrays(["a", "a", "b", "b"], ["w", "x", "y", "z"])
    heavy = replace(data, weight=np.array([1, 100, 1, 1], np.float32))
    settings = recipe("matrix_factorization", epochs="3", learning_rate="0.001")
    light_score, heavy_score = (
        train(settings, each).model.score_catalogue(torch.tensor([0]), torch.empty(1, 0))[0] for each in (data, heavy)
    )
    assert heavy_score[1] - heavy_score[0] > light_score[1] - light_score[0]


def test_recency_weighs_newer_examples_more() -> None:
    data = Interactions.from_arrays(["a", "a", "a", "b"], ["w", "x", "y", "z"])
    weight = Examples(data, torch.device("cpu"), recency=1.0).weight(torch.arange(4), 1)
    assert weight is not None
    assert weight.flatten().tolist() == pytest.approx([1 / 3, 1 / 2, 1, 1])


def test_recency_leaves_data_without_an_order_alone() -> None:
    data = replace(Interactions.from_arrays(["a", "a"], ["w", "x"]), in_order=False)
    assert Examples(data, torch.device("cpu"), recency=1.0).weight(torch.arange(2), 1) is None


def test_user_balance_weighs_active_users_less() -> None:
    data = replace(Interactions.from_arrays(["a", "a", "b"], ["x", "y", "z"]), weight=np.array([1, 4, 3], np.float32))
    weight = Examples(data, torch.device("cpu"), user_balance=1.0).weight(torch.arange(3), 1)
    assert weight is not None
    assert weight.flatten().tolist() == pytest.approx([1 / 2, 2, 3])


def test_weights_over_neumfs_factors_stay_at_one_where_they_are_not_to_be_learnt() -> None:
    for name, are_learnt in (("true", True), ("false", False)):
        model = train(recipe("neumf", weigh_factors=name, l2="0.01", epochs="1"), checkerboard()).model
        assert bool((model.state_dict()["factor_weights"] != 1).any()) == are_learnt


def test_the_initial_model_is_where_training_starts() -> None:
    data = checkerboard()
    settings = recipe("matrix_factorization", learning_rate="1e-12", epochs="1")
    first = train(recipe("matrix_factorization", epochs="20"), data)
    second = train(settings, data, initial=first.model, seed=9)
    assert all(torch.allclose(weights(first)[name], weights(second)[name], atol=1e-6) for name in weights(first))


DEGENERATE = {
    "one user": (["a"] * 4, ["w", "x", "y", "z"]),
    "one item": (["a", "b", "c"], ["x", "x", "x"]),
    "one event": (["a"], ["x"]),
    "users with one event": (["a", "b", "c"], ["x", "y", "z"]),
    "the same item again and again": (["a"] * 5, ["x", "x", "x", "y", "x"]),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", RECIPES)
def test_degenerate_data_gives_finite_scores(name: str, case: str) -> None:
    users, items = DEGENERATE[case]
    data = Interactions.from_arrays(users, items)
    result = train(replace(RECIPES[name], epochs=2), data)
    windows = torch.full((data.num_users, result.model.window_length), data.num_items)
    assert result.model.score_catalogue(torch.arange(data.num_users), windows).isfinite().all()


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_to_train_on_is_refused(name: str) -> None:
    data = Interactions.from_arrays(["a"], ["x"])
    with pytest.raises(ValueError, match="no interactions"):
        train(RECIPES[name], data.select(np.zeros(1, bool)))


class AskedForAValue(TorchDispatchMode):
    """Notes operations after which a GPU would make the host wait: their result or its shape is a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asks = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags)
        if function is torch.ops.aten.index.Tensor:  # by numbers its shape is known, by a mask it is not
            asks = {index for index in args[1] if index is not None and index.dtype == torch.bool}
        if asks:
            self.found.add(str(function))
        return function(*args, **(kwargs or {}))


def test_the_watch_sees_what_asks_for_a_value() -> None:
    values = torch.tensor([1.0, 0.0])
    for ask in (
        lambda: float(values[0]),
        lambda: values[values > 0],
        lambda: values.nonzero(),
        lambda: values.unique(),
    ):
        with AskedForAValue() as watch:
            ask()
        assert watch.found


@pytest.mark.parametrize(("name", "loss"), LEARNERS)
def test_with_fixed_shapes_a_step_asks_for_no_value_and_learns_the_same(
    name: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, data = recipe(name, loss=loss, targets="3", epochs="1", l2="0.01"), checkerboard()
    usual = train(settings, data)
    step, found = training._Loop._step, set()

    def watched(loop: Any, positions: torch.Tensor) -> torch.Tensor:
        with AskedForAValue() as watch:
            result = step(loop, positions)
        found.update(watch.found)
        return result

    monkeypatch.setattr(training._Loop, "_step", watched)
    monkeypatch.setattr(training, "RowAdam", partial(RowAdam, fixed_shapes=True))
    fixed = train(settings, data)
    assert not found
    for key, value in weights(usual).items():
        assert torch.allclose(value, weights(fixed)[key], atol=1e-4), key


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch brings GNU's OpenMP on Linux alone")
@pytest.mark.parametrize(
    ("environment", "turns"),
    [({}, "1000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000"), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_threads_wait_in_short_turns_unless_told_otherwise(environment: dict[str, str], turns: str) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    # What OpenMP read when it was loaded, by its own account.
    done = subprocess.run(
        [sys.executable, "-c", "import ml.train"],
        env=inherited | {"OMP_DISPLAY_ENV": "VERBOSE"} | environment,
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{turns}'" in done.stderr
