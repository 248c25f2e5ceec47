"""Masks in one convention: what attention makes of them is what torch's attention makes of its own."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gpseq.reconfiguration import Call, Masks
from gpseq.reconfiguration.calls import masks_by_name
from gpseq.reconfiguration.masks import additive_to_keys, ignored, only_hides
from tests.oracles_reconfiguration import FUTURE, LEFT, PADDING

BATCH, HEADS, TOKENS = 3, 2, 5


def attention():
    return nn.MultiheadAttention(8, HEADS, batch_first=True, dtype=torch.float64)


def floats(mask, least=-math.inf):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, least)


@given(st.booleans(), st.booleans(), st.sampled_from(["none", "shared", "batch", "heads", "bias"]), st.integers(0, 99))
def test_attention_is_that_of_torch(with_keys, causal, kind, seed):
    torch.manual_seed(seed)
    layer, x = attention(), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    open_diagonal = ~torch.eye(TOKENS).bool()
    shapes = {"shared": (TOKENS, TOKENS), "batch": (BATCH, 1, TOKENS, TOKENS), "heads": (1, HEADS, TOKENS, TOKENS)}
    pairs = None
    if kind in shapes:
        pairs = torch.rand(shapes[kind]).lt(0.4) & open_diagonal
    elif kind == "bias":
        pairs = torch.randn(BATCH, HEADS, TOKENS, TOKENS, dtype=torch.float64)
    keys = PADDING if with_keys else None
    found = layer(x, x, x, **Masks(pairs, keys, causal).for_attention(x, HEADS), need_weights=False)[0]
    # Torch's own semantics, with all that is there in one float mask.
    added = torch.zeros(BATCH, HEADS, TOKENS, TOKENS, dtype=torch.float64)
    if pairs is not None:
        added = added + (pairs if kind == "bias" else floats(pairs))
    if keys is not None:
        added = added + floats(keys)[:, None, None]
    if causal:
        added = added + floats(FUTURE)
    want = layer(x, x, x, attn_mask=added.flatten(0, 1), need_weights=False)[0]
    seen = ~added.isinf().all(-1).any(1)
    torch.testing.assert_close(found[seen], want[seen], rtol=0, atol=1e-12)
    assert found.isfinite().all()


def test_queries_that_see_nothing_give_numbers_and_gradients():
    layer, x = attention(), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64, requires_grad=True)
    everything = torch.ones(BATCH, TOKENS).bool()
    for masks in (Masks(keys=everything), Masks(keys=LEFT, causal=True), Masks(pairs=torch.ones(5, 5).bool())):
        out = layer(x, x, x, **masks.for_attention(x, HEADS), need_weights=False)[0]
        out.sum().backward()
        assert out.isfinite().all() and x.grad.isfinite().all()


def test_no_mask_is_no_argument():
    x = torch.zeros(BATCH, TOKENS, 8)
    assert Masks().for_attention(x, HEADS) == {"key_padding_mask": None, "attn_mask": None}
    given = Masks(keys=PADDING).for_attention(x, HEADS)
    assert given["key_padding_mask"].equal(PADDING) and given["attn_mask"] is None
    shared = Masks(causal=True).for_attention(x, HEADS)["attn_mask"]
    assert shared.shape == (TOKENS, TOKENS) and shared.dtype == x.dtype


def test_which_tokens_are_padding():
    assert Masks().padding() is None
    assert Masks(causal=True).padding() is None
    assert Masks(keys=PADDING).padding().equal(PADDING)
    assert not Masks(pairs=FUTURE).padding().any()
    pairs = FUTURE | PADDING[:, None, None, :]
    assert Masks(pairs=pairs).padding().equal(PADDING)
    assert Masks(pairs=floats(pairs, torch.finfo(torch.float64).min)).padding().equal(PADDING)
    assert Masks(pairs=pairs, keys=LEFT).padding().equal(PADDING | LEFT)


def test_masks_that_users_give():
    masks = Masks(keys=PADDING)
    assert Masks.of(masks) is masks
    assert Masks.of(None).keys is None
    assert Masks.of(PADDING).keys is PADDING
    assert Masks.of(FUTURE).pairs is FUTURE
    assert Masks.of(FUTURE, 3).pairs is FUTURE
    with pytest.raises(ValueError, match=r"expected Masks\(keys=mask\) or Masks\(pairs=mask\)"):
        Masks.of(FUTURE, 5)
    assert Masks.of(floats(FUTURE), 5).pairs is not None
    with pytest.raises(ValueError, match=r"mask: expected \(B, T\), \(T, T\) or \(B, H, T, T\), got shape \(3,\)"):
        Masks.of(torch.zeros(3).bool())
    with pytest.raises(TypeError, match=r"mask: expected a tensor of bools or floating-point numbers, got torch.int64"):
        Masks.of(torch.ones(2, 3).long())
    with pytest.raises(TypeError, match="got list"):
        Masks.of([[True]])


@pytest.mark.parametrize(
    "masks",
    [
        Masks(keys=PADDING[:2]),
        Masks(keys=PADDING[:, :4]),
        Masks(pairs=FUTURE[:4]),
        Masks(pairs=FUTURE.expand(2, 1, 5, 5)),
        Masks(pairs=FUTURE.expand(3, 3, 5, 5)),
    ],
    ids=["batch of keys", "tokens of keys", "pairs", "batch of pairs", "heads"],
)
def test_masks_that_do_not_fit(masks):
    with pytest.raises(ValueError, match="mask: expected"):
        masks.for_attention(torch.zeros(BATCH, TOKENS, 8), HEADS)
    assert Masks(keys=PADDING[:1]).check(BATCH, TOKENS, HEADS).keys is not None


def test_what_hides():
    least = torch.finfo(torch.float32).min
    mask = torch.tensor([0.0, -1.0, least, -math.inf])
    assert ignored(mask).tolist() == [False, False, True, True]
    assert not only_hides(mask) and only_hides(mask[[0, 2, 3]]) and only_hides(mask > 0)


def test_masks_of_hosts_as_keys():
    rows = (~PADDING)[:, None, None, :]
    for mask in (rows, floats(~rows)):
        for value in (mask, mask.expand(-1, -1, 5, -1)):
            pairs, keys = additive_to_keys(value, seen=True)
            assert pairs is None and keys.equal(PADDING)
    pairs, keys = additive_to_keys(rows & ~FUTURE, seen=True)
    assert keys is None and pairs.equal(PADDING[:, None, None, :] | FUTURE)
    bias = torch.randn(3, 1, 1, 5)
    pairs, keys = additive_to_keys(bias)
    assert keys is None and pairs.equal(bias.expand(-1, -1, 5, -1))


class Block(nn.Module):
    def forward(
        self,
        x,
        mask=None,
        attn_mask=None,
        attention_mask=None,
        src_key_padding_mask=None,
        key_padding_mask=None,
        tgt_mask=None,
        memory_mask=None,
        is_causal=False,
    ):
        return x


def by_name(**kwargs):
    return masks_by_name(Block(), Call((), kwargs))


def test_masks_by_their_names():
    assert by_name(mask=FUTURE).pairs is FUTURE
    assert by_name(tgt_mask=FUTURE).pairs is FUTURE
    assert by_name(attn_mask=~FUTURE).pairs.equal(FUTURE)  # True is seen, as for torch's function
    assert by_name(src_key_padding_mask=PADDING).keys.equal(PADDING)
    assert by_name(key_padding_mask=floats(PADDING)).keys.equal(PADDING)
    assert by_name(attention_mask=(~PADDING).long()).keys.equal(PADDING)
    assert by_name(is_causal=True).causal and not by_name().causal
    with pytest.raises(NotImplementedError, match=r"expected masks of the names .* at Block, got memory_mask"):
        by_name(memory_mask=FUTURE)
    with pytest.raises(ValueError, match=r"attention_mask: expected \(B, 1, T, T\) in a block, got shape \(2, 3, 4\)"):
        by_name(attention_mask=torch.zeros(2, 3, 4))
    with pytest.raises(NotImplementedError, match="attention_mask: expected a tensor, got dict"):
        by_name(attention_mask={})


@pytest.mark.parametrize("kind", ["bool", "float", "none"])
def test_floats_on_keys_are_added(kind):
    """As torch's attention does; only what hides is padding."""
    layer, x = attention(), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    bias = torch.randn(BATCH, TOKENS, dtype=torch.float64).masked_fill(PADDING, -math.inf)
    pairs = {"bool": FUTURE, "float": floats(FUTURE), "none": None}[kind]
    masks = by_name(key_padding_mask=bias, **({} if pairs is None else {"mask": pairs}))
    assert masks.padding().equal(PADDING)
    found = layer(x, x, x, **masks.for_attention(x, HEADS), need_weights=False)[0]
    attn_mask = None if pairs is None else floats(FUTURE)
    want = layer(x, x, x, key_padding_mask=bias, attn_mask=attn_mask, need_weights=False)[0]
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def test_attention_that_is_causal_by_itself():
    block = Block()
    block.attention = nn.Identity()
    block.attention.is_causal = True
    assert masks_by_name(block, Call()).causal
    assert not masks_by_name(block, Call((), {"attention_mask": (~PADDING)[:, None, None]})).causal
