"""Gaussian processes in timm's vision transformers, against a stand-in with the contract of timm's attention."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpseq.integrations.timm import GPAttention
from gpseq.nn import init_inducing, kl_divergence, replace_attention

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


class Attention(nn.Module):
    """What timm's own does, written out: explicit softmax, masks where True = attend."""

    def __init__(
        self, dim, num_heads=8, qkv_bias=False, qk_norm=False, scale_norm=False, proj_bias=True, attn_drop=0.0,
        proj_drop=0.0, norm_layer=None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **place)
        self.q_norm = norm_layer(self.head_dim, **place) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **place) if qk_norm else nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)
        self.norm = norm_layer(dim, **place) if scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **place)

    def forward(self, x, attn_mask=None, is_causal=False):
        size, length, width = x.shape
        shape = (size, length, self.num_heads, self.head_dim)
        query, key, value = (part.reshape(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = self.q_norm(query) @ self.k_norm(key).mT / self.head_dim**0.5
        if is_causal:
            attn_mask = torch.ones(length, length).tril().bool()
        if attn_mask is not None:
            hidden = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if hidden else scores + attn_mask
        heads = self.attn_drop(scores.softmax(-1)) @ value
        return self.proj_drop(self.proj(self.norm(heads.transpose(1, 2).reshape(size, length, width))))


Attention.__module__ = "timm.layers.attention"


class Vit(nn.Module):
    """Blocks that call their attention as timm's do."""

    def __init__(self, attn_layer=Attention, depth=2, **options):
        super().__init__()
        dtype = options.get("dtype")
        self.norms = nn.ModuleList(nn.LayerNorm(8, dtype=dtype) for _ in range(depth))
        self.blocks = nn.ModuleList(
            attn_layer(8, num_heads=2, qkv_bias=True, norm_layer=nn.LayerNorm, **options) for _ in range(depth)
        )

    def forward(self, x, attn_mask=None):
        for norm, attn in zip(self.norms, self.blocks, strict=True):
            x = x + attn(norm(x), attn_mask=attn_mask)
        return x


def masks(dtype):
    yield {}
    yield {"is_causal": True}
    yield {"is_causal": True, "attn_mask": torch.randn(5, 5, dtype=dtype)}  # then the mask is not used
    yield {"attn_mask": torch.rand(3, 1, 5, 5).lt(0.5) | torch.eye(5).bool()}
    yield {"attn_mask": torch.randn(5, 5, dtype=dtype)}


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "scale_norm": True}, {"proj_bias": False}], ids=str)
def test_a_model_starts_as_what_it_was(options, dtype):
    old = Vit(**options, dtype=dtype).eval()
    x = torch.randn(3, 5, 8, dtype=dtype)
    torch.manual_seed(4)
    want = [old.blocks[0](x, **mask) for mask in masks(dtype)]
    whole = old(x)
    weights = [attn.qkv.weight for attn in old.blocks]
    new = replace_attention(old, num_inducing=3, sampling="mean")
    assert new is old
    assert all(isinstance(attn, GPAttention) for attn in new.blocks)
    assert all(attn.qkv.weight is weight for attn, weight in zip(new.blocks, weights, strict=True))
    torch.testing.assert_close(new(x), whole, rtol=0, atol=TOLERANCE[dtype])
    torch.manual_seed(4)
    for mask, result in zip(masks(dtype), want, strict=True):
        torch.testing.assert_close(new.blocks[0](x, **mask), result, rtol=0, atol=TOLERANCE[dtype])
    assert kl_divergence(new) == 0
    assert {p.dtype for p in new.parameters()} == {dtype}


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "scale_norm": True}], ids=str)
def test_checkpoints_load_into_a_model_that_was_built_with_it(options):
    old = Vit(**options).eval()
    new = Vit(partial(GPAttention, num_inducing=3, sampling="mean"), **options).eval()
    missing, unexpected = new.load_state_dict(old.state_dict(), strict=False)
    assert not unexpected
    assert all(".gp.inducing." in name for name in missing)
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(new(x), old(x))


def test_draws_training_and_inducing_keys():
    model = Vit(proj_drop=0.1, attn_drop=0.1)
    model.blocks[0].requires_grad_(False)
    model.blocks[1].eval()
    replace_attention(model, num_inducing=3)
    assert [attn.gp.training for attn in model.blocks] == [True, False]
    assert not model.blocks[0].qkv.weight.requires_grad
    x = torch.randn(3, 5, 8)
    init_inducing(model, [(x, torch.zeros(3))])
    query = model.eval().blocks[0].qkv(model.norms[0](x))[..., :8].unflatten(-1, (2, 4)).flatten(0, 1)
    for head, tokens in zip(model.blocks[0].gp.inducing.location, query.transpose(0, 1), strict=True):
        assert torch.cdist(head, tokens).min(-1).values.max() < 1e-4
    assert model(x).ne(model(x)).all()
    model.train()
    (model(x).square().mean() + kl_divergence(model, num_data=9) / 9).backward()
    assert all(p.grad.isfinite().all() for attn in model.blocks for p in attn.gp.parameters())


def test_nothing_leaks():
    attn = GPAttention(8, 2, num_inducing=3, sampling="mean")
    attn.gp.inducing.value.data.normal_()
    x = torch.randn(3, 5, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(attn(x, is_causal=True)[:, 2].square().sum(), x)
    assert grad[:, 3:].eq(0).all()
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    mask = real[:, None, None, :].expand(3, 1, 5, 5)
    changed = x.masked_fill(~real.unsqueeze(-1), 9.0)
    torch.testing.assert_close(attn(changed, mask)[real], attn(x, mask)[real])


def test_other_widths():
    attn = GPAttention(8, 2, attn_head_dim=3, dim_out=5, num_inducing=2)
    assert attn(torch.randn(3, 5, 8)).shape == (3, 5, 5)
    assert F.relu(attn(torch.randn(1, 1, 8))).isfinite().all()


def test_refusals_change_nothing():
    model = Vit()
    for mode in ("sgpa", "softmax_kernel"):
        with pytest.raises(ValueError, match=f"mode: expected 'residual' for attention of timm, .* got '{mode}'"):
            replace_attention(model, mode=mode)
    relative = type("AttentionRope", (Attention,), {"__module__": "timm.layers.attention"})
    with pytest.raises(ValueError, match=r"got blocks.0 \(AttentionRope\), blocks.1 \(AttentionRope\)"):
        replace_attention(Vit(relative))
    assert all(type(attn) is Attention for attn in model.blocks)
    replace_attention(model, "last")
    with pytest.raises(ValueError, match=r"were not replaced before, got 'blocks.1'"):
        replace_attention(model)
    with pytest.raises(ValueError, match="dim: expected a multiple of num_heads = 3, got 8"):
        GPAttention(8, 3)
    with pytest.raises(ValueError, match="norm_layer: expected a class"):
        GPAttention(8, 2, qk_norm=True)


@pytest.mark.parametrize("norm", [True, False])
def test_the_real_thing(norm):
    try:
        from timm.models.vision_transformer import VisionTransformer
    except (ImportError, RuntimeError) as error:  # its torchvision may fail in either way
        pytest.skip(f"timm cannot be imported: {error}")
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "qk_norm": norm}
    model = VisionTransformer(**options).eval()
    x = torch.randn(2, 3, 8, 8)
    want = model(x)
    built = VisionTransformer(**options, attn_layer=partial(GPAttention, sampling="mean")).eval()
    built.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(built(x), want)
    torch.testing.assert_close(replace_attention(model, sampling="mean")(x), want)
