"""Several processes that train one model: each learns from its own users' interactions, all hold the same weights.

`torchrun … -m ml train …` starts them. A step's gradients travel as the rows that the batch touched, never as whole
tables, and every process applies the sum of all, so that the weights stay alike without being sent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.distributed as torch_distributed
from torch import Tensor, nn

# How long a process waits for the others: longer than the longest thing one does alone (reading its parts, publishing,
# writing a checkpoint). One that dies is noticed at once, by its closed connection; this is for one that hangs.
TIMEOUT = timedelta(minutes=15)
# Streams of random numbers lie this far apart in the seeds: the golden ratio of 2**63, so that small seeds don't meet.
_SEED_STEP = 0x4F1BBCDCBFA53E0B
_ALIGNED_ROWS = 1 << 20


class ProcessLost(ConnectionError):  # noqa: N818
    """Another process of the training died, hangs or failed; its own output says why."""


class ElsewhereFailed(ValueError):  # noqa: N818
    """Another process met a problem that ends all of them; the message names it."""


class Processes:
    """The processes of one training and this one's `rank` among `size`; every method is called by all or by none.

    Alone (the default), each method gives back what it is given.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.size = size
        # What travels must lie where the processes' network takes it from: NCCL moves device memory, gloo the host's.
        self._device = device or torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this process reports, keeps checkpoints and publishes."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """A seed of this process's own; the first keeps the one it is given."""
        return (seed + self.rank * _SEED_STEP) % 2**63

    def common_generator(self, seed: int, own: torch.Generator) -> torch.Generator:
        """What all processes draw the same numbers from; alone, `own`."""
        return own if self.size == 1 else torch.Generator(own.device).manual_seed((seed - _SEED_STEP) % 2**63)

    def part(self, order: Tensor, step: int, steps: int, batch_size: int) -> Tensor:
        """This process's share of one of the `steps` batches of an epoch; `order` are its own examples.

        Alone, batches have `batch_size` and the last one what is left. Several processes each cut their examples into
        as many even parts as there are steps, so that all take part in every step and each example comes once.
        """
        if self.size == 1:
            return order[step * batch_size : (step + 1) * batch_size]
        return order[len(order) * step // steps : len(order) * (step + 1) // steps]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Each process's tensor, in the order of ranks; they may differ in their first dimension."""
        if self.size == 1:
            return [tensor]
        lengths = [int(length) for length in self._gather_alike(torch.tensor([len(tensor)]))]
        return self._gather_rows(tensor, lengths)

    def gather_array(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """All processes' arrays, one after the other."""
        if self.size == 1:
            return array
        is_flag = array.dtype == np.bool_
        found = torch.cat(self.gather(torch.from_numpy(array.astype(np.uint8) if is_flag else array))).numpy()
        return found.astype(np.bool_) if is_flag else found

    def gather_values(self, value: Any) -> list[Any]:
        """What each process has to say, as JSON takes it."""
        if self.size == 1:
            return [value]
        written = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(bytes(each.numpy())) for each in self.gather(written)]

    def joint_name(self, name: str) -> str:
        """One name for all from each process's own."""
        return hashlib.sha256(json.dumps(self.gather_values(name)).encode()).hexdigest()

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, element by element."""
        return tensor if self.size == 1 else self._all_reduce(tensor)

    def sum_array(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The sum of all processes' arrays, element by element."""
        return array if self.size == 1 else self._all_reduce(torch.from_numpy(array)).numpy()

    def sum_number(self, number: int) -> int:
        """The sum of all processes' numbers."""
        return int(self.sum_tensor(torch.tensor(number)))

    def exchange_rows(self, rows: npt.NDArray[Any], destination: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Send each row to the process it belongs to; returns those that came here, in the order of ranks."""
        if self.size == 1:
            return rows
        order = np.argsort(destination, kind="stable")
        outgoing = np.bincount(destination, minlength=self.size)
        table = torch.stack(self._gather_alike(torch.from_numpy(outgoing)))
        incoming = [int(count) for count in table[:, self.rank]]
        sent = torch.from_numpy(np.ascontiguousarray(rows[order])).to(self._device)
        received = sent.new_empty((sum(incoming), *sent.shape[1:]))
        with _told_if_lost():
            torch_distributed.all_to_all_single(received, sent, incoming, [int(count) for count in outgoing])
        return received.cpu().numpy()

    def gather_strings(self, strings: pa.Array) -> pa.Array:
        """All processes' strings, one after the other."""
        if self.size == 1:
            return strings
        sink = pa.BufferOutputStream()
        table = pa.table({"": strings})
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        written = torch.from_numpy(np.frombuffer(sink.getvalue(), np.uint8).copy())
        found = [pa.ipc.open_stream(pa.py_buffer(each.numpy())).read_all().column(0) for each in self.gather(written)]
        return pa.concat_arrays([chunk for column in found for chunk in column.chunks])

    @contextmanager
    def together(self) -> Iterator[None]:
        """End all processes with the same error if one meets a problem in this block, which must not talk to others."""
        if self.size == 1:
            yield
            return
        problem: Exception | None = None
        try:
            yield
        except (ValueError, OSError) as error:
            problem = error
        problems = self.gather_values(None if problem is None else str(problem))
        if problem is not None:
            raise problem
        for rank, text in enumerate(problems):
            if text is not None:
                raise ElsewhereFailed(f"process {rank} of {self.size}: {text}")

    def add_gradients(
        self, parameters: Mapping[str, nn.Parameter], tables: Collection[str], loss: Tensor, weight: Tensor
    ) -> Tensor:
        """Leave in every process the gradient of the whole batch's loss, and return that loss.

        `loss` is the mean over this process's examples, which weigh `weight` together: the whole batch's is the mean
        of all, so weighed. Of `tables` only the rows with a gradient travel; what is left of them is a sparse gradient
        whose rows may repeat. Other parameters are small, and are summed whole.
        """
        if self.size == 1:
            return loss
        rows = {name: _rows_of(parameters[name]) for name in parameters if name in tables}
        # One message says how much follows: weight, weighed loss, and the rows of each table.
        counts = torch.tensor([len(indices) for indices, _ in rows.values()], dtype=torch.float64, device=loss.device)
        weight = weight.to(torch.float64)
        # A process without examples counts for nothing, whatever the loss of none may be.
        weighed = torch.where(weight > 0, loss.to(torch.float64) * weight, 0.0)
        heads = torch.stack(self._gather_alike(torch.cat((torch.stack((weight, weighed)), counts)))).to(loss.device)
        total = heads[:, 0].sum()
        share = torch.where(total > 0, weight / total, 0.0).to(loss.dtype)
        self._add_dense([parameters[name] for name in parameters if name not in tables], share)
        self._add_rows({parameters[name]: found for name, found in rows.items()}, heads[:, 2:].long().cpu(), share)
        return torch.where(total > 0, heads[:, 1].sum() / total, 0.0).to(loss.dtype)

    @torch.no_grad()
    def align(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep the weights alike, which every process has computed for itself.

        On CPUs they are, to the last bit. A GPU adds in any order, so there all take the first one's, once an epoch.
        """
        if self.size == 1:
            return
        if self._device.type == "cpu":
            sums = [float(parameter.double().sum()) for parameter in parameters]
            assert len({str(each) for each in self.gather_values(sums)}) == 1, "the processes' weights differ"
            return
        for parameter in parameters:
            for rows in torch.split(parameter, _ALIGNED_ROWS):
                weights = rows.contiguous()
                with _told_if_lost():
                    torch_distributed.broadcast(weights, 0)
                rows.copy_(weights)

    def _add_dense(self, parameters: Sequence[nn.Parameter], share: Tensor) -> None:
        if not parameters:
            return
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        flat = self._all_reduce(torch.cat([gradient.flatten() for gradient in gradients]) * share)
        for parameter, values in zip(parameters, torch.split(flat, [each.numel() for each in parameters]), strict=True):
            parameter.grad = values.view_as(parameter)

    def _add_rows(self, rows: Mapping[nn.Parameter, tuple[Tensor, Tensor]], counts: Tensor, share: Tensor) -> None:
        """All tables' rows in two messages: the indices, and the values."""
        if not rows:
            return
        indices = torch.cat([found for found, _ in rows.values()])
        values = torch.cat([found.flatten() * share for _, found in rows.values()])
        widths = torch.tensor([found.shape[1] for _, found in rows.values()])
        all_indices = self._gather_rows(indices, [int(n) for n in counts.sum(1)])
        all_values = self._gather_rows(values, [int(n) for n in (counts * widths).sum(1)])
        index_parts = [torch.split(each, n.tolist()) for each, n in zip(all_indices, counts, strict=True)]
        value_parts = [torch.split(each, (n * widths).tolist()) for each, n in zip(all_values, counts, strict=True)]
        for place, parameter in enumerate(rows):
            parameter.grad = torch.sparse_coo_tensor(
                torch.cat([parts[place] for parts in index_parts]).unsqueeze(0),
                torch.cat([parts[place] for parts in value_parts]).view(-1, parameter.shape[1]),
                parameter.shape,
                check_invariants=False,
            )

    def _gather_alike(self, tensor: Tensor) -> list[Tensor]:
        """Each process's tensor, where all have the same shape."""
        sent = tensor.to(self._device).contiguous()
        received = [torch.empty_like(sent) for _ in range(self.size)]
        with _told_if_lost():
            torch_distributed.all_gather(received, sent)
        return [each.to(tensor.device) for each in received]

    def _gather_rows(self, tensor: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Each process's rows; shorter ones travel padded, as the networks want equal shapes."""
        padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        return [each[:length] for each, length in zip(self._gather_alike(padded), lengths, strict=True)]

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        sent = tensor.to(self._device, copy=True).contiguous()
        with _told_if_lost():
            torch_distributed.all_reduce(sent)
        return sent.to(tensor.device)


ALONE = Processes()


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started with this one, or the group that is set up already; else be alone.

    On GPUs each process takes the one of its place on its host, through NCCL; else gloo.
    """
    if torch_distributed.is_available() and torch_distributed.is_initialized():
        yield _of_group(device)
        return
    if not (torch_distributed.is_available() and torch_distributed.is_torchelastic_launched()):
        yield ALONE
        return
    if device == "cuda":
        torch.cuda.set_device(torch_distributed.get_node_local_rank())
    with _told_if_lost():
        torch_distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    yield _of_group(device)
    # Only after success: with a lost process the others would wait for it once more.
    torch_distributed.destroy_process_group()


def shares(counts: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """Cut users into `size` ranges with about as many interactions each: the first user of each, and the end.

    `counts` (num_users,) are the users' numbers of interactions.
    """
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    inner = np.searchsorted(ends, np.arange(1, size) * total / size, side="left")
    return np.concatenate([[0], np.minimum(inner + 1, len(counts)), [len(counts)]]).astype(np.int64)


def _of_group(device: str) -> Processes:
    on = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    return Processes(torch_distributed.get_rank(), torch_distributed.get_world_size(), on)


def _rows_of(parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    """The rows of a table that have a gradient, each once, and their gradients (rows, width)."""
    gradient = parameter.grad
    if gradient is None:
        return parameter.new_empty(0, dtype=torch.int64), parameter.new_empty(0, parameter.shape[1])
    gradient = gradient.coalesce()
    return gradient.indices()[0], gradient.values()


@contextmanager
def _told_if_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ProcessLost(
            "another process of this training is gone or does not answer; its own output says why, and the training "
            f"goes on from its checkpoint when all are started again ({reason})"
        ) from error
