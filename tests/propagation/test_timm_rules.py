"""Rules for timm's vision transformers, on a stand-in with the parts and the contract of theirs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpseq.propagation import from_variances, propagate
from gpseq.propagation.forward import exact_kernels
from gpseq.propagation.moments import GaussianState
from gpseq.propagation.rules import timm
from gpseq.propagation.walk import Options, Walk
from tests.oracles_propagation import monte_carlo, posterior, relative_variances

FORMS = ["full", "lowrank", "blockdiag", "diag"]
WIDTH, HEADS = 8, 2
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


class LayerNorm(nn.LayerNorm):
    """With a forward of its own, as timm's has."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class RmsNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.normalized_shape, self.eps = (width,), eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class Attention(nn.Module):
    """Explicit softmax, masks where True = attend."""

    def __init__(self, dim, num_heads=HEADS, qkv_bias=True, qk_norm=None, scale_norm=None):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm, self.k_norm = (qk_norm(self.head_dim) if qk_norm else nn.Identity() for _ in range(2))
        self.attn_drop, self.proj_drop = nn.Dropout(0.1), nn.Dropout(0.1)
        self.norm = scale_norm(dim) if scale_norm else nn.Identity()
        self.gate = None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None, is_causal=False):
        size, length, width = x.shape
        shape = (size, length, 3, self.num_heads, self.head_dim)
        query, key, value = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
        scores = self.q_norm(query) @ self.k_norm(key).mT * self.scale
        if is_causal:
            attn_mask = torch.ones(length, length).tril().bool()
        if attn_mask is not None:
            hidden = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if hidden else scores + attn_mask
        heads = self.attn_drop(scores.softmax(-1)) @ value
        return self.proj_drop(self.proj(self.norm(heads.transpose(1, 2).reshape(size, length, width))))


class Mlp(nn.Module):
    def __init__(self, dim, hidden, norm=None):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(0.1)
        self.norm = norm(hidden) if norm else nn.Identity()
        self.fc2, self.drop2 = nn.Linear(hidden, dim), nn.Dropout(0.1)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x):
        return x * self.gamma


class DropPath(nn.Module):
    def __init__(self, drop_prob=0.1):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        assert not self.training
        return x


class Block(nn.Module):
    def __init__(self, dim, scaled=False, mlp_norm=None, **options):
        super().__init__()
        self.norm1, self.attn = LayerNorm(dim, eps=1e-6), Attention(dim, **options)
        self.ls1 = LayerScale(dim) if scaled else nn.Identity()
        self.drop_path1 = DropPath() if scaled else nn.Identity()
        self.norm2, self.mlp = LayerNorm(dim, eps=1e-6), Mlp(dim, 12, mlp_norm)
        self.ls2 = LayerScale(dim) if scaled else nn.Identity()
        self.drop_path2 = DropPath() if scaled else nn.Identity()

    def forward(self, x, attn_mask=None, is_causal=False):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj, self.norm, self.flatten = nn.Conv2d(3, dim, 4, 4), nn.Identity(), True

    def forward(self, x):
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class VisionTransformer(nn.Module):
    def __init__(self, depth=3, global_pool="token", registers=0, no_embed_class=False, fc_norm=False, **options):
        super().__init__()
        self.global_pool, self.num_prefix_tokens, self.no_embed_class = global_pool, 1 + registers, no_embed_class
        self.dynamic_img_size, self.pool_include_prefix = False, False
        self.patch_embed = PatchEmbed(WIDTH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.reg_token = nn.Parameter(torch.randn(1, registers, WIDTH)) if registers else None
        length = 4 if no_embed_class else 4 + self.num_prefix_tokens
        self.pos_embed = nn.Parameter(torch.randn(1, length, WIDTH))
        self.pos_drop, self.patch_drop, self.norm_pre = nn.Dropout(0.0), nn.Identity(), nn.Identity()
        self.blocks = nn.Sequential(*(Block(WIDTH, **options) for _ in range(depth)))
        self.norm = nn.Identity() if fc_norm else LayerNorm(WIDTH, eps=1e-6)
        self.attn_pool = None
        self.fc_norm = LayerNorm(WIDTH, eps=1e-6) if fc_norm else nn.Identity()
        self.head_drop, self.head = nn.Dropout(0.1), nn.Linear(WIDTH, 3)

    def _pos_embed(self, x):
        first = [part.expand(len(x), -1, -1) for part in (self.cls_token, self.reg_token) if part is not None]
        x = x + self.pos_embed if self.no_embed_class else x
        x = torch.cat([*first, x], 1)
        return self.pos_drop(x if self.no_embed_class else x + self.pos_embed)

    def forward(self, x, attn_mask=None):
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        for block in self.blocks:
            x = block(x, attn_mask=attn_mask)
        x = self.norm(x)
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(1)
        elif self.global_pool == "max":
            x = x[:, self.num_prefix_tokens :].amax(1)
        return self.head(self.head_drop(self.fc_norm(x)))


for kind in (LayerNorm, RmsNorm, Attention, Mlp, LayerScale, DropPath, Block, PatchEmbed, VisionTransformer):
    kind.__module__ = "timm.stand_in"

OPTIONS = {
    "plain": {},
    "scaled": {"scaled": True, "qkv_bias": False},
    "normed": {"qk_norm": nn.LayerNorm},
    "rms": {"qk_norm": RmsNorm, "scale_norm": LayerNorm, "mlp_norm": LayerNorm},
}
POOLS = {
    "token": {},
    "avg": {"global_pool": "avg", "fc_norm": True},
    "none": {"global_pool": "", "registers": 2},
    "registers": {"registers": 2, "no_embed_class": True},
}


def moved(network, dtype=torch.float64):
    network = network.to(dtype).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def masks(dtype):
    yield {}
    yield {"is_causal": True}
    yield {"attn_mask": torch.ones(5, 5).tril().bool()}
    yield {"attn_mask": torch.randn(2, 1, 5, 5, dtype=dtype)}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_blocks_without_uncertainty(name, dtype):
    block = moved(Block(WIDTH, **OPTIONS[name]), dtype)
    x = torch.randn(2, 5, WIDTH, dtype=dtype)
    zero = {key: torch.zeros_like(p) for key, p in block.named_parameters() if "_norm" not in key}
    for mask in masks(dtype):
        for form in FORMS:
            options = Options(form=form, activations="tangent")
            walk = Walk(block, from_variances(zero).bind(block), options, 4)
            state = walk(block, GaussianState(x), **mask)
            torch.testing.assert_close(state.mean, block(x, **mask), rtol=0, atol=TOLERANCE[dtype])
            assert state.variance.eq(0).all()
            assert not walk.unused()


@pytest.mark.parametrize("name", list(OPTIONS))
def test_blocks_agree_with_monte_carlo(name):
    network = moved(nn.Sequential(Block(WIDTH, **OPTIONS[name]), Block(WIDTH, **OPTIONS[name])))
    x = torch.randn(1, 5, WIDTH, dtype=torch.float64)
    # Norms of so few entries are far from linear where a query is short.
    variances = relative_variances(network, 0.005 if "qk_norm" in OPTIONS[name] else 0.05)
    variances = {key: value for key, value in variances.items() if "q_norm" not in key and "k_norm" not in key}
    with exact_kernels():
        _, covariance = monte_carlo(network, variances, x, 4000, torch.Generator().manual_seed(1))
    true = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    found = propagate(network, from_variances(variances), x, covariance="full")
    assert abs((found.variance.sqrt().flatten(1) / true).mean() - 1) < 0.02
    error = found.covariance.to_dense() - covariance
    assert (error.abs() / (true.unsqueeze(-1) * true.unsqueeze(-2))).max() < 0.2
    low = propagate(network, from_variances(variances), x, covariance="lowrank", num_tangents=1000)
    assert abs((low.variance / found.variance).sqrt().mean() - 1) < 0.03
    for form in ("diag", "blockdiag"):
        other = propagate(network, from_variances(variances), x, covariance=form)
        assert abs((other.variance / found.variance).sqrt().mean() - 1) < 0.35


@pytest.mark.parametrize("pool", list(POOLS))
@pytest.mark.parametrize("form", FORMS)
def test_whole_models(pool, form, dtype):
    model = moved(VisionTransformer(**POOLS[pool], scaled=True), dtype)
    x = torch.randn(3, 3, 8, 8, dtype=dtype)
    want = model(x).detach()
    last = ["blocks.2", "head", "norm."]
    options = {"covariance": form, "num_tangents": 8}
    zero = propagate(model, posterior(model, 0.0, last), x, activations="tangent", **options)
    torch.testing.assert_close(zero.mean, want, rtol=0, atol=TOLERANCE[dtype])
    assert zero.variance.eq(0).all()
    found = propagate(model, posterior(model, 0.1, last), x, generator=torch.Generator().manual_seed(0), **options)
    parts = propagate(
        model, posterior(model, 0.1, last), x, generator=torch.Generator().manual_seed(0), chunk_size=2, **options
    )
    assert found.variance.gt(0).all()
    torch.testing.assert_close(parts.variance, found.variance, rtol=1e-3, atol=0)


@pytest.mark.parametrize("pool", ["token", "registers"])
def test_patches_and_positions_may_be_uncertain(pool):
    model = moved(VisionTransformer(depth=1, **POOLS[pool]))
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    names = ["patch_embed", "cls_token", "pos_embed", "reg_token"]
    variances = relative_variances(model, 0.03, names)
    zero = propagate(model, posterior(model, 0.0, names), x, activations="tangent")
    torch.testing.assert_close(zero.mean, model(x).detach())
    _, covariance = monte_carlo(model, variances, x, 4000, torch.Generator().manual_seed(1))
    found = propagate(model, from_variances(variances), x, covariance="full")
    assert abs((found.variance / covariance.diagonal(dim1=-2, dim2=-1)).sqrt().mean() - 1) < 0.03


def test_masks_leave_no_trace_of_what_they_hide():
    block = moved(Block(WIDTH))
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    later = x.clone()
    later[:, 3:] = torch.randn_like(later[:, 3:])
    for form in FORMS:
        one, two = (
            Walk(block, posterior(block, 0.1).bind(block), Options(form=form), 8, torch.Generator().manual_seed(0))(
                block, GaussianState(given), is_causal=True
            )
            for given in (x, later)
        )
        torch.testing.assert_close(one.mean[:, :3], two.mean[:, :3])
        torch.testing.assert_close(one.variance[:, :3], two.variance[:, :3])


def test_early_blocks_run_as_they_are():
    model = moved(VisionTransformer())
    seen = []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, out, number=number: seen.append(number))
    walk = Walk(model, posterior(model, 0.1, ["blocks.2"]).bind(model), Options(form="diag"))
    walk(model, GaussianState(torch.randn(1, 3, 8, 8, dtype=torch.float64)))
    assert seen == [0, 1]


def test_what_is_known():
    assert timm.is_block(Block(WIDTH, scaled=True, qk_norm=RmsNorm))
    assert timm.is_attention(Attention(WIDTH))
    for change in (
        lambda block: setattr(block, "gamma_1", nn.Parameter(torch.ones(WIDTH))),  # as in relatives with scales
        lambda block: setattr(block.attn, "relative_position_bias_table", nn.Parameter(torch.ones(3))),
        lambda block: setattr(block.attn, "gate", nn.Linear(WIDTH, WIDTH)),
        lambda block: setattr(block, "attn", nn.MultiheadAttention(WIDTH, HEADS)),
    ):
        block = Block(WIDTH)
        change(block)
        assert not timm.is_block(block)

    class Other(nn.Module):
        pass

    assert not timm.is_block(Other())
    foreign = type("Block", (Block,), {"__module__": "elsewhere"})
    assert not timm.is_block(foreign(WIDTH))


def test_refusals():
    x = torch.randn(1, 5, WIDTH, dtype=torch.float64)
    block = moved(Block(WIDTH, qk_norm=nn.LayerNorm))
    walk = Walk(block, posterior(block, 0.1, ["q_norm"]).bind(block), Options())
    with pytest.raises(NotImplementedError, match=r"attn.q_norm, between queries and keys, .* got uncertain weights"):
        walk(block, GaussianState(x))
    odd = moved(Block(WIDTH))
    odd.attn.k_norm = nn.Tanh()
    walk = Walk(odd, posterior(odd, 0.1).bind(odd), Options())
    with pytest.raises(NotImplementedError, match=r"attn.k_norm.* got a Tanh"):
        walk(odd, GaussianState(x))
    model = moved(VisionTransformer(global_pool="max"))
    walk = Walk(model, posterior(model, 0.1, ["head"]).bind(model), Options())
    with pytest.raises(NotImplementedError, match=r"global_pool .*'max'"):
        walk(model, GaussianState(torch.randn(1, 3, 8, 8, dtype=torch.float64)))
    path = DropPath().train()
    walk = Walk(path, from_variances({}).bind(path), Options())
    with pytest.raises(ValueError, match="DropPath"):
        timm.drop_path(path, GaussianState(x), walk)


def test_packed_weights_are_those_of_a_plain_matrix():
    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    plain = Attention(WIDTH)
    assert timm.is_attention(plain)
    plain.qkv = Halved(WIDTH, 3 * WIDTH)
    assert not timm.is_attention(plain)
