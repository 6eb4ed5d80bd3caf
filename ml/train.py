"""The training loop, one for CPU and GPU."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ml.checkpoint import load_checkpoint, save_checkpoint
from ml.distributed import ALONE, Processes
from ml.examples import Examples
from ml.interactions import Interactions
from ml.losses import LOSSES, MARGIN_LOSSES
from ml.models import CaserConfig, Popularity, RankingModel, build_model
from ml.optimizer import RowAdam
from ml.recipes import Recipe
from ml.recorded_step import RecordedStep
from ml.sampling import Negatives, NegativeSampler, choose_hard

STOPPING_METRIC = "ndcg@10"
# A GPU runs ahead of the loop; its loss is looked at this often, a CPU's at every step.
GPU_LOOK_EVERY = 50
SECONDS_BETWEEN_REPORTS = 0.5

ValidationMetric = Callable[[RankingModel], dict[str, float]]


@dataclass(frozen=True)
class Progress:
    """How far a training is; `validation` is filled once an epoch, when it has been validated.

    `fraction` counts all epochs, so it jumps to 1 when training stops early.
    """

    epoch: int
    epochs: int
    fraction: float
    loss: float
    examples_per_second: float
    seconds_left: float
    validation: dict[str, float] | None = None
    epoch_ended: bool = False


@dataclass(frozen=True)
class TrainResult:
    """A trained model with the weights of its best epoch; `history` has one row an epoch."""

    model: RankingModel
    best_epoch: int
    epochs_run: int
    history: list[dict[str, float]]
    seconds: float
    examples_per_second: float


class NotFiniteError(ValueError):
    """The loss or a weight is no longer a number."""


def train(
    recipe: Recipe,
    interactions: Interactions,
    validation_metric: ValidationMetric | None = None,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    checkpoint: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    epochs: int | None = None,
    initial: RankingModel | None = None,
    processes: Processes = ALONE,
) -> TrainResult:
    """Train a recipe on interactions, and keep the weights of the epoch with the best validation nDCG@10.

    Without `validation_metric` it trains for all epochs and keeps the last weights. `epochs` is how many to train
    instead of the recipe's. `initial` gives the weights to start from. With `checkpoint`, the state is saved there
    after every epoch, and a training that finds its own state there goes on from it: on a CPU the result is the same
    to the last digit. A callback may raise to stop the training.

    Several `processes` call it with their own users' interactions, over the same id maps, and all end with the same
    model: `validation_metric` must then give all of them the same figures, and the first one keeps the checkpoint,
    where the others must find it.
    """
    device = torch.device(device)
    if processes.sum_number(len(interactions)) == 0:
        raise ValueError("there is nothing to train on: no interactions")
    devices = [device] if device.type == "cuda" else []
    # Dropout and initial weights draw from torch's own generator.
    with _memory_explained(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model = build_model(recipe.model, interactions.num_users, interactions.num_items, recipe.config)
        if initial is not None:
            model.load_state_dict(initial.state_dict())
        model.to(device)
        model.count(torch.as_tensor(interactions.item_index, dtype=torch.int64, device=device))
        for name, counts in model.named_buffers():
            if name == "counts":
                counts.copy_(processes.sum_tensor(counts))
        if isinstance(model, Popularity):
            return _count(model, interactions, validation_metric, on_progress, processes)
        epochs = recipe.epochs if epochs is None else epochs
        if not processes.is_first:  # the weights are the same everywhere, what dropout leaves out is not
            torch.manual_seed(processes.seed(seed))
        loop = _Loop(recipe, model, interactions, device, seed, epochs, on_progress, processes)
        fingerprint = (
            ""
            if checkpoint is None
            else processes.joint_name(_fingerprint(recipe, interactions, seed, epochs, device, initial))
        )
        if checkpoint is not None:
            loop.restore_from(checkpoint, fingerprint)
        while loop.epoch < epochs and not loop.stopped:
            loop.run_epoch()
            loop.validate(validation_metric)
            if checkpoint is not None:
                state = loop.state()
                with processes.together():
                    if processes.is_first:
                        save_checkpoint(checkpoint, fingerprint, state)
        return loop.result()


@contextmanager
def _memory_explained() -> Iterator[None]:
    """Say what to do where memory is refused; PyTorch tells of it by the text of the error alone."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(r"allocate memory|out of memory", str(error)):
            raise
        reason = str(error).partition("\n")[0][:200]
        raise ValueError(
            "not enough memory for this training: choose a smaller batch_size, or fewer negatives, targets or factors "
            f"({reason})"
        ) from error


@dataclass
class _Loop:
    """A training between two epochs: what a checkpoint holds, and the step."""

    recipe: Recipe
    model: RankingModel
    interactions: Interactions
    device: torch.device
    seed: int
    epochs: int
    on_progress: Callable[[Progress], None] | None
    processes: Processes
    epoch: int = 0
    best_epoch: int = 0
    best_score: float = -math.inf
    best_weights: dict[str, Tensor] | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    stopped: bool = False
    train_seconds: float = 0.0
    validation_seconds: float = 0.0
    recorded: RecordedStep | None = None

    def __post_init__(self) -> None:
        recipe, data = self.recipe, self.interactions
        self.examples = Examples(data, self.device, recipe.recency, recipe.user_balance)
        distribution: Literal["uniform", "popularity"] = "popularity" if recipe.sampling == "popularity" else "uniform"
        self.sampler = NegativeSampler(
            self.examples.users,
            self.examples.items,
            data.num_users,
            data.num_items,
            distribution=distribution,
            popularity_power=recipe.popularity_power,
            processes=self.processes,
        )
        self.number = self.processes.sum_number(len(self.examples))
        self.parameters = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        self.optimizer = RowAdam(self.parameters.values(), recipe.learning_rate, l2=recipe.l2)
        self.generator = torch.Generator(self.device).manual_seed(self.processes.seed(self.seed))
        # What a whole batch shares must be the same in all processes.
        self.common_generator = self.processes.common_generator(self.seed, self.generator)
        self.tables = {*self.model.user_tables, *self.model.item_tables}
        self.is_hard = recipe.sampling in ("hard", "semi_hard")
        self.hidden_share = recipe.config.unknown_user_share if isinstance(recipe.config, CaserConfig) else 0.0
        if recipe.loss in MARGIN_LOSSES:
            self.loss_function = partial(MARGIN_LOSSES[recipe.loss], margin=recipe.margin)
        else:
            self.loss_function = partial(LOSSES[recipe.loss])

    def run_epoch(self) -> None:
        """Show the model every example once, in a new order."""
        self.model.train()
        number, size = self.number, self.recipe.batch_size
        if self.recipe.targets > 1:
            # Without a window, targets that are learnt together are any of a user's items, else neighbours, cut alike
            # whichever process a user belongs to.
            if self.model.window_length == 0:
                order = self.examples.group(self.recipe.targets, self.generator)
            else:
                order = self.examples.cut(self.recipe.targets, self.common_generator)
            groups = self.processes.sum_number(len(order))
            size = max(1, round(size * groups / number))  # groups that hold about batch_size targets
        else:
            order, groups = torch.arange(len(self.examples), device=self.device), number
        order = order[torch.randperm(len(order), generator=self.generator, device=self.device)]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        steps = -(-groups // size)
        step_on = self._step
        if self.device.type == "cuda" and self.processes.size == 1:  # processes talk to each other within a step
            self.recorded = self.recorded or RecordedStep(self._step, size, self.generator)
            step_on = self.recorded
        started = reported = time.perf_counter()
        for step in range(steps):
            self._set_rate(self.epoch + step / steps)
            loss = step_on(self.processes.part(order, step, steps, size))
            total += loss
            if self.device.type == "cpu" or step % GPU_LOOK_EVERY == GPU_LOOK_EVERY - 1 or step == steps - 1:
                value = float(loss)
                if not math.isfinite(value):
                    raise self._not_finite("loss", step + 1)
                now = time.perf_counter()
                if self.on_progress is not None and now - reported >= SECONDS_BETWEEN_REPORTS:
                    reported = now
                    self._report(number * (step + 1) // steps, now - started, value)
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise self._not_finite("weights", steps)
        self.processes.align(self.model.parameters())
        self.epoch += 1
        seconds = time.perf_counter() - started
        self.train_seconds += seconds
        self.history.append({"epoch": self.epoch, "loss": float(total) / steps, "seconds": seconds})

    def _set_rate(self, epochs_done: float) -> None:
        """Set the learning rate; a schedule spans the recipe's epochs, also where fewer are trained.

        So a refit for the epochs that validation chose goes the way that was validated.
        """
        if self.recipe.schedule == "cosine":
            done = epochs_done / max(self.recipe.epochs, self.epochs)
            self.optimizer.set_learning_rate(self.recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done)))

    def _step(self, positions: Tensor) -> Tensor:
        """Learn from the examples at these positions, and from those of the other processes; returns their loss."""
        for parameter in self.parameters.values():
            parameter.grad = None
        loss, weight = self._learn(positions)
        loss = self.processes.add_gradients(self.parameters, self.tables, loss, weight)
        self.optimizer.step()
        return loss

    def _learn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of the examples at these positions; returns their loss and what they weigh."""
        recipe, examples = self.recipe, self.examples
        users = examples.users[positions]
        windows = examples.windows(positions, self.model.window_length)
        targets, is_target = examples.targets(positions, recipe.targets)
        weight = examples.weight(positions, recipe.targets)
        number = recipe.pool if self.is_hard else recipe.negatives
        if recipe.shared_negatives:
            negatives = self.sampler.sample_shared(users, number, self.common_generator)
        else:
            negatives = self.sampler.sample(users, number, self.generator)
        if not len(positions):  # a process with fewer examples than there are steps
            return torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        if self.hidden_share:
            hidden = torch.rand(len(users), generator=self.generator, device=self.device) < self.hidden_share
            users = torch.where(hidden, self.model.num_users, users)

        is_half = self.device.type == "cuda" or recipe.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_half):
            encoded = self.model.encode(users, windows)
            if recipe.shared_negatives:
                positive, negative = self.model.score(encoded, targets), self.model.score(encoded, negatives.items)
            else:  # each user has items of their own, and one pass costs less than two
                scores = self.model.score(encoded, torch.cat((targets, negatives.items), 1))
                positive, negative = scores[:, : targets.shape[1]], scores[:, targets.shape[1] :]
        positive, negative, valid = positive.float(), negative.float(), negatives.valid
        if self.is_hard:
            negative, valid = self._hardest(positive, negative, negatives)
        # Each target is an example of its own, against the same samples.
        weight = is_target.float() if weight is None else weight * is_target
        loss: Tensor = self.loss_function(
            positive.unsqueeze(2), negative.unsqueeze(1), valid.unsqueeze(1), weight.unsqueeze(2)
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), weight.sum()

    def _hardest(self, positive: Tensor, negative: Tensor, negatives: Negatives) -> tuple[Tensor, Tensor]:
        below = positive.detach()[:, :1] if self.recipe.sampling == "semi_hard" else None
        chosen = choose_hard(negative.detach(), negatives, self.recipe.negatives, below)
        return negative.gather(1, chosen), negatives.valid.gather(1, chosen)

    def validate(self, validation_metric: ValidationMetric | None) -> None:
        """Score the epoch, keep its weights if they are the best, and decide whether to go on."""
        metrics: dict[str, float] = {}
        if validation_metric is None:
            self.best_epoch = self.epoch
        else:
            started = time.perf_counter()
            self.model.eval()
            with torch.no_grad():
                metrics = validation_metric(self.model)
            self.validation_seconds += time.perf_counter() - started
            self.history[-1].update(metrics)
            if (score := metrics[STOPPING_METRIC]) > self.best_score:
                self.best_score, self.best_epoch = score, self.epoch
                self.best_weights = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.stopped = self.epoch - self.best_epoch >= self.recipe.patience
        if self.on_progress is not None:
            self._report(0, 0.0, self.history[-1]["loss"], metrics or None, epoch_ended=True)

    def _report(
        self,
        done: int,
        seconds: float,
        loss: float,
        validation: dict[str, float] | None = None,
        *,
        epoch_ended: bool = False,
    ) -> None:
        assert self.on_progress is not None
        number = self.number
        all_done = self.epoch * number + done
        seconds += self.train_seconds
        rate = all_done / max(seconds, 1e-9)
        left = (self.epochs * number - all_done) / max(rate, 1e-9)
        left += self.validation_seconds / max(self.epoch, 1) * (self.epochs - self.epoch)
        ended = epoch_ended and (self.stopped or self.epoch == self.epochs)
        self.on_progress(
            Progress(
                epoch=self.epoch if epoch_ended else self.epoch + 1,
                epochs=self.epochs,
                fraction=1.0 if ended else all_done / (self.epochs * number),
                loss=loss,
                examples_per_second=rate,
                seconds_left=0.0 if ended else left,
                validation=validation,
                epoch_ended=epoch_ended,
            )
        )

    def _not_finite(self, what: str, step: int) -> NotFiniteError:
        kind = "is" if what == "loss" else "are"
        return NotFiniteError(
            f"the {what} {kind} not finite at epoch {self.epoch + 1}, step {step}, with learning rate "
            f"{self.recipe.learning_rate:g}: try a smaller learning_rate"
        )

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on; of random numbers, every process's."""
        on_gpu = self.device.type == "cuda"
        random = [
            self.generator.get_state(),
            self.common_generator.get_state(),
            torch.get_rng_state(),
            torch.cuda.get_rng_state(self.device) if on_gpu else torch.empty(0, dtype=torch.uint8),
        ]
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": [self.processes.gather(each) for each in random],
            "best_weights": self.best_weights,
            "numbers": {
                "epoch": self.epoch,
                "best_epoch": self.best_epoch,
                "best_score": self.best_score,
                "stopped": self.stopped,
                "train_seconds": self.train_seconds,
                "validation_seconds": self.validation_seconds,
            },
            "history": self.history,
        }

    def restore_from(self, checkpoint: Path, fingerprint: str) -> None:
        """Go back to where a checkpoint was written, if there is one."""
        with self.processes.together():
            state = load_checkpoint(checkpoint, fingerprint)
        epochs = self.processes.gather_values(-1 if state is None else state["numbers"]["epoch"])
        if len(set(epochs)) > 1:
            raise ValueError(
                f"not all processes find the checkpoint {checkpoint} (epochs {epochs}): keep it where all hosts see it"
            )
        if state is not None:
            self.restore(state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to what `state` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        own, common, host, gpu = (each[self.processes.rank] for each in state["random"])
        self.generator.set_state(own)
        self.common_generator.set_state(common)
        torch.set_rng_state(host)
        if len(gpu):
            torch.cuda.set_rng_state(gpu, self.device)
        best = state["best_weights"]
        self.best_weights = None if best is None else {name: value.to(self.device) for name, value in best.items()}
        numbers = state["numbers"]
        self.epoch, self.best_epoch = numbers["epoch"], numbers["best_epoch"]
        self.best_score, self.stopped = numbers["best_score"], numbers["stopped"]
        self.train_seconds, self.validation_seconds = numbers["train_seconds"], numbers["validation_seconds"]
        self.history = list(state["history"])

    def result(self) -> TrainResult:
        """The model with its best weights, ready to score."""
        self.optimizer.release()
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        self.model.eval()
        return TrainResult(
            model=self.model,
            best_epoch=self.best_epoch,
            epochs_run=self.epoch,
            history=self.history,
            seconds=self.train_seconds + self.validation_seconds,
            examples_per_second=self.epoch * self.number / max(self.train_seconds, 1e-9),
        )


def _count(
    model: Popularity,
    interactions: Interactions,
    validation_metric: ValidationMetric | None,
    on_progress: Callable[[Progress], None] | None,
    processes: Processes,
) -> TrainResult:
    """Popularity is counted, not trained."""
    started = time.perf_counter()
    model.eval()
    with torch.no_grad():
        metrics = {} if validation_metric is None else validation_metric(model)
    seconds = time.perf_counter() - started
    rate = processes.sum_number(len(interactions)) / max(seconds, 1e-9)
    if on_progress is not None:
        on_progress(Progress(1, 1, 1.0, 0.0, rate, 0.0, metrics or None, epoch_ended=True))
    return TrainResult(model, 1, 1, [{"epoch": 1, "loss": 0.0, "seconds": seconds, **metrics}], seconds, rate)


def _fingerprint(
    recipe: Recipe, data: Interactions, seed: int, epochs: int, device: torch.device, initial: RankingModel | None
) -> str:
    """Name a training by all that its result depends on."""
    digest = hashlib.sha256()
    sizes = [data.num_users, data.num_items, seed, epochs, device.type, torch.__version__]
    digest.update(json.dumps([recipe.as_dict(), sizes], sort_keys=True).encode())
    for array in (data.user_index, data.item_index, data.weight):
        if array is not None:
            digest.update(array.tobytes())
    if initial is not None:
        for value in initial.state_dict().values():
            digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()
