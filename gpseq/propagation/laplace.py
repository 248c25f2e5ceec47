r"""Laplace approximations of a trained network's weights, from its generalised Gauss-Newton matrix.

For a network f with weights :math:`\theta` and data :math:`x_1, \dots, x_N`

.. math:: H = \sum_n J_n^\top \Lambda_n J_n, \qquad J_n = \partial f(x_n) / \partial \theta

where :math:`\Lambda_n` is the Hessian of the negative log likelihood in the outputs:
:math:`\operatorname{diag}(p) - p p^\top` for classes, the inverse noise variance for regression. It does not depend on
the labels of the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gpseq.checks import check_count, check_number
from gpseq.prediction_checks import check_generator
from gpseq.propagation.call import check_dtypes
from gpseq.propagation.curvature import Curvature, Factors
from gpseq.propagation.gauss_newton import Call, Head, Squares
from gpseq.propagation.kfac import Taps
from gpseq.propagation.posteriors import WeightPosterior, matrix_shape, unwrapped
from gpseq.propagation.switches import evaluating
from gpseq.training import move


def fit_laplace(
    model: nn.Module,
    loader: Iterable[Any],
    likelihood: str = "classification",
    structure: str = "diag",
    parameters: str | Sequence[str] | None = None,
    prior_precision: float | Mapping[str, float] = 1.0,
    noise: float = 1.0,
    num_samples: int | str | None = "auto",
    sharing: str = "expand",
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> WeightPosterior:
    r"""A Laplace approximation: a Gaussian around trained weights with the covariance :math:`(H + \lambda I)^{-1}`.

    It is :func:`fit_curvature` and :meth:`Curvature.posterior <gpseq.propagation.Curvature.posterior>` in
    one; take these where the prior precision is still to be chosen.

    Args:
        model: trained; its weights are the mean.
        loader: see :func:`fit_curvature`, as all that follows but ``prior_precision``.
        likelihood: ``"classification"`` or ``"regression"``.
        structure: ``"diag"`` or ``"kron"``.
        parameters: names or patterns of those that are uncertain.
        prior_precision: lambda, that of the weight decay the network was trained with, times N where the loss was a
            mean; or one for each parameter, by names or patterns.
        noise: variance of observations, for regression.
        num_samples: labels that are drawn for each example.
        sharing: how weights count that act on several tokens or positions.
        chunk_size: examples at a time.
        generator: of the labels that are drawn.

    Returns:
        The posterior, for :func:`gpseq.propagation.propagate`.

    Raises:
        TypeError: as :func:`fit_curvature`.
        ValueError: likewise, or a prior precision that is not positive.

    Source:
        Daxberger et al. (2021), Laplace redux, effortless Bayesian deep learning; Martens and Grosse (2015), Optimizing
        neural networks with Kronecker-factored approximate curvature.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> data = [(torch.randn(20, 3), torch.randint(2, (20,)))]
        >>> fit_laplace(model, data, structure="kron", parameters="2.*").names
        ('2.weight', '2.bias')
    """
    return fit_curvature(
        model, loader, likelihood, structure, parameters, noise, num_samples, sharing, chunk_size, generator
    ).posterior(prior_precision)


def fit_curvature(
    model: nn.Module,
    loader: Iterable[Any],
    likelihood: str = "classification",
    structure: str = "diag",
    parameters: str | Sequence[str] | None = None,
    noise: float = 1.0,
    num_samples: int | str | None = "auto",
    sharing: str = "expand",
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Curvature:
    r"""The generalised Gauss-Newton matrix of a network, its diagonal or Kronecker factors of its blocks.

    Args:
        model: trained. It is evaluated in eval mode, and left as it was. Its output is a tensor with classes or targets
            last, or an object with ``logits``.
        loader: batches ``(x, y)``, or mappings of the model's arguments, whose ``"labels"`` are not handed to it.
            Labels are not needed, but for those that are -100: these examples or tokens do not count.
        likelihood: ``"classification"``, with logits; one logit is that of class 1 of two. ``"regression"``, with
            Gaussian noise.
        structure: ``"diag"``, by gradients of single examples; or ``"kron"``: a block for each parameter, B for its
            outputs and A for its inputs, for ``nn.Linear``, ``nn.Conv2d`` without groups and the ``Conv1D`` of
            transformers. All else has its diagonal: norms, embeddings, weights that are used in two places, and those
            that no layer of their own is called for, such as all of ``nn.MultiheadAttention``.
        parameters: names or patterns of parameters, such as ``"layers.10.*"``; ``None`` is all that require a gradient.
        noise: variance of observations, for regression.
        num_samples: labels that are drawn for each example from the model's own prediction; ``None`` is the exact
            expectation, one backward pass an output; ``"auto"`` is that up to 32 outputs an example, and one draw
            beyond.
        sharing: for ``"kron"`` and weights that act on several tokens or positions. ``"expand"``: each counts as an
            example, exact for independent ones; those that nothing depends on, such as padding, do not count.
            ``"reduce"``: inputs are averaged and gradients summed over positions first, the batch being the first
            dimension; exact for a linear layer before a mean over tokens.
        chunk_size: examples whose gradients are held at a time; ``None`` is found from the number of parameters.
        generator: of the labels that are drawn; ``None`` is torch's default generator.

    Returns:
        The curvature, a sum over examples.

    Raises:
        TypeError: the model is no module or in half precision, or batches, outputs or labels of another kind.
        ValueError: an unknown option, a pattern that fits no parameter, no example, or numbers out of range.

    Source:
        Kronecker factors under shared weights: Eschenhagen et al. (2023), Kronecker-factored approximate curvature for
        modern neural network architectures.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> curvature = fit_curvature(model, [torch.ones(5, 3)], "regression")
        >>> curvature.blocks["weight"], curvature.num_data
        (tensor([[5., 5., 5.]]), 5)
    """
    _check_option("likelihood", likelihood, ("classification", "regression"))
    _check_option("structure", structure, ("diag", "kron"))
    _check_option("sharing", sharing, ("expand", "reduce"))
    if num_samples not in ("auto", None):
        check_count("num_samples", num_samples)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    check_generator(generator)
    head = Head(likelihood, check_number("noise", noise, above=0.0, expected="a positive variance"))
    if isinstance(loader, Tensor | Mapping) or not isinstance(loader, Iterable):
        raise TypeError(f"loader: expected batches, got {type(loader).__name__}; a list of one batch is a loader.")
    model = unwrapped(model)[0]
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    check_dtypes(model)
    chosen = choose_parameters(model, parameters)
    device = next(iter(chosen.values())).device
    taps = Taps.of(model, chosen, sharing) if structure == "kron" else None
    squares: Squares | None = None
    num_data = 0
    with torch.inference_mode(False), evaluating(model):
        for number, batch in enumerate(loader):
            call = Call.of(tree_map(_usable, move(batch, device)))
            if not call.size:
                continue
            num_data += call.size
            with torch.no_grad():
                outputs = head.outputs(call.run(model, {}))
            if outputs.isnan().any():
                raise ValueError(f"loader: expected inputs with finite outputs, got NaN in batch {number}.")
            columns = head.columns(outputs, call.labels, num_samples, generator)
            if taps is not None:
                taps.add(call, head, columns)
            if squares is None:
                done = taps.names if taps is not None else ()
                squares = Squares(model, {name: p for name, p in chosen.items() if name not in done}, chunk_size)
            squares.add(call, head, columns)
    if squares is None:
        raise ValueError("loader: expected at least one example, got none.")
    found: dict[str, Tensor | Factors] = {} if taps is None else taps.factors()
    for name, total in squares.totals.items():
        found[name] = total.to(chosen[name]).reshape(matrix_shape(chosen[name]))
    norms = {name: float(p.detach().double().square().sum()) for name, p in chosen.items()}
    return Curvature({name: found[name] for name in chosen}, norms, num_data)


def choose_parameters(model: nn.Module, wanted: str | Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Parameters of a model by names or patterns, in the model's order.

    Args:
        model: any module.
        wanted: names or patterns; ``None`` is all that require a gradient.

    Raises:
        ValueError: one fits no parameter, or there is none.
    """
    known = dict(model.named_parameters())
    if wanted is None:
        chosen = {name: p for name, p in known.items() if p.requires_grad}
        if not chosen:
            raise ValueError("parameters: expected names where no parameter requires a gradient, got None.")
        return chosen
    patterns = [wanted] if isinstance(wanted, str) else list(wanted)
    fitting = {pattern: [name for name in known if fnmatchcase(name, pattern)] for pattern in patterns}
    empty = [pattern for pattern, names in fitting.items() if not names]
    if empty or not patterns:
        some = ", ".join(list(known)[:8]) + (", ..." if len(known) > 8 else "")
        raise ValueError(
            f"parameters: expected names or patterns of parameters ({some}), got {', '.join(empty) or 'none'}."
        )
    names = {name for found in fitting.values() for name in found}
    return {name: p for name, p in known.items() if name in names}


def _usable(value: Any) -> Any:
    """What a graph can be made with, which tensors of the inference mode are not."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _check_option(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}.")
