"""What torch.compile brings to encoders with sparse-GP attention: a step's time, and what compiling costs."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.tables import table
from benchmarks.timing import in_turn
from gpseq.nn import SGPATransformerEncoder, SGPATransformerEncoderLayer, kl_divergence

#: Mode, width and tokens of an encoder of one layer. More layers take as much longer to compile as to run. Derivatives
#: of the first mode are written out, those of the other are torch's own.
SIZES = (("sgpa", 64, 32), ("sgpa", 128, 128), ("residual", 128, 128))
HEADS, INDUCING, BATCH, NUM_DATA = 4, 16, 8, 1000


def run(smoke: bool) -> dict[str, Any]:
    """Seconds of forward and backward, eager and compiled in turn, and of the first compiled step, by size."""
    import torch._dynamo

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    # A smoke test needs no compiler: all but the last part of the way is the same.
    backend = "aot_eager" if smoke else "inductor"
    sizes = []
    for mode, width, tokens in (("sgpa", 16, 8),) if smoke else SIZES:
        torch._dynamo.reset()
        sizes.append(_measure(mode, width, tokens, backend, device, 3 if smoke else 30))
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "backend": backend,
        "heads": HEADS,
        "inducing": INDUCING,
        "batch": BATCH,
        "sizes": sizes,
    }


def _measure(mode: str, width: int, tokens: int, backend: str, device: str, repetitions: int) -> dict[str, Any]:
    from torch._inductor.utils import fresh_cache

    torch.manual_seed(0)
    layer = SGPATransformerEncoderLayer(
        width, HEADS, 4 * width, dropout=0.0, batch_first=True, num_inducing=INDUCING, mode=mode, device=device
    )
    encoder = SGPATransformerEncoder(layer, 1).to(device).train()
    x = torch.randn(BATCH, tokens, width, device=device)

    def step(model: nn.Module) -> None:
        encoder.zero_grad(set_to_none=True)
        loss = model(x).square().mean() + kl_divergence(encoder, num_data=NUM_DATA) / NUM_DATA
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    with fresh_cache():  # what was compiled on an earlier day would make this one look cheap
        compiled = torch.compile(encoder, backend=backend, fullgraph=True)
        begun = time.perf_counter()
        step(compiled)
        first = time.perf_counter() - begun
        ways = {"eager": lambda: step(encoder), "compiled": lambda: step(compiled)}
        in_turn(ways, 2)  # caches and clocks
        seconds = in_turn(ways, repetitions)
    return {"mode": mode, "width": width, "tokens": tokens, "first": first, "seconds": seconds}


def ratios(size: dict[str, Any]) -> tuple[float, float, float]:
    """Quartiles of compiled to eager in the same turn: lower, median, upper."""
    seconds = size["seconds"]
    low, middle, high = statistics.quantiles(
        [a / b for a, b in zip(seconds["compiled"], seconds["eager"], strict=True)], n=4
    )
    return low, middle, high


def steps_to_pay(size: dict[str, Any]) -> float:
    """After how many steps the first one is paid for; infinite where a compiled step is not shorter."""
    eager, compiled = (statistics.median(size["seconds"][name]) for name in ("eager", "compiled"))
    return (size["first"] - compiled) / (eager - compiled) if compiled < eager else float("inf")


def verdict(size: dict[str, Any]) -> str:
    """Whether compiling pays, by the quartiles."""
    low, _, high = ratios(size)
    if high < 1:
        return f"pays after {steps_to_pay(size):,.0f} steps"
    return "costs" if low > 1 else "no difference"


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """One table, and what follows from it."""
    rows = []
    for size in result["sizes"]:
        low, middle, high = ratios(size)
        medians = [1e3 * statistics.median(size["seconds"][name]) for name in ("eager", "compiled")]
        rows.append(
            [
                size["mode"],
                size["width"],
                size["tokens"],
                *(f"{m:.2f}" for m in medians),
                f"{middle:.2f} ({low:.2f} – {high:.2f})",
                f"{size['first']:.1f}",
                verdict(size),
            ]
        )
    return [
        "## Compiled attention",
        f"Forward and backward of a `SGPATransformerEncoder` of one layer with {result['heads']} heads, "
        f"{result['inducing']} inducing keys and a batch of {result['batch']}, the divergence in the loss, by "
        f'`torch.compile(encoder, fullgraph=True)` with backend "{result["backend"]}" beside the eager one, whose '
        f'derivatives are written out in mode "sgpa" and torch\'s own in mode "residual"; on {result["device"]}, one '
        "thread. Turns alternate; ratios are those of a turn, median and quartiles. The first step compiles, without a "
        "cache of earlier runs.",
        table(["mode", "width", "tokens", "eager, ms", "compiled, ms", "ratio", "first step, s", "verdict"], rows),
        _conclusion(result["sizes"]),
    ]


def _conclusion(sizes: list[dict[str, Any]]) -> str:
    named = {kind: [] for kind in ("pays", "costs", "no difference")}
    for size in sizes:
        kind = next(k for k in named if verdict(size).startswith(k))
        named[kind].append(f'"{size["mode"]}" of width {size["width"]} with {size["tokens"]} tokens')
    texts = {
        "pays": "Compiled steps are shorter for {}.",
        "costs": "Compiled steps are longer for {}: there, leave the encoder as it is.",
        "no difference": "Quartiles do not tell them apart for {}.",
    }
    parts = [texts[kind].format(", ".join(places)) for kind, places in named.items() if places]
    if paid := [steps_to_pay(size) for size in sizes if verdict(size).startswith("pays")]:
        parts.append(
            f"There the first step is paid for after {min(paid):,.0f} steps"
            + (f" to {max(paid):,.0f}." if len(paid) > 1 else ".")
        )
    return " ".join(parts)
