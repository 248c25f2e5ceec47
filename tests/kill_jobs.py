"""Jobs that are killed and begun again: each keeps a checkpoint in a folder, and writes what it ends with."""

from pathlib import Path

import gpytorch
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gpseq
from gpseq.models import FleetStore, StreamingFleet
from gpseq.reconfiguration import Distiller
from gpseq.training import fit

EPOCHS = 12


def train(directory: Path) -> None:
    """A network with processes for attention, with draws and dropout, on shuffled batches."""
    torch.manual_seed(0)
    layer = gpseq.nn.SGPATransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True, num_inducing=4)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 2))
    loader = DataLoader(_data(), 16, shuffle=True, generator=torch.Generator().manual_seed(1))
    fit(
        model,
        lambda model, pair, step: nn.functional.cross_entropy(model(pair[0]), pair[1]),
        loader,
        optimizer=torch.optim.Adam(model.parameters(), 1e-2),
        epochs=EPOCHS,
        checkpoint=directory / "checkpoint",
        progress=False,
    )
    gpseq.storage.save(directory / "result", model.state_dict())


def distil(directory: Path) -> None:
    """A student, on its own path with draws."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    teacher = nn.Sequential(encoder, nn.Flatten(), nn.Linear(24, 2)).eval().requires_grad_(False)
    distiller = Distiller(teacher)
    loader = DataLoader(_data(), 16, shuffle=True, generator=torch.Generator().manual_seed(1))
    distiller.fit(loader, EPOCHS, checkpoint=directory / "checkpoint", progress=False)
    gpseq.storage.save(directory / "result", distiller.student.state_dict())


def fleet(directory: Path) -> None:
    """A fleet in files, fed from the beginning each time: it knows itself what it has."""
    kernel, likelihood = gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.GaussianLikelihood()
    prototype = StreamingFleet(4, gpseq.features.HippoFeatures(14, 3.0), kernel, likelihood)
    store = FleetStore(directory / "fleet", prototype, 14)
    for chunk in range(30):
        generator = torch.Generator().manual_seed(chunk)
        streams = torch.randperm(14, generator=generator)[:6]
        times = 0.2 * (chunk + torch.rand(6, 2, generator=generator))
        store.update(times, torch.randn(6, 2, generator=generator), streams=streams, position=chunk)
    gpseq.storage.save(
        directory / "result", {f"{i}.{k}": v for i in range(4) for k, v in store.shard(i).state_dict().items()}
    )


def _data() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 3, 8, generator=generator)
    return TensorDataset(x, (x.mean((1, 2)) > 0).long())


JOBS = {"train": train, "distil": distil, "fleet": fleet}
