r"""The network's tangent in its weights: a Gaussian over outputs for any architecture, without a rule for any layer.

With J the Jacobian of the outputs in the weights at their mean, the outputs have the plain outputs as their mean and
:math:`J \Sigma J^\top` as their covariance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from linear_operator.operators import RootLinearOperator
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

from gpseq.checks import check_count
from gpseq.logits import network_output
from gpseq.prediction_checks import check_generator
from gpseq.predictive import Predictive
from gpseq.propagation.call import CHOICES, Call, check_model
from gpseq.propagation.differences import Prefix, step_size
from gpseq.propagation.draws import Draws
from gpseq.propagation.posteriors import BoundPosterior, WeightPosterior, bind
from gpseq.propagation.quadratic import covariance
from gpseq.propagation.sizes import free_bytes, largest_state
from gpseq.propagation.switches import as_found, forward_mode

#: How the covariance of the outputs is found.
METHODS = ("sampled", "differences", "exact")
#: Tangents that are pushed through a network together, at the most: more are no faster, and take memory.
_TOGETHER = 64

Weights = dict[str, Tensor]


def linearised(
    model: nn.Module,
    posterior: WeightPosterior,
    x: Tensor | Mapping[str, Any],
    num_tangents: int = 256,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
    *,
    method: str = "sampled",
    noise: Tensor | float | None = None,
    batch_dim: int = 0,
    **inputs: Any,
) -> Predictive:
    r"""Mean and covariance of a network's outputs by its tangent in the weights.

    .. math:: f(x; \theta) \approx f(x; \bar\theta) + J (\theta - \bar\theta), \qquad
        \operatorname{Cov} f = J \Sigma J^\top

    No layer needs a rule, and every covariance is there, that between layers included. The mean is the plain output:
    what curvature adds to it is left out.

    Args:
        model: in eval mode; anything that ``torch.func`` can differentiate.
        posterior: of its weights.
        x: a tensor, or a mapping of arguments, ``model(**x)``.
        num_tangents: draws of all uncertain weights that are pushed forward, K; the standard deviations have a relative
            error of about :math:`1 / \sqrt{2 K}`. They are the draws of :func:`propagate` in the form ``"lowrank"``
            with the same generator.
        chunk_size: elements of the batch at a time; ``None`` finds out from the memory.
        generator: of the draws; ``None`` is torch's default generator.
        method: ``"sampled"``, by forward-mode derivatives; ``"differences"``, the same by quotients of small
            differences, a plain pass for each draw, where what comes before the first uncertain weight is computed
            once; or ``"exact"``, a backward pass for each element and output.
        noise: noise variances of observations, for regression.
        batch_dim: batch dimension of x and of outputs ``(T, B, K)``; the prediction has the batch first in any case.
        inputs: further arguments of the model, such as masks; ``positions`` and ``outputs``, integers ``(P,)``, choose
            from outputs ``(B, T, K)``.

    Returns:
        The prediction of outputs ``(B, K)`` with their covariance, or ``(B, T, K)``, whose event is ``(T, K)``.

    Raises:
        NotImplementedError: the model has no forward-mode derivatives, such as some implementations of attention.
        RuntimeError: the memory is too small for the exact Jacobian, or a network that draws meets ``"differences"``.
        TypeError: as for :func:`propagate`.
        ValueError: a posterior that does not fit the model, a model in train mode, inputs that are not finite, or an
            unknown method.

    Source:
        Immer, Korzepa and Bauer (2021), Improving predictions of Bayesian neural nets via local linearization.

    Example:
        >>> from gpseq.propagation import from_variances
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> posterior = from_variances({"2.weight": torch.full((2, 8), 0.1)})
        >>> linearised(model, posterior, torch.randn(5, 3), method="exact")
        Predictive(Gaussian, batch_shape=(5,), event_shape=(2,), dtype=float32, device=cpu)
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}.")
    check_count("num_tangents", num_tangents)
    check_generator(generator)
    call = Call.of(x, inputs, batch_dim)
    model, bound = bind(posterior, model)
    check_model(model, call)
    network = Network(model, bound, batch_dim)
    if method == "differences":
        with as_found(model):
            mean, operator = _differences(network, call, num_tangents, chunk_size, generator)
    else:
        with forward_mode(model):
            if method == "exact":
                mean, operator = _exact(network, call)
            else:
                mean, operator = _sampled(network, call, num_tangents, chunk_size, generator)
    event_dim = event_dims(mean)
    found = Predictive.from_moments(mean, operator, noise=noise, event_dim=event_dim)
    return found.noted(covariance="linearised")


@dataclass(frozen=True, eq=False)
class Network:
    """A model as a function of its uncertain weights.

    Attributes:
        model: any module.
        bound: posterior of its weights.
        batch_dim: batch dimension of its inputs and outputs.
    """

    model: nn.Module
    bound: BoundPosterior
    batch_dim: int = 0

    @property
    def means(self) -> Weights:
        """Of the uncertain weights."""
        return {name: self.bound.mean(self.bound.parameters[name]) for name in self.bound.posterior.names}

    def at(self, call: Call) -> Callable[[Weights], Tensor]:
        """Outputs, ``(B, *event)``, as a function of the uncertain weights.

        Args:
            call: arguments of the model.
        """
        # The posterior may also know better means of weights that it takes to be certain.
        fixed = self.bound.means(self.model)
        args, named = call.arguments()
        positions, outputs = (call.named.get(name) for name in CHOICES)

        def run(weights: Weights) -> Tensor:
            output = main_output(functional_call(self.model, {**fixed, **weights}, args, named))
            return _select(output.movedim(self.batch_dim, 0) if output.dim() > 2 else output, positions, outputs)

        return run


def _select(output: Tensor, positions: Any, outputs: Any) -> Tensor:
    if positions is not None:
        output = output[:, torch.as_tensor(positions, device=output.device)]
    return output if outputs is None else output[..., torch.as_tensor(outputs, device=output.device)]


def main_output(output: Any) -> Tensor:
    """What a network says first: logits where there are some, else the first of several tensors.

    Args:
        output: a tensor, a tuple or a mapping, or an object with logits.
    """
    if isinstance(output, Mapping) and "logits" not in output:
        output = next(iter(output.values()))
    elif isinstance(output, list) and output:
        output = output[0]
    return network_output(output)[0]


def event_dims(mean: Tensor) -> int:
    """How many dimensions an event of the outputs has.

    Args:
        mean: ``(B, K)`` or ``(B, T, K)``.

    Raises:
        ValueError: it has another shape.
    """
    if mean.dim() not in (2, 3):
        raise ValueError(f"model: expected outputs (B, K) or (B, T, K), got {tuple(mean.shape)}.")
    return mean.dim() - 1


# Derivatives


def push_forward(function: Callable[[Any], Tensor], primals: Any, tangents: Any, subject: str = "the model") -> Tensor:
    r"""Directional derivatives, :math:`J u_r`, of many directions.

    Args:
        function: of one argument, which may hold many tensors.
        primals: where, as the argument.
        tangents: the same with R of each in front.
        subject: what messages call the function.

    Returns:
        ``(R, *output)``.

    Raises:
        NotImplementedError: the function has no forward-mode derivatives.
    """

    def along(tangent: Any) -> Tensor:
        found: Tensor = jvp(function, (primals,), (tangent,))[1]
        return found

    return _mapped(along, tangents, subject, "forward-mode")


def pull_back(function: Callable[[Any], Tensor], primals: Any, cotangents: Tensor, subject: str = "the model") -> Any:
    r"""Gradients, :math:`J^\top w_r`, of many weightings of the outputs.

    Args:
        function: of one argument, which may hold many tensors.
        primals: where, as the argument.
        cotangents: ``(R, *output)``.
        subject: what messages call the function.

    Returns:
        As the argument, with R of each tensor in front.

    Raises:
        NotImplementedError: the function has no derivatives.
    """
    back = vjp(function, primals)[1]
    return _mapped(lambda cotangent: back(cotangent)[0], cotangents, subject, "reverse-mode")


def mapped_over(function: Callable[[Any], Any], many: Any) -> Any:
    """A function of many arguments at once, by ``vmap``.

    Args:
        function: of one of them.
        many: with a dimension in front.
    """
    with warnings.catch_warnings():  # about operations that torch takes one by one
        warnings.filterwarnings("ignore", "There is a performance drop")
        return vmap(function)(many)


def _mapped(function: Callable[[Any], Any], many: Any, subject: str, mode: str) -> Any:
    """A function of many arguments at once, or one after the other where it cannot take them together."""
    try:
        return mapped_over(function, many)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError):  # no batching rule, or control flow that looks at numbers
        pass
    leaves = tree_leaves(many)
    try:
        rows = [function(tree_map(lambda value, i=i: value[i], many)) for i in range(len(leaves[0]))]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise NotImplementedError(
            f"model: expected {mode} derivatives of {subject}, but torch says: {reason.strip()} If this comes from its "
            "attention, load it with attn_implementation='eager' (or 'sdpa'); a custom torch.autograd.Function needs "
            "setup_context and jvp."
        ) from error
    return tree_map(lambda *parts: torch.stack(parts), *rows)


@dataclass(frozen=True, eq=False)
class Tangents:
    """Draws of weights, a few at a time.

    Attributes:
        drawn: by names.
        exact: columns that are no draws, which stand before them.
        num_exact: how many.
        parameters: by names, which give shapes.
        num_drawn: how many draws there are.
    """

    drawn: Mapping[str, Draws]
    exact: Mapping[str, Tensor]
    num_exact: int
    parameters: Mapping[str, Tensor]
    num_drawn: int

    @classmethod
    def of(cls, network: Network, call: Call, number: int, generator: torch.Generator | None) -> Tangents:
        """Draws of a network's uncertain weights.

        Args:
            network: the model.
            call: its arguments, whose dtype and device are taken where no weight is uncertain.
            number: of draws.
            generator: of the draws.
        """
        bound, means = network.bound, network.means
        like = next(iter(bound.parameters.values())) if bound.parameters else call.first
        drawn, exact = bound.draw(number, generator, like)
        return cls(drawn, exact, bound.posterior.num_columns, means, number)

    def __len__(self) -> int:
        return self.num_exact + self.num_drawn

    def rows(self, start: int, stop: int) -> Weights:
        """Those from one number to another, ``(stop - start, *shape)`` each.

        Args:
            start: the first.
            stop: the one after the last.
        """
        found = {}
        for name, parameter in self.parameters.items():
            parts = []
            if start < self.num_exact:
                count = min(stop, self.num_exact) - start
                known = self.exact.get(name)
                parts.append(parameter.new_zeros(count, *parameter.shape) if known is None else known[start:][:count])
            if stop > self.num_exact:
                parts.append(self.drawn[name].some(max(start - self.num_exact, 0), stop - self.num_exact))
            found[name] = torch.cat([part.reshape(-1, *parameter.shape).to(parameter) for part in parts])
        return found


# The two methods


def _sampled(
    network: Network, call: Call, num_tangents: int, chunk_size: int | None, generator: torch.Generator | None
) -> tuple[Tensor, RootLinearOperator]:
    means = network.means
    tangents = Tangents.of(network, call, num_tangents, generator)
    total = len(tangents)
    batch, together = _chunks(network.model, call, sum(mean.numel() for mean in means.values()), total, chunk_size)
    parts = list(call.chunks(batch))
    functions = [network.at(part) for part in parts]
    outputs = [function(means) for function in functions]
    mean = torch.cat(outputs)
    if not means:
        return mean, RootLinearOperator(mean.new_zeros(len(mean), mean[0].numel(), 1))
    columns: list[list[Tensor]] = [[] for _ in parts]
    for start in range(0, total, together):  # outside, as draws may be large and are made once
        rows = tangents.rows(start, min(start + together, total))
        for found, function in zip(columns, functions, strict=True):
            found.append(push_forward(function, means, rows).flatten(2))
    root = torch.cat([torch.cat(found) for found in columns], 1)  # (K, B, E)
    return mean, RootLinearOperator(root.permute(1, 2, 0))


def _differences(
    network: Network, call: Call, num_tangents: int, chunk_size: int | None, generator: torch.Generator | None
) -> tuple[Tensor, RootLinearOperator]:
    """The same by difference quotients, one pass for each."""
    means = network.means
    tangents = Tangents.of(network, call, num_tangents, generator)
    batch, _ = _chunks(network.model, call, sum(mean.numel() for mean in means.values()), 1, chunk_size)
    parts = [(network.at(part), Prefix(network.model, means)) for part in call.chunks(batch)]
    states = _random_states(call.first.device)
    outputs = [prefix(function, means) for function, prefix in parts]
    if not all(map(torch.equal, states, _random_states(call.first.device))):
        raise RuntimeError(
            "method: expected a network that answers alike each time for 'differences', got one that draws; take "
            "'sampled'."
        )
    mean = torch.cat(outputs)
    if not means:
        return mean, RootLinearOperator(mean.new_zeros(len(mean), mean[0].numel(), 1))
    columns = []
    for number in range(len(tangents)):
        row = {name: value[0] for name, value in tangents.rows(number, number + 1).items()}
        step = step_size(means, row)
        moved = {name: means[name] + step * value for name, value in row.items()}
        after = [prefix(function, moved) for function, prefix in parts]
        columns.append(torch.cat([b - a for a, b in zip(outputs, after, strict=True)]).flatten(1) / step)
    return mean, RootLinearOperator(torch.stack(columns, -1))


def _random_states(device: torch.device) -> list[Tensor]:
    """Of torch's default generators: who draws from them changes them."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _chunks(model: nn.Module, call: Call, size: int, total: int, chunk_size: int | None) -> tuple[int, int]:
    """Elements of the batch, and tangents, at a time."""
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    memory = free_bytes(call.first.device) // 4
    element = 12 * largest_state(model, call) * call.itemsize
    batch = chunk_size or max(min(len(call.first), memory // (8 * element)), 1)
    together = memory // (min(batch, len(call.first)) * element + 3 * size * call.itemsize)
    return batch, max(min(together, total, _TOGETHER), 1)


def _exact(network: Network, call: Call) -> tuple[Tensor, Tensor]:
    means = network.means
    outputs, covariances = [], []
    for part in call.chunks(1):
        function = network.at(part)
        output = function(means)
        outputs.append(output)
        if not means:
            covariances.append(output.new_zeros(1, output.numel(), output.numel()))
            continue

        def first(weights: Weights, run: Callable[[Weights], Tensor] = function) -> Tensor:
            return run(weights)[0]

        jacobians = weight_jacobians(first, means, output[0])
        covariances.append(covariance(network.bound, jacobians).unsqueeze(0))
    return torch.cat(outputs), torch.cat(covariances)


def weight_jacobians(
    function: Callable[[Weights], Tensor], means: Weights, output: Tensor, subject: str = "the model"
) -> Weights:
    """Derivatives of the outputs of one element in its weights, by backward passes.

    Args:
        function: from weights to ``(*event)``, which has E entries.
        means: of the weights.
        output: the function there.
        subject: what messages call the function.

    Returns:
        By names, ``(E, *shape)``.

    Raises:
        RuntimeError: they do not fit into memory.
    """
    size = sum(mean.numel() for mean in means.values())
    needed, memory = 3 * output.numel() * size * output.element_size(), free_bytes(output.device)
    if needed > memory:
        raise RuntimeError(
            f"covariance: expected a Jacobian of {output.numel()} outputs in {size} weights that fits into memory, got "
            f"an estimate of {needed / 2**30:.1f} GiB with {memory / 2**30:.1f} GiB free; take method='sampled', or "
            "the form 'lowrank'."
        )
    together = max(min(memory // (4 * max(size, 1) * output.element_size()), _TOGETHER), 1)
    basis = torch.eye(output.numel(), dtype=output.dtype, device=output.device).view(-1, *output.shape)
    parts = [pull_back(function, means, rows, subject) for rows in basis.split(together)]
    return {name: torch.cat([part[name] for part in parts]) for name in means}
