"""Readings of declared sensors, checked against what is to learn them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor

from gpseq.checks import check_floating
from gpseq.models.observations import noise_of


@dataclass(frozen=True)
class Readings:
    """Rows of readings, a column for each declared sensor; float64.

    Attributes:
        times: ``(n, 1)``.
        y: ``(n, S)``; zero where there is no reading.
        weights: 1 / noise, ``(n, S)``; zero where there is no reading.
    """

    times: Tensor
    y: Tensor
    weights: Tensor

    @property
    def heard(self) -> Tensor:
        """Times of the rows with a reading, ``(n', 1)``."""
        return self.times[(self.weights > 0).any(-1)]


def check_readings(
    places: Tensor,
    likelihood: Likelihood,
    times: Tensor,
    y: Tensor,
    sensors: Tensor | Sequence[int] | None,
    noise: Tensor | float | None,
    missing: str,
) -> Readings:
    """Check rows of readings.

    Args:
        places: of all declared sensors, ``(S, d)``.
        likelihood: where noise comes from that is not given.
        times: ``(n,)``.
        y: ``(n, s)``.
        sensors: indices of the sensors that report, ``(s,)``; ``None`` means all.
        noise: see ``SpaceTimeStreamingGP.update``.
        missing: ``"error"`` or ``"skip"``.

    Returns:
        The readings.

    Raises:
        TypeError: something is not a tensor of the right kind.
        ValueError: the message names the argument, what came and what was expected.
    """
    if missing not in ("error", "skip"):
        raise ValueError(f"missing: expected 'error' or 'skip', got {missing!r}.")
    for name, value in (("times", times), ("y", y)):
        if check_floating(name, value).device != places.device:
            raise ValueError(f"{name}: expected a tensor on {places.device}, where the model is, got {value.device}.")
    which = _check_sensors(sensors, len(places), places.device)
    t = check_times(times)
    if y.shape != (len(t), len(which)):
        raise ValueError(
            f"y: expected shape ({len(t)}, {len(which)}), a row for each time and a column for each sensor, got "
            f"{tuple(y.shape)}."
        )
    noises = noise_of(likelihood, noise, y).detach().double()
    try:
        noises = noises.expand(y.shape)
    except RuntimeError:
        raise ValueError(
            f"noise: expected a scalar or variances for y of shape {tuple(y.shape)}, got shape {tuple(noises.shape)}."
        ) from None
    observed = ~y.isnan() if missing == "skip" else torch.ones_like(y, dtype=torch.bool)
    # One transfer from the device for both questions.
    answers = [(y.isfinite() | ~observed).all(), ((noises.isfinite() & (noises > 0)) | ~observed).all()]
    y_good, noise_good = torch.stack(answers).tolist()
    if not y_good:
        hint = "" if missing == "skip" else " (missing='skip' passes over NaN)"
        raise ValueError(f"y: expected finite readings, got NaN or infinity in shape {tuple(y.shape)}{hint}.")
    if not noise_good:
        raise ValueError(f"noise: expected finite positive variances, got others in shape {tuple(noises.shape)}.")
    weights = torch.where(observed, noises.reciprocal(), 0.0)
    values = torch.where(observed, y.detach().double(), 0.0)
    if sensors is not None:
        values, weights = (_spread(part, which, len(places)) for part in (values, weights))
    return Readings(t.detach().double(), values, weights)


def check_times(times: Tensor) -> Tensor:
    """Times ``(n,)``, or ``(n, 1)``, as inputs ``(n, 1)``."""
    check_floating("times", times)
    if times.dim() not in (1, 2) or times.shape[1:] not in ((), (1,)):
        raise ValueError(f"times: expected shape (n,), got {tuple(times.shape)}.")
    if not times.isfinite().all():
        raise ValueError(f"times: expected finite times, got NaN or infinity in shape {tuple(times.shape)}.")
    return times.reshape(-1, 1)


def check_places(name: str, places: Tensor, num_dims: int, device: torch.device) -> Tensor:
    """Finite places ``(s, d)`` in float64.

    Args:
        name: of the argument.
        places: ``(s, d)``.
        num_dims: d.
        device: where the model is.

    Returns:
        They, in float64.
    """
    if check_floating(name, places).device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, where the model is, got {places.device}.")
    if places.dim() != 2 or places.shape[-1] != num_dims:
        raise ValueError(f"{name}: expected shape (s, {num_dims}), got {tuple(places.shape)}.")
    if not places.isfinite().all():
        raise ValueError(f"{name}: expected finite coordinates, got NaN or infinity.")
    return places.double()


def _spread(values: Tensor, which: Tensor, total: int) -> Tensor:
    """Columns put where they belong among those of all sensors."""
    return values.new_zeros(len(values), total).index_copy(1, which, values)


def _check_sensors(sensors: Tensor | Sequence[int] | None, total: int, device: torch.device) -> Tensor:
    if sensors is None:
        return torch.arange(total, device=device)
    if isinstance(sensors, Sequence):
        try:
            sensors = torch.tensor(sensors, device=device) if len(sensors) else torch.zeros(0, dtype=torch.int64)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"sensors: expected indices, got {sensors!r}.") from None
    if not isinstance(sensors, Tensor) or sensors.is_floating_point() or sensors.dtype == torch.bool:
        got = sensors.dtype if isinstance(sensors, Tensor) else type(sensors).__name__
        raise TypeError(f"sensors: expected a tensor of indices, got {got}.")
    if sensors.dim() != 1:
        raise ValueError(f"sensors: expected indices of shape (s,), got {tuple(sensors.shape)}.")
    unknown = (sensors < 0) | (sensors >= total)
    if unknown.any():
        raise ValueError(
            f"sensors: expected indices of the {total} declared sensors, got {sensors[unknown][0].item()}; "
            "declare(locations) adds more."
        )
    if len(sensors.unique()) != len(sensors):
        raise ValueError("sensors: expected distinct indices, got one of them twice.")
    return sensors.long().to(device)
