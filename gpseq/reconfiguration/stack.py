"""Which blocks of a model a chain is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from gpseq.checks import check_count
from gpseq.reconfiguration.blocks import BlockKind, find_kind, known_kinds

#: Where a chain may be cut, beside names of blocks.
POINTS = ("attention", "block")


@dataclass(frozen=True, eq=False)
class Stack:
    """Blocks that are called one after the other.

    Attributes:
        container: name of the ``ModuleList`` or ``Sequential`` that holds them; ``""`` is the model itself.
        start: place of the first replaced block in it.
        blocks: those that are replaced.
        kind: of the blocks, where the chain is cut in their middle; ``None`` at their ends.
        keys: names of the blocks in the container; without, they are numbers.
    """

    container: str
    start: int
    blocks: tuple[nn.Module, ...]
    kind: BlockKind | None
    keys: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the blocks, in the model."""
        first = f"{self.container}." if self.container else ""
        keys = self.keys or tuple(str(self.start + number) for number in range(len(self.blocks)))
        return tuple(first + key for key in keys)

    @property
    def batch_dim(self) -> int:
        """Where tokens have the batch."""
        kind = self.kind or find_kind(self.blocks[0])
        return 0 if kind is None else kind.batch_dim(self.blocks[0])


def find_stack(model: nn.Module, points: str | Sequence[str] = "attention", first_block: int = 0) -> Stack:
    """The blocks of a model.

    Args:
        model: any module.
        points: ``"attention"``, the states after the attention of each block; ``"block"``, those behind each block; or
            names of blocks that stand behind one another in one ``ModuleList`` or ``Sequential``, ``("layers.2",
            "layers.3")``, or that of the container, ``"encoder.layers"``, which are cut at their ends.
        first_block: how many blocks are left as they are.

    Returns:
        The stack.

    Raises:
        TypeError: the model is no module, or ``points`` of another kind.
        ValueError: no stack is found, or several are; the message lists candidates.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> find_stack(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), first_block=1).names
        ('layers.1', 'layers.2')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}.")
    check_count("first_block", first_block, least=0)
    if isinstance(points, str) and points in POINTS:
        found = _only(_runs(model, points), points, model)
    else:
        found = _named(model, points)
    if first_block >= len(found):
        raise ValueError(
            f"first_block: expected fewer than the {len(found)} blocks of {found.container or 'the model'!r}, got "
            f"{first_block}."
        )
    start, blocks, keys = found.start + first_block, found.blocks[first_block:], found.keys[first_block:]
    return Stack(found.container, start, blocks, found.kind, keys)


def _containers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList | nn.Sequential)}


def _runs(model: nn.Module, points: str) -> list[Stack]:
    """Blocks of one kind behind one another; for ``"block"`` also layers of one class and one size."""
    found = []
    for name, container in _containers(model).items():
        children = children_of(container)
        alike = [_key(child, points) for child in children.values()]
        start = 0
        while start < len(alike):
            stop = start + 1
            while stop < len(alike) and alike[stop] == alike[start]:
                stop += 1
            if alike[start] is not None:
                run = _part(name, children, start, stop)
                found.append(replace(run, kind=find_kind(run.blocks[0])) if points == "attention" else run)
            start = stop
    if points == "block" and any(find_kind(stack.blocks[0]) for stack in found):
        return [stack for stack in found if find_kind(stack.blocks[0])]
    return found


def children_of(container: nn.Module) -> dict[str, nn.Module]:
    """The children of a container by name; one that stands there twice is there twice.

    Args:
        container: any module.
    """
    return {name: child for name, child in container._modules.items() if child is not None}


def _part(name: str, children: dict[str, nn.Module], start: int, stop: int) -> Stack:
    """Some children of a container of that name, cut at their ends."""
    keys, blocks = tuple(children), tuple(children.values())
    return Stack(name, start, blocks[start:stop], None, keys[start:stop])


def _key(block: nn.Module, points: str) -> object:
    """What is alike for blocks of one run."""
    kind = find_kind(block)
    if kind is not None:
        return kind.name
    sizes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    is_layer = not list(block.children()) and (type(block).__module__.startswith("torch.nn.") or not sizes)
    if points == "attention" or is_layer:
        return None
    return type(block), sizes


def _only(found: list[Stack], points: str, model: nn.Module) -> Stack:
    """The one that is meant: the longest."""
    if not found:
        candidates = [
            f"{name or 'the model itself'} ({', '.join(sorted({type(child).__name__ for child in part.children()}))})"
            for name, part in _containers(model).items()
        ]
        raise ValueError(
            f"teacher: expected blocks of a known kind ({', '.join(known_kinds())}) behind one another in a "
            f"ModuleList or Sequential for points={points!r}, got {'; '.join(candidates) or 'no such container'}. Give "
            "the names of blocks as points, or teach gpseq.reconfiguration.register_block their halves."
        )
    longest = max(len(stack) for stack in found)
    best = [stack for stack in found if len(stack) == longest]
    if len(best) > 1:
        names = ", ".join(repr(f"{stack.container}") for stack in best)
        raise ValueError(f"points: expected one stack of blocks, got several of the same length: {names}; name one.")
    return best[0]


def _named(model: nn.Module, points: str | Sequence[str]) -> Stack:
    names = [points] if isinstance(points, str) else list(points)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"points: expected 'attention', 'block' or names of blocks, got {points!r}.")
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            close = [other for other in modules if other.rpartition(".")[2] == name.rpartition(".")[2]][:8]
            known = f"; is it one of {', '.join(close)}?" if close else ""
            raise ValueError(f"points: expected {', '.join(POINTS)} or names of modules, got {name!r}{known}")
    if len(names) == 1 and isinstance(modules[names[0]], nn.ModuleList | nn.Sequential):
        container, places = names[0], list(range(len(children_of(modules[names[0]]))))
    else:
        split = [name.rpartition(".") for name in names]
        container = split[0][0]
        is_list = isinstance(modules.get(container), nn.ModuleList | nn.Sequential)
        if any(part[0] != container for part in split) or not is_list:
            raise ValueError(f"points: expected blocks of one ModuleList or Sequential, got {', '.join(names)}.")
        places = [list(children_of(modules[container])).index(part[2]) for part in split]
    if not places or places != list(range(places[0], places[0] + len(places))):
        raise ValueError(f"points: expected blocks that follow each other, got {', '.join(names)}.")
    return _part(container, children_of(modules[container]), places[0], places[-1] + 1)
