"""Several processes, started by torchrun, that train one model: each takes its share of a step's sequences."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..architectures.base import Model

_PATIENCE = timedelta(hours=12)
"""While one process makes the tokens of the text, the others wait."""


@dataclass(frozen=True)
class World:
    """The processes that train together; this one alone, as it stands here."""

    rank: int = 0
    size: int = 1

    @classmethod
    @contextlib.contextmanager
    def join(cls, device: str) -> Iterator[World]:
        """Those that torchrun started."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield cls()
            return
        dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=_PATIENCE)
        try:
            yield cls(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process does what is in the block, then the others."""
        if self.rank:
            dist.barrier()
        yield
        if self.size > 1 and not self.rank:
            dist.barrier()

    def device(self, name: str) -> str:
        """A GPU of its own for every process of a machine."""
        return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and self.size > 1 else name

    def share(self, batch: Tensor) -> Tensor:
        """This process's sequences of a step: a part of as many as all others have."""
        return batch.chunk(self.size)[self.rank]

    def sums(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Of each value, over all processes."""
        if self.size == 1:
            return [*values]
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def mean(self, gradient: Tensor) -> Tensor:
        """Over all processes."""
        if self.size > 1:
            dist.all_reduce(gradient)
            gradient /= self.size
        return gradient

    def mean_rows(self, gradient: Tensor) -> Tensor:
        """A sparse gradient of rows, coalesced: the mean over all processes, coalesced."""
        if self.size == 1:
            return gradient
        rows, values = gradient.indices()[0], gradient.values()
        counts = [int(count) for count in self._gathered(torch.tensor([len(rows)], device=rows.device))]
        all_rows, all_values = (self._gathered(_padded(its, max(counts))) for its in (rows, values))
        kept = [slice(index * max(counts), index * max(counts) + count) for index, count in enumerate(counts)]
        rows, values = (torch.cat([its[part] for part in kept]) for its in (all_rows, all_values))
        mean = torch.sparse_coo_tensor(rows[None], values / self.size, gradient.shape, check_invariants=False)
        return mean.coalesce()

    def _gathered(self, tensor: Tensor) -> Tensor:
        """Those of all processes, one after the other."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)


ALONE = World()


def _padded(tensor: Tensor, length: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])


def replicate(model: Model, tables: Sequence[Tensor]) -> DistributedDataParallel:
    """The model, whose gradients are averaged while they are computed; those of `tables` are left to `mean_rows`."""
    ids = {id(table) for table in tables}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in ids]
    # The name that PyTorch has for this: DDP would have a dense gradient of each table, or none on NCCL.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return DistributedDataParallel(model)


def shard(model: Model, world: World) -> None:
    """Spreads weights, and so gradients and moments, over the processes; a layer has its own together while it is
    computed. Scalars stay whole in each process, their gradients are left to `World.mean`."""
    mesh = init_device_mesh(model.embed_tokens.weight.device.type, (world.size,))
    scalars = {parameter for parameter in model.parameters() if parameter.dim() == 0}
    for module in [*model.layers, model]:
        fully_shard(module, mesh=mesh, ignored_params=scalars)


@contextlib.contextmanager
def accumulating(model: nn.Module, last: bool) -> Iterator[None]:
    """Around a forward and a backward pass: gradients are averaged after the last one of a step alone."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    with contextlib.nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
        yield


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a sharded model and its optimizer, in the first process; all processes have to ask."""
    weights, moments = get_state_dict(model, optimizer, options=_WHOLE)
    return weights, moments


def load_whole_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Any], moments: dict[str, Any]
) -> None:
    """The inverse; every process has the whole of it."""
    set_state_dict(
        model,
        optimizer,
        model_state_dict=weights,
        optim_state_dict=moments,
        options=StateDictOptions(full_state_dict=True, strict=False),  # a base has what is frozen
    )
