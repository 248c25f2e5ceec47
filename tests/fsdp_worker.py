"""What each process of the runs in test_training_recipes.py does, under torchrun."""

import argparse
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gpseq.distributed import average_gradients
from tests.distributed_worker import Attention, Sequences, batch

KINDS, WAYS = ("attention", "sequences"), ("sharded", "replicated")


def build(kind: str) -> torch.nn.Module:
    """A module whose forward returns its loss, the same in every process."""
    return (Attention("joint") if kind == "attention" else Sequences()).double().train()


def replicated(kind: str, module: torch.nn.Module) -> set[torch.nn.Parameter]:
    """Parameters of Gaussian processes and of noise: what is not sharded."""
    if kind == "attention":
        return {p for layer in module.encoder.layers for p in layer.self_attn.inducing.parameters()}
    return {*module.vae.prior.parameters(), *module.vae.likelihood.parameters()}


def shard(kind: str, module: torch.nn.Module) -> None:
    """The backbone over all processes of a CPU."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    kept = replicated(kind, module)
    blocks = module.encoder.layers if kind == "attention" else (module.vae.encoder, module.vae.decoder)
    for part in (*blocks, module):
        fully_shard(part, mesh=mesh, ignored_params=kept)


def step(kind: str, size: int, rank: int | None, way: str = "sharded") -> dict[str, dict[str, torch.Tensor]]:
    """One step of AdamW on two micro-batches a process: in one of several, or in one that takes all parts in turn."""
    module = build(kind)
    kept = replicated(kind, module)
    forward = module
    if rank is not None and way == "sharded":
        shard(kind, module)
    elif rank is not None:
        forward = torch.nn.parallel.DistributedDataParallel(module)
    # In groups of their own, as steps over all tensors at once (foreach) refuse a mixture.
    groups = [{"params": [p for p in module.parameters() if p not in kept]}]
    groups += [{"params": [p for p in module.parameters() if p in kept]}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    x, y = batch()
    parts = [rank] if rank is not None else range(size)
    for part in parts:
        torch.manual_seed(100 + part)  # each process draws for itself
        mine, labels = x.tensor_split(size)[part], y.tensor_split(size)[part]
        for rows in (slice(0, 1), slice(1, None)):
            last = rows.stop is None
            if rank is not None and way == "sharded":
                module.set_requires_gradient_sync(last)
            with nullcontext() if rank is None or way == "sharded" or last else forward.no_sync():
                loss = forward(mine[rows], labels[rows]) * len(mine[rows]) / len(mine)
                (loss / len(parts)).backward()
    if rank is not None and way == "sharded":
        average_gradients(p for p in module.parameters() if p in kept)
    named = dict(module.named_parameters())
    gradients = {name: whole(p.grad) for name, p in named.items() if p.grad is not None}
    optimizer.step()
    sharded = {name: torch.tensor(isinstance(p, DTensor)) for name, p in named.items()}
    return {"gradients": gradients, "parameters": {name: whole(p) for name, p in named.items()}, "sharded": sharded}


def whole(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor, of which this process may hold a part."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def refused() -> list[str]:
    """What is said of parameters without a dimension, which kernels and noises have."""
    found = []
    try:
        fully_shard(build("sequences"), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    except ValueError as error:
        found.append(str(error))
    return found


def main() -> None:
    """One step of each kind; what it ends with."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("error")
    # Linear layers return views on a CPU; nobody writes into these.
    warnings.filterwarnings("ignore", ".*returned a view tensor", UserWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, size = dist.get_rank(), dist.get_world_size()
    found = {(kind, way): step(kind, size, rank, way) for kind in KINDS for way in WAYS}
    torch.save({"steps": found, "refused": refused()}, args.out / f"fsdp-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
