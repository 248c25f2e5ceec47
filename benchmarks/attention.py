"""What attention as a Gaussian process costs: time against fused softmax attention, memory, accuracy of the fused form."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tables import table
from gpseq import plots, sgpa
from gpseq.nn import KEPAttention, RFFAttention, SGPAttention

WIDTH, HEADS, INDUCING, BATCH = 128, 4, 16, 8
#: Largest ratio to fused softmax attention, forward and backward, that was set as a goal.
GOALS = {"shared": {64: 1.8, 128: 1.8, 256: 1.8, 1024: 1.5}, "per_dim": {64: 2.5, 128: 2.5, 256: 2.5, 1024: 1.9}}


class SoftmaxAttention(nn.Module):
    """The peer: one product for queries, keys and values, fused attention, one product for the output."""

    def __init__(self) -> None:
        super().__init__()
        self.projection, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projection(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


def run(smoke: bool) -> dict[str, Any]:
    """Times by length and layer, memory by length, errors of the fused form, divergence at the start."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    lengths = (64, 128) if smoke else (64, 128, 256, 512, 1024)
    dtypes = ["float32"]
    if device == "cuda":
        lengths = (64, 256) if smoke else (64, 256, 1024, 4096, 8192)
        dtypes = ["float32", "bfloat16"]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "width": WIDTH,
        "heads": HEADS,
        "inducing": INDUCING,
        "batch": BATCH,
        "times": [_times(length, dtype, device, smoke) for dtype in dtypes for length in lengths],
        "memory": [_memory(length, device) for length in ((512, 1024) if smoke else (1024, 2048, 4096))],
        "errors": _errors(512 if smoke else 2048, device),
        "initial": [_initial(mode, kernel, length) for mode, kernel in _MODES for length in (16, 64, 256)],
    }


_MODES = [(m, k) for m in ("sgpa", "residual", "softmax_kernel") for k in ("rbf", "exponential")]


def _layers(device: str) -> dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]]:
    """Every layer, and how it is called: to its output, or to its output and its divergence."""

    def attend(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x, x, x, need_weights=False)[0].sum()

    def causal(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x, x, x, need_weights=False, is_causal=True)[0].sum()

    def with_divergence(layer: nn.Module, x: Tensor) -> Tensor:
        return attend(layer, x) + layer.kl_divergence(num_data=1000) / 1000  # type: ignore[operator]

    def alone(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x).sum()

    def ours(**options: Any) -> nn.Module:
        return SGPAttention(WIDTH, HEADS, INDUCING, batch_first=True, **options)

    layers: dict[str, tuple[nn.Module, Any]] = {
        "softmax": (SoftmaxAttention(), alone),
        "nn.MultiheadAttention": (nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), attend),
        "shared": (ours(), attend),
        "shared with KL": (ours(), with_divergence),
        "per_dim": (ours(covariance="per_dim"), attend),
        "per_dim with KL": (ours(covariance="per_dim"), with_divergence),
        "diagonal": (ours(covariance="diagonal"), attend),
        "low_rank": (ours(covariance="low_rank"), attend),
        "residual": (ours(mode="residual"), attend),
        "exponential": (ours(kernel="exponential"), attend),
        "pathwise": (ours(sampling="pathwise"), attend),
        "KEPAttention": (KEPAttention(WIDTH, HEADS, batch_first=True), attend),
        "RFFAttention": (RFFAttention(WIDTH, HEADS, batch_first=True), attend),
        "RFFAttention causal": (RFFAttention(WIDTH, HEADS, batch_first=True), causal),
    }
    return {name: (layer.to(device), call) for name, (layer, call) in layers.items()}


def _times(length: int, dtype: str, device: str, smoke: bool) -> dict[str, Any]:
    """Seconds of forward and backward, and of forward without gradients, all layers in turn."""
    layers = _layers(device)
    x = torch.randn(BATCH, length, WIDTH, device=device, requires_grad=True)
    mixed = dtype != "float32"

    def forward(name: str) -> Tensor:
        layer, call = layers[name]
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            return call(layer, x)

    def train(name: str) -> None:
        layers[name][0].zero_grad(set_to_none=True)
        x.grad = None
        forward(name).backward()

    def serve(name: str) -> None:
        with torch.no_grad():
            forward(name)

    repetitions = 3 if smoke else max(8, min(60, 12000 // length))
    return {
        "length": length,
        "dtype": dtype,
        "train": _in_turn(train, list(layers), repetitions, device),
        "serve": _in_turn(serve, list(layers), repetitions, device),
    }


def _in_turn(way: Callable[[str], None], names: list[str], repetitions: int, device: str) -> dict[str, list[float]]:
    """Seconds of each layer at each repetition, A B C A B C; of the process on a CPU, of the clock on a GPU."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        way(name)
    for _ in range(repetitions):
        for name in names:
            if device == "cuda":
                torch.cuda.synchronize()
            clock = time.perf_counter if device == "cuda" else time.process_time
            begun = clock()
            way(name)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - begun)
    return seconds


def _memory(length: int, device: str) -> dict[str, Any]:
    """Peak memory of one forward and backward, each layer in a process of its own."""
    peaks = {}
    for name in ("softmax", "shared", "per_dim", "explicit", "RFFAttention"):
        code = f"from benchmarks.attention import peak; peak({name!r}, {length}, {device!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
        peaks[name] = json.loads(done.stdout)
    return {"length": length, "batch": 1, "bytes": peaks}


def peak(name: str, length: int, device: str) -> None:
    """Print the bytes that one forward and backward of a layer needs at most; run in a process of its own."""
    torch.set_num_threads(1)
    layer, call = _layers(device)["shared" if name == "explicit" else name]
    if name == "explicit":
        # The same posterior with its matrix of scores formed: it is what asking for weights does.
        def call(layer: nn.Module, x: Tensor) -> Tensor:
            return layer(x, x, x, need_weights=True)[0].sum()

    warm = torch.randn(1, 8, WIDTH, device=device, requires_grad=True)
    call(layer, warm).backward()
    x = torch.randn(1, length, WIDTH, device=device, requires_grad=True)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(layer, x).backward()
        print(torch.cuda.max_memory_allocated() - before)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of this process starts anew (Linux)
    before = _high_water()
    call(layer, x).backward()
    print(_high_water() - before)


def _high_water() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _errors(length: int, device: str) -> dict[str, float]:
    """Largest error of the fused form, relative to the largest value of the explicit one in float64."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, HEADS, length, 32, generator=generator, dtype=torch.float64) / 4
    v = torch.randn(2, HEADS, length, 32, generator=generator, dtype=torch.float64)
    exact = sgpa.rbf_product(q, q, v, fused=False)
    errors = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        a, b = q.to(device, dtype), v.to(device, dtype)
        fused = sgpa.rbf_product(a, a, b, fused=True).double().cpu()
        errors[str(dtype).removeprefix("torch.")] = ((fused - exact).abs().max() / exact.abs().max()).item()
    return errors


def _initial(mode: str, kernel: str, length: int) -> dict[str, Any]:
    """Divergence of a sequence before training, the largest of some seeds."""
    costs = []
    for seed in range(5):
        torch.manual_seed(seed)
        layer = SGPAttention(WIDTH, HEADS, INDUCING, kernel=kernel, mode=mode, batch_first=True)
        x = torch.randn(BATCH, length, WIDTH)
        with torch.no_grad():
            layer(x, x, x, need_weights=False)
            costs.append(layer.kl_divergence(num_data=BATCH).item() / BATCH)
    return {"mode": mode, "kernel": kernel, "length": length, "nats": max(costs)}


def ratio(times: dict[str, list[float]], name: str) -> tuple[float, float, float]:
    """Median of the ratios to softmax attention in the same repetition, and their quartiles."""
    ratios = [a / b for a, b in zip(times[name], times["softmax"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Tables of ratios, against the goals, and a figure of time and memory."""
    parts = [
        "## Attention as a sparse GP: what it costs",
        f"`SGPAttention` with {result['inducing']} inducing keys, width {result['width']}, {result['heads']} heads, batch "
        f'{result["batch"]}, `sampling="marginal"`, on {result["device"]}; one thread on a CPU. Numbers are ratios to a '
        "layer with one product for queries, keys and values, `scaled_dot_product_attention` and one product for the "
        'output, in the same repetition: median and quartiles. "With KL" adds `kl_divergence()` to the loss.',
    ]
    for kind, title in (("train", "Forward and backward"), ("serve", "Forward alone, without gradients")):
        names = [n for n in result["times"][0][kind] if n != "softmax"]
        header = [
            "layer",
            *(f"T = {t['length']}" + (f" {t['dtype']}" if t["dtype"] != "float32" else "") for t in result["times"]),
        ]
        rows = [["softmax, ms", *(f"{1e3 * statistics.median(t[kind]['softmax']):.2f}" for t in result["times"])]]
        for name in names:
            cells = []
            for t in result["times"]:
                middle, low, high = ratio(t[kind], name)
                cells.append(f"{middle:.2f} ({low:.2f} – {high:.2f})")
            rows.append([name, *cells])
        parts += [f"**{title}**", table(header, rows)]
    parts += [
        "**Against the goals** (forward and backward, float32). The goals are for the layer; the last column adds the "
        "divergence to the loss, and its own verdict.",
        _goals(result),
        "What was tried at short lengths, where the number of operations counts: derivatives written out in place of "
        "automatic differentiation (which *diagonal*, *low_rank*, *residual* and *exponential* above still use), the matrix "
        "of scores formed up to T = 384 and fused attention above, products of tensors in their own order in memory, all "
        "pairs of inducing keys in one product. One projection for queries and values, fused attention below T = 256, and "
        "pairs of inducing keys once instead of twice brought nothing.",
    ]
    lengths = [m["length"] for m in result["memory"]]
    names = list(result["memory"][0]["bytes"])
    parts += [
        "**Peak memory** of one forward and backward, batch 1, in MB; *explicit* asks the same layer for its weights. "
        "The last column is the factor for each doubling of the length: 2 is linear, 4 is quadratic.",
        table(
            ["layer", *(f"T = {n}" for n in lengths), "a doubling"],
            [
                [n, *(f"{m['bytes'][n] / 1e6:.0f}" for m in result["memory"]), f"{_growth(result, n):.1f}"]
                for n in names
            ],
        ),
        "**Error of the fused form** against the explicit one in float64, relative: "
        + ", ".join(f"{name} {error:.0e}" for name, error in result["errors"].items())
        + ".",
        "**Divergence at initialisation**, nats a sequence and layer, the largest of five seeds:",
        table(
            ["mode", "kernel", "T = 16", "T = 64", "T = 256"],
            [
                [m, k, *(f"{i['nats']:.3f}" for i in result["initial"] if (i["mode"], i["kernel"]) == (m, k))]
                for m, k in _MODES
            ],
        ),
        "![Ratios of time, and memory](figures/attention_cost.png)",
    ]
    _draw(result, figures / "attention_cost.png")
    return parts


def _goals(result: dict[str, Any]) -> str:
    rows = []
    for name, goals in GOALS.items():
        for entry in result["times"]:
            goal = goals.get(entry["length"])
            if goal is None or entry["dtype"] != "float32":
                continue
            with_kl = ratio(entry["train"], f"{name} with KL")[0]
            middle = ratio(entry["train"], name)[0]
            row = [name, entry["length"], goal]
            for measured in (middle, with_kl):
                row += [f"{measured:.2f}", "reached" if measured <= goal else f"missed by {measured - goal:.2f}"]
            rows.append(row)
    return table(["covariance", "T", "goal", "measured", "", "with KL", ""], rows)


def _growth(result: dict[str, Any], name: str) -> float:
    first, last = result["memory"][0], result["memory"][-1]
    doublings = torch.tensor(last["length"] / first["length"]).log2().item()
    return float((last["bytes"][name] / max(first["bytes"][name], 1)) ** (1 / doublings))


def _draw(result: dict[str, Any], path: Path) -> None:
    figure = plots.new_figure(9.0, 3.6)
    left, right = figure.subplots(1, 2)
    entries = [t for t in result["times"] if t["dtype"] == "float32"]
    lengths = [t["length"] for t in entries]
    colours = {"shared": plots.BLUE, "per_dim": plots.ORANGE, "residual": plots.GREEN, "RFFAttention": plots.PINK}
    for name, colour in colours.items():
        left.plot(lengths, [ratio(t["train"], name)[0] for t in entries], "o-", color=colour, label=name)
    left.axhline(1.0, color="0.6", lw=1)
    left.set_xscale("log", base=2)
    left.set_xticks(lengths, [str(n) for n in lengths])
    left.set_ylim(0)
    plots.style_axes(left, "tokens", "time of softmax attention")
    plots.legend_above(left)
    lengths = [m["length"] for m in result["memory"]]
    for name, colour in {
        "softmax": "0.4",
        "shared": plots.BLUE,
        "per_dim": plots.ORANGE,
        "explicit": plots.VERMILION,
    }.items():
        right.plot(lengths, [m["bytes"][name] / 1e6 for m in result["memory"]], "o-", color=colour, label=name)
    right.set_xscale("log", base=2)
    right.set_yscale("log", base=2)
    right.set_yticks([4, 16, 64, 256, 1024], ["4", "16", "64", "256", "1024"])
    right.set_xticks(lengths, [str(n) for n in lengths])
    plots.style_axes(right, "tokens", "peak memory in MB")
    plots.legend_above(right)
    plots.save_figure(figure, path)
