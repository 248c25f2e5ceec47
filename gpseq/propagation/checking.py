"""Monte Carlo over weights: what a propagation is checked against, and the prediction that it is instead of."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpseq.checks import check_count
from gpseq.prediction_checks import check_generator
from gpseq.predictive import Predictive
from gpseq.propagation.call import Call, check_model
from gpseq.propagation.forward import propagate
from gpseq.propagation.linearisation import Network, Weights, event_dims, mapped_over
from gpseq.propagation.posteriors import WeightPosterior, bind
from gpseq.propagation.quadratic import draw_weights
from gpseq.propagation.sizes import free_bytes, largest_state
from gpseq.propagation.switches import as_found, forward_mode

#: Numbers of drawn weights at a time. The draws, and so the result, depend on it: it does not look at the memory.
_DRAWN = 2**22
#: Numbers of an event up to which correlations are compared.
_CORRELATED = 512
#: Outputs that have a row of their own in a printed table.
_PRINTED = 20


@dataclass(frozen=True, eq=False)
class Comparison:
    r"""A propagation beside Monte Carlo over weights.

    Attributes:
        mean_error: difference of the means in standard deviations of Monte Carlo, ``(B, *event)``.
        ratio: standard deviation, propagated by that of Monte Carlo, ``(B, *event)``.
        ratio_standard_error: of the ratio, as Monte Carlo has it from its number of samples, the same.
        correlation_error: root mean square difference of the correlations between different outputs, ``(B,)``; ``None``
            for a single output or more than 512.
        num_samples: S; its standard error is :math:`1 / \sqrt S` for ``mean_error``, and at most about that for a
            correlation.
        propagated: what was checked.
    """

    mean_error: Tensor
    ratio: Tensor
    ratio_standard_error: Tensor
    correlation_error: Tensor | None
    num_samples: int
    propagated: Predictive

    @property
    def mean_standard_error(self) -> float:
        """Of ``mean_error``, as Monte Carlo has it."""
        return self.num_samples**-0.5

    def __str__(self) -> str:
        size = self.ratio.shape[-1]
        head = f"{'output':>8}{'ratio of sd':>14}{'spread':>10}{'MC error':>10}{'mean error / sd':>18}"
        form = self.propagated.notes.get("covariance", "?")
        lines = [f"propagated, covariance {form!r}, by Monte Carlo with {self.num_samples:,} samples", head]
        for output in range(min(size, _PRINTED)):
            lines.append(self._row(str(output), (..., slice(output, output + 1))))
        if size > _PRINTED:
            lines.append(f"{'...':>8}")
        lines.append(self._row("all", ...))
        lines.append(f"standard error of Monte Carlo: {self.mean_standard_error:.3f} sd for a mean")
        if self.correlation_error is not None:
            error = self.correlation_error.square().mean().sqrt().item()
            lines.append(
                f"correlations: {error:.3f} root mean square error, of which Monte Carlo's is "
                f"{self.mean_standard_error:.3f} at most"
            )
        return "\n".join(lines)

    def _row(self, name: str, part: Any) -> str:
        ratio = self.ratio[part].flatten().double()
        # One element's error: those of a batch share their draws of weights, so averages have hardly a smaller one.
        error = self.ratio_standard_error[part].double().square().mean().sqrt()
        shift = self.mean_error[part].double().square().mean().sqrt()
        spread = ratio.std(correction=0)
        return f"{name:>8}{ratio.mean().item():>14.3f}{spread.item():>10.3f}{error.item():>10.3f}{shift.item():>18.3f}"


def check(
    model: nn.Module,
    posterior: WeightPosterior,
    x: Tensor | Mapping[str, Any],
    num_samples: int = 10_000,
    covariance: str = "auto",
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    quiet: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Comparison:
    """Compare a propagation with Monte Carlo over weights from the same posterior.

    Prints, for each output, the ratio of the standard deviations and the difference of the means over the batch, and
    what of them may be Monte Carlo's own error. Take as few elements as tell you something: this runs the model
    ``num_samples`` times.

    Args:
        model: as for :func:`propagate`.
        posterior: of its weights.
        x: inputs.
        num_samples: S, draws of the weights.
        covariance: what travels, see :func:`propagate`.
        generator: of all draws; ``None`` is torch's default generator.
        chunk_size: elements of the batch at a time.
        quiet: print nothing.
        progress: called with the number of samples that are done, and S.
        options: all others of :func:`propagate`, and further arguments of the model.

    Returns:
        The comparison, which prints as a table.

    Raises:
        ValueError: ``dropout="variance"``, which is no randomness of weights; and as for :func:`propagate`.

    Example:
        >>> from gpseq.propagation import from_variances
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> posterior = from_variances({"2.weight": torch.full((2, 8), 0.1)})
        >>> g = torch.Generator().manual_seed(0)
        >>> found = check(model, posterior, torch.ones(1, 3), num_samples=4000, generator=g, quiet=True)
        >>> bool(((found.ratio - 1).abs() < 4 * found.ratio_standard_error).all())
        True
    """
    check_count("num_samples", num_samples, least=2)
    if options.get("dropout", "off") != "off":
        raise ValueError("dropout: expected 'off', as Monte Carlo draws weights only, got 'variance'.")
    with torch.no_grad():
        found = propagate(
            model, posterior, x, covariance=covariance, generator=generator, chunk_size=chunk_size, **options
        )
        known = inspect.signature(propagate).parameters
        inputs = {name: value for name, value in options.items() if name not in known}
        draws = _draws(model, posterior, x, num_samples, generator, chunk_size, options.get("batch_dim", 0), inputs)
        return _compared(found, draws, num_samples, quiet, progress)


def _compared(
    found: Predictive,
    draws: Iterator[Tensor],
    num_samples: int,
    quiet: bool,
    progress: Callable[[int, int], None] | None,
) -> Comparison:
    """Moments of draws about the propagated mean, in double precision, and what follows from them."""
    centre = found.mean.double()
    size = centre[0].numel()
    powers = [torch.zeros_like(centre) for _ in range(4)]
    outer: Tensor | float | None = 0.0 if 1 < size <= _CORRELATED else None
    done = 0
    for part in draws:
        gap = part.double() - centre
        for number, total in enumerate(powers, start=1):
            total += gap.pow(number).sum(0)
        if outer is not None:
            flat = gap.flatten(2)
            outer = outer + torch.einsum("sbi,sbj->bij", flat, flat)
        done += len(part)
        if progress is not None:
            progress(done, num_samples)
    first, second, third, fourth = (total / done for total in powers)
    variance = (second - first.square()).clamp_min(0)
    central = fourth - 4 * first * third + 6 * first.square() * second - 3 * first.pow(4)
    deviation, propagated = variance.sqrt(), found.variance.double().sqrt()
    some = deviation > 0
    safe = torch.where(some, deviation, 1.0)
    # Where Monte Carlo has no variance there is no scale: right is right, and all else is infinitely wrong.
    close = first.abs() <= torch.finfo(found.dtype).eps ** 0.5 * (1 + centre.abs())
    mean_error = torch.where(some, -first / safe, torch.where(close, 0.0, math.inf))
    ratio = torch.where(some, propagated / safe, torch.where(propagated == 0, 1.0, math.inf))
    kurtosis = torch.where(some, central / safe.pow(4), 1.0)
    error = torch.where(some, ratio * ((kurtosis - 1).clamp_min(0) / done).sqrt() / 2, 0.0)
    correlation_error = None
    if outer is not None:
        flat = first.flatten(1)
        sampled = _correlations(outer / done - flat.unsqueeze(-1) * flat.unsqueeze(-2))
        gap = (_correlations(found.covariance.to_dense().double()) - sampled).square()
        gap = gap - torch.diag_embed(gap.diagonal(dim1=-2, dim2=-1))
        correlation_error = (gap.sum((-2, -1)) / (size * (size - 1))).sqrt().to(found.dtype)
    made = Comparison(
        mean_error.to(found.dtype), ratio.to(found.dtype), error.to(found.dtype), correlation_error, done, found
    )
    if not quiet:
        sys.stdout.write(f"{made}\n")
    return made


def _correlations(covariance: Tensor) -> Tensor:
    deviation = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    scale = torch.where(deviation > 0, 1 / torch.where(deviation > 0, deviation, 1.0), 0.0)
    return scale.unsqueeze(-1) * covariance * scale.unsqueeze(-2)


def sample(
    model: nn.Module,
    posterior: WeightPosterior,
    x: Tensor | Mapping[str, Any],
    num_samples: int = 10,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    *,
    noise: Tensor | float | None = None,
    batch_dim: int = 0,
    **inputs: Any,
) -> Predictive:
    """Predict by Monte Carlo: as many forward passes as samples, each with weights drawn from the posterior.

    One draw of the weights is for the whole batch.

    Args:
        model: in eval mode.
        posterior: of its weights.
        x: a tensor, or a mapping of arguments, ``model(**x)``.
        num_samples: S.
        generator: of the draws; ``None`` is torch's default generator.
        chunk_size: elements of the batch at a time; ``None`` finds out from the memory.
        noise: noise variances of observations, for regression.
        batch_dim: batch dimension of x and of outputs ``(T, B, K)``; the prediction has the batch first in any case.
        inputs: further arguments of the model, such as masks; ``positions`` and ``outputs``, integers ``(P,)``, choose
            from outputs ``(B, T, K)``.

    Returns:
        The prediction by draws, ``(S, B, K)`` or ``(S, B, T, K)``, whose event is ``(T, K)``.

    Raises:
        TypeError: as for :func:`propagate`.
        ValueError: a posterior that does not fit the model, a model in train mode, or inputs that are not finite.

    Example:
        >>> from gpseq.propagation import from_variances
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> posterior = from_variances({"2.weight": torch.full((2, 8), 0.1)})
        >>> sample(model, posterior, torch.randn(5, 3), num_samples=20)
        Predictive(samples=20, batch_shape=(5,), event_shape=(2,), dtype=float32, device=cpu)
    """
    check_count("num_samples", num_samples)
    drawn = torch.cat(list(_draws(model, posterior, x, num_samples, generator, chunk_size, batch_dim, inputs)))
    made = Predictive.from_samples(drawn, noise=noise, event_dim=event_dims(drawn[0]))
    return made.noted(covariance="sampled")


def _draws(
    model: nn.Module,
    posterior: WeightPosterior,
    x: Tensor | Mapping[str, Any],
    num_samples: int,
    generator: torch.Generator | None,
    chunk_size: int | None,
    batch_dim: int,
    inputs: Mapping[str, Any],
) -> Iterator[Tensor]:
    """Outputs with drawn weights, ``(s, B, *event)`` at a time."""
    check_generator(generator)
    call = Call.of(x, inputs, batch_dim)
    model, bound = bind(posterior, model)
    check_model(model, call)
    network = Network(model, bound, batch_dim)
    size = max(sum(bound.parameters[name].numel() for name in bound.posterior.names), 1)
    together = max(min(_DRAWN // size, 256, num_samples), 1)
    if chunk_size is None:
        needed = 4 * 12 * largest_state(model, call) * call.itemsize * together
        chunk_size = max(free_bytes(call.first.device) // needed, 1)
    parts = [network.at(part) for part in call.chunks(check_count("chunk_size", chunk_size))]
    mapped = together >= 4  # larger networks take as long one after the other, and keep torch's fast kernels
    for start in range(0, num_samples, together):
        weights = draw_weights(bound, min(together, num_samples - start), generator)
        if mapped and weights:
            try:
                with forward_mode(model):
                    made = torch.cat([mapped_over(part, weights) for part in parts], 1)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError):  # something in it cannot be mapped; what is wrong fails again
                mapped = False
            else:
                yield made
                continue
        count = min(together, num_samples - start)
        with as_found(model):
            made = torch.stack([torch.cat([part(_one(weights, i)) for part in parts]) for i in range(count)])
        yield made


def _one(weights: Weights, number: int) -> Weights:
    return {name: value[number] for name, value in weights.items()}
