"""Training one model with several processes: ranks, sums over ranks, DDP and sharding.

    DDP      every rank has all weights; gradients are averaged                 for all that fits
    FSDP2    a rank has 1/world of each weight, gradient and moment; a block, on a CPU a Linear, is gathered just before it runs
    HSDP     FSDP2 within groups of `--shard_size` ranks (a node), gradients averaged over the groups

What a rank of FSDP2 holds beside its shards: two blocks, on a CPU two Linears; the frozen weights outside the blocks (embeddings,
heads), which are in use all through a step, so that to cut them would save nothing at its peak; a gathered copy of the trained ones
there, and at first a second one, because PyTorch gathers into a buffer and copies from it. `train.py --plan` counts it, with blocks.

Without torchrun all of this does nothing. Functions marked collective must be called by all ranks in the same order.
Of a tensor that is cut each rank has its own rows. Imports nothing of ours: any file may use it. FSDP takes as long to import
as half of torch, so only `shard` does. Next: train.py.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel as DDP


def start(name: str, local: int) -> torch.device:
    """Join the group that torchrun made; returns the device of this process, `name` being cpu, cuda or auto."""
    kind = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device=cuda: this machine shows no CUDA device; use --device=cpu, or check driver and CUDA_VISIBLE_DEVICES")
        torch.cuda.set_device(torch.device(kind, local))
    if kind == "cpu" and os.name == "posix" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 25)      # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD: what a step frees stays for the next one, because
        libc.mallopt(-1, 1 << 30)      # to get zeroed pages from the kernel anew takes 3 to 5 % of it
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


def decided(choose: Callable[[], Any]) -> Any:
    """What `choose` returns on rank 0, on every rank. Collective."""
    found = [choose() if ranks()[0] == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found, 0)
    return found[0]


def end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- DDP and sharding ----

def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has cut it: FSDP2 has then added its methods."""
    return hasattr(module, "unshard")


def is_cut(t: Any) -> bool:
    """Whether it is a DTensor, of which each rank has a part."""
    return hasattr(t, "placements")


def shard(model: nn.Module, block: type[nn.Module], linear: type[nn.Module], device: torch.device, dtype: torch.dtype,
          size: int = 0) -> None:
    """Shard the weights over the ranks, in place; a single process shards nothing, and what is cut stays as it is. Collective.

    A module of type `block` is gathered while it runs, on a CPU, where nothing overlaps, each `linear` in it while that runs; what is
    trained outside with the whole model; what is frozen outside stays whole. Shards, gradients and moments keep their dtype; gathered
    weights are in `dtype`, and gradients are summed in fp32.
    `size` ranks share one copy of the weights, 0 = all. A model on the meta device is cut before it has weights.
    """
    if not dist.is_initialized() or is_sharded(model):
        return
    world = dist.get_world_size()
    if size and world % size:
        raise ValueError(f"--shard_size={size} does not divide {world} ranks; give the number of ranks on a node")
    for t in [*model.parameters(), *model.buffers()]:       # what rank 0 drew or read holds, as DDP has it
        if not t.is_meta:
            dist.broadcast(t.data, 0)
    if device.type == "cpu" and os.name == "posix" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 17)      # M_MMAP_THRESHOLD, else glibc keeps what gathered blocks leave: all of them, by and by
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (world // size, size) if size else (world,), mesh_dim_names=("copy", "shard") if size else None)
    blocks = [m for m in model.modules() if isinstance(m, block)]
    uncut = {p for p in model.parameters() if not p.requires_grad}.difference(*(m.parameters() for m in blocks))
    linears = [m for b in blocks for m in b.modules() if isinstance(m, linear)] if device.type == "cpu" else []
    for module in [*linears, *blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=uncut)


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The module to call in training: the model itself if it is sharded or there is one process, otherwise DDP. Collective."""
    if is_sharded(model) or not dist.is_initialized():
        return model
    return DDP(model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)


def last_of_step(net: nn.Module, last: bool) -> None:
    """DDP averages gradients only in the last micro-batch; FSDP2 keeps no whole gradients and reduces in each one."""
    if isinstance(net, DDP):
        net.require_backward_grad_sync = last


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Context in which every rank has all weights, so that each may run the model on its own, or not at all. Collective."""
    parts = [m for m in model.modules() if is_sharded(m)]
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
    return t.full_tensor() if is_cut(t) else t


def part(t: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return t.to_local() if is_cut(t) else t


def first_row(t: Tensor) -> int:
    """The row of the whole with which this rank's part begins."""
    for n, place in enumerate(t.placements):
        if place.is_shard(0):
            return min(len(t), t.device_mesh.get_local_rank(n) * -(-len(t) // t.device_mesh.size(n)))
    return 0


def own_rows(full: Any, like: Tensor) -> Any:
    """Of a whole tensor, read or not, what this rank has of one that is cut as `like`."""
    return full.narrow(0, first_row(like), len(part(like))) if is_cut(like) else full


def joined(own: Tensor, like: Tensor) -> Tensor:
    """The tensor of which every rank has its own rows, cut as `like`; it may lack last axes of that."""
    if not is_cut(like):
        return own
    shape = torch.Size((len(like), *own.shape[1:]))
    return type(like.data).from_local(own, like.device_mesh, like.placements, run_check=False, shape=shape,
                              stride=torch.empty(shape, device="meta").stride())


def place(full: Tensor, like: Tensor) -> Tensor:
    """Put a whole tensor, which every rank has, on the device of `like`, cut as `like`."""
    own = own_rows(full, like)
    return joined(own.to(like.device, copy=own is not full), like)
