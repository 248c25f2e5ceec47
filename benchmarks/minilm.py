"""What a prediction in one pass costs on MiniLM, and how close it is: time, memory, and divergence from many draws."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.tables import table
from gpseq import plots
from gpseq.predictive import Predictive
from gpseq.propagation import WeightPosterior, from_variances, linearised, propagate
from gpseq.propagation.moments import GaussianState
from gpseq.propagation.pooling import mean_tokens
from gpseq.propagation.walk import Walk

#: Blocks at the end of the network that are uncertain, with the head, and the deviation of weights relative to their
#: root mean square.
BLOCKS, RATIO = 2, 0.05
#: Two heads side by side, with random weights: of 2 and of 10 outputs. Each row has weights of its own, so either half
#: is what a network with that head alone would predict.
HEADS = (2, 10)
BATCH, LENGTH = 32, 64
#: Sequences, and draws of the weights, of the divergence; sets of columns over which it is averaged.
SEQUENCES, SAMPLES, SETS = 4, 10_000, 60
#: Columns of the form ``"lowrank"``.
RANKS = (4, 8, 16, 32)
#: Ways to columns of the outputs' covariance: by rules, and by quotients of small differences.
COLUMNS = ("lowrank", "differences")
REPETITIONS = 4


class Encoder(nn.Module):
    """A BERT over ids ``(B, T)`` without padding, the mean of its tokens, and a head.

    Args:
        bert: a ``transformers.BertModel``.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert: Any = bert
        self.head = nn.Linear(self.bert.config.hidden_size, sum(HEADS))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``(B, K)``."""
        return self.head(self.bert(input_ids=ids).last_hidden_state.mean(1))

    def propagate_moments(self, state: GaussianState, walk: Walk) -> GaussianState:
        """The rule of it."""
        return walk(self.head, mean_tokens(walk(self.bert, state)))


class Tail(nn.Module):
    """The last blocks of an encoder, from the tokens ``(B, T, D)`` that enter them, with its own parameters.

    Args:
        encoder: whose blocks they are.
        count: how many.
    """

    def __init__(self, encoder: Encoder, count: int = BLOCKS) -> None:
        super().__init__()
        self.blocks = encoder.bert.encoder.layer[-count:]
        self.head = encoder.head

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits ``(B, K)``."""
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(1))

    def propagate_moments(self, state: GaussianState, walk: Walk) -> GaussianState:
        """The rule of it."""
        for block in self.blocks:
            state = walk(block, state)
        return walk(self.head, mean_tokens(state))


# The network, its inputs and its posterior


def load(smoke: bool) -> tuple[Encoder, Tensor]:
    """MiniLM with its trained weights and random heads, and ids of reviews; or a small random BERT.

    Args:
        smoke: the small one.

    Returns:
        The network in eval mode, and ids ``(B, T)`` without padding.

    Raises:
        ImportError: the package of the weights, or transformers, is not installed.
    """
    torch.manual_seed(0)
    if smoke:
        from transformers import BertConfig, BertModel

        shape = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 6, "intermediate_size": 64}
        config = BertConfig(vocab_size=100, max_position_embeddings=16, initializer_range=0.2, **shape)
        return Encoder(BertModel(config, add_pooling_layer=False)).eval(), torch.randint(1, 100, (4, 8))
    from benchmarks.uncertainty import sentiment
    from gpseq.datasets import load_sentiment

    bert = sentiment.make().bert
    # Enough reviews in a row that none of the rows is too short.
    texts = load_sentiment("yelp").train.texts
    rows = [" ".join(texts[12 * row : 12 * (row + 1)]) for row in range(BATCH)]
    ids = sentiment.tokenize(rows)
    assert ids.shape == (BATCH, LENGTH) and bool((ids != 0).all())
    return Encoder(bert).eval(), ids


def variances(model: nn.Module, blocks: Sequence[int]) -> dict[str, Tensor]:
    """Variances of all weights of some blocks and of the head, vectors such as biases and gains included.

    Args:
        model: an encoder, or its tail.
        blocks: numbers of blocks, as names of parameters have them.
    """
    return {
        name: torch.full_like(parameter, RATIO**2 * float(parameter.detach().square().mean()))
        for name, parameter in model.named_parameters()
        if name.startswith(("head.", *(f"bert.encoder.layer.{i}." for i in blocks), *(f"blocks.{i}." for i in blocks)))
    }


def entering(encoder: Encoder, ids: Tensor, count: int = BLOCKS) -> Tensor:
    """Tokens ``(B, T, D)`` before the last blocks."""
    hidden = encoder.bert.embeddings(input_ids=ids)
    for block in encoder.bert.encoder.layer[:-count]:
        hidden = block(hidden)
    return hidden


def draws(
    model: nn.Module, posterior: dict[str, Tensor], x: Tensor, count: int, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Outputs with drawn weights, one draw after the other: plain forward passes, with all that makes them fast.

    Args:
        model: any.
        posterior: variances by names of parameters.
        x: inputs.
        count: S.
        generator: of the draws.
    """
    parameters = [(name, model.get_parameter(name).detach(), value.sqrt()) for name, value in posterior.items()]
    for _ in range(count):
        weights = {
            name: torch.empty_like(mean).normal_(generator=generator).mul_(deviation).add_(mean)
            for name, mean, deviation in parameters
        }
        yield functional_call(model, weights, (x,))


# Time and memory


def ways(encoder: Encoder, ids: Tensor) -> dict[str, Callable[[], Any]]:
    """Every way to a prediction, by its name.

    Args:
        encoder: the network.
        ids: ``(B, T)``.
    """
    layers = len(encoder.bert.encoder.layer)
    uncertain = variances(encoder, range(layers - BLOCKS, layers))
    last, everything = from_variances(uncertain), from_variances(variances(encoder, range(layers)))
    tail = Tail(encoder)
    uncertain_tail = variances(tail, range(BLOCKS))

    def ours(covariance: str, rank: int = 8, posterior: WeightPosterior = last) -> Callable[[], Predictive]:
        return lambda: propagate(encoder, posterior, ids, covariance=covariance, num_tangents=rank)

    def quotients(rank: int, posterior: WeightPosterior = last) -> Callable[[], Predictive]:
        return lambda: linearised(encoder, posterior, ids, num_tangents=rank, method="differences")

    def whole(count: int) -> Callable[[], Tensor]:
        return lambda: torch.stack(list(draws(encoder, uncertain, ids, count)))

    def last_blocks(count: int) -> Callable[[], Tensor]:
        return lambda: torch.stack(list(draws(tail, uncertain_tail, entering(encoder, ids), count)))

    return {
        "plain": lambda: encoder(ids),
        "published rules": lambda: propagate(encoder, last, ids, preset="streamlined"),
        "diag": ours("diag"),
        **{f"lowrank {rank}": ours("lowrank", rank) for rank in RANKS},
        "lowrank 8, all blocks": ours("lowrank", 8, everything),
        **{f"differences {rank}": quotients(rank) for rank in RANKS},
        "differences 8, all blocks": quotients(8, everything),
        "linearised 8": lambda: linearised(encoder, last, ids, num_tangents=8),
        "4 draws": last_blocks(4),
        "10 draws": last_blocks(10),
        "4 draws, whole network": whole(4),
        "10 draws, whole network": whole(10),
    }


def goals() -> dict[str, float]:
    """Plain forward passes that a way may take at the most."""
    columns = {f"{way} {rank}": 1 + rank / 2 for way in COLUMNS for rank in RANKS}
    return {"diag": 2.3, **columns, **{f"{way} 8, all blocks": 9.0 for way in COLUMNS}}


def times(found: dict[str, Callable[[], Any]], repetitions: int, cuda: bool) -> dict[str, list[float]]:
    """Seconds of each way at each repetition, A B C A B C: of the process on a CPU, of the clock on a GPU."""
    clock = time.perf_counter if cuda else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in found}
    with torch.no_grad():
        for repetition in range(-1, repetitions):  # the first is for warmth
            for name, way in found.items():
                if cuda:
                    torch.cuda.synchronize()
                begun = clock()
                way()
                if cuda:
                    torch.cuda.synchronize()
                if repetition >= 0:
                    seconds[name].append(clock() - begun)
    return seconds


def memory(names: Sequence[str], smoke: bool) -> dict[str, int]:
    """Peak memory of each way beyond that of the network and its inputs, each in a process of its own."""
    # What was freed goes back to the system at once (glibc), so that memory which is used again counts again.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = {}
    for name in names:
        code = f"from benchmarks.minilm import peak; peak({name!r}, {smoke})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        found[name] = int(json.loads(done.stdout.splitlines()[-1]))
    return found


def peak(name: str, smoke: bool) -> None:
    """Print the bytes that a way needs at most; run in a process of its own.

    Args:
        name: of the way.
        smoke: with the small network.
    """
    torch.set_num_threads(1)
    device = _device()
    encoder, ids = load(smoke)
    encoder, ids = encoder.to(device), ids.to(device)
    with torch.no_grad():
        ways(encoder, ids[:1, :8])[name]()  # what is loaded at the first call is no part of it
        way = ways(encoder, ids)[name]
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            way()
            print(torch.cuda.max_memory_allocated() - before)
            return
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of this process starts anew (Linux)
        before = _high_water()
        way()
        print(_high_water() - before)


def _high_water() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# Divergence


def divergence(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    r""":math:`\operatorname{KL}(\mathcal N(m, C) \,\|\, \mathcal N(m', C'))` in nats, ``(*batch,)``.

    Args:
        mean: m, ``(*batch, K)``.
        covariance: C, ``(*batch, K, K)``.
        other_mean: of the approximation.
        other_covariance: likewise.
    """
    factor, other = torch.linalg.cholesky(covariance), torch.linalg.cholesky(other_covariance)
    trace = torch.linalg.solve_triangular(other, factor, upper=False).square().sum((-2, -1))
    shift = torch.linalg.solve_triangular(other, (other_mean - mean).unsqueeze(-1), upper=False).square().sum((-2, -1))
    logdet = 2 * (other.diagonal(dim1=-2, dim2=-1).log() - factor.diagonal(dim1=-2, dim2=-1).log()).sum(-1)
    return (trace + shift - mean.shape[-1] + logdet) / 2


def marginal(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """The same of independent outputs, summed: ``(*batch, K)`` to ``(*batch,)``."""
    ratio = variance / other_variance
    return ((ratio + (other_mean - mean).square() / other_variance - 1 - ratio.log()) / 2).sum(-1)


def closeness(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> dict[str, float]:
    """Nats an input, averaged over all else, from many draws and, with ``"back"``, to them; and ratios of deviations.

    Jointly of all outputs of a head, which is infinite where the covariance of the approximation is singular, and of
    its outputs one by one, summed. Each with its standard error over the sets, 0 where there is one.

    Args:
        mean: of many draws, ``(B, K)``, both heads side by side.
        covariance: ``(B, K, K)``.
        other_mean: of the approximation, ``(S, B, K)``.
        other_covariance: ``(S, B, K, K)``.
    """
    found = {}

    def add(name: str, nats: Tensor) -> None:
        each = nats.mean(-1)  # inputs share what was drawn
        found[name] = each.mean().item()
        found[f"{name}, error"] = (each.std() / len(each) ** 0.5).item() if len(each) > 1 else 0.0

    for head, part in zip(HEADS, (slice(0, HEADS[0]), slice(HEADS[0], None)), strict=True):
        here = mean[..., part], covariance[..., part, part]
        there = other_mean[..., part], other_covariance[..., part, part]
        values = torch.linalg.eigvalsh(there[1])
        if bool((values[..., 0] > 1e-9 * values[..., -1]).all()):
            add(f"joint, {head}", divergence(*here, *there))
            add(f"back, joint, {head}", divergence(*there, *here))
        else:
            found |= {f"{name}joint, {head}": math.inf for name in ("", "back, ")}
        here, there = ((m, c.diagonal(dim1=-2, dim2=-1)) for m, c in (here, there))
        add(f"marginals, {head}", marginal(*here, *there))
        add(f"back, marginals, {head}", marginal(*there, *here))
    ratios = (other_covariance.diagonal(dim1=-2, dim2=-1) / covariance.diagonal(dim1=-2, dim2=-1)).sqrt()
    return found | {"ratio": ratios.mean().item(), "spread": ratios.std().item()}


def divergences(encoder: Encoder, ids: Tensor, smoke: bool) -> dict[str, Any]:
    """Divergence of every way from the moments of many draws, nats an input.

    Args:
        encoder: the network.
        ids: ``(B, T)``.
        smoke: few draws.
    """
    samples, sets = (200, 2) if smoke else (SAMPLES, SETS)
    x = entering(encoder, ids[:SEQUENCES])
    tail = Tail(encoder).eval()
    uncertain = variances(tail, range(BLOCKS))
    posterior = from_variances(uncertain)
    generator = torch.Generator(x.device).manual_seed(0)
    drawn = torch.stack(list(draws(tail, uncertain, x, samples, generator))).double()
    mean, covariance = _moments(drawn)
    found: dict[str, dict[str, float]] = {}

    def add(name: str, *made: Predictive) -> None:
        means = torch.stack([p.mean.double() for p in made])
        covariances = torch.stack([p.covariance.to_dense().double() for p in made])
        found[name] = closeness(mean, covariance, means, covariances)

    def again(sets: int) -> list[torch.Generator]:
        return [torch.Generator(x.device).manual_seed(seed) for seed in range(sets)]

    add("published rules", propagate(tail, posterior, x, preset="streamlined"))
    add("diag", propagate(tail, posterior, x, covariance="diag"))
    for rank in RANKS:
        made = [
            propagate(tail, posterior, x, covariance="lowrank", num_tangents=rank, generator=g) for g in again(sets)
        ]
        add(f"lowrank {rank}", *made)
        made = [
            linearised(tail, posterior, x, num_tangents=rank, generator=g, method="differences") for g in again(sets)
        ]
        add(f"differences {rank}", *made)
        if rank == 8:
            made = [linearised(tail, posterior, x, num_tangents=rank, generator=g) for g in again(sets)]
            add("linearised 8", *made)
    add("linearised, exact", linearised(tail, posterior, x, method="exact"))
    for count in (4, 10, 30, 100):
        # Each group of draws is one prediction by so many; the divergence is what one has on average.
        groups = drawn[: samples // count * count].unflatten(0, (-1, count)).movedim(1, 0)
        found[f"{count} draws"] = closeness(mean, covariance, *_moments(groups))
    return {"samples": samples, "sequences": len(x), "sets": sets, "nats": found}


def _moments(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased covariance of draws ``(S, ..., K)``."""
    mean = drawn.mean(0)
    centred = drawn - mean
    return mean, torch.einsum("s...i,s...j->...ij", centred, centred) / (len(drawn) - 1)


def run(smoke: bool) -> dict[str, Any]:
    """Time and memory of every way, and divergences."""
    torch.set_num_threads(1)
    device = _device()
    encoder, ids = load(smoke)
    encoder, ids = encoder.to(device), ids.to(device)
    found = ways(encoder, ids)
    with torch.no_grad():
        nats = divergences(encoder, ids, smoke)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "batch": len(ids),
        "length": ids.shape[1],
        "blocks": BLOCKS,
        "layers": len(encoder.bert.encoder.layer),
        "ratio": RATIO,
        "uncertain": sum(v.numel() for v in variances(Tail(encoder), range(BLOCKS)).values()),
        "seconds": times(found, 2 if smoke else REPETITIONS, device == "cuda"),
        "bytes": memory(["plain"] if smoke else list(found), smoke),
        "divergence": nats,
    }


# The report


def ratio(seconds: dict[str, list[float]], name: str) -> tuple[float, float, float]:
    """Median of the ratios to a plain forward pass in the same repetition, and their quartiles."""
    ratios = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Cost and closeness of every way, against the goals, and a figure of one against the other."""
    seconds, nats = result["seconds"], result["divergence"]["nats"]
    plain = 1e3 * statistics.median(seconds["plain"])
    limits = goals()
    rows = []
    for name in seconds:
        middle, low, high = ratio(seconds, name)
        goal = limits.get(name)
        verdict = "" if goal is None else "reached" if middle <= goal else f"missed by {middle - goal:.2f}"
        size = result["bytes"].get(name)
        rows.append(
            [
                name,
                f"{middle:.2f} ({low:.2f} – {high:.2f})",
                "" if goal is None else f"{goal:g}",
                verdict,
                "" if size is None else f"{size / 1e6:.0f}",
            ]
        )
    columns = ("joint, 2", "marginals, 2", "joint, 10", "marginals, 10")
    close = [
        [
            name,
            *(_nats(found, column) for column in columns),
            f"{found['ratio']:.3f} ± {found['spread']:.3f}",
        ]
        for name, found in nats.items()
    ]
    theirs, aims = nats["10 draws"], []
    for way in COLUMNS:
        ours, verdicts = nats[f"{way} 8"], []
        for name, what in (("joint, 2", "two outputs, jointly"), ("marginals, 10", "ten outputs, marginals")):
            met = "reached" if ours[name] < theirs[name] else "missed"
            here, back = (f"{_nats(ours, n)} against {_nats(theirs, n)}" for n in (name, f"back, {name}"))
            verdicts.append(f"{what}: {here}, {met} (the other way round {back})")
        aims.append(f"**Against the goal**, `{way}` with 8 columns closer than 10 draws: {'; '.join(verdicts)}.")
    parts = [
        "## MiniLM in one pass: what it costs, and how close it is",
        f"MiniLM ({result['layers']} blocks), batch {result['batch']}, {result['length']} tokens; all "
        f"{result['uncertain'] / 1e6:.1f} million weights of the last {result['blocks']} blocks and of a random head are "
        f"uncertain, with deviations of {result['ratio']:g} of their root mean square. Without gradients, "
        f"{'one thread of a CPU' if result['device'] == 'cpu' else result['device']}; a plain forward pass takes "
        f"{plain:.0f} ms. Times are ratios to one in the same repetition: median and quartiles of "
        f"{len(seconds['plain'])}. Draws run the first blocks once; *whole network* runs all of it for each draw. "
        '`differences` is `linearised(..., method="differences")`. Memory is the peak beyond the network and its inputs.',
        table(["way", "plain forwards", "goal", "", "memory [MB]"], rows),
        f"**How close**: the Gaussian divergence of each way from the moments of {result['divergence']['samples']:,} "
        f"draws, in nats an input, for {result['divergence']['sequences']} inputs and two random heads, of 2 and of 10 "
        f"outputs; columns are averaged over {result['divergence']['sets']} sets of draws, and draws over all groups of "
        "so many. The covariance of ten draws of ten outputs is singular, and that of eight columns nearly so: ten "
        "outputs are compared by their marginals too, one by one. Behind ± is the standard error of the average. The last column is the ratio of deviations to those of many draws, over outputs and inputs.",
        table(["way", "2, joint", "2, marginals", "10, joint", "10, marginals", "ratio of deviations"], close),
        *aims,
        "![Divergence from many draws against time](figures/minilm_closeness.png)",
    ]
    _draw(result, figures / "minilm_closeness.png")
    return parts


def _nats(found: dict[str, float], name: str) -> str:
    if math.isinf(found[name]):
        return "singular"
    error = found[f"{name}, error"]
    return f"{found[name]:.3f}" + (f" ± {error:.3f}" if error else "")


def _draw(result: dict[str, Any], path: Path) -> None:
    figure = plots.new_figure(9.0, 3.6)
    axes = figure.subplots(1, 2, sharex=True)
    seconds, nats = result["seconds"], result["divergence"]["nats"]
    styles = {"lowrank": (plots.GREEN, "o-"), "differences": (plots.PINK, "D-")}
    for ax, key, title in (
        (axes[0], "joint, 2", "two outputs, jointly"),
        (axes[1], "marginals, 10", "ten outputs, marginals"),
    ):

        def points(names: Sequence[str], suffix: str = "", key: str = key) -> tuple[list[float], list[float]]:
            return [ratio(seconds, name + suffix)[0] for name in names], [nats[name][key] for name in names]

        lines = (
            *((way, points([f"{way} {rank}" for rank in RANKS]), *styles[way]) for way in COLUMNS),
            ("draws", points(("4 draws", "10 draws")), plots.GREY, "s-"),
            ("draws, whole network", points(("4 draws", "10 draws"), ", whole network"), plots.GREY, "s:"),
            ("diag", points(("diag",)), plots.ORANGE, "^"),
            ("published rules", points(("published rules",)), plots.VERMILION, "v"),
        )
        for label, (x, y), colour, style in lines:
            ax.plot(x, y, style, color=colour, label=label, markersize=5)
        for way in COLUMNS:
            for rank, x, y in zip(RANKS, *points([f"{way} {rank}" for rank in RANKS]), strict=True):
                ax.annotate(str(rank), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        plots.style_axes(ax, "plain forward passes", "nats an input" if ax is axes[0] else "")
        ax.set_title(title, loc="left", fontsize=9)
        ax.xaxis.set_major_formatter("{x:g}")
    axes[1].legend(frameon=False, fontsize=7)
    plots.save_figure(figure, path)
