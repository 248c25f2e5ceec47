"""Which blocks a chain is made of, and what is said where there are none."""

import pytest
import torch
from torch import nn

from gpseq.nn import SGPATransformerEncoder, SGPATransformerEncoderLayer
from gpseq.reconfiguration import BlockKind, find_stack, register_block
from gpseq.reconfiguration import blocks as blocks_of
from gpseq.reconfiguration.blocks import find_kind, known_kinds
from tests.oracles_reconfiguration import HOSTS, WIDTH, Classifier, VisionTransformer


def test_every_host_is_found():
    names = {
        "torch pre": ("encoder.layers", "torch"),
        "torch post": ("encoder.layers", "torch"),
        "vit": ("vit.layers", "ViT"),
        "bert": ("bert.encoder.layer", "BERT"),
        "gpt2": ("transformer.h", "GPT-2"),
        "timm": ("blocks", "timm"),
    }
    for name, (container, kind) in names.items():
        stack = find_stack(HOSTS[name](torch.float32).model)
        assert (stack.container, stack.kind.name, len(stack), stack.start) == (container, kind, 3, 0)
        assert stack.names == tuple(f"{container}.{number}" for number in range(3))
    encoder = SGPATransformerEncoder(SGPATransformerEncoderLayer(WIDTH, 2, 12, batch_first=True), 2)
    assert find_stack(encoder).kind.name == "torch"


def test_first_block():
    stack = find_stack(Classifier(depth=4), first_block=1)
    assert stack.start == 1 and stack.names == ("encoder.layers.1", "encoder.layers.2", "encoder.layers.3")
    stack = find_stack(Classifier(depth=4), ["encoder.layers.1", "encoder.layers.2"], first_block=1)
    assert stack.names == ("encoder.layers.2",)
    with pytest.raises(ValueError, match=r"first_block: expected fewer than the 3 blocks of 'encoder\.layers', got 3"):
        find_stack(Classifier(), first_block=3)
    with pytest.raises(ValueError, match="first_block: expected at least 0, got -1"):
        find_stack(Classifier(), first_block=-1)
    with pytest.raises(TypeError, match=r"first_block: expected an integer, got 1.0"):
        find_stack(Classifier(), first_block=1.0)


def test_a_teacher_without_blocks_lists_candidates():
    model = nn.Sequential(nn.Linear(3, 4), nn.ModuleList([nn.GRU(4, 4), nn.GRU(4, 4)]))
    with pytest.raises(
        ValueError, match=r"of a known kind \(timm, .*the model itself \(Linear, ModuleList\); 1 \(GRU\)"
    ):
        find_stack(model)
    with pytest.raises(ValueError, match="got no such container"):
        find_stack(nn.Linear(3, 4))
    with pytest.raises(TypeError, match="model: expected a torch module, got str"):
        find_stack("model")


class Two(nn.Module):
    def __init__(self, first=2, second=2):
        super().__init__()
        self.one, self.other = Classifier(depth=first).encoder, VisionTransformer(depth=second)


def test_several_stacks():
    with pytest.raises(ValueError, match=r"several of the same length: 'one\.layers', 'other\.blocks'; name one"):
        find_stack(Two())
    assert find_stack(Two(2, 3)).container == "other.blocks"
    assert find_stack(Two(), "one.layers").container == "one.layers"


def test_named_blocks():
    model = Classifier(depth=4)
    assert find_stack(model, "encoder.layers").kind is None
    assert find_stack(model, ["encoder.layers.1", "encoder.layers.2"]).start == 1
    cases = {
        r"got 'encoder\.layer'": "encoder.layer",
        r"names of modules, got 'encoder\.layers\.7'": ["encoder.layers.7"],
        r"is it one of encoder\.layers\.0\.linear1": ["linear1"],
        "blocks that follow each other": ["encoder.layers.0", "encoder.layers.2"],
        r"blocks of one ModuleList or Sequential, got embed": ["embed"],
        r"got encoder\.layers\.0, head": ["encoder.layers.0", "head"],
    }
    for match, points in cases.items():
        with pytest.raises(ValueError, match=match):
            find_stack(model, points)
    for points in ([], [3]):
        with pytest.raises(TypeError, match="points: expected 'attention', 'block' or names of blocks"):
            find_stack(model, points)


class Leaf(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))

    def forward(self, x):
        return x @ self.weight


def test_blocks_of_any_class():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), Leaf(), Leaf(), Leaf(), nn.Linear(4, 4))
    stack = find_stack(model, "block")
    assert (stack.start, len(stack), stack.kind, stack.container) == (3, 3, None, "")
    assert stack.names == ("3", "4", "5")
    sizes = nn.Sequential(Leaf(3), Leaf(4), Leaf(4))
    assert find_stack(sizes, "block").start == 1
    # Blocks that are known go before others, even where these are more.
    both = nn.ModuleDict({"a": nn.Sequential(*(Leaf() for _ in range(9))), "b": Classifier(depth=2)})
    assert find_stack(both, "block").container == "b.encoder.layers"


def test_another_kind_of_block():
    kinds = dict(blocks_of._KINDS)
    leaf = BlockKind(
        "leaf",
        lambda module: isinstance(module, Leaf),
        lambda block: ("weight", "input"),
        lambda block, x, call: block(x),
        lambda block, x: x,
        lambda block, call: None,
        lambda block: (),
    )
    try:
        register_block(leaf)
        assert find_kind(Leaf()) is leaf and known_kinds()[-1] == "leaf"
        assert find_stack(nn.Sequential(Leaf(), Leaf())).kind is leaf
        register_block(leaf)
        assert known_kinds().count("leaf") == 1
    finally:
        blocks_of._KINDS.clear()
        blocks_of._KINDS.update(kinds)
    with pytest.raises(LookupError, match=r"name: expected a kind of block that is registered, of .*, got 'leaf'"):
        leaf.__reduce__()[0]("leaf")
