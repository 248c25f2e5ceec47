"""The diagonal of the Fisher information of a network, from gradients of single examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import Module

from gpseq.checks import check_count, check_number
from gpseq.continual.tasks import check_generator


@dataclass(frozen=True)
class Family:
    """What the outputs of a network mean: a distribution of targets.

    Attributes:
        log_prob: from outputs ``(n, ...)`` and targets ``(n, ...)`` to log probabilities ``(n, ...)``; those of one
            example are summed. It is called under ``torch.func`` with ``n = 1``.
        sample: from outputs and a generator to targets. ``None``: only the empirical Fisher can be had.
        support: from outputs to targets ``(K, n, ...)`` and weights ``(K, n)`` under which the sum of squared
            gradients is the exact expectation. ``None``: it has to be sampled.
        check: called with outputs and the targets that are given for the empirical Fisher, before gradients are taken;
            raises where they do not suit each other. ``None``: nothing is checked.
    """

    log_prob: Callable[[Tensor, Tensor], Tensor]
    sample: Callable[[Tensor, torch.Generator | None], Tensor] | None = None
    support: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    check: Callable[[Tensor, Tensor], None] | None = None


def categorical() -> Family:
    """Classes 0, ..., C - 1, two of them or more, with outputs that are logits, ``(n, C)``.

    Example:
        >>> categorical().log_prob(torch.zeros(1, 4), torch.tensor([2]))
        tensor([-1.3863])
    """

    def log_prob(output: Tensor, target: Tensor) -> Tensor:
        return output.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)

    def sample(output: Tensor, generator: torch.Generator | None) -> Tensor:
        _check_logits(output)
        return torch.multinomial(output.softmax(-1), 1, generator=generator).squeeze(-1)

    def support(output: Tensor) -> tuple[Tensor, Tensor]:
        _check_logits(output)
        classes = torch.arange(output.shape[-1], device=output.device)
        return classes.unsqueeze(-1).expand(-1, len(output)), output.softmax(-1).T

    def check(output: Tensor, target: Tensor) -> None:
        _check_logits(output)
        if target.dtype != torch.int64 or target.shape != output.shape[:1]:
            raise ValueError(
                f"batches: expected labels of torch.int64 and shape ({len(output)},) for 'categorical', got "
                f"{target.dtype} of shape {tuple(target.shape)}."
            )
        classes = output.shape[-1]
        if bool((wrong := (target < 0) | (target >= classes)).any()):
            label = target[wrong][0].item()
            raise ValueError(f"batches: expected labels from 0 to {classes - 1} for {classes} outputs, got {label}.")

    return Family(log_prob, sample, support, check)


def bernoulli() -> Family:
    """Labels 0 or 1 with outputs that are logits, ``(n,)`` or ``(n, k)`` for k labels that are independent.

    Example:
        >>> bernoulli().log_prob(torch.zeros(1), torch.ones(1))
        tensor([-0.6931])
    """

    def log_prob(output: Tensor, target: Tensor) -> Tensor:
        return -torch.nn.functional.binary_cross_entropy_with_logits(
            output, target.to(output.dtype).reshape(output.shape), reduction="none"
        )

    def sample(output: Tensor, generator: torch.Generator | None) -> Tensor:
        uniform = torch.rand(output.shape, generator=generator, dtype=output.dtype, device=output.device)
        return (uniform < output.sigmoid()).to(output.dtype)

    def support(output: Tensor) -> tuple[Tensor, Tensor]:
        if output[0].numel() != 1:
            raise ValueError("num_samples: expected a number where there are several labels, got None.")
        one = output.sigmoid()
        targets = torch.stack([torch.zeros_like(one), torch.ones_like(one)])
        return targets, torch.stack([1 - one, one]).flatten(1)

    def check(output: Tensor, target: Tensor) -> None:
        _check_size(output, target)
        if bool((wrong := (target != 0) & (target != 1)).any()):
            raise ValueError(f"batches: expected labels 0 or 1 for 'bernoulli', got {target[wrong][0].item():g}.")

    return Family(log_prob, sample, support, check)


def gaussian(noise: float = 1.0) -> Family:
    """Real targets with outputs that are means, ``(n, ...)``, and independent noise.

    Args:
        noise: variance of the noise, in the squared unit of the targets.

    Raises:
        ValueError: it is not positive.

    Example:
        >>> gaussian(noise=4.0).log_prob(torch.zeros(1), torch.zeros(1))
        tensor([-1.6121])
    """
    variance = check_number("noise", noise, above=0.0, expected="a positive variance")

    def log_prob(output: Tensor, target: Tensor) -> Tensor:
        squared = (target.reshape(output.shape) - output).square() / variance
        return -0.5 * (squared + math.log(2 * math.pi * variance))

    def sample(output: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = torch.randn(output.shape, generator=generator, dtype=output.dtype, device=output.device)
        return output + math.sqrt(variance) * noise

    def support(output: Tensor) -> tuple[Tensor, Tensor]:
        # The gradient is linear in the residual: one standard deviation in each output in turn gives its square.
        size = output[0].numel()
        steps = math.sqrt(variance) * torch.eye(size, dtype=output.dtype, device=output.device)
        targets = output + steps.reshape(size, 1, *output.shape[1:])
        return targets, output.new_ones(size, len(output))

    return Family(log_prob, sample, support, _check_size)


def _check_logits(output: Tensor) -> None:
    # The softmax of one logit is 1 whatever the logit: every gradient would be zero, and nothing would be held.
    if output.dim() != 2 or output.shape[-1] < 2:
        shape = ", ".join(["n", *(str(size) for size in output.shape[1:])]) + "," * (output.dim() == 1)
        raise ValueError(
            f"family: expected outputs (n, C) with two classes or more for 'categorical', got ({shape}); for one "
            "output take 'gaussian' (a mean) or 'bernoulli' (a logit)."
        )


def _check_size(output: Tensor, target: Tensor) -> None:
    if target[0].numel() != output[0].numel():
        raise ValueError(
            f"batches: expected targets of shape {tuple(output.shape)}, as the outputs have, got {tuple(target.shape)}."
        )


FAMILIES: dict[str, Callable[[], Family]] = {
    "categorical": categorical,
    "bernoulli": bernoulli,
    "gaussian": gaussian,
}


def fisher_diagonal(
    model: Module,
    batches: Iterable[Any],
    family: str | Family | Callable[[Tensor, Tensor], Tensor] = "categorical",
    empirical: bool = False,
    num_samples: int | None = 1,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
    chunk_size: int = 64,
) -> dict[str, Tensor]:
    r"""Diagonal of the Fisher information of each trainable parameter.

    .. math:: F_p = \frac1N \sum_{i=1}^N \mathrm{E}_{y \sim p(y \mid x_i, \theta)}
              \left[ \left( \partial_{\theta_p} \log p(y \mid x_i, \theta) \right)^2 \right]

    The labels are those that the *model* expects: sampled from its predictions, or summed over exactly. With
    ``empirical=True`` they are those given; then F is no Fisher information, and differs from it where the model does
    not fit. Gradients are of single examples, by ``torch.func``: the square of the gradient of a batch is another
    thing. The model is in evaluation mode meanwhile (dropout off, statistics of batch normalisation fixed), and is
    left as it was, buffers included.

    Args:
        model: any network that ``torch.func.vmap`` can map (``torch.nn.GRU``, for one, it cannot), of one output
            tensor, with examples along the first axis; examples must not see each other.
        batches: a loader, or a list even of one batch: ``x``, or ``(x, y)`` with the targets, which only the empirical
            Fisher reads. ``x`` is a tensor ``(n, ...)``, or a tuple of such tensors for a model of several inputs. It
            is moved to the device of the model, not to its dtype.
        family: ``"categorical"`` (outputs are logits), ``"bernoulli"`` (logits), ``"gaussian"`` (means, noise variance
            1), any :class:`Family`, or, for the empirical Fisher, a function ``log_prob(output, target)`` alone.
        empirical: use the given targets.
        num_samples: labels drawn for each example; ``None`` takes the expectation exactly, at the cost of one gradient
            for each class or output.
        generator: of the draws; ``None`` is torch's default generator.
        reduction: ``"mean"`` over examples, or their ``"sum"``, which is what a posterior given all of them has.
        chunk_size: examples whose gradients are held at once; memory is ``chunk_size`` times that of the parameters.

    Returns:
        Name of a parameter -> tensor like it, in its dtype and on its device. Frozen parameters (without
        ``requires_grad``) are left out; one that is shared appears once, under its first name.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: there are no examples or no trainable parameters, targets are missing or none of the family's,
            outputs do not suit the family, gradients are not finite, or a value out of range.
        RuntimeError: ``torch.func.vmap`` cannot map the model.

    Source:
        Kirkpatrick et al. (2017), Overcoming catastrophic forgetting in neural networks; Kunstner, Balles and Hennig
        (2019), Limitations of the empirical Fisher approximation, for why it is not the default.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> fisher_diagonal(model, [torch.tensor([[1.0], [3.0]])], family="gaussian", num_samples=None)
        {'weight': tensor([[5.]])}
    """
    family = check_options(family, empirical, num_samples, generator, reduction, chunk_size)
    check_model(model)
    batches = _check_batches(batches)
    learnt = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not learnt:
        raise ValueError("model: expected at least one parameter that requires gradients, got none.")
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}
    device = next(iter(learnt.values())).device

    def outputs(values: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        # Copies, made here: whatever a module writes into its buffers is thrown away.
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        return functional_call(model, (values, fixed, copies), inputs)

    def log_prob(values: dict[str, Tensor], inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        output = outputs(values, tuple(value.unsqueeze(0) for value in inputs))
        return family.log_prob(output, target.unsqueeze(0)).sum()

    gradients = vmap(grad(log_prob), in_dims=(None, 0, 0))
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in learnt.items()}
    count = 0
    with _evaluating(model):
        for batch in batches:
            inputs, target = _unpack(batch, device, empirical)
            for start in range(0, len(inputs[0]), chunk_size):
                part = tuple(value[start : start + chunk_size] for value in inputs)
                count += len(part[0])
                given = None if target is None else target[start : start + chunk_size]
                with torch.no_grad():
                    output = outputs(learnt, part) if given is None or family.check is not None else None
                    if given is not None and output is not None and family.check is not None:
                        family.check(output, given)
                    for labels, weights in _targets(output, family, given, num_samples, generator):
                        for name, g in _mapped(gradients, learnt, part, labels).items():
                            total[name] += torch.einsum("n...,n->...", g.double().square(), weights.double())
    if count == 0:
        raise ValueError("batches: expected at least one example, got none.")
    result = {name: (value / count if reduction == "mean" else value).to(learnt[name]) for name, value in total.items()}
    for name, value in result.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"model: expected finite gradients, got NaN or infinity in the Fisher of {name!r}.")
    return result


def _mapped(gradients: Callable[..., dict[str, Tensor]], *arguments: Any) -> dict[str, Tensor]:
    try:
        return gradients(*arguments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            "model: expected gradients of single examples by torch.func.vmap, which cannot map every network "
            f"(torch.nn.GRU, for one), got: {error}"
        ) from error


def _targets(
    output: Tensor | None,
    family: Family,
    given: Tensor | None,
    num_samples: int | None,
    generator: torch.Generator | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Targets of all examples of a chunk, and the weight of each, as often as gradients have to be taken."""
    if given is not None:
        yield given, torch.ones(len(given), dtype=torch.float64, device=given.device)
        return
    assert output is not None
    if num_samples is None:
        assert family.support is not None
        yield from zip(*family.support(output), strict=True)
        return
    assert family.sample is not None
    for _ in range(num_samples):
        labels = family.sample(output, generator)
        yield labels, torch.full((len(output),), 1 / num_samples, dtype=torch.float64, device=output.device)


def _unpack(batch: Any, device: torch.device, empirical: bool) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Inputs, always a tuple, and the targets where they are wanted."""
    target = None
    if isinstance(batch, tuple | list):
        if len(batch) not in (1, 2):
            raise ValueError(f"batches: expected x or (x, y), got {len(batch)} parts; give several inputs as a tuple.")
        target = batch[1] if len(batch) == 2 else None
        batch = batch[0]
    inputs = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    for value in (*inputs, *(() if target is None else (target,))):
        if not isinstance(value, Tensor):
            raise TypeError(f"batches: expected tensors, got {type(value).__name__}.")
    if empirical and target is None:
        raise ValueError("batches: expected (x, y), because the empirical Fisher needs targets, got x alone.")
    if not inputs or any(len(value) != len(inputs[0]) for value in (*inputs, *(() if target is None else (target,)))):
        raise ValueError("batches: expected as many targets as inputs, got different lengths in one batch.")
    moved = tuple(value.detach().to(device) for value in inputs)
    return moved, target.detach().to(device) if empirical and target is not None else None


def _check_batches(batches: Any) -> Iterator[Any]:
    """Something to iterate over, and not a batch itself."""
    single = isinstance(batches, Tensor) or (
        isinstance(batches, tuple) and any(isinstance(part, Tensor) for part in batches)
    )
    try:
        if not single:
            return iter(batches)
    except TypeError:
        pass
    got = "a tuple of tensors" if isinstance(batches, tuple) else f"{type(batches).__name__}"
    raise TypeError(f"batches: expected a list or loader of x or (x, y), got {got}; write [x] or [(x, y)].")


def check_model(model: Any) -> None:
    """A network."""
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")


def check_options(
    family: Any, empirical: bool, num_samples: Any, generator: Any, reduction: Any, chunk_size: Any
) -> Family:
    """The family, if it and all that :func:`fisher_diagonal` is told beside the data are in order."""
    family = _family(family, empirical, num_samples)
    check_generator(generator)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}.")
    check_count("chunk_size", chunk_size)
    return family


def _family(family: Any, empirical: bool, num_samples: int | None) -> Family:
    if isinstance(family, str):
        if family not in FAMILIES:
            raise ValueError(f"family: expected one of {tuple(FAMILIES)}, a Family or a function, got {family!r}.")
        family = FAMILIES[family]()
    elif not isinstance(family, Family):
        if not callable(family):
            raise TypeError(f"family: expected a name, a Family or a function, got {type(family).__name__}.")
        family = Family(family)
    if num_samples is not None:
        check_count("num_samples", num_samples)
    if not empirical and (family.support if num_samples is None else family.sample) is None:
        how = "support, for the exact expectation" if num_samples is None else "sample"
        raise ValueError(f"family: expected one with {how}, or empirical=True, got one without.")
    return family


@contextmanager
def _evaluating(model: Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
