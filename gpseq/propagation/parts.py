"""Moments through a part of a network, which begins with what is certain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gpseq.prediction_checks import check_generator
from gpseq.propagation.call import Call, check_model
from gpseq.propagation.forward import Settings, planned
from gpseq.propagation.linearisation import main_output
from gpseq.propagation.posteriors import BoundPosterior, WeightPosterior, bind, unwrapped
from gpseq.propagation.switches import forward_mode, same_draws

#: Options of a propagation that a part has: all but those of whole predictions.
_OPTIONS = {field.name for field in fields(Settings)} - {"covariance", "noise", "batch_dim"} | {"generator"}


class PartMoments:
    r"""Mean and variance that uncertain weights give the output of a part of a network, for inputs that are certain.

    A part is any module that has parameters in common with the model: one of its blocks, or a small module whose
    ``forward`` calls some of its submodules. Parameters are known by their identity, so that a part may have other
    names for them. Of the model's posterior it takes what is about the parameters that it holds, the marginal where a
    joint law is about others too. A part that holds none that is uncertain has the variance zero.

    Parameters that the part holds and its output does not depend on, such as those of the first half of a block whose
    second half it calls, are left out; :func:`propagate` would raise for them. Gradients are those that
    :func:`propagate` has: what is to be a target wants ``torch.no_grad()``.

    Args:
        model: the network, in eval mode.
        posterior: of its weights.
        covariance: what travels, as for :func:`propagate`; of the result there is the diagonal in any case. ``"diag"``
            is quick, and forgets what tokens, and a residual path and its branch, have in common.
        options: ``activations``, ``layer_norm``, ``on_unknown``, ``num_tangents``, ``generator``, ``preset``,
            ``dropout`` and ``chunk_size`` of :func:`propagate`. Without a ``chunk_size`` the batch stays in one piece:
            a part may hold masks that are about just this batch.

    Raises:
        TypeError: an unknown option, a model that is no module, or a posterior of another kind.
        ValueError: a posterior that does not fit the model, or an option out of range.

    Example:
        >>> from gpseq.propagation import from_variances
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 2)).eval()
        >>> posterior = from_variances({"2.weight": torch.full((8, 8), 0.1), "3.bias": torch.full((2,), 0.5)})
        >>> moments = PartMoments(model, posterior)
        >>> with torch.no_grad():
        ...     mean, variance = moments(model[3:], torch.randn(1, 5, 8))
        >>> mean.shape, variance[0, 0]
        (torch.Size([1, 5, 2]), tensor([0.5000, 0.5000]))
    """

    def __init__(self, model: nn.Module, posterior: WeightPosterior, covariance: str = "diag", **options: Any) -> None:
        if unknown := sorted(options.keys() - _OPTIONS):
            raise TypeError(f"options: expected some of {', '.join(sorted(_OPTIONS))}, got {', '.join(unknown)}.")
        options = dict(options)
        self.generator: torch.Generator | None = options.pop("generator", None)
        check_generator(self.generator)
        self.settings = Settings(covariance, **options)
        bind(posterior, model)
        self.model, self.posterior = model, posterior

    def __call__(self, part: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of a part's output.

        Args:
            part: in eval mode, with parameters that are the model's.
            x: its input, batch first, ``(B, T, D)``.

        Returns:
            Mean and variance, in the shape of the output, ``(B, T, D)``. Of several outputs they are those of the
            first.

        Raises:
            NotImplementedError: something in the part has no rule, and cannot be followed.
            TypeError: the part is no module, or x no tensor of floating-point numbers in the dtype of the weights.
            ValueError: a part none of whose parameters is the model's, as in a copy; one in train mode; or an x that is
                not finite.
        """
        part, _ = unwrapped(part)
        if not isinstance(part, nn.Module):
            raise TypeError(f"part: expected a torch.nn.Module, got {type(part).__name__}.")
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x: expected a floating-point tensor, got {got}.")
        call = replace(Call.of(x, {}), whole=self.settings.chunk_size is None)
        check_model(part, call)
        # Bound anew each time: parameters may have been replaced since, or all of this may be a copy.
        _, bound = bind(self.posterior, self.model)
        names, uncertain = _shared(part, bound), set(bound.posterior.names)
        used = _used(part, {name for known, name in names.items() if known in uncertain}, call)
        kept = {known: name for known, name in names.items() if known not in uncertain or name in used}
        posterior = bound.restricted(kept)
        found, _ = planned(part, posterior, call, self.settings, self.generator)
        return found.mean, found.variance

    def __repr__(self) -> str:
        number = len(self.posterior.names)
        return f"PartMoments({type(self.model).__name__}, {number} uncertain, covariance={self.settings.covariance!r})"


def _shared(part: nn.Module, bound: BoundPosterior) -> dict[str, str]:
    """Names in a part of those of the model's parameters that it holds, by their names in the model.

    Raises:
        ValueError: it has parameters, and none of them is the model's.
    """
    held = dict(part.named_parameters())
    names = {bound.names[id(value)]: name for name, value in held.items() if id(value) in bound.names}
    if held and not names:
        raise ValueError(
            f"part: expected parameters of the model, got a {type(part).__name__} that has none of them; is it a copy?"
        )
    return names


def _used(part: nn.Module, names: set[str], call: Call) -> set[str]:
    """Which of a part's parameters its output depends on."""
    if not names:
        return set()
    with torch.inference_mode(False), torch.enable_grad(), forward_mode(part), same_draws(part):
        held = dict(part.named_parameters())
        leaves = {name: _leaf(held[name]) for name in sorted(names)}
        try:  # one element is enough, but for a part that knows how many there are
            output = _run(part, leaves, call.first[:1])
        except Exception:
            output = _run(part, leaves, call.first)
        if not output.requires_grad:
            return set()
        slopes = torch.autograd.grad(output.sum(), list(leaves.values()), allow_unused=True)
    return {name for name, slope in zip(leaves, slopes, strict=True) if slope is not None}


def _run(part: nn.Module, leaves: Mapping[str, Tensor], x: Tensor) -> Tensor:
    # What is done in place is done to copies, which are no tensors of the inference mode either.
    return main_output(functional_call(part, dict(leaves), (x.detach().clone(),)))


def _leaf(parameter: Tensor) -> Tensor:
    """A parameter to derive by, whether the model's own is frozen or made in inference mode."""
    return (parameter.clone() if parameter.is_inference() else parameter.detach()).requires_grad_()
