"""What each process of test_distributed.py does, under torchrun: learns its part, and writes what it ends with."""

import argparse
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import gpytorch
import torch
import torch.distributed as dist

import gpseq
from gpseq.distributed import ProcessError, ProcessShards, average_gradients
from gpseq.models import FleetStore, StreamingFleet, StreamingGP


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Three chunks of 40; the third passes the horizon."""
    generator = torch.Generator().manual_seed(0)
    x = torch.sort(12 * torch.rand(120, generator=generator, dtype=torch.float64)).values
    return x, x.sin() + 0.1 * torch.randn(120, generator=generator, dtype=torch.float64)


def stream(kind: str) -> StreamingGP:
    """A model that is the same in every process."""
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).double()
    likelihood = {
        "gaussian": gpytorch.likelihoods.GaussianLikelihood,
        "batch": gpytorch.likelihoods.GaussianLikelihood,
        "points": gpytorch.likelihoods.GaussianLikelihood,
        "sites": gpytorch.likelihoods.StudentTLikelihood,
        "binary": gpytorch.likelihoods.BernoulliLikelihood,
    }[kind]()
    features = gpseq.features.HippoFeatures(24, horizon=8.0)
    if kind == "points":
        features = gpseq.features.SelectedPoints(10)
    if kind == "batch":
        kernel = gpytorch.kernels.ScaleKernel(
            gpytorch.kernels.RBFKernel(batch_shape=torch.Size([2])), batch_shape=torch.Size([2])
        ).double()
        kernel.base_kernel.lengthscale = torch.tensor([0.8, 1.3]).reshape(2, 1, 1)
    return StreamingGP(features, kernel, likelihood.double()).eval()


KINDS = ("gaussian", "batch", "points", "sites", "binary")


def targets(kind: str, y: torch.Tensor) -> torch.Tensor:
    """Of a kind of stream."""
    if kind == "batch":
        return torch.stack([y, -y])
    return (y > 0).double() if kind == "binary" else y


def learn(kind: str, shards: ProcessShards | None) -> StreamingGP:
    """All chunks: whole ones without shards, else a part in turn; of the second chunk process 0 has everything."""
    x, y = data()
    model = stream(kind)
    for number, chunk in enumerate(torch.arange(120).split(40)):
        rows = chunk
        if shards is not None:
            rows = chunk.tensor_split(shards.size)[shards.rank]
            if number == 1:
                rows = chunk if shards.rank == 0 else chunk[:0]
        model.update(x[rows], targets(kind, y)[..., rows], shards=shards)
    return model


def fleet(folder: Path, rank: int = 0, size: int = 1) -> FleetStore:
    """Streams in files, of which each process learns its own."""
    kernel, likelihood = gpytorch.kernels.RBFKernel().double(), gpytorch.likelihoods.GaussianLikelihood().double()
    prototype = StreamingFleet(4, gpseq.features.HippoFeatures(10, horizon=4.0), kernel, likelihood)
    if rank == 0:
        store = FleetStore(folder, prototype, num_streams=18)
    if size > 1:
        dist.barrier()
    store = FleetStore(folder, prototype).part(rank, size)
    for chunk in range(3):
        generator = torch.Generator().manual_seed(chunk)
        x = 2 * (chunk + torch.rand(18, 3, generator=generator, dtype=torch.float64))
        store.update(x, torch.randn(18, 3, generator=generator, dtype=torch.float64), position=chunk)
    return store


def main() -> None:
    """Learn, refuse, or die, as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    shards = ProcessShards()
    globals()[args.job](shards, args.out)
    if dist.is_initialized() and args.job != "death":
        dist.barrier()
        dist.destroy_process_group()


def update(shards: ProcessShards, out: Path) -> None:
    """Each kind of stream; the states at the end. And errors that all see."""
    found = {kind: dict(learn(kind, shards).state.items()) for kind in KINDS}
    model = learn("gaussian", shards)
    before = dict(model.state.items())
    errors = []
    x, y = torch.linspace(0, 5, 6), torch.zeros(6)
    bad = y.clone()
    bad[3] = torch.nan
    for part in (
        lambda: model.update(x, bad if shards.rank == 0 else y, shards=shards),
        lambda: stream("gaussian" if shards.rank else "points").update(x, y, shards=shards),
    ):
        try:
            part()
            errors.append("none")
        except ValueError as error:
            errors.append(str(error))
    unchanged = all(torch.equal(before[name], value) for name, value in model.state.items())
    fleet(out / "fleet", shards.rank, shards.size)
    weight = torch.nn.Parameter(torch.ones(3))
    number = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    (weight.sum() * (shards.rank + 1)).backward()
    if shards.rank == 0:
        (number * 4).backward()
    average_gradients([weight, number])
    torch.save(
        {"states": found, "errors": errors, "unchanged": unchanged, "gradients": [weight.grad, number.grad]},
        out / f"update-{shards.rank}.pt",
    )


class Attention(torch.nn.Module):
    """A transformer with processes for attention, and its loss: a mean over sequences, and the divergence once."""

    def __init__(self, sampling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = gpseq.nn.SGPATransformerEncoderLayer(
            8, 2, dim_feedforward=16, dropout=0.0, batch_first=True, num_inducing=4, sampling=sampling
        )
        self.encoder = gpseq.nn.SGPATransformerEncoder(layer, 2)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Minus the bound on the log probability of a label."""
        logits = self.head(self.encoder(x).mean(1))
        return torch.nn.functional.cross_entropy(logits, y) + gpseq.nn.kl_divergence(self.encoder, 100) / 100


class Sequences(torch.nn.Module):
    """A VAE of series, and its loss for a series."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vae = gpseq.generative.GPPriorVAE(
            torch.nn.Linear(3, 4), torch.nn.Linear(2, 3), num_latents=2, prior="matern32"
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Mean over series."""
        times = torch.linspace(0, 5, x.shape[1], dtype=x.dtype).expand(x.shape[:2])
        return self.vae(times, x[..., :3]).loss / len(x)


class Student(torch.nn.Module):
    """A student with its teacher's path; only the student learns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        encoder = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        teacher = torch.nn.Sequential(encoder, Pooled(), torch.nn.Linear(8, 3)).double().eval()
        self.distiller = gpseq.reconfiguration.Distiller(teacher.requires_grad_(False))
        self.distiller.calibrate(batch()[0])  # once, with the same inputs in all processes
        self.student = self.distiller.student.train()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Of the path, and of the labels."""
        return self.distiller.loss(x, y)


class Pooled(torch.nn.Module):
    """Mean over tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, T, D)`` to ``(B, D)``."""
        return x.mean(1)


LOSSES = {
    "attention, mean": lambda: Attention("mean"),
    "attention, joint": lambda: Attention("joint"),
    "sequences": Sequences,
    "student": Student,
}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Eight sequences."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 5, 8, generator=generator, dtype=torch.float64), torch.arange(8) % 3


def gradients(kind: str, size: int, rank: int | None) -> dict[str, torch.Tensor]:
    """Of one loss: under DDP in a process of several, or in one process that takes the parts in turn."""
    module = LOSSES[kind]().double().train()
    x, y = batch()
    parts = [rank] if rank is not None else range(size)
    wrapped = torch.nn.parallel.DistributedDataParallel(module) if rank is not None else module
    for part in parts:
        torch.manual_seed(100 + part)  # each process draws for itself
        loss = wrapped(x.tensor_split(size)[part], y.tensor_split(size)[part])
        (loss / len(parts)).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def training(shards: ProcessShards, out: Path) -> None:
    """Gradients of all losses."""
    found = {kind: gradients(kind, shards.size, shards.rank) for kind in LOSSES}
    torch.save(found, out / f"training-{shards.rank}.pt")


def death(shards: ProcessShards, out: Path) -> None:
    """The last process dies before its second chunk; the others say what they got, and what they know."""
    x, y = data()
    model = stream("gaussian")
    model.update(x[:40], y[:40], shards=shards)
    before = dict(model.state.items())
    if shards.rank == shards.size - 1:
        os._exit(0)
    try:
        model.update(x[40:80], y[40:80], shards=shards)
        message = "none"
    except ProcessError as error:
        message = str(error)
    unchanged = all(torch.equal(before[name], value) for name, value in model.state.items())
    torch.save({"message": message, "unchanged": unchanged}, out / f"death-{shards.rank}.pt")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
