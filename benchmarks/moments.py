"""Moments in one pass against Monte Carlo over the weights: linear networks, perceptrons, and a small transformer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.tables import table
from gpseq.predictive import Predictive
from gpseq.propagation import WeightPosterior, from_variances, linearised, propagate
from gpseq.propagation.moments import GaussianState
from gpseq.propagation.pooling import mean_tokens, select_token
from gpseq.propagation.walk import Walk

SAMPLES = 40_000
TANGENTS = 64
#: Ways to a prediction, and how each is called.
METHODS: dict[str, Callable[[nn.Module, WeightPosterior, Tensor], Predictive]] = {
    "published rules": lambda model, posterior, x: propagate(model, posterior, x, preset="streamlined"),
    "diag": lambda model, posterior, x: propagate(model, posterior, x, covariance="diag"),
    "full, tangent": lambda model, posterior, x: propagate(
        model, posterior, x, covariance="full", activations="tangent"
    ),
    "lowrank": lambda model, posterior, x: propagate(
        model, posterior, x, covariance="lowrank", num_tangents=TANGENTS, generator=torch.Generator().manual_seed(0)
    ),
    "full": lambda model, posterior, x: propagate(model, posterior, x, covariance="full"),
    "GLM": lambda model, posterior, x: linearised(model, posterior, x, method="exact"),
}


class Readout(nn.Module):
    """The first token, or the mean of all.

    Args:
        mean: which of the two.
    """

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, D)`` to ``(B, D)``."""
        return x.mean(1) if self.mean else x[:, 0]

    def propagate_moments(self, state: GaussianState, walk: Walk) -> GaussianState:
        """The rule of it."""
        return mean_tokens(state) if self.mean else select_token(state, 0)


def perceptron(activation: type[nn.Module]) -> nn.Module:
    """Widths 8, 32, 32 and 3."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 3)).double()


def transformer(mean: bool) -> nn.Module:
    """Two blocks of width 16 with four heads, norms before them, and three outputs."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, activation="gelu", batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    network = nn.Sequential(encoder, Readout(mean), nn.Linear(16, 3))
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return network.double().eval()


def tokens(alike: bool) -> Tensor:
    """Eight sequences: of 6 tokens, or of 16 that differ little."""
    draws = torch.Generator().manual_seed(2)
    if not alike:
        return torch.randn(8, 6, 16, generator=draws, dtype=torch.float64)
    common = torch.randn(8, 1, 16, generator=draws, dtype=torch.float64)
    return common + 0.1 * torch.randn(8, 16, 16, generator=draws, dtype=torch.float64)


def relative(model: nn.Module, ratio: float, rows: slice | None = None, *parts: str) -> dict[str, Tensor]:
    """Variances of matrices of weights: squares of a ratio of each matrix's root mean square.

    Args:
        model: whose weights they are.
        ratio: r.
        rows: of the packed projections only, where given.
        parts: of names; without, all matrices and, for perceptrons, their biases.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or (parts and not any(part in name for part in parts)):
            continue
        variance = torch.full_like(parameter, ratio**2) * parameter.detach().square().mean()
        if rows is not None and "in_proj" in name:
            chosen = torch.zeros_like(variance)
            chosen[rows] = variance[rows]
            variance = chosen
        found[name] = variance
    return found


def monte_carlo(model: nn.Module, variances: dict[str, Tensor], x: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of outputs ``(B, K)`` over Gaussian weights."""
    draws = torch.Generator().manual_seed(3)
    means = {name: model.get_parameter(name).detach() for name in variances}
    chunk = 500
    found = []
    for _ in range(samples // chunk):
        weights = {
            name: mean + variances[name].sqrt() * torch.randn(chunk, *mean.shape, generator=draws, dtype=mean.dtype)
            for name, mean in means.items()
        }
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            found.append(vmap(lambda w: functional_call(model, w, (x,)))(weights))
    drawn = torch.cat(found)
    return drawn.mean(0), drawn.var(0)


def compare(model: nn.Module, variances: dict[str, Tensor], x: Tensor, samples: int) -> dict[str, Any]:
    """Each method's deviations relative to Monte Carlo's, over all outputs and inputs."""
    mean, variance = monte_carlo(model, variances, x, samples)
    posterior = from_variances(variances)
    found = {}
    for name, method in METHODS.items():
        begun = time.process_time()
        with torch.no_grad():
            made = method(model, posterior, x)
        seconds = time.process_time() - begun
        ratio = (made.variance / variance).sqrt()
        bias = ((made.mean - mean).abs() / variance.sqrt()).mean()
        found[name] = {
            "ratio": ratio.mean().item(),
            "spread": ratio.std().item(),
            "bias": bias.item(),
            "seconds": seconds,
        }
    return found


def linear_error(depth: int) -> float:
    """Largest error of mean and covariance of a linear network against all patterns of its weights plus and minus."""
    torch.manual_seed(depth)
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(depth))).double()
    x = torch.tensor([[0.7, -1.1]], dtype=torch.float64)
    deviations = {name: torch.rand_like(value) for name, value in model.named_parameters()}
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4 * depth)), dtype=torch.float64)
    out = x.expand(len(signs), 1, 2)
    for part, (name, deviation) in zip(signs.split(4, dim=1), deviations.items(), strict=True):
        weight = model.get_parameter(name) + deviation * part.view(-1, 2, 2)
        out = out @ weight.mT
    drawn = out.squeeze(1)
    posterior = from_variances({name: value.square() for name, value in deviations.items()})
    with torch.no_grad():
        made = propagate(model, posterior, x, covariance="full")
        covariance = drawn.T.cov(correction=0)
        errors = (made.mean[0] - drawn.mean(0)).abs().max(), (made.covariance.to_dense()[0] - covariance).abs().max()
    return max(error.item() for error in errors)


def run(smoke: bool) -> dict[str, Any]:
    """Linear networks, perceptrons and transformers."""
    samples = 2_000 if smoke else SAMPLES
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(16, 8, generator=draws, dtype=torch.float64)
    perceptrons = {}
    for label, activation in (("ReLU", nn.ReLU), ("GELU", nn.GELU), ("tanh", nn.Tanh)):
        for ratio in (0.1, 0.3):
            model = perceptron(activation)
            perceptrons[f"{label}, {ratio:g}"] = compare(model, relative(model, ratio), x, samples)
    values, scores = slice(32, 48), slice(0, 32)
    cases: dict[str, tuple[bool, bool, float, slice | None, tuple[str, ...]]] = {
        "6 tokens, first, values": (False, False, 0.05, values, ("in_proj",)),
        "6 tokens, first, queries and keys": (False, False, 0.05, scores, ("in_proj",)),
        "6 tokens, first, perceptron": (False, False, 0.05, None, ("linear",)),
        "6 tokens, first, all": (False, False, 0.05, None, ()),
        "6 tokens, mean, all": (False, True, 0.05, None, ()),
        "6 tokens, mean, all, 0.15": (False, True, 0.15, None, ()),
        "16 alike, first, values": (True, False, 0.05, values, ("in_proj",)),
        "16 alike, mean, values": (True, True, 0.05, values, ("in_proj",)),
        "16 alike, mean, all": (True, True, 0.05, None, ()),
    }
    chosen = dict(list(cases.items())[-1:]) if smoke else cases
    transformers = {}
    for label, (alike, mean, ratio, rows, parts) in chosen.items():
        model = transformer(mean)
        transformers[label] = compare(model, relative(model, ratio, rows, *parts), tokens(alike), samples)
    return {
        "samples": samples,
        "linear": {str(depth): linear_error(depth) for depth in (1, 2, 3, 4)},
        "perceptrons": perceptrons,
        "transformers": transformers,
    }


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Ratios of deviations, method by method."""
    worst = max(result["linear"].values())
    parts = [
        "## Moments in one pass: how far from Monte Carlo?",
        f"Deviations of outputs, relative to those of {result['samples']:,} draws of the weights: mean and deviation "
        "over outputs and inputs, and in brackets the mean error of the means in units of the deviation. A number "
        "behind a network is the deviation of its weights relative to their size, 0.05 where there is none.",
        f"Linear networks of depth one to four are exact: the largest error of means and covariances is {worst:.0e}.",
    ]
    for title, key in (("Perceptron", "perceptrons"), ("Transformer of two blocks", "transformers")):
        rows = [
            [label, *(f"{s['ratio']:.3f} ± {s['spread']:.3f} ({s['bias']:.3f})" for s in scores.values())]
            for label, scores in result[key].items()
        ]
        parts.append(table([title, *METHODS], rows))
    return parts
