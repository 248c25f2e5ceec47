"""Gaussian processes in place of the attention of a trained model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from gpseq.checks import check_count
from gpseq.nn.attention import MODES, SGPAttention
from gpseq.nn.conversion import convert_attention
from gpseq.nn.projection import ProjectedAttention
from gpseq.nn.residual import ResidualGP
from gpseq.sgpa.arguments import check_choice

Layers = str | re.Pattern[str] | Sequence[str]


@dataclass(frozen=True)
class Host:
    """A library whose attention can be replaced.

    Attributes:
        name: for messages.
        is_attention: whether a module is an attention of this library, as it stands before.
        prepare: from the model, the modules by their names and the options (``mode`` and ``num_inducing`` among them)
            to a function that installs what was made and returns the model. Nothing of the model changes before that
            is called.
    """

    name: str
    is_attention: Callable[[nn.Module], bool]
    prepare: Callable[[nn.Module, Mapping[str, nn.Module], Mapping[str, Any]], Callable[[nn.Module], nn.Module]]


def replace_attention(
    model: nn.Module, layers: Layers = "all", mode: str = "residual", num_inducing: int = 16, **options: Any
) -> nn.Module:
    r"""Put a Gaussian process in the place of a model's attention, in place; trained weights stay.

    In mode ``"residual"``, the default, trained attention becomes the mean of a GP. With ``sampling="mean"`` the model
    starts as the function that it was, to rounding, under every mask, except that the padding of a sequence gets zero
    as output from torch's attention; and every pass of a model that draws differs by the noise of the GP. It is not
    the published method. The other modes convert weights with a loss, and say how great it is (a
    ``ConversionWarning``); accuracy has to be trained back.

    Without more, this replaces ``nn.MultiheadAttention`` at any depth. After ``import
    gpseq.integrations.huggingface`` also the attention of transformers, after ``import gpseq.integrations.timm`` that
    of timm, both in mode ``"residual"``. Parameters are made anew: build the optimiser afterwards.

    Args:
        model: any module.
        layers: which attentions: ``"all"``; ``"last"``, the last one in the order of ``model.named_modules()``; a
            pattern on module names, with ``*`` and ``?`` as for files (``"*.layers.1.*"``); a compiled regular
            expression, which is searched for in the names; or a sequence of patterns. ``"all"`` is an error where the
            model also has attention that cannot be replaced; a pattern takes what matches of the rest.
        mode: ``"residual"``, ``"sgpa"`` or ``"softmax_kernel"``, see :class:`~gpseq.nn.SGPAttention`.
        num_inducing: M, inducing keys a head. They start at random: :func:`gpseq.nn.init_inducing` puts them on data.
        options: for torch's attention, further arguments of :class:`~gpseq.nn.SGPAttention`; for others, of
            :class:`gpseq.nn.residual.ResidualGP`.

    Returns:
        The model; where it is itself an attention, what replaces it.

    Raises:
        TypeError: the model is no module, ``layers`` is of no such kind, or an option is unknown.
        ValueError: there is nothing to replace (with a list of what was found), a pattern matches no attention, a
            layer was replaced before, or an option does not fit. The model is as it was.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2)
        >>> model = replace_attention(model, "last", num_inducing=4, sampling="mean")
        >>> [type(layer.self_attn).__name__ for layer in model.layers]
        ['MultiheadAttention', 'SGPAttention']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}.")
    check_choice("mode", mode, MODES)
    check_count("num_inducing", num_inducing)
    names = dict(model.named_modules())
    known = {name: host for name, module in names.items() for host in _HOSTS.values() if host.is_attention(module)}
    done = [name for name, module in names.items() if is_replaced(module)]
    chosen = _choose(layers, names, known, done)
    again = [name for name in chosen if name in done]
    if again:
        raise ValueError(
            f"layers: expected layers that were not replaced before, got {_list(again)}; a pattern names the others."
        )
    if layers == "all":
        unknown = _unknown(names, {*known, *done})
        if unknown:
            raise ValueError(
                f"layers: 'all' expects attention of known kinds only, got {_kinds(unknown, names)}; give a pattern "
                f"for what is to be replaced, of {_list(list(known))}.{_hint(unknown, names)}"
            )
    installs = []
    for host in _HOSTS.values():
        found = {name: names[name] for name in chosen if known[name] is host}
        if found:
            installs.append(host.prepare(model, found, {"mode": mode, "num_inducing": num_inducing, **options}))
    for install in installs:
        model = install(model)
    return model


def register_host(host: Host) -> None:
    """Teach :func:`gpseq.nn.replace_attention` another library; one of the same name is replaced.

    Args:
        host: how its attention is found and replaced.
    """
    _HOSTS[host.name] = host


def is_replaced(module: nn.Module) -> bool:
    """Whether a module is attention with a Gaussian process."""
    return isinstance(module, ProjectedAttention) or any(isinstance(child, ResidualGP) for child in module.children())


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Take back a replacement if something fails after it.

    Args:
        model: any module; what of it an exception brings back are its submodules, torch's flag for nested tensors, and
            the settings of configurations such as those of transformers.
    """
    modules = list(model.modules())
    children = [dict(module._modules) for module in modules]
    nested = [(m, m.use_nested_tensor) for m in modules if isinstance(m, nn.TransformerEncoder)]
    configs = {
        id(config): config for m in modules for config in [getattr(m, "config", None)] if hasattr(config, "__dict__")
    }
    settings = [(config, dict(vars(config))) for config in configs.values()]
    try:
        yield
    except BaseException:
        for module, before in zip(modules, children, strict=True):
            module._modules.clear()
            module._modules.update(before)
        for encoder, flag in nested:
            encoder.use_nested_tensor = flag
        for config, before in settings:
            vars(config).clear()
            vars(config).update(before)
        raise


def matching(layers: Layers, candidates: Sequence[str], names: Mapping[str, nn.Module] | None = None) -> list[str]:
    """Names that a pattern picks.

    Args:
        layers: ``"all"``, ``"last"``, a pattern with ``*`` and ``?``, a compiled regular expression, or a sequence of
            patterns.
        candidates: names to pick from.
        names: all modules of the model, for messages.

    Returns:
        In the order of the candidates.

    Raises:
        TypeError: ``layers`` is of another kind.
        ValueError: a pattern matches none.

    Example:
        >>> matching("*.1.*", ["layers.0.self_attn", "layers.1.self_attn"])
        ['layers.1.self_attn']
    """
    if isinstance(layers, str) and layers == "all":
        return list(candidates)
    if isinstance(layers, str) and layers == "last":
        return list(candidates[-1:])
    names = names or {}
    if isinstance(layers, re.Pattern):
        tests: list[Callable[[str], Any]] = [layers.search]
    elif isinstance(layers, str):
        tests = [lambda name: fnmatchcase(name, layers)]
    elif isinstance(layers, Sequence) and layers and all(isinstance(pattern, str) for pattern in layers):
        tests = [lambda name, pattern=pattern: fnmatchcase(name, pattern) for pattern in layers]  # type: ignore[misc]
    else:
        raise TypeError(
            f"layers: expected 'all', 'last', a pattern, a compiled regular expression or a sequence of patterns, got "
            f"{layers!r}."
        )
    shown = list(layers) if not isinstance(layers, str | re.Pattern) else [layers]
    for pattern, test in zip(shown, tests, strict=True):
        if not any(test(name) for name in candidates):
            others = [name for name in names if test(name)]
            hit = f"which matches {_kinds(others, names)} only" if others else "which matches nothing"
            raise ValueError(
                f"layers: expected a pattern that matches attention, of {_list(candidates)}, got {pattern!r}, {hit}."
            )
    return [name for name in candidates if any(test(name) for test in tests)]


def swap(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put modules in the places of others, wherever those stand.

    Args:
        model: any module.
        made: from old to new.

    Returns:
        The model, or what replaces it.

    Example:
        >>> old, new = nn.ReLU(), nn.GELU()
        >>> swap(nn.Sequential(old, nn.Sequential(old)), {old: new})
        Sequential(
          (0): GELU(approximate='none')
          (1): Sequential(
            (0): GELU(approximate='none')
          )
        )
    """
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in made:
                setattr(parent, name, made[child])
    return made.get(model, model)


def _prepare_torch(
    model: nn.Module, found: Mapping[str, nn.Module], options: Mapping[str, Any]
) -> Callable[[nn.Module], nn.Module]:
    made: dict[nn.Module, nn.Module] = {}
    for name, module in found.items():
        assert isinstance(module, nn.MultiheadAttention)
        try:
            made[module] = convert_attention(module, **options)
        except ValueError as error:
            raise ValueError(f"{name or 'model'}: {error}") from error

    def install(root: nn.Module) -> nn.Module:
        root = swap(root, made)
        for module in root.modules():
            # Decided when the encoder was made, from layers that are others now.
            if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, SGPAttention) for m in module.modules()):
                module.use_nested_tensor = False
        return root

    return install


_HOSTS: dict[str, Host] = {
    "torch": Host("torch", lambda module: type(module) is nn.MultiheadAttention, _prepare_torch),
}


def _choose(
    layers: Layers, names: Mapping[str, nn.Module], known: Mapping[str, Host], done: Sequence[str]
) -> list[str]:
    """Names of the attentions that are asked for, in the order of the model."""
    candidates = [name for name in names if name in known or name in done]
    if not any(name in known and name not in done for name in candidates):
        found = _kinds(_unknown(names, {*known, *done}), names)
        before = f"; {_list(list(done))} replaced before" if done else ""
        other = sorted({type(module).__name__ for module in names.values()})
        raise ValueError(
            f"model: expected attention to replace, of {', '.join(_HOSTS)}, got {found or 'none'} among modules of "
            f"types {', '.join(other[:20])}{before}.{_hint(names, names)}"
        )
    return matching(layers, candidates, names)


def _unknown(names: Mapping[str, nn.Module], known: set[str]) -> list[str]:
    """Modules that call themselves attention, and neither are nor hold nor belong to a known one."""

    def related(name: str) -> bool:
        return any(_within(name, other) or _within(other, name) for other in known)

    def suspect(module: nn.Module) -> bool:
        return any(re.search("attention|attn", kind.__name__, re.I) for kind in type(module).__mro__)

    suspects = [name for name, module in names.items() if suspect(module)]
    suspects = [name for name in suspects if not related(name)]
    # Of a wrapper and what it wraps, the latter.
    return [name for name in suspects if not any(name != other and _within(other, name) for other in suspects)]


def _within(name: str, parent: str) -> bool:
    return name == parent or parent == "" or name.startswith(parent + ".")


def _list(names: Sequence[str]) -> str:
    shown = [repr(name) if name else "the model itself" for name in names[:8]]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _kinds(found: Sequence[str], names: Mapping[str, nn.Module]) -> str:
    shown = [f"{name or 'the model itself'} ({type(names[name]).__name__})" for name in found[:8]]
    return ", ".join(shown) + (f" and {len(found) - 8} more" if len(found) > 8 else "")


def _hint(found: Sequence[str] | Mapping[str, nn.Module], names: Mapping[str, nn.Module]) -> str:
    """Which import teaches the libraries that these modules come from."""
    homes = {type(names[name]).__module__.partition(".")[0] for name in found}
    doors = {"transformers": "huggingface", "timm": "timm"}
    wanted = [door for home, door in doors.items() if home in homes and door not in _HOSTS]
    return "".join(f" Did you import gpseq.integrations.{door}?" for door in wanted)
