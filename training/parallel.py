"""Training one model with several processes: ranks, sums over ranks, DDP and sharding.

    DDP      every rank has all weights; gradients are averaged                 for adapters, and for all that fits
    FSDP2    a rank has 1/world of each weight, gradient and moment; a block is gathered just before it runs

Without torchrun all of this does nothing. Functions marked collective must be called by all ranks in the same order.
Checkpoints contain whole tensors in both cases: `whole` gathers one, `place` cuts out this rank's part. Next: train.py.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP


def start(name: str, local: int) -> torch.device:
    """Join the group that torchrun made; returns the device of this process, `name` being cpu, cuda or auto."""
    kind = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        if not torch.cuda.is_available():
            fix = "use --device=cpu, or check its driver and CUDA_VISIBLE_DEVICES"
            raise ValueError(f"--device=cuda: this machine shows no CUDA device; {fix}")
        torch.cuda.set_device(torch.device(kind, local))
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=30))
    return torch.device(kind, local) if kind == "cuda" else torch.device(kind)


def ranks() -> tuple[int, int, int]:
    """Number of this process, how many there are, and its number on this machine."""
    rank, world, local = (int(os.environ.get(name, other)) for name, other in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    return rank, world, local


def barrier() -> None:
    """Wait for every rank. Collective."""
    if dist.is_initialized():
        dist.barrier()


def all_sum(x: Tensor, device: torch.device) -> Tensor:
    """Sum over ranks, returned on the CPU. Collective; `device` is where the reduction runs (NCCL needs the GPU)."""
    x = x.to(device)
    if dist.is_initialized():
        dist.all_reduce(x)
    return x.cpu()


def end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- DDP and sharding ----

def shard(model: nn.Module, block: type[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Shard every weight over the ranks, in place; a single process shards nothing. Collective.

    A module of type `block` is gathered while it runs, all other weights with the whole model. Shards, gradients and moments
    keep their dtype; gathered weights are in `dtype`, and gradients are summed in fp32.
    """
    if not dist.is_initialized():
        return
    for t in [*model.parameters(), *model.buffers()]:       # what rank 0 drew or read holds, as DDP has it
        dist.broadcast(t.data, 0)
    policy = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in [m for m in model.modules() if isinstance(m, block)] + [model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The module to call in training: the model itself if it is sharded or there is one process, otherwise DDP. Collective."""
    if isinstance(model, FSDPModule) or not dist.is_initialized():
        return model
    return DDP(model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)


def last_of_step(net: nn.Module, last: bool) -> None:
    """DDP averages gradients only in the last micro-batch; FSDP2 keeps no whole gradients and reduces in each one."""
    if isinstance(net, DDP):
        net.require_backward_grad_sync = last


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Context in which every rank has all weights, so that each may run the model on its own, or not at all. Collective."""
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    if parts:
        model._get_fsdp_state()._lazy_init()       # otherwise a block that runs before the model ever did takes itself for the root
    for m in parts:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    try:
        yield
    finally:
        for m in parts:
            m.reshard()
            m.set_reshard_after_forward(m is not model, recurse=False)     # the model's own part is used until backward


def whole(t: Tensor) -> Tensor:
    """The whole tensor of which each rank has a part. Collective."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def part(t: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return t.to_local() if isinstance(t, DTensor) else t


def place(full: Tensor, like: Tensor) -> Tensor:
    """Put a whole tensor, which every rank has, on the device of `like`, sharded as `like`."""
    full = full.to(like.device)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None) if isinstance(like, DTensor) else full
