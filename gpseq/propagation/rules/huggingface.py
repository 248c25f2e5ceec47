"""What rules for the transformers of Hugging Face have in common; those of each family have a file of their own.

Modules are known by the names of their classes and of their parts; transformers itself is not imported. Names of parts
are those of releases 5, with those of the later releases 4 where they differ. Blocks that nothing uncertain has reached
run as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from gpseq.propagation.moments import GaussianState
from gpseq.propagation.pooling import select_token
from gpseq.propagation.registry import find, register
from gpseq.propagation.rules.basic import is_linear
from gpseq.propagation.walk import Walk

#: Relatives of BERT whose blocks do the same.
FAMILY = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")
#: Kinds of attention that are softmax attention, and no more.
SOFTMAX = (None, "eager", "sdpa")
#: Parts of attention that go by rules of their own, whatever they are.
BEHIND = {"o_proj", "c_proj", "out_lin", "residual_gp"}
#: Arguments that say what a model returns beside its output, or how.
HARMLESS = {"use_cache", "return_dict", "output_attentions", "output_hidden_states"}


def is_class(*names: str) -> Callable[[nn.Module], bool]:
    """Whether a module is of a class of transformers, or of a subclass that has its ``forward``.

    A block or an attention, whose rule looks into its parts, has to have those of transformers.

    Args:
        names: of classes.
    """
    of_block = any(name.endswith(("Layer", "Block", "Attention")) for name in names)

    def predicate(module: nn.Module) -> bool:
        kind = type(module)
        return any(
            base.__name__ in names
            and _is_theirs(base)
            and inspect.unwrap(kind.forward) is inspect.unwrap(base.forward)  # type: ignore[attr-defined]
            and (not of_block or _has_their_parts(module))
            for base in kind.__mro__
        )

    return predicate


def _is_theirs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("transformers", "transformers_modules")


def _has_their_parts(block: nn.Module) -> bool:
    """Whether all that has parts inside a block is of transformers: others may have put their attention there."""
    for name, part in block.named_children():
        idle = type(part).forward is nn.Module.forward  # a mere container
        theirs = idle or (_is_theirs(type(part)) and "forward" not in vars(part))
        if name not in BEHIND and next(part.children(), None) is not None and not (theirs and _has_their_parts(part)):
            return False
    return True


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the matrix of weights of GPT-2, and no more."""
    return is_class("Conv1D")(module) and not is_parametrized(module)


def of_family(*suffixes: str) -> Callable[[nn.Module], bool]:
    """The same of BERT and its relatives.

    Args:
        suffixes: what follows the name of the family.
    """
    return is_class(*(name + suffix for name in FAMILY for suffix in suffixes))


def find_part(module: nn.Module, walk: Walk, *paths: str) -> Any:
    """The part of a module that has one of several names.

    Args:
        module: any.
        walk: of the network, for the message.
        paths: dotted.

    Raises:
        NotImplementedError: it has none of them.
    """
    for path in paths:
        found: Any = module
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return found
    raise NotImplementedError(
        f"model: expected {walk.path(module)}, a {type(module).__name__}, to have {' or '.join(paths)}, as in "
        "transformers 4.5x or 5; write a rule for it with gpseq.propagation.register."
    )


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of scores as one that is added: 0, or ``-inf`` where a key is removed.

    Args:
        mask: ``(B, 1, T, T)`` or what broadcasts to it, boolean (True = attend), or added to scores; ``(B, T)`` with 1
            for tokens and 0 for padding.
        like: gives its dtype.
    """
    if mask.dim() == 2:
        mask = mask.bool()[:, None, None, :]
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, -torch.inf)
    # Models remove with the least number there is, and sums of those.
    return mask.to(like).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)


def model_mask(mask: Tensor | None, like: Tensor, causal: bool = False) -> Tensor | None:
    """The mask of a model's call as its blocks take it, ``(B, 1, T, T)`` or what broadcasts to it, or ``None``.

    Blocks run with it whether by a rule or as they are: so it removes with the least number, not with ``-inf``, of
    which softmax makes NaN where a row has nothing else.

    Args:
        mask: ``(B, T)``, 1 for tokens and 0 for padding; with more dimensions, as blocks take it.
        like: embedded tokens, ``(B, T, D)``.
        causal: whether tokens see those before them only.
    """
    length = like.shape[1]
    seen: Tensor | None = None
    if mask is not None and mask.dim() != 2:
        if mask.dtype != torch.bool:
            return mask.to(like) if mask.dim() == 4 else mask.to(like).unsqueeze(1)
        seen = mask if mask.dim() == 4 else mask.unsqueeze(1)
    elif mask is not None and not mask.bool().all():
        seen = mask.bool()[:, None, None, :]
    if causal:
        past = torch.ones(length, length, dtype=torch.bool, device=like.device).tril()
        seen = past[None, None] if seen is None else seen & past
    if seen is None:
        return None
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, torch.finfo(like.dtype).min)


def score_mask(module: Any, mask: Tensor | None, like: Tensor, causal: bool = False) -> Tensor | None:
    """What attention adds to its scores, ``(B, 1, T, T)`` or what broadcasts to it, or ``None``.

    Args:
        module: that has the scores.
        mask: of its call.
        like: tokens, ``(B, T, D)``.
        causal: whether tokens see those before them only where no mask is given.
    """
    if mask is None and causal:
        kind = getattr(getattr(module, "config", None), "_attn_implementation", None)
        # "eager" leaves that to the model, unless the triangle is a buffer, as releases 4 had it.
        if kind != "eager" or getattr(module, "bias", None) is not None:
            mask = model_mask(None, like, causal=True)
    return None if mask is None else additive(mask, like)


def check_attention(module: Any, walk: Walk) -> None:
    """That a module's attention is softmax attention.

    Raises:
        NotImplementedError: something else computes it, which would be lost.
    """
    kind = getattr(getattr(module, "config", None), "_attn_implementation", None)
    other = "a Gaussian process" if hasattr(module, "residual_gp") else None if kind in SOFTMAX else repr(kind)
    if other is not None:
        raise NotImplementedError(
            f"model: attention in {walk.path(module)} is computed by {other}, for which there is no rule; expected "
            "that of model.set_attn_implementation('sdpa') or 'eager'."
        )
    if getattr(module, "position_embedding_type", None) not in (None, "absolute"):
        raise NotImplementedError(
            f"model: expected absolute positions in {walk.path(module)}, got {module.position_embedding_type!r}, for "
            "which there is no rule."
        )
    for name, part in module.named_children():
        plain = name in BEHIND or next(part.parameters(), None) is None or is_linear(part) or is_conv1d(part)
        if not plain:
            raise NotImplementedError(
                f"model: expected {walk.path(part)} to be a matrix of weights, as transformers has it, got a "
                f"{type(part).__name__}; merge adapters into the weights, or write a rule for the block with "
                "gpseq.propagation.register."
            )


def check_inputs(module: nn.Module, walk: Walk, inputs: dict[str, Any]) -> None:
    """That nothing was asked for that a rule would not do.

    Args:
        module: that is called.
        walk: of the network, for the message.
        inputs: arguments that its rule does not know.

    Raises:
        TypeError: there is one.
    """
    unknown = [name for name, value in inputs.items() if value is not None and name not in HARMLESS]
    if unknown:
        raise TypeError(
            f"inputs: {', '.join(unknown)} of {walk.path(module)}, a {type(module).__name__}, cannot be followed; "
            "expected tokens, masks and positions."
        )


def through_blocks(state: GaussianState, walk: Walk, blocks: Any, mask: Tensor | None) -> GaussianState:
    """One block after the other.

    Args:
        state: ``(B, T, D)``.
        walk: of the network.
        blocks: of the model.
        mask: of the scores, see :func:`model_mask`.
    """
    inputs = {} if mask is None else {"attention_mask": mask}
    for block in blocks:
        state = walk(block, state, **inputs)
    return state


def through_base(module: nn.Module, state: GaussianState, walk: Walk, name: str, **inputs: Any) -> GaussianState:
    """The model inside of one with a head, by its rule even where it is certain: it may get tokens that are embedded.

    Args:
        module: with the head.
        state: ids, pixels, or embedded tokens.
        walk: of the network.
        name: of the model inside.
        inputs: further ones.

    Returns:
        Hidden states, ``(B, T, D)``.
    """
    base = find_part(module, walk, name)
    rule = find(base)
    return walk.unknown(base, state, **inputs) if rule is None else rule(base, state, walk, **inputs)


def activate(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """An activation, a module or a bare function."""
    return walk(module, state) if isinstance(module, nn.Module) else walk.elementwise(state, module)


@register(is_class("Conv1D"))
def conv1d(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """A matrix of weights, stored with the inputs first."""
    return walk.linear(state, module.weight, module.bias, transposed=True)


@register(of_family("Pooler"), is_class("ViTPooler"))
def pooler(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """The first token, through a matrix of weights and tanh."""
    return activate(module.activation, walk(module.dense, select_token(state, 0)), walk)
