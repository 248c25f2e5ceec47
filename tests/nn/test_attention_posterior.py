"""SGPAttention's posterior as a distribution, one-pass moments, and whether draws are draws from it."""

from itertools import product

import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from linear_operator.operators import (
    BlockInterleavedLinearOperator,
    LowRankRootAddedDiagLinearOperator,
    RootLinearOperator,
)

from gpseq.nn import SGPAttention
from tests.layers import COVARIANCES, EVERY_MEAN, KERNELS, MODES, mean_of, name_of, small

every_mean = pytest.mark.parametrize("options", EVERY_MEAN, ids=name_of)
DRAWN = [
    {"mode": "sgpa", "kernel": "rbf", "covariance": "per_dim"},
    {"mode": "sgpa", "kernel": "exponential", "covariance": "shared"},
    {"mode": "residual", "kernel": "exponential", "covariance": "low_rank"},
    {"mode": "softmax_kernel", "kernel": "exponential", "covariance": "diagonal"},
]
PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 0, 0, 1]]).bool()


def heads_of(layer: SGPAttention, *inputs: torch.Tensor) -> torch.Tensor:
    """The mean of the heads, ``(B, H, T, D)``."""
    return layer.posterior(*inputs).mean


def dense_covariance(layer: SGPAttention, x: torch.Tensor) -> torch.Tensor:
    """Covariance of the heads of one sequence, ``(H, D, T, T)``, from the formula; without a normalised kernel."""
    keys = layer.inducing.key(*layer._key_projection())
    scale, variance = layer.inducing.log_lengthscale.exp(), layer.inducing.log_variance.exp()
    query = layer.project_query(x.unsqueeze(0))[0]
    blocks = []
    for h in range(layer.num_heads):
        q, g = query[h] / scale[h], keys[h] / scale[h]

        def kernel(a, b, h=h):
            if layer.kernel == "exponential":
                return variance[h] * torch.exp(a @ b.mT)
            return variance[h] * torch.exp(-0.5 * (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1))

        # The whitening is that of the RBF kernel, and the exponential one is that between factors.
        factor = torch.exp(0.5 * g.square().sum(-1)) if layer.kernel == "exponential" else torch.ones(len(g)).double()
        tril = torch.linalg.cholesky(kernel(g, g) / factor.outer(factor))
        features = torch.linalg.solve_triangular(tril, kernel(g, q) / factor.unsqueeze(-1), upper=False).mT
        for d in range(layer.head_dim):
            own = 0 if layer.covariance == "shared" else d
            std = layer.inducing.log_diagonal[h, own].exp()
            whitened = torch.diag(std.square())
            if layer.inducing.lower is not None:
                root = layer.inducing.lower[h, own].tril(-1) + torch.diag(std)
                whitened = root @ root.mT
            elif layer.inducing.root is not None:
                whitened = whitened + layer.inducing.root[h, own] @ layer.inducing.root[h, own].mT
            blocks.append(kernel(q, q) + features @ (whitened - torch.eye(len(g))) @ features.mT)
    return torch.stack(blocks).unflatten(0, (layer.num_heads, layer.head_dim))


def blocks_of(distribution: MultitaskMultivariateNormal) -> torch.Tensor:
    """Covariance of each dimension by itself, ``(*batch, D, T, T)``, after a check that they are independent."""
    length, dims = distribution.event_shape
    dense = distribution.covariance_matrix.unflatten(-1, (length, dims)).unflatten(-3, (length, dims))
    blocks = dense.diagonal(dim1=-3, dim2=-1).movedim(-1, -3)
    apart = torch.diag_embed(blocks.movedim(-3, -1), dim1=-3, dim2=-1)
    assert dense.equal(apart)
    return blocks


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", ["sgpa", "residual"])
def test_covariances_are_those_of_the_formula(mode, kernel, covariance):
    layer = small(mode=mode, kernel=kernel, covariance=covariance, jitter=0.0)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    want = torch.stack([dense_covariance(layer, sequence) for sequence in x])
    full = layer.posterior(x, x, x, full=True)
    assert (full.batch_shape, full.event_shape) == ((3, 2), (5, 4))
    torch.testing.assert_close(blocks_of(full), want)
    lazy = layer.posterior(x, x, x)
    assert (lazy.batch_shape, lazy.event_shape) == ((3, 2), (5, 4))
    torch.testing.assert_close(lazy.variance, want.diagonal(dim1=-2, dim2=-1).mT)
    torch.testing.assert_close(lazy.mean, full.mean)
    # Between tokens: what goes through the inducing keys.
    between = ~torch.eye(5).bool()
    prior = dense_covariance(_at_prior(layer), x[0])
    explained = (want[0] - prior)[..., between]
    torch.testing.assert_close(
        (blocks_of(lazy)[0] - blocks_of(_at_prior(layer).posterior(x[0], x[0], x[0])))[..., between], explained
    )


def _at_prior(layer: SGPAttention) -> SGPAttention:
    """The same layer with q(u) of no whitened covariance but the identity."""
    other = small(mode=layer.mode, kernel=layer.kernel, covariance="diagonal", jitter=0.0)
    state = {k: v for k, v in layer.state_dict().items() if not k.startswith("inducing.l") or "length" in k}
    for name in ("inducing.location", "inducing.log_lengthscale", "inducing.log_variance"):
        state[name] = layer.state_dict()[name]
    state.pop("inducing.root", None)
    other.load_state_dict({**other.state_dict(), **state})
    torch.nn.init.zeros_(other.inducing.log_diagonal)
    return other


@every_mean
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_posterior_is_lazily_low_rank_plus_diagonal(options, covariance):
    layer = small(**options, covariance=covariance)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    for batch in ((3,), ()):
        inputs = x if batch else x[0]
        posterior = layer.posterior(inputs, inputs, inputs)
        assert isinstance(posterior, MultitaskMultivariateNormal)
        assert (posterior.batch_shape, posterior.event_shape) == ((*batch, 2), (5, 4))
        lazy = posterior.lazy_covariance_matrix
        assert isinstance(lazy, BlockInterleavedLinearOperator)
        assert isinstance(lazy.base_linear_op, LowRankRootAddedDiagLinearOperator)
        root = lazy.base_linear_op._linear_op.root
        assert root.shape == (*batch, 2, 4, 5, 5 if covariance == "low_rank" else 3)
        full = layer.posterior(inputs, inputs, inputs, full=True)
        torch.testing.assert_close(posterior.variance, full.variance)
        torch.testing.assert_close(posterior.mean, full.mean)
        with torch.no_grad():
            value = full.rsample()
        assert posterior.rsample().shape == value.shape == (*batch, 2, 5, 4)
        for distribution in (posterior, full):
            dense = torch.distributions.MultivariateNormal(
                distribution.mean.flatten(-2), distribution.covariance_matrix
            )
            torch.testing.assert_close(
                distribution.log_prob(value), dense.log_prob(value.flatten(-2)), rtol=1e-6, atol=1e-6
            )
    posterior.log_prob(value).sum().backward()
    assert layer.inducing.log_diagonal.grad.ne(0).any()


def test_rsample_of_the_posterior_has_its_moments():
    layer = small(covariance="per_dim")
    x = torch.randn(4, 8, dtype=torch.float64)
    for full in (False, True):
        posterior = layer.posterior(x, x, x, full=full)
        with torch.no_grad():
            draws = posterior.rsample(torch.Size([10000])).flatten(-2)
        centred = draws - posterior.mean.flatten(-2)
        sample = torch.einsum("nhi,nhj->hij", centred, centred) / len(draws)
        error = (sample - posterior.covariance_matrix).abs().max()
        assert error < 0.08 * posterior.variance.max()


@every_mean
def test_posterior_under_masks(options):
    layer = small(**options)
    x, y = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    for given in ({}, {"key_padding_mask": PADDING}, {"is_causal": True}, {"attn_mask": torch.rand(6, 5, 5) < 0.4}):
        for key in (x, y):
            posterior = layer.posterior(x, key, key, **given)
            heads = posterior.mean.transpose(1, 2).flatten(-2)
            out = layer.out_proj(heads)
            if key is x and "key_padding_mask" in given:
                out = out.masked_fill(PADDING.unsqueeze(-1), 0.0)
            torch.testing.assert_close(out, mean_of(layer, x, key, key, **given))
    late = small(**options, batch_first=False)
    late.load_state_dict(layer.state_dict())
    swapped = x.transpose(0, 1)
    torch.testing.assert_close(late.posterior(swapped, swapped, swapped).mean, layer.posterior(x, x, x).mean)


def test_posterior_in_single_precision_at_the_inducing_keys():
    layer = small(torch.float32, moved=False)
    with torch.no_grad():
        layer.inducing.log_diagonal.fill_(-9.0)
        layer.inducing.location[1] = layer.inducing.location[0]
    x = layer.inducing.location[0].detach().unsqueeze(0)
    posterior = layer.posterior(x, x, x)
    variance = posterior.lazy_covariance_matrix.diagonal()
    assert variance.gt(0).all()
    assert variance[:, :1].max() < 1e-4
    assert posterior.log_prob(posterior.mean).isfinite().all()
    assert posterior.rsample().isfinite().all()


def test_variance_returns_to_the_prior_far_away():
    for mode in ("sgpa", "residual"):
        layer = small(mode=mode)
        x = torch.cat([layer.inducing.location[0, :1], 1e4 * torch.randn(1, 8).double()]).detach()
        variance = layer.posterior(x, x, x).variance
        prior = layer.inducing.log_variance.exp().unsqueeze(-1)
        torch.testing.assert_close(variance[:, 1], prior.expand(2, 4))
        with torch.no_grad():
            layer.inducing.log_diagonal.fill_(-3.0)
            layer.inducing.lower.zero_()
        known = layer.posterior(x, x, x).variance[0]
        assert known[0].max() < 0.1 * known[1].min()


@pytest.mark.parametrize("options", DRAWN, ids=name_of)
def test_draws_of_every_kind(options):
    layer = small(**options)
    with torch.no_grad():
        layer.out_proj.weight.copy_(torch.eye(8))
        layer.out_proj.bias.zero_()
    # Near each other, so that they covary.
    x = 0.3 * torch.randn(1, 3, 8, dtype=torch.float64)
    many = x.expand(4000, 3, 8)
    posterior = layer.posterior(x, x, x, full=True)
    want, mean = blocks_of(posterior)[0], mean_of(layer, x, x, x)[0]
    scale = want.diagonal(dim1=-2, dim2=-1).amax((-2, -1))
    for sampling in ("marginal", "joint", "pathwise"):
        layer.sampling = sampling
        with torch.no_grad():
            draws = layer(many, many, many, need_weights=False)[0] - mean
        draws = draws.unflatten(-1, (2, 4))  # (N, T, H, D)
        sample = torch.einsum("nshd,nthd->hdst", draws, draws) / len(draws)
        target = want if sampling != "marginal" else torch.diag_embed(want.diagonal(dim1=-2, dim2=-1))
        # Random features of a draw are shared by the batch: their error does not fall with the number of draws.
        tolerance = 0.25 if sampling == "pathwise" else 0.12
        assert ((sample - target).abs() < tolerance * scale[:, None, None, None]).all(), sampling
        # Heads and dimensions are independent of each other.
        across = torch.einsum("nthd,nthe->hde", draws, draws) / len(draws) / 3
        between = across[:, ~torch.eye(4).bool()]
        assert (between.abs() < 0.12 * scale[:, None]).all()
        assert (
            torch.einsum("ntd,nte->de", draws[:, :, 0], draws[:, :, 1]) / len(draws) / 3
        ).abs().max() < 0.12 * scale.max()
    assert want[0, 0, 0, 1] > 0.1 * scale[0]


def test_sequences_draw_independently():
    for sampling in ("marginal", "joint", "pathwise"):
        layer = small(sampling=sampling)
        x = torch.randn(1, 3, 8, dtype=torch.float64).expand(4, 3, 8)
        out, _ = layer(x, x, x)
        assert len(out.flatten(1).unique(dim=0)) == 4
        layer.sampling = "mean"
        out, _ = layer(x, x, x)
        torch.testing.assert_close(out, out[:1].expand_as(out))


@every_mean
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_conditional_has_the_moments_of_the_draws(options, cross):
    layer = small(**options, covariance="per_dim")
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    y = torch.randn(3, 5, 8, dtype=torch.float64) if cross else x
    given = {"key_padding_mask": PADDING}
    mean, covariance = layer.conditional(x, y, key_padding_mask=PADDING) if cross else layer.conditional(x, **given)
    assert isinstance(covariance, RootLinearOperator)
    assert covariance.shape == (3, 5, 8, 8)
    torch.testing.assert_close(mean, mean_of(layer, x, y, y, **given))
    variance = layer.posterior(x, y, y, **given).variance.transpose(1, 2).flatten(-2)
    weight = layer.out_proj.weight
    want = (weight * variance.unsqueeze(-2)) @ weight.mT
    if not cross:
        assert mean[PADDING].eq(0).all()
        want = want.masked_fill(PADDING[..., None, None], 0.0)
    torch.testing.assert_close(covariance.to_dense(), want)
    late = small(**options, covariance="per_dim", batch_first=False)
    late.load_state_dict(layer.state_dict())
    moved = late.conditional(x.transpose(0, 1), y.transpose(0, 1) if cross else None, **given)
    torch.testing.assert_close(moved[0].transpose(0, 1), mean)
    torch.testing.assert_close(moved[1].to_dense().transpose(0, 1), want)
    alone = layer.conditional(x[0], y[0])
    torch.testing.assert_close(alone[0], mean[0])
    torch.testing.assert_close(alone[1].to_dense(), want[0])


def test_conditional_equals_monte_carlo():
    for mode in MODES:
        layer = small(mode=mode)
        x = torch.randn(1, 3, 8, dtype=torch.float64)
        mean, covariance = layer.conditional(x, is_causal=True)
        many = x.expand(4000, 3, 8)
        with torch.no_grad():
            draws = layer(many, many, many, need_weights=False, is_causal=True)[0]
        centred = draws - mean
        sample = torch.einsum("nti,ntj->tij", centred, centred) / len(draws)
        scale = covariance.diagonal(dim1=-2, dim2=-1).max()
        assert (sample - covariance.to_dense()[0]).abs().max() < 0.12 * scale
        assert (draws.mean(0) - mean[0]).abs().max() < 0.06 * scale.sqrt()


def test_variance_has_a_gradient_where_it_is_zero():
    layer = small(torch.float32, num_inducing=1)
    with torch.no_grad():
        layer.inducing.log_diagonal.fill_(-60.0)
    x = layer.inducing.location[0].detach()
    layer.jitter = 0.0
    for call in (lambda: layer.conditional(x)[1].to_dense(), lambda: layer(x, x, x)[0]):
        layer.zero_grad()
        call().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_a_seed_or_a_generator_reproduces():
    for mode, sampling in product(MODES, ("marginal", "joint", "pathwise")):
        layer = small(mode=mode, sampling=sampling)
        x = torch.randn(2, 3, 8, dtype=torch.float64)
        torch.manual_seed(5)
        first = layer(x, x, x)[0]
        torch.manual_seed(5)
        assert layer(x, x, x)[0].equal(first)
        assert not layer(x, x, x)[0].equal(first)
        layer.generator, state = torch.Generator().manual_seed(5), torch.get_rng_state()
        assert layer(x, x, x)[0].equal(first)
        assert torch.get_rng_state().equal(state)
