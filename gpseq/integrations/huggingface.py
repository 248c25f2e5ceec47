"""Gaussian processes inside the transformers of Hugging Face.

Importing this module teaches :func:`gpseq.nn.replace_attention` every model of ``transformers >= 5`` whose attention
asks the registry of attention functions; transformers itself is imported at the first use. A
:class:`~gpseq.nn.residual.ResidualGP` is attached to each attention, as ``residual_gp``: its parameters are part of the
model, of its ``state_dict`` and of what an optimiser gets. The attention stays that of ``"sdpa"``, with its masks,
caches and grouped heads; attention weights are not returned.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gpseq.nn.inducing import FITTED
from gpseq.nn.objective import variational_loss
from gpseq.nn.residual import ResidualGP
from gpseq.nn.surgery import Host, register_host

#: Under this name the attention and its mask are registered, and the settings stand in a model's configuration.
NAME = "gpseq"
#: Under this name a Gaussian process hangs on an attention.
CHILD = "residual_gp"
#: What cross-attention is called in decoders.
CROSS = re.compile("cross|encoder_attn|enc(oder)?_?dec", re.IGNORECASE)


def gp_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention function of the registry: that of ``"sdpa"`` plus a draw of the module's Gaussian process, if any.

    Args:
        module: an attention of transformers.
        query: projected and rotated, ``(B, H, Tq, D)``.
        key: likewise, ``(B, H or fewer, Tk, D)``.
        value: likewise.
        attention_mask: as in transformers, True = attend; ``None`` is none or the causal one, as the module says.
        options: whatever the registry hands over.

    Returns:
        Heads ``(B, Tq, H, D)``, and ``None`` for the weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    heads, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    gp = getattr(module, CHILD, None)
    if gp is None:
        return heads, None
    return gp(query, heads.transpose(1, 2), attention_mask).transpose(1, 2).contiguous(), None


def load_pretrained(path: str | Path, model_class: type | None = None, **options: Any) -> Any:
    """Load what ``save_pretrained`` wrote of a model with Gaussian processes.

    The ``from_pretrained`` of the class itself would leave them out, with a note on unexpected weights.

    Args:
        path: a folder, or a name on the hub.
        model_class: of the model; ``None`` is the one that was saved.
        options: further arguments of ``from_pretrained``.

    Returns:
        The model, in evaluation mode as ``from_pretrained`` leaves it. Where it was saved by a version without closed
        forms of covariances, they count as not fitted.

    Raises:
        ValueError: the configuration has no settings of Gaussian processes, or none of the weights that belong to them.
    """
    import transformers

    config = options.pop("config", None)
    if config is None:
        config = transformers.AutoConfig.from_pretrained(path)
    settings = getattr(config, NAME, None)
    if not isinstance(settings, dict) or not settings.get("layers"):
        raise ValueError(
            f"path: expected a model whose config.json has settings under {NAME!r}, as replace_attention leaves them, "
            f"got none in {path}."
        )
    if model_class is None:
        names = config.architectures or []
        if len(names) != 1 or not hasattr(transformers, names[0]):
            raise ValueError(f"model_class: expected one, as the configuration names {names}.")
        model_class = getattr(transformers, names[0])

    base: Any = model_class

    def construct(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        for name, own in getattr(config, NAME)["layers"].items():
            module = _module(self, name)
            module.add_module(CHILD, _make(name, module, own))

    # A class that has the places for the weights before they are read: from_pretrained then does all the rest.
    grown: Any = type(base.__name__, (base,), {"__init__": construct, "__module__": base.__module__})
    model, report = grown.from_pretrained(path, config=config, output_loading_info=True, **options)
    missing = sorted(key for key in report["missing_keys"] if f".{CHILD}." in f".{key}")
    for key in [key for key in missing if key.endswith(FITTED)]:  # of a time before these
        model.get_submodule(key.rpartition(".")[0]).forget_fit()
        missing.remove(key)
    if missing:
        raise ValueError(f"path: expected the weights of the Gaussian processes in {path}, {missing[0]} is missing.")
    model.__class__ = model_class
    _switch(model)
    return model


def compute_loss(
    model: nn.Module,
    num_data: int,
    beta: float | Callable[[], float] = 1.0,
    shift: bool = False,
    ignore_index: int = -100,
) -> Callable[..., Tensor]:
    r"""The loss for ``Trainer(compute_loss_func=...)``: cross-entropy plus the divergence of the model.

    With accumulation of gradients each part pays its share of both.

    Args:
        model: what is trained.
        num_data: N, number of labels of the training set that count: sequences for a label a sequence, tokens for a
            label a token.
        beta: weight of the divergence, see :func:`gpseq.nn.variational_loss`, or a function that is asked at every
            call, for annealing.
        shift: whether labels are those of the next token, as for causal language models.
        ignore_index: the label that does not count.

    Returns:
        A function of ``outputs``, ``labels`` and ``num_items_in_batch``.

    Example:
        >>> import torch
        >>> loss = compute_loss(ResidualGP(2, 4), num_data=100)
        >>> loss({"logits": torch.zeros(3, 2)}, torch.tensor([0, 1, 1])).item()
        0.6931
    """

    def function(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if labels is None:
            raise ValueError("labels: expected a column 'labels' in the data, got none.")
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
        if shift:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        labels = labels.flatten()
        total = F.cross_entropy(logits.flatten(0, -2).float(), labels, ignore_index=ignore_index, reduction="sum")
        here = (labels != ignore_index).sum().clamp_min(1)
        weight = beta() if callable(beta) else beta
        bound = variational_loss(model, total / here, num_data, weight)
        return bound if num_items_in_batch is None else bound * (here / num_items_in_batch)

    return function


def _is_attention(module: nn.Module) -> bool:
    """Whether a module asks the registry for its attention function."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _prepare(
    model: nn.Module, found: Mapping[str, nn.Module], options: Mapping[str, Any]
) -> Callable[[nn.Module], nn.Module]:
    mode = options["mode"]
    if mode != "residual":
        raise ValueError(
            f"mode: expected 'residual' for attention of transformers, whose queries and keys have maps of their own, "
            f"got {mode!r}."
        )
    owners = {name: _owner(model, name) for name in found}
    for root, _ in owners.values():
        for part in root.modules():
            if (
                callable(getattr(part, "_can_set_attn_implementation", None))
                and not part._can_set_attn_implementation()
            ):
                raise ValueError(
                    f"model: expected one whose attention can be set, {type(part).__name__} fixes its own: masks and "
                    "attention would not go together."
                )
    settings = {name: value for name, value in options.items() if name != "mode"}
    made = {name: _make(name, module, settings) for name, module in found.items()}

    def install(model: nn.Module) -> nn.Module:
        for name, module in found.items():
            module.add_module(CHILD, made[name])
            root, own = owners[name]
            layers = dict((getattr(root.config, NAME, None) or {}).get("layers", {}))
            layers[own] = made[name].settings()
            setattr(root.config, NAME, {"layers": layers})
        for root in {id(root): root for root, _ in owners.values()}.values():
            _switch(root)
        return model

    return install


def _owner(model: nn.Module, name: str) -> tuple[Any, str]:
    """The outermost pre-trained model around a module, and the module's name in it."""
    from transformers import PreTrainedModel

    parts = name.split(".") if name else []
    for depth in range(len(parts)):
        candidate = model.get_submodule(".".join(parts[:depth]))
        if isinstance(candidate, PreTrainedModel):
            return candidate, ".".join(parts[depth:])
    raise ValueError(f"model: expected {name or 'the attention'} inside a PreTrainedModel, whose masks it needs.")


def _make(name: str, module: nn.Module, settings: Mapping[str, Any]) -> ResidualGP:
    """A Gaussian process that fits an attention of some name."""
    config = getattr(module, "config", None)

    def first(*names: str) -> int | None:
        values = [getattr(source, name, None) for source in (module, config) for name in names]
        return next((int(value) for value in values if isinstance(value, int)), None)

    heads = first("num_attention_heads", "num_heads", "n_heads", "n_head")
    width = first("head_dim", "attention_head_size", "d_head")
    if width is None and heads is not None and (total := first("hidden_size", "embed_dim", "d_model")) is not None:
        width = total // heads
    if heads is None or width is None:
        raise ValueError(f"model: expected attention that tells its heads and their width, {type(module).__name__}.")
    weight = next(module.parameters())
    gp = ResidualGP(heads, width, device=weight.device, dtype=weight.dtype, **settings)
    gp.self_attention = not _is_cross(name, module)
    return gp.train(module.training)


def _is_cross(name: str, module: nn.Module) -> bool:
    """Whether an attention looks at other tokens than its queries, which the registry is not told."""
    if isinstance(said := getattr(module, "is_cross_attention", None), bool):
        return said
    # Many classes serve as both. Of the name, what stands inside a block: a whole model may be a "cross-encoder".
    parts = name.split(".")
    inside = max((place + 1 for place, part in enumerate(parts) if part.isdigit()), default=max(len(parts) - 2, 0))
    return bool(CROSS.search(type(module).__name__) or CROSS.search(".".join(parts[inside:])))


def _switch(model: Any) -> None:
    """Let a model use our attention, with masks of the kind that it needs."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, gp_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # without it masks are None, and padding leaks
    model.set_attn_implementation(NAME)
    for module in model.modules():
        # Models made of two others share their configurations with those, but not with the attention inside.
        if hasattr(module, CHILD) and getattr(module, "config", None) is not None:
            module.config._attn_implementation = NAME


def _module(model: Any, name: str) -> nn.Module:
    """A module by its name when it was saved: with or without a head around the model."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            return model.get_submodule(candidate)
        except AttributeError:
            continue
    raise ValueError(f"model_class: expected a model with {name}, got {type(model).__name__}.")


register_host(Host("transformers", _is_attention, _prepare))
