"""What is known of a network's weights: a Gaussian law for each parameter that is uncertain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gpseq.checks import check_number
from gpseq.linalg import covariance_root, row_major
from gpseq.propagation.draws import DenseDraws, Draws
from gpseq.propagation.laws import Dense, Diagonal, Kronecker, KroneckerLaplace, Law, LowRank


@dataclass(frozen=True, eq=False)
class Joint:
    r"""One Gaussian law of several parameters, whose entries follow one another.

    Attributes:
        names: of the parameters, in this order.
        covariance: ``(n, n)`` over all their entries, or ``None``.
        columns: instead of it, ``(R, n)``, whose outer products are added up.
        variances: ``(n,)``, added to those; ``None`` is zero.
        shapes: of the parameters, where whoever made it knows them; a model's have to be the same.
    """

    names: tuple[str, ...]
    covariance: Tensor | None = None
    columns: Tensor | None = None
    variances: Tensor | None = None
    shapes: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, eq=False)
class WeightPosterior:
    r"""A Gaussian posterior of weights, by names of parameters as in ``model.named_parameters()``.

    Parameters that are not named are certain. Make one with :func:`gpseq.propagation.from_variances`,
    :func:`gpseq.propagation.from_factors`, :func:`gpseq.propagation.from_covariance`,
    :func:`gpseq.propagation.from_columns`, :func:`gpseq.propagation.fit_laplace`, or from laplace-torch with
    :func:`gpseq.integrations.laplace.from_laplace`; ``|`` puts two of them side by side.

    Attributes:
        laws: of parameters that are independent of all others; each is a law of the parameter as a matrix, with the
            first dimension as rows and all others flattened; one of a vector has a single column.
        joints: laws of several parameters together.
        means: where they are not the model's values.

    Example:
        >>> from gpseq.propagation import from_variances
        >>> posterior = from_variances({"weight": torch.full((2, 3), 0.1)})
        >>> posterior.names
        ('weight',)
    """

    laws: Mapping[str, Law] = field(default_factory=dict)
    joints: Sequence[Joint] = ()
    means: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, law in self.laws.items():
            _check_law(name, law)
        # As they would come back from a file, so that a saved module answers alike to the last bit.
        laws = {name: _row_major(law) for name, law in self.laws.items()}
        object.__setattr__(self, "laws", laws)
        object.__setattr__(self, "joints", tuple(_row_major(joint) for joint in self.joints))
        twice = sorted(name for name, number in Counter(self.names).items() if number > 1)
        if twice:
            raise ValueError(f"posterior: expected each parameter once, got {', '.join(twice)} more often.")

    @property
    def names(self) -> tuple[str, ...]:
        """Of all parameters that are uncertain."""
        return (*self.laws, *(name for joint in self.joints for name in joint.names))

    @property
    def num_columns(self) -> int:
        """Columns of joint laws, which a covariance of low rank keeps as they are."""
        return sum(len(joint.columns) for joint in self.joints if joint.columns is not None)

    def __or__(self, other: WeightPosterior) -> WeightPosterior:
        twice = sorted(set(self.names) & set(other.names))
        if twice:
            raise ValueError(f"posterior: expected each parameter once, got {', '.join(twice)} in both.")
        return WeightPosterior(
            {**self.laws, **other.laws}, (*self.joints, *other.joints), {**self.means, **other.means}
        )

    def scaled(self, factor: Tensor | float, names: Sequence[str] | None = None) -> WeightPosterior:
        """With covariances that are so many times as large.

        Args:
            factor: positive.
            names: of the parameters that it is about; ``None`` is all. Joint laws cannot be scaled in part.

        Raises:
            ValueError: the factor is not positive, a name is unknown, or a joint law would be scaled in part.
        """
        known = factor.detach() if isinstance(factor, Tensor) else factor
        check_number("factor", known, above=0.0, expected="a positive number")
        chosen = set(self.names if names is None else [names] if isinstance(names, str) else names)
        if unknown := sorted(chosen - set(self.names)):
            raise ValueError(f"names: expected uncertain parameters, got {', '.join(unknown)}.")
        laws = {name: law.scaled(factor) if name in chosen else law for name, law in self.laws.items()}
        joints = []
        for joint in self.joints:
            inside = set(joint.names) & chosen
            if inside and inside != set(joint.names):
                raise ValueError(f"names: expected all of {', '.join(joint.names)} or none, got {', '.join(inside)}.")
            joints.append(_scaled(joint, factor) if inside else joint)
        return WeightPosterior(laws, tuple(joints), self.means)

    def _without(self, prefix: str) -> WeightPosterior:
        """The same, with names that do not begin so."""

        def short(name: str) -> str:
            return name.removeprefix(prefix)

        return WeightPosterior(
            {short(name): law for name, law in self.laws.items()},
            tuple(replace(joint, names=tuple(map(short, joint.names))) for joint in self.joints),
            {short(name): mean for name, mean in self.means.items()},
        )

    def bind(self, model: nn.Module) -> BoundPosterior:
        """Check that the posterior is about a model's parameters.

        Args:
            model: any module.

        Returns:
            What the rules ask, for the model's parameters.

        Raises:
            TypeError: the model is no module.
            ValueError: a name or a shape that does not fit.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
        parameters = dict(model.named_parameters())
        unknown = sorted({*self.names, *self.means} - set(parameters))
        if unknown:
            known = ", ".join(list(parameters)[:8]) + (", ..." if len(parameters) > 8 else "")
            raise ValueError(
                f"posterior: expected names of parameters ({known}), got {', '.join(unknown)}"
                f"{_other_names(model, parameters, unknown)}."
            )
        for name, law in self.laws.items():
            shape = matrix_shape(parameters[name])
            if law.shape != shape:
                raise ValueError(
                    f"posterior: expected a law of shape {shape} for {name}, which has shape "
                    f"{tuple(parameters[name].shape)}, got {law.shape}."
                )
        for joint in self.joints:
            for name, expected in zip(joint.names, joint.shapes or (), strict=joint.shapes is not None):
                if parameters[name].shape != tuple(expected):
                    raise ValueError(
                        f"posterior: expected a law for {name} of shape {tuple(parameters[name].shape)}, got one for "
                        f"{tuple(expected)}."
                    )
            size = sum(parameters[name].numel() for name in joint.names)
            for value in (joint.covariance, joint.columns, joint.variances):
                if value is not None and value.shape[-1] != size:
                    raise ValueError(
                        f"posterior: expected {size} entries for {', '.join(joint.names)}, got {value.shape[-1]}."
                    )
        for name, mean in self.means.items():
            if mean.shape != parameters[name].shape:
                raise ValueError(
                    f"posterior: expected a mean of shape {tuple(parameters[name].shape)} for {name}, got "
                    f"{tuple(mean.shape)}."
                )
        return BoundPosterior(self, {id(value): name for name, value in parameters.items()}, parameters)


@dataclass(frozen=True, eq=False)
class BoundPosterior:
    """A posterior and the parameters that it is about.

    Attributes:
        posterior: of the weights.
        names: of parameters, by their identity.
        parameters: by their names.
    """

    posterior: WeightPosterior
    names: Mapping[int, str]
    parameters: Mapping[str, Tensor]

    def name(self, parameter: Tensor | None) -> str | None:
        """Of a parameter that is uncertain; ``None`` for all others."""
        if parameter is None:
            return None
        name = self.names.get(id(parameter))
        return name if name in self._uncertain else None

    @cached_property
    def _uncertain(self) -> frozenset[str]:
        return frozenset(self.posterior.names)

    def mean(self, parameter: Tensor) -> Tensor:
        """The posterior's mean, or the parameter itself."""
        name = self.names.get(id(parameter))
        mean = None if name is None else self.posterior.means.get(name)
        return parameter if mean is None else mean.to(parameter)

    def means(self, module: nn.Module) -> dict[str, Tensor]:
        """Means inside of a module that are not the model's values, by the names that they have there."""
        if not self.posterior.means:
            return {}
        return {
            name: self.mean(parameter)
            for name, parameter in module.named_parameters()
            if self.names.get(id(parameter)) in self.posterior.means
        }

    def uncertain(self, module: nn.Module) -> tuple[str, ...]:
        """Names of the uncertain parameters inside of a module."""
        names = (self.name(parameter) for parameter in module.parameters())
        return tuple(name for name in names if name is not None)

    def restricted(self, names: Mapping[str, str]) -> WeightPosterior:
        """What is known of some parameters alone, the others integrated out.

        Args:
            names: of these parameters, with the names that they get. Those that are certain give their means, where the
                posterior has some.

        Returns:
            The posterior. Of a joint law it has the rows and columns that belong to them.
        """
        known = self.posterior
        laws = {names[name]: law for name, law in known.laws.items() if name in names}
        parts = [self._marginal(joint, names) for joint in known.joints if not names.keys().isdisjoint(joint.names)]
        means = {names[name]: mean for name, mean in known.means.items() if name in names}
        return WeightPosterior(laws, tuple(parts), means)

    def _marginal(self, joint: Joint, names: Mapping[str, str]) -> Joint:
        """The joint law of those of its parameters that have a new name."""
        inside = [number for number, name in enumerate(joint.names) if name in names]
        renamed = tuple(names[joint.names[number]] for number in inside)
        if len(inside) == len(joint.names):
            return replace(joint, names=renamed)
        places = list(self.places(joint).values())
        index = torch.cat([places[number].flatten() for number in inside])
        return Joint(
            renamed,
            None if joint.covariance is None else joint.covariance[index][:, index],
            None if joint.columns is None else joint.columns[:, index],
            None if joint.variances is None else joint.variances[index],
            None if joint.shapes is None else tuple(joint.shapes[number] for number in inside),
        )

    def law(
        self, weight: Tensor | None, bias: Tensor | None, like: Tensor, transposed: bool = False
    ) -> list[tuple[Law, str]]:
        """Laws of the noise of a layer, each with what it multiplies: ``"weight"``, ``"bias"`` or ``"both"``.

        ``"both"`` is about inputs with a one appended. With ``transposed`` the weight is ``(D, K)``, and its law that
        of its transpose.
        """
        found: list[tuple[Law, str]] = []
        weight_name, bias_name = self.name(weight), self.name(bias)
        for name, part in ((weight_name, "weight"), (bias_name, "bias")):
            if name is not None and name in self.posterior.laws:
                law = self.posterior.laws[name].to(like)
                found.append((law.transposed() if transposed and part == "weight" else law, part))
        for joint in self.posterior.joints:
            inside = [name for name in (weight_name, bias_name) if name is not None and name in joint.names]
            if inside:
                part = "both" if len(inside) == 2 else "weight" if inside[0] == weight_name else "bias"
                found.append((self._part(joint, inside, weight_name if transposed else None).to(like), part))
        return found

    def _part(self, joint: Joint, names: Sequence[str], turned: str | None = None) -> Law:
        """The law of the matrices of some parameters of a joint law, side by side; one of them transposed."""
        places = self.places(joint)
        matrices = {name: places[name].reshape(matrix_shape(self.parameters[name])) for name in names}
        index = torch.cat([matrix.mT if name == turned else matrix for name, matrix in matrices.items()], 1)
        if joint.covariance is not None:
            flat = index.flatten()
            return Dense(joint.covariance[flat][:, flat].unflatten(0, index.shape).unflatten(2, index.shape))
        assert joint.columns is not None
        entries = joint.columns.new_zeros(index.shape) if joint.variances is None else joint.variances[index]
        return LowRank(joint.columns[:, index], entries)

    def crosses_layers(self, model: nn.Module) -> bool:
        """Whether a joint law is about more than one layer, whose covariance only the form ``"lowrank"`` keeps.

        Args:
            model: with the parameters.
        """
        owners = {id(p): number for number, module in enumerate(model.modules()) for p in module.parameters(False)}
        return any(
            len({owners.get(id(self.parameters[name])) for name in joint.names}) > 1 for joint in self.posterior.joints
        )

    def places(self, joint: Joint) -> dict[str, Tensor]:
        """Where each parameter's entries are in a joint law, in the shape of the parameter."""
        found, start = {}, 0
        for name in joint.names:
            shape = self.parameters[name].shape
            device = next(v.device for v in (joint.covariance, joint.columns) if v is not None)
            found[name] = torch.arange(start, start + shape.numel(), device=device).view(shape)
            start += shape.numel()
        return found

    def draw(
        self, num_draws: int, generator: torch.Generator | None, like: Tensor
    ) -> tuple[dict[str, Draws], dict[str, Tensor]]:
        """One set of draws of all weights, each parameter's as a matrix.

        Returns:
            Draws by names, ``num_draws`` of them, and columns that are exact, ``(num_columns, K, D)``.
        """
        drawn: dict[str, Draws] = {}
        exact: dict[str, Tensor] = {}
        for name, law in self.posterior.laws.items():
            drawn[name] = law.draw(num_draws, generator, like)
        started, total = 0, self.posterior.num_columns
        for joint in self.posterior.joints:
            size = sum(self.parameters[name].numel() for name in joint.names)
            noise = torch.randn(num_draws, size, generator=generator, dtype=like.dtype, device=like.device)
            if joint.covariance is not None:
                made = noise @ covariance_root(joint.covariance.to(like)).mT
            else:
                made = noise * 0 if joint.variances is None else noise * joint.variances.to(like).sqrt()
            for name, index in self.places(joint).items():
                index = index.reshape(matrix_shape(self.parameters[name])).to(like.device)
                drawn[name] = DenseDraws(made[:, index] * num_draws**-0.5)
                if joint.columns is not None:
                    columns = like.new_zeros(total, *index.shape)
                    columns[started : started + len(joint.columns)] = joint.columns.to(like)[:, index]
                    exact[name] = columns
            started += 0 if joint.columns is None else len(joint.columns)
        return drawn, exact


def bind(posterior: WeightPosterior, model: nn.Module) -> tuple[nn.Module, BoundPosterior]:
    """The model without what only runs it, and the posterior of its weights.

    Args:
        posterior: of the weights; names may be those of a compiled model or ``nn.DataParallel``, or of what is inside.
        model: any module.

    Returns:
        The module inside, and the posterior bound to it.

    Raises:
        TypeError: the posterior is something else, or the model is no module.
        ValueError: a name or a shape that does not fit.
    """
    if not isinstance(posterior, WeightPosterior):
        raise TypeError(
            "posterior: expected a WeightPosterior, such as from_variances makes of a mapping, got "
            f"{type(posterior).__name__}."
        )
    inside, prefixes = unwrapped(model)
    for prefix in prefixes:
        posterior = posterior._without(prefix)
    return inside, posterior.bind(inside)


def unwrapped(model: Any) -> tuple[Any, tuple[str, ...]]:
    """The module inside of a compiled model or ``nn.DataParallel``, and what its parameters' names begin with there.

    Args:
        model: any module.
    """
    prefixes: list[str] = []
    while isinstance(model, nn.Module):
        compiled = "_orig_mod" in vars(model)["_modules"]
        if not compiled and not isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            break
        name = "_orig_mod" if compiled else "module"
        model = getattr(model, name)
        prefixes.append(f"{name}.")
    return model, tuple(prefixes)


def _other_names(model: nn.Module, parameters: Mapping[str, Tensor], unknown: Sequence[str]) -> str:
    """Under which names a model lists parameters that it has under several, for messages."""
    every = dict(model.named_parameters(remove_duplicate=False))
    listed = {id(value): name for name, value in parameters.items()}
    found = [f"{name} is {listed[id(every[name])]}" for name in unknown if name in every]
    return f" ({', '.join(found)})" if found else ""


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """Shape of a parameter as a matrix: its first dimension, and all others; a vector has a single column."""
    rows = parameter.shape[0] if parameter.dim() else 1
    return rows, parameter.numel() // max(rows, 1)


def _check_law(name: str, law: Any) -> None:
    """A law whose variances, as far as they are cheap to see, are none that cannot be."""
    if not isinstance(law, Law):
        raise TypeError(f"posterior: expected a law for {name}, such as Diagonal, got {type(law).__name__}.")
    if isinstance(law, Diagonal | LowRank):
        known = law.entries
    elif isinstance(law, KroneckerLaplace):
        known = law.eigenvalues
    elif isinstance(law, Kronecker | Dense):
        known = law.marginals()
    else:
        return
    lowest = float(known.detach().amin()) if known.numel() else 0.0
    if not lowest >= 0:
        raise ValueError(f"posterior: expected variances that are not negative for {name}, got {lowest}.")


def _row_major(value: Any) -> Any:
    """A dataclass whose tensors are row-major; itself where they are, or where it is a law of the user's."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    tensors = {field.name: getattr(value, field.name) for field in fields(value)}
    laid_out = {name: row_major(tensor) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    changed = {name: tensor for name, tensor in laid_out.items() if tensor is not tensors[name]}
    return replace(value, **changed) if changed else value


def _scaled(joint: Joint, factor: Tensor | float) -> Joint:
    def by(value: Tensor | None, power: float = 1.0) -> Tensor | None:
        return None if value is None else value * factor**power

    return replace(
        joint, covariance=by(joint.covariance), columns=by(joint.columns, 0.5), variances=by(joint.variances)
    )
