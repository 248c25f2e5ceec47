"""Moments in one pass against Monte Carlo over the weights: linear networks, perceptrons, and small transformers."""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from benchmarks.tables import table
from gpseq import plots
from gpseq.predictive import Predictive
from gpseq.propagation import WeightPosterior, from_variances, linearised, propagate
from gpseq.propagation.linearisation import forward_mode, main_output
from gpseq.propagation.moments import GaussianState
from gpseq.propagation.pooling import mean_tokens, select_token
from gpseq.propagation.walk import Walk

#: Draws of the weights; of the perceptrons' more, as their goal is as narrow as the error of 40,000.
SAMPLES, SAMPLES_PERCEPTRON, SAMPLES_LENGTHS = 40_000, 160_000, 20_000
#: Columns of the form ``"lowrank"``, and how many sets of draws its ratios are averaged over.
TANGENTS, SETS = 64, 10
LENGTHS = (1, 2, 4, 8, 16, 32)
Inputs = Tensor | Mapping[str, Any]


def _lowrank(model: nn.Module, posterior: WeightPosterior, x: Inputs, seed: int = 0) -> Predictive:
    generator = torch.Generator().manual_seed(seed)
    return propagate(model, posterior, x, covariance="lowrank", num_tangents=TANGENTS, generator=generator)


#: Ways to a prediction, and how each is called.
METHODS: dict[str, Callable[[nn.Module, WeightPosterior, Inputs], Predictive]] = {
    "published rules": lambda model, posterior, x: propagate(model, posterior, x, preset="streamlined"),
    "diag": lambda model, posterior, x: propagate(model, posterior, x, covariance="diag"),
    "full, tangent": lambda model, posterior, x: propagate(
        model, posterior, x, covariance="full", activations="tangent"
    ),
    "lowrank": _lowrank,
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


# Networks, inputs, and how uncertain weights are


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


def tokens(alike: bool, length: int) -> Tensor:
    """Eight sequences, of independent tokens or of tokens that differ little."""
    draws = torch.Generator().manual_seed(2)
    if not alike:
        return torch.randn(8, length, 16, generator=draws, dtype=torch.float64)
    common = torch.randn(8, 1, 16, generator=draws, dtype=torch.float64)
    return common + 0.1 * torch.randn(8, length, 16, generator=draws, dtype=torch.float64)


def pretrained() -> dict[str, tuple[nn.Module, Inputs, tuple[str, ...]]]:
    """BERT, ViT and GPT-2 of Hugging Face, small and random: network, inputs, and the names of the last two blocks.

    Empty where transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        return {}
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2ForSequenceClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    # Weights so large that attention is far from uniform.
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 64}
    common = {"initializer_range": 0.2, "num_labels": 3}
    torch.manual_seed(0)
    bert = BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **shape, **common))
    vit = ViTForImageClassification(ViTConfig(image_size=12, patch_size=4, num_channels=1, **shape, **common))
    gpt2 = GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=50,
            n_positions=16,
            n_embd=32,
            n_layer=4,
            n_head=4,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
            **common,
        )
    )
    ids = torch.randint(1, 50, (4, 8))
    mask = torch.ones(4, 8, dtype=torch.long)
    mask[1, 5:], mask[2, 3:] = 0, 0
    pixels = torch.randn(4, 1, 12, 12, dtype=torch.float64)
    return {
        "BERT, with padding": (
            bert.double().eval(),
            {"input_ids": ids, "attention_mask": mask},
            ("layer.2.", "layer.3."),
        ),
        "ViT": (vit.double().eval(), {"pixel_values": pixels}, ("layers.2.", "layers.3.", "layer.2.", "layer.3.")),
        "GPT-2": (gpt2.double().eval(), {"input_ids": ids}, ("h.2.", "h.3.")),
    }


def relative(model: nn.Module, ratio: float, rows: slice | None = None, parts: Sequence[str] = ()) -> dict[str, Tensor]:
    """Variances of matrices of weights: squares of a ratio of each matrix's root mean square.

    Args:
        model: whose weights they are.
        ratio: r.
        rows: of the packed projections only, where given.
        parts: of names; without, all matrices.
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
        found[name] = variance.detach()
    return found


# Comparisons


def monte_carlo(model: nn.Module, variances: dict[str, Tensor], x: Inputs, samples: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of outputs ``(B, K)`` over Gaussian weights."""
    draws = torch.Generator().manual_seed(3)
    means = {name: model.get_parameter(name).detach() for name in variances}
    args, named = ((x,), {}) if isinstance(x, Tensor) else ((), dict(x))
    chunk = 500
    found = []
    for _ in range(samples // chunk):
        weights = {
            name: mean + variances[name].sqrt() * torch.randn(chunk, *mean.shape, generator=draws, dtype=mean.dtype)
            for name, mean in means.items()
        }
        with forward_mode(model), torch.no_grad():
            found.append(vmap(lambda w: main_output(functional_call(model, w, args, named)))(weights))
    drawn = torch.cat(found)
    return drawn.mean(0), drawn.var(0)


def compare(model: nn.Module, variances: dict[str, Tensor], x: Inputs, samples: int) -> dict[str, Any]:
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


def by_length(parts: str, lengths: Sequence[int], samples: int) -> dict[str, Any]:
    """Ratios for the mean of tokens that differ little, against their number.

    Args:
        parts: ``"values"``, only their matrices are uncertain; or ``"all"``.
        lengths: numbers of tokens.
        samples: draws of the weights.

    Returns:
        By methods, the ratio at each length, averaged over outputs and inputs; for ``"lowrank"`` over sets of draws as
        well, and the deviation from one set to another of a single output's ratio.
    """
    model = transformer(mean=True)
    variances = relative(model, 0.05, slice(32, 48), ("in_proj",)) if parts == "values" else relative(model, 0.05)
    posterior = from_variances(variances)
    names = ("published rules", "diag", "full")
    found: dict[str, list[float]] = {name: [] for name in (*names, "lowrank", "lowrank, deviation")}
    for length in lengths:
        x = tokens(True, length)
        _, variance = monte_carlo(model, variances, x, samples)

        with torch.no_grad():
            for name in names:
                found[name].append((METHODS[name](model, posterior, x).variance / variance).sqrt().mean().item())
            made = torch.stack([_lowrank(model, posterior, x, seed).variance for seed in range(SETS)])
        ratios = (made / variance).sqrt()
        found["lowrank"].append(ratios.mean().item())
        found["lowrank, deviation"].append(ratios.var(0).mean().sqrt().item())
    return found


def run(smoke: bool) -> dict[str, Any]:
    """Linear networks, perceptrons and transformers."""
    torch.set_num_threads(1)
    samples = 1_000 if smoke else SAMPLES
    samples_perceptron = 1_000 if smoke else SAMPLES_PERCEPTRON
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(16, 8, generator=draws, dtype=torch.float64)
    perceptrons = {}
    for label, activation in (("ReLU", nn.ReLU), ("GELU", nn.GELU), ("tanh", nn.Tanh)):
        for ratio in (0.1, 0.3):
            model = perceptron(activation)
            perceptrons[f"{label}, {ratio:g}"] = compare(model, relative(model, ratio), x, samples_perceptron)
    values, scores = slice(32, 48), slice(0, 32)
    cases: dict[str, tuple[int, bool, bool, float, slice | None, tuple[str, ...]]] = {
        "6 tokens, first, values": (6, False, False, 0.05, values, ("in_proj",)),
        "6 tokens, first, queries and keys": (6, False, False, 0.05, scores, ("in_proj",)),
        "6 tokens, first, perceptron": (6, False, False, 0.05, None, ("linear",)),
        "6 tokens, first, all": (6, False, False, 0.05, None, ()),
        "6 tokens, mean, queries and keys": (6, False, True, 0.05, scores, ("in_proj",)),
        "6 tokens, mean, all": (6, False, True, 0.05, None, ()),
        "6 tokens, mean, all, 0.15": (6, False, True, 0.15, None, ()),
        "16 alike, first, values": (16, True, False, 0.05, values, ("in_proj",)),
        "16 alike, mean, values": (16, True, True, 0.05, values, ("in_proj",)),
        "16 alike, mean, all": (16, True, True, 0.05, None, ()),
    }
    chosen = dict(list(cases.items())[-1:]) if smoke else cases
    transformers = {}
    for label, (length, alike, mean, ratio, rows, parts) in chosen.items():
        model = transformer(mean)
        transformers[label] = compare(model, relative(model, ratio, rows, parts), tokens(alike, length), samples)
    last_blocks = {
        label: compare(model, relative(model, 0.05, parts=blocks), given, samples)
        for label, (model, given, blocks) in pretrained().items()
    }
    lengths = LENGTHS[:3] if smoke else LENGTHS
    samples_lengths = 1_000 if smoke else SAMPLES_LENGTHS
    return {
        "samples": samples,
        "samples_perceptron": samples_perceptron,
        "sets": SETS,
        "tangents": TANGENTS,
        "linear": {str(depth): linear_error(depth) for depth in (1, 2, 3, 4)},
        "perceptrons": perceptrons,
        "transformers": transformers,
        "pretrained": last_blocks,
        "samples_lengths": samples_lengths,
        "tokens": {"lengths": list(lengths)}
        | {part: by_length(part, lengths, samples_lengths) for part in ("values", "all")},
    }


# The report


def goals(result: dict[str, Any]) -> list[list[str]]:
    """What was to be reached, what was measured, whether it is, and what the published rules give."""
    worst = max(result["linear"].values())
    rows = [["linear networks of depth 1 to 4, error", "1e-12 at most", f"{worst:.0e}", _verdict(worst <= 1e-12), ""]]
    aims = [
        ("perceptrons", "ReLU, 0.3", 0.005),
        ("transformers", "6 tokens, mean, all", 0.02),
        ("transformers", "16 alike, mean, all", 0.02),
        ("transformers", "6 tokens, first, queries and keys", 0.02),
        ("transformers", "6 tokens, mean, queries and keys", 0.02),
    ]
    for group, label, width in aims:
        found = result[group].get(label)
        if found is None:  # a smoke test has few
            continue
        ratio, spread = found["full"]["ratio"], found["full"]["spread"]
        # The narrowest goal is about each output; the others about their average.
        met = abs(ratio - 1) <= width and (group != "perceptrons" or spread <= width)
        published = f"{found['published rules']['ratio']:.2f}"
        rows.append([f"{label}: `full`", f"1 ± {width}", f"{ratio:.4f} ± {spread:.4f}", _verdict(met), published])
    return rows


def _verdict(met: bool) -> str:
    return "reached" if met else "missed"


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Ratios of deviations, method by method, and against the number of tokens."""
    parts = [
        "## Moments in one pass: how far from Monte Carlo?",
        f"Deviations of outputs, relative to those of {result['samples']:,} draws of the weights "
        f"({result['samples_perceptron']:,} for perceptrons): mean and deviation over outputs and inputs, and in brackets "
        "the mean error of the means in units of the deviation. All matrices of weights are uncertain, unless it says "
        "which. A number behind a network is the deviation of its weights relative to their size, 0.05 where there is "
        f"none. `lowrank` has {result['tangents']} columns, of one set of draws. Networks have random weights.",
        "**Against the goals**",
        table(["what", "goal", "measured", "", "published rules"], goals(result)),
    ]
    groups = (
        ("Perceptron", "perceptrons"),
        ("Transformer of two blocks", "transformers"),
        ("Last two of four blocks", "pretrained"),
    )
    for title, key in groups:
        if not result[key]:
            parts.append(f"{title}: not measured, for want of transformers.")
            continue
        rows = [
            [label, *(f"{s['ratio']:.3f} ± {s['spread']:.3f} ({s['bias']:.3f})" for s in scores.values())]
            for label, scores in result[key].items()
        ]
        parts.append(table([title, *METHODS], rows))
    lengths = result["tokens"]["lengths"]
    rows = []
    for part, label in (("values", "values"), ("all", "all weights")):
        found = result["tokens"][part]
        for name in ("published rules", "diag", "lowrank", "full"):
            cells = [f"{value:.3f}" for value in found[name]]
            if name == "lowrank":
                cells = [
                    f"{cell} ± {deviation:.3f}"
                    for cell, deviation in zip(cells, found["lowrank, deviation"], strict=True)
                ]
            rows.append([label, f"`{name}`" if name != "published rules" else name, *cells])
    parts += [
        "**Tokens that differ little**: the same ratio for the mean of the tokens of a transformer, against their number; "
        f"{result['samples_lengths']:,} draws. "
        f"`lowrank` is the mean of {result['sets']} sets of draws, with the deviation of a single output from one set to "
        "another.",
        table(["uncertain", "method", *(f"T = {length}" for length in lengths)], rows),
        "![Deviation of the outputs relative to Monte Carlo, against the number of tokens]"
        "(figures/propagation_tokens.png)",
    ]
    _draw(result["tokens"], figures / "propagation_tokens.png")
    return parts


def _draw(found: dict[str, Any], path: Path) -> None:
    figure = plots.new_figure(9.0, 3.4)
    axes = figure.subplots(1, 2, sharey=True)
    lengths = found["lengths"]
    titles = {"values": "weights of the values", "all": "all weights"}
    styles = {
        "published rules": (plots.VERMILION, "s-"),
        "diag": (plots.ORANGE, "^--"),
        "lowrank": (plots.GREEN, "o-"),
        "full": (plots.BLUE, "o-"),
    }
    for ax, (part, title) in zip(axes, titles.items(), strict=True):
        plots.style_axes(ax, "tokens", "standard deviation / Monte Carlo" if part == "values" else "")
        ax.axhline(1.0, color="0.6", lw=1)
        for name, (colour, style) in styles.items():
            error = found[part]["lowrank, deviation"] if name == "lowrank" else None
            ax.errorbar(lengths, found[part][name], error, fmt=style, color=colour, markersize=4, capsize=2, label=name)
        ax.set_title(f"uncertain: {title}", loc="left", fontsize=9)
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [str(length) for length in lengths])
        ax.set_ylim(0)
    axes[1].legend(frameon=False, fontsize=8, loc="lower left")
    plots.save_figure(figure, path)
