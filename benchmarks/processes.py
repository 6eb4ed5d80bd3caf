"""Measures what training over several processes costs: bytes that travel in a step, and processor time to move them.

    torchrun --nproc-per-node 2 benchmarks/processes.py [--users 20000] [--items 10000] [--events 400000]

Trains one epoch of each recipe on generated interactions and prints, for each, one JSON line of figures of the first
process. Processor time rather than the clock's: processes on one host share its cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from ml.distributed import Processes, joined, shares
from ml.interactions import Interactions
from ml.recipes import recipe_named
from ml.train import train


class Measured(Processes):
    """Counts the bytes that this process sends and the processor time that exchanging gradients takes."""

    def __init__(self, of: Processes) -> None:
        super().__init__(of.rank, of.size)
        self.steps, self.bytes, self.step_bytes, self.seconds = 0, 0, 0, 0.0

    def add_gradients(
        self, parameters: Mapping[str, nn.Parameter], tables: Collection[str], loss: Tensor, weight: Tensor
    ) -> Tensor:
        self.steps += 1
        started, before = time.process_time(), self.bytes
        whole = super().add_gradients(parameters, tables, loss, weight)
        self.seconds += time.process_time() - started
        self.step_bytes = self.bytes - before
        return whole

    def _gather_alike(self, tensor: Tensor) -> list[Tensor]:
        self.bytes += tensor.nbytes
        return super()._gather_alike(tensor)

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        self.bytes += tensor.nbytes
        return super()._all_reduce(tensor)


def made_up(users: int, items: int, events: int) -> Interactions:
    """Interactions of users with items some of which are far more popular than others."""
    random = np.random.default_rng(0)
    user_ids = pa.array([f"user-{number:08}" for number in range(users)])
    item_ids = pa.array([f"item-{number:08}" for number in range(items)])
    chosen_users = np.sort((users * random.random(events)).astype(np.int64))
    chosen_items = (items * random.random(events) ** 3).astype(np.int64)
    return Interactions.from_arrays(user_ids.take(pa.array(chosen_users)), item_ids.take(pa.array(chosen_items)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what training over several processes costs.")
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--events", type=int, default=400_000)
    parser.add_argument("--recipe", action="append", help="neumf-fast and caser unless others are named")
    parser.add_argument("--batch-size", type=int, help="of all processes together, instead of the recipe's")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = made_up(arguments.users, arguments.items, arguments.events)
    with joined("cpu") as processes:
        first, end = shares(np.diff(data.offsets), processes.size)[processes.rank : processes.rank + 2]
        own = data.select((data.user_index >= first) & (data.user_index < end))
        for name in arguments.recipe or ["neumf-fast", "caser"]:
            recipe = recipe_named(name)
            recipe = replace(recipe, batch_size=arguments.batch_size or recipe.batch_size)
            measured, started = Measured(processes), time.process_time()
            train(recipe, own, epochs=1, processes=measured)
            seconds = time.process_time() - started
            if not processes.is_first:
                continue
            figures = {
                "recipe": name,
                "processes": processes.size,
                "examples_per_step": len(data) / measured.steps,
                "bytes_sent_per_step": measured.step_bytes,
                "processor_ms_per_step": 1000 * seconds / measured.steps,
                "of_which_exchange_ms": 1000 * measured.seconds / measured.steps,
            }
            print(
                json.dumps(
                    {key: round(value, 2) if isinstance(value, float) else value for key, value in figures.items()}
                )
            )


if __name__ == "__main__":
    main()
