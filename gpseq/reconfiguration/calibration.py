"""One number for a student's spread, fitted on data that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gpseq.checks import check_count
from gpseq.nn.capture import evaluating
from gpseq.nn.generator import use_generator
from gpseq.reconfiguration.batches import batch_parts, logits_of, run
from gpseq.reconfiguration.rollout import drawing, find_rollout

#: Factors that are tried first; the best and its neighbours are refined.
SCALES = (0.125, 0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0)
#: Halvings of the step around the best.
REFINEMENTS = 2


@torch.no_grad()
def calibrate_spread(
    student: nn.Module, loader: Iterable[Any], num_samples: int = 10, generator: torch.Generator | None = None
) -> float:
    r"""Scale a student's deviations, in place, so that its predictions fit labels best.

    .. math:: \min_c \; -\sum_n \log \frac1S \sum_s p_{y_n}\bigl(x_n; c\, s(\cdot)\bigr),

    with the same noise for all c. A temperature makes all inputs less sure alike; a spread does so where the chain is
    uncertain.

    Args:
        student: whose chain is scaled.
        loader: batches of inputs and labels, or mappings with ``"labels"``, that training has not seen.
        num_samples: S, draws.
        generator: of the seed of the noise; ``None`` is torch's default generator.

    Returns:
        c, which multiplies the scale that the student had.

    Raises:
        TypeError: it is no student.
        ValueError: there are no batches, or none with labels.

    Example:
        >>> from gpseq.reconfiguration import Distiller
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> network = nn.Sequential(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(8, 3)).eval()
        >>> student = Distiller(network).student
        >>> batches = [(torch.randn(16, 5, 8), torch.randint(3, (16, 5)))]
        >>> calibrate_spread(student, batches) > 0
        True
    """
    check_count("num_samples", num_samples)
    rollout = find_rollout(student)
    batches = [batch_parts(batch) for batch in loader]
    if not batches or any(labels is None for _, labels in batches):
        raise ValueError(f"loader: expected batches with labels, got {'none' if not batches else 'some without'}.")
    device = rollout.spread_scale.device
    seed = int(torch.randint(2**62, (), generator=generator, device=None if generator is None else generator.device))
    before = rollout.spread_scale.clone()

    def loss(scale: float) -> float:
        rollout.spread_scale.copy_(before * scale)
        noise = torch.Generator(device).manual_seed(seed)
        total, number = 0.0, 0
        with use_generator(student, noise), drawing(student), evaluating(student):
            for x, labels in batches:
                assert labels is not None
                logs = torch.stack([logits_of(run(student, x)).log_softmax(-1) for _ in range(num_samples)])
                mean = logs.logsumexp(0) - math.log(num_samples)
                seen = labels >= 0
                chosen = mean.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
                total -= float(torch.where(seen, chosen, 0.0).sum())
                number += int(seen.sum())
        return total / max(number, 1)

    try:
        tried = {scale: loss(scale) for scale in SCALES}
        step = math.sqrt(2)
        for _ in range(REFINEMENTS):
            step = math.sqrt(step)
            best = min(tried, key=lambda scale: tried[scale])
            tried |= {scale: loss(scale) for scale in (best / step, best * step)}
        best = min(tried, key=lambda scale: tried[scale])
    except BaseException:
        rollout.spread_scale.copy_(before)
        raise
    rollout.spread_scale.copy_(before * best)
    return best
