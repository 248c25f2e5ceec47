"""A network and its weight posterior as one module, which predicts when it is called and can be saved."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor, nn

from gpseq import storage
from gpseq.predictive import Predictive
from gpseq.propagation.calibration import Calibration
from gpseq.propagation.call import Call, check_mode
from gpseq.propagation.forward import Plan, Settings, planned
from gpseq.propagation.laws import Law
from gpseq.propagation.posteriors import Joint, WeightPosterior, bind

#: What a file says that it holds.
KIND = "gpseq.propagation.Streamlined"


class Streamlined(nn.Module):
    r"""A network and its weight posterior: a module whose call is :func:`~gpseq.propagation.propagate`.

    All tensors of posterior and calibration are buffers, copies of those that came, and their numbers are too. So
    ``.to(...)`` moves them, and ``state_dict`` is complete: it can be loaded into another one that was made from the
    same kind of network, posterior and calibration. :meth:`save` writes a file that knows the kind of posterior as
    well. Make one with :func:`streamline`.

    Args:
        model: the network, which stays what it is and must be in eval mode if it has dropout or norms of batches.
        posterior: of its weights.
        calibration: applied to every prediction.
        options: of :func:`~gpseq.propagation.propagate`, but for ``generator``.

    Attributes:
        model: the network.
        options: those that were given, but for noise.
        held: buffers of posterior, calibration and noise.
        last_plan: how the last prediction was made: the form of the covariance, the memory, the chunks; ``None`` before
            the first.
    """

    def __init__(
        self,
        model: nn.Module,
        posterior: WeightPosterior,
        calibration: Calibration | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        known = [field.name for field in dataclasses.fields(Settings)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(f"options: expected those of propagate ({', '.join(known)}), got {', '.join(unknown)}.")
        Settings(**options)
        check_mode(bind(posterior, model)[0])
        if calibration is not None and not isinstance(calibration, Calibration):
            raise TypeError(f"calibration: expected that of calibrate, got {type(calibration).__name__}.")
        noise = options.pop("noise", None)
        self.model = model
        self.options = options
        self.last_plan: Plan | None = None
        self.held = Held({"posterior": posterior, "calibration": calibration, "noise": noise})

    @property
    def posterior(self) -> WeightPosterior:
        """Of the weights, made of the buffers."""
        return self.held.values()["posterior"]

    @property
    def calibration(self) -> Calibration | None:
        """What predictions are corrected by."""
        return self.held.values()["calibration"]

    def forward(
        self, x: Tensor | Mapping[str, Any] | None = None, *, generator: torch.Generator | None = None, **inputs: Any
    ) -> Predictive:
        """The prediction for some inputs.

        Args:
            x: a tensor, or a mapping of arguments of the network; ``None`` where all of them have names.
            generator: of the draws of the form ``"lowrank"``; ``None`` is torch's default generator.
            inputs: further arguments of the network, such as masks.

        Raises:
            ValueError: the network is in train mode; and as :func:`~gpseq.propagation.propagate` does.
        """
        held = self.held.values()
        settings = Settings(**self.options, noise=held["noise"])
        call = Call.of(inputs, {}, settings.batch_dim) if x is None else Call.of(x, inputs, settings.batch_dim)
        found, self.last_plan = planned(self.model, held["posterior"], call, settings, generator)
        calibration = held["calibration"]
        return found if calibration is None else calibration.apply(found)

    def conditional(
        self, x: Tensor | Mapping[str, Any] | None = None, *, generator: torch.Generator | None = None, **inputs: Any
    ) -> tuple[Tensor, LinearOperator]:
        """Mean and covariance, as ``gpseq.predict(module, x, method="moments")`` asks for them.

        Noise of observations is not among them, nor is what tokens have in common.

        Args:
            x: as for a call, and so are all others.
            generator: of draws.
            inputs: further arguments of the network.

        Returns:
            ``(*batch, E)`` and ``(*batch, E, E)``; outputs ``(B, T, K)`` have tokens in the batch.
        """
        found = self(x, generator=generator, **inputs)
        found = found if found.event_dim == 1 else found.pointwise()
        return found.mean, found.covariance

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weights of the network, the posterior, the calibration and the options to a file.

        Args:
            path: the file, see :func:`gpseq.storage.save`; it is replaced if it exists.
        """
        storage.save(path, self.state_dict(), {"kind": KIND, "options": self.options, "structure": self.held.structure})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> Streamlined:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            model: a network of the same architecture; its weights become those of the file.

        Returns:
            The module; tensors of the posterior are on the device of the network.

        Raises:
            StorageError: the file is foreign, damaged or of a newer version, or has laws of classes that are not there.
            RuntimeError: the weights are not those of the network; it may have been changed.

        Example:
            >>> import tempfile
            >>> from pathlib import Path
            >>> from gpseq.propagation import from_variances
            >>> path = Path(tempfile.mkdtemp()) / "network.safetensors"
            >>> variances = {"weight": torch.full((2, 3), 0.1)}
            >>> streamline(nn.Linear(3, 2), from_variances(variances)).save(path)
            >>> Streamlined.load(path, nn.Linear(3, 2)).posterior.names
            ('weight',)
        """
        tensors, metadata = storage.load(path)
        if metadata.get("kind") != KIND:
            raise storage.StorageError(f"{path} holds no streamlined network.")
        prefix = "held."
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        try:
            held = put_together(metadata["structure"], own)
        except KeyError as error:
            raise storage.StorageError(f"{path}: there is no {error.args[0]} here; was its module imported?") from error
        made = cls(model, held["posterior"], held["calibration"], noise=held["noise"], **metadata["options"])
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        made.held.to(device)
        made.load_state_dict(tensors)
        return made

    def extra_repr(self) -> str:
        """Options, and how many parameters are uncertain."""
        options = [f"{name}={value!r}" for name, value in self.options.items()]
        return ", ".join([f"uncertain={len(self.posterior.names)}", *options])


def streamline(
    model: nn.Module,
    posterior: WeightPosterior,
    calibration: Calibration | None = None,
    **options: Any,
) -> Streamlined:
    """A network and its weight posterior as one module: call it, save it, move it.

    Args:
        model: the network; in eval mode if it has dropout or norms of batches.
        posterior: of its weights.
        calibration: from :func:`~gpseq.propagation.calibrate`, applied to every prediction.
        options: of :func:`~gpseq.propagation.propagate`, but for ``generator``, which calls take.

    Returns:
        The module.

    Raises:
        TypeError: an option that there is not.
        ValueError: a posterior that does not fit the network, a network in train mode, or an unknown value of an
            option.

    Example:
        >>> from gpseq.propagation import from_variances
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> module = streamline(model, from_variances({"2.weight": torch.full((2, 8), 0.1)}), covariance="diag")
        >>> module(torch.randn(5, 3)).variance.shape, module.last_plan.form
        (torch.Size([5, 2]), 'diag')
    """
    return Streamlined(model, posterior, calibration, **options)


class Held(nn.Module):
    """Nested values whose tensors and real numbers are buffers.

    Args:
        values: mappings, sequences, laws and their like, numbers, strings and tensors, by names.

    Attributes:
        structure: what the values are but for their tensors, in what JSON holds.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        tensors: dict[str, Tensor] = {}
        self.structure = {name: take_apart(value, name, tensors) for name, value in values.items()}
        for name, value in tensors.items():
            # A copy: what is loaded or cast here changes nothing elsewhere.
            self.register_buffer(name, value.detach().clone(memory_format=torch.contiguous_format))

    def values(self) -> dict[str, Any]:
        """The values, with the buffers as they are now."""
        return put_together(self.structure, dict(self.named_buffers()))


def take_apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """What a value is but for its tensors and real numbers, which are collected.

    Args:
        value: a tensor, a number, a string, ``None``; a law, a joint law, a posterior or a calibration; or mappings and
            sequences of these.
        name: of the value; dots, which names of buffers cannot have, become slashes.
        tensors: to which those of the value are added.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, Tensor | float):
        name = name.replace(".", "/")
        while name in tensors:
            name += "'"
        tensors[name] = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        return {"tensor" if isinstance(value, Tensor) else "number": name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {"mapping": [[key, take_apart(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, tuple | list):
        return {"sequence": [take_apart(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    kind = type(value)
    if _kinds().get(_name(kind)) is not kind or not dataclasses.is_dataclass(value):
        raise TypeError(
            f"posterior: expected laws that are dataclasses of tensors, which can be kept in buffers, got "
            f"{kind.__name__} for {name}."
        )
    fields = [field.name for field in dataclasses.fields(value) if field.init]
    return {
        "kind": _name(kind),
        "fields": [[field, take_apart(getattr(value, field), f"{name}/{field}", tensors)] for field in fields],
    }


def put_together(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`take_apart`.

    Args:
        structure: what it returned.
        tensors: what it collected.

    Raises:
        KeyError: a class or a tensor is missing.
    """
    if not isinstance(structure, dict):
        return structure
    if "tensor" in structure:
        return tensors[structure["tensor"]]
    if "number" in structure:
        return float(tensors[structure["number"]])
    if "mapping" in structure:
        return {key: put_together(item, tensors) for key, item in structure["mapping"]}
    if "sequence" in structure:
        return tuple(put_together(item, tensors) for item in structure["sequence"])
    if "kind" in structure:
        fields = {field: put_together(item, tensors) for field, item in structure["fields"]}
        return _kinds()[structure["kind"]](**fields)
    return {name: put_together(item, tensors) for name, item in structure.items()}


def _kinds() -> dict[str, type[Any]]:
    """Classes that are kept, by their names: nothing else is ever made from a file."""
    found: list[type[Any]] = [WeightPosterior, Joint, Calibration]
    waiting: list[type[Any]] = [Law]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            found.append(kind)
            waiting.append(kind)
    return {_name(kind): kind for kind in found}


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
