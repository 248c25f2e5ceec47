"""Training of the networks that contenders are made of, with a cache of those that are finished."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.uncertainty.networks import make_sngp
from benchmarks.uncertainty.tasks import Part, Task
from gpseq import training
from gpseq.nn import CovarianceRefit, replace_attention
from gpseq.storage import replace_file

CACHE = Path("build/uncertainty")
#: Training inputs that covariances are fitted on again and again.
REFITTED = 1_000


@dataclass(frozen=True)
class Kind:
    """A way to train.

    Attributes:
        make: the network at the start.
        loss: from a network, inputs, labels, the part of all steps that is done (0 to 1), and the number of training
            inputs, to a scalar.
        finish: what is done after the last epoch, in place.
        before: from the network, the task and the steps of an epoch to what is called with the number of each step before
            it.
        version: goes up when the way changes, so that networks of the old one are not taken from the cache.
    """

    make: Callable[[Task], nn.Module]
    loss: Callable[[nn.Module, Tensor, Tensor, float, int], Tensor]
    finish: Callable[[nn.Module, Task], Any] | None = None
    version: int = 1
    before: Callable[[nn.Module, Task, int], Callable[[int], None]] | None = None


def _cross_entropy(network: nn.Module, x: Tensor, y: Tensor, done: float, num_data: int) -> Tensor:
    return functional.cross_entropy(network(x), y)


def _fit_head(network: nn.Module, task: Task) -> None:
    network.head.fit(in_batches(network.features, task.train.inputs))  # type: ignore[union-attr, operator, arg-type]


def _process(task: Task) -> nn.Module:
    return replace_attention(task.make(True), num_inducing=32)


def _process_without_dropout(task: Task) -> nn.Module:
    network = task.make(True)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return replace_attention(network, num_inducing=32)


def _refit(network: nn.Module, task: Task, steps: int) -> CovarianceRefit:
    return CovarianceRefit(network, list(task.train.inputs[:REFITTED].split(100)), every=steps)


KINDS: dict[str, Kind] = {
    "softmax": Kind(lambda task: task.make(True), _cross_entropy),
    "gp": Kind(_process, _cross_entropy, before=_refit),
    # Noise in the place of dropout: an ablation.
    "gp without dropout": Kind(_process_without_dropout, _cross_entropy, before=_refit),
    "none": Kind(lambda task: task.make(False), _cross_entropy),
    "sngp": Kind(lambda task: make_sngp(task.make(True)), _cross_entropy, _fit_head),
}


@dataclass(frozen=True)
class Trained:
    """A finished network.

    Attributes:
        network: in eval mode.
        seconds_per_step: process time of a training step.
        history: what :func:`gpseq.training.fit` recorded, as a dict.
    """

    network: nn.Module
    seconds_per_step: float
    history: dict[str, Any]


@dataclass(frozen=True)
class Batches:
    """The training part in random batches, in a new order at each epoch; the last, smaller batch is left out.

    Attributes:
        part: inputs and labels.
        batch_size: of each batch; the whole part where that is smaller.
        generator: of the order.
    """

    part: Part
    batch_size: int
    generator: torch.Generator

    def __len__(self) -> int:
        return max(len(self.part) // self.batch_size, 1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        assert self.part.labels is not None
        order = torch.randperm(len(self.part), generator=self.generator)
        for rows in order.split(self.batch_size)[: len(self)]:
            yield self.part.inputs[rows], self.part.labels[rows]


def trained(task: Task, kind: str, seed: int, cache: Path = CACHE, progress: bool | None = None) -> Trained:
    """A network of a kind, from the cache if it was finished before.

    A run that was stopped goes on from its last whole epoch. Finished networks lie in ``cache/<task>`` under the kind,
    the seed and a hash of all settings and of the training part.

    Args:
        task: what it is trained on.
        kind: one of ``KINDS``.
        seed: of the weights at the start, the order of the data and dropout.
        cache: a folder.
        progress: as in :func:`gpseq.training.fit`.

    Returns:
        The network and how long a step took. Time before an interruption is not counted, nor are its steps.
    """
    way = KINDS[kind]
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        network = way.make(task)
        folder = cache / task.name
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{kind}-{seed}-{key(task, kind, network)}.pt"
        if file.exists():
            found = torch.load(file, weights_only=True)
            network.load_state_dict(found["state"])
            return Trained(network.eval(), found["seconds_per_step"], json.loads(found["history"]))
        seconds, history = _train(task, way, network, seed, file.with_suffix(".run"), progress)
    finally:
        torch.random.set_rng_state(state)
    content = {"state": network.state_dict(), "seconds_per_step": seconds, "history": json.dumps(history)}
    data = io.BytesIO()
    torch.save(content, data)
    replace_file(file, data.getvalue())
    file.with_suffix(".run").unlink(missing_ok=True)
    return Trained(network, seconds, history)


def _train(
    task: Task, way: Kind, network: nn.Module, seed: int, checkpoint: Path, progress: bool | None
) -> tuple[float, dict[str, Any]]:
    order = torch.Generator().manual_seed(seed)
    batches = Batches(task.train, task.batch_size, order)
    total = task.epochs * len(batches)
    optimizer = torch.optim.AdamW(network.parameters(), lr=task.learning_rate, weight_decay=task.weight_decay)
    scheduler = training.warmup_cosine(optimizer, total, round(task.warmup * total))
    steps = 0
    before = None if way.before is None else way.before(network, task, len(batches))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        nonlocal steps
        if before is not None:
            before(step)
        steps += 1
        return way.loss(model, *batch, step / total, len(task.train))

    begun = time.process_time()
    history = training.fit(
        network,
        loss,
        batches,
        optimizer=optimizer,
        epochs=task.epochs,
        scheduler=scheduler,
        schedule="step",
        max_grad_norm=1.0,
        checkpoint=checkpoint,
        generators=(order,),
        progress=progress,
    )
    seconds = (time.process_time() - begun) / max(steps, 1)
    network.eval()
    if way.finish is not None:
        way.finish(network, task)
    return seconds, history.as_dict()


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], inputs: Tensor, batch_size: int = 250) -> Tensor:
    """A function of many inputs, some at a time, without gradients."""
    return torch.cat([function(part) for part in inputs.split(batch_size)])


def key(task: Task, kind: str = "softmax", network: nn.Module | None = None) -> str:
    """A hash of all that a finished network depends on, apart from its seed; without the network, of the data alone."""
    settings = [kind, KINDS[kind].version, task.epochs, task.batch_size]
    settings += [task.learning_rate, task.weight_decay, task.warmup]
    digest = hashlib.sha256(json.dumps(settings).encode() + ("" if network is None else repr(network)).encode())
    for value in (task.train.inputs, task.train.labels):
        assert value is not None
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:10]
