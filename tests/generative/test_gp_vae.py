"""The GP-prior VAE: its bound, what is missing, windows, tasks, states, and what it refuses."""

import copy
import io

import gpytorch
import pytest
import torch
from torch import nn

from gpseq.features import HippoFeatures, InducingPoints, SelectedPoints
from gpseq.generative.geco import Geco
from gpseq.generative.gp_vae import GPPriorVAE
from gpseq.generative.observations import BernoulliObservations

L, D = 2, 6


class Network(nn.Module):
    """Of each time by itself, any number of axes in front."""

    def __init__(self, before: int, after: int, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(before, 16), nn.Tanh(), nn.Linear(16, after))
        self.shape, self.before = shape, before

    def forward(self, x):
        if x.shape[-1] != self.before:
            x = x.flatten(-2)
        out = self.layers(x)
        return out.unflatten(-1, self.shape) if self.shape else out


def kernel(channels: int = L):
    made = gpytorch.kernels.RBFKernel(batch_shape=torch.Size([channels]))
    made.lengthscale = torch.linspace(0.8, 1.2, channels).view(channels, 1, 1)
    return made


def model(prior: str = "hippo", dtype=torch.float32, **options):
    torch.manual_seed(0)
    encoder, decoder = Network(D, 2 * L), Network(L, D)
    if prior == "markov":
        return GPPriorVAE(encoder, decoder, num_latents=L, prior="matern32", **options).to(dtype)
    features = HippoFeatures(8, horizon=5.0) if prior == "hippo" else InducingPoints(torch.linspace(0, 5, 8)[:, None])
    return GPPriorVAE(encoder, decoder, features, kernel(), L, **options).to(dtype)


def series(n: int = 20, batch: tuple[int, ...] = (), dtype=torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = 5 * torch.rand(*batch, n, generator=generator, dtype=torch.float64).sort(-1).values
    mixing = torch.randn(2, D, generator=generator, dtype=torch.float64)
    y = torch.stack([x.sin(), (0.7 * x).cos()], -1) @ mixing
    return x.to(dtype), y.to(dtype)


PRIORS = ["hippo", "points", "markov"]


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_shapes_and_gradients(prior, batch, dtype):
    vae, (x, y) = model(prior, dtype), series(batch=batch, dtype=dtype)
    out = vae(x, y)
    assert out.recon.shape == batch and out.kl.shape == (*batch, L) and out.loss.dtype == dtype
    torch.testing.assert_close(out.loss.double(), -out.elbo)
    torch.testing.assert_close(out.elbo, out.recon.sum() - out.kl.sum())
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters() if p.requires_grad)
    assert (out.kl >= 0).all()
    p = vae.predict(x[..., :4], x, y)
    assert p.batch_shape == (*batch, 4) and p.event_shape == (D,)
    assert vae.sample(x, 3).shape == (3, *y.shape)


@pytest.mark.parametrize("prior", PRIORS)
def test_the_bound_is_below_the_evidence_of_a_linear_model(prior):
    """With a linear decoder the density of the data is known: no bound may pass it."""
    torch.manual_seed(1)
    n = 12
    x, y = series(n, dtype=torch.float64)
    encoder, decoder = nn.Linear(D, 2 * L), nn.Linear(L, D, bias=False)
    vae = model(prior, torch.float64, noise=0.1)
    vae.encoder, vae.decoder = encoder.double(), decoder.double()
    k = (
        (lambda a: vae.prior.covar_module(a.unsqueeze(-1)).to_dense())
        if prior != "markov"
        else (lambda a: gpytorch.kernels.MaternKernel(1.5, batch_shape=torch.Size([L])).double().initialize(
            lengthscale=vae.prior.lengthscale.view(L, 1, 1)
        )(a.unsqueeze(-1)).to_dense())
    )  # fmt: skip
    W = decoder.weight
    covariance = sum(torch.kron(k(x)[c], torch.outer(W[:, c], W[:, c])) for c in range(L))
    covariance = covariance + 0.1 * torch.eye(n * D, dtype=torch.float64)
    evidence = torch.distributions.MultivariateNormal(torch.zeros(n * D).double(), covariance).log_prob(y.flatten())

    @torch.no_grad()
    def bound():
        out = vae(x.expand(200, n), y.expand(200, n, D), generator=torch.Generator().manual_seed(0))
        return out.recon - out.kl.sum(-1)

    bounds = bound()
    assert bounds.mean() < evidence
    optimiser = torch.optim.Adam([*encoder.parameters()], 0.05)
    for _ in range(150):
        optimiser.zero_grad()
        vae(x, y).loss.backward()
        optimiser.step()
    after = bound()
    assert bounds.mean() < after.mean() < evidence + 3 * after.std() / 200**0.5
    assert evidence - after.mean() < 0.2 * (evidence - bounds.mean())


@pytest.mark.parametrize("prior", PRIORS)
def test_a_missing_time_is_as_if_it_were_not_there(prior):
    vae, (x, y) = model(prior, torch.float64), series(dtype=torch.float64)
    missing = torch.arange(20) % 4 == 1
    holes = y.clone()
    holes[missing] = torch.nan
    out, other = vae(x, holes, missing), vae(x[~missing], y[~missing])
    torch.testing.assert_close(out.kl, other.kl)
    torch.testing.assert_close(out.posterior.mean[:, ~missing], other.posterior.mean)
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in vae.parameters())


@pytest.mark.parametrize("prior", PRIORS)
def test_a_missing_entry_has_no_part_in_anything(prior):
    vae, (x, y) = model(prior, torch.float64), series(dtype=torch.float64)
    missing = torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    y = y.requires_grad_()
    out = vae(x, y, missing)
    out.loss.backward()
    assert (y.grad[missing] == 0).all() and (y.grad[~missing] != 0).any()
    other = vae(x, torch.where(missing, 99.0, y.detach()), missing, generator=torch.Generator().manual_seed(3))
    again = vae(x, torch.where(missing, torch.nan, y.detach()), missing, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(other.elbo, again.elbo)


@pytest.mark.parametrize("prior", PRIORS)
def test_lengths_may_differ(prior):
    """Padding at the end of a short series is data that are missing."""
    vae, (x, y) = model(prior, torch.float64), series(batch=(2,), dtype=torch.float64)
    missing = torch.zeros(2, 20, dtype=torch.bool)
    missing[1, 13:] = True
    out, short = vae(x, y, missing), vae(x[1, :13], y[1, :13])
    torch.testing.assert_close(out.kl[1], short.kl)


def test_images_and_coins():
    torch.manual_seed(0)
    encoder, decoder = Network(20, 2 * L), Network(L, 20, (4, 5))
    vae = GPPriorVAE(encoder, decoder, HippoFeatures(8, horizon=5.0), kernel(), L, likelihood="bernoulli")
    x, _ = series()
    y = (torch.rand(20, 4, 5) > 0.5).float()
    out = vae(x, y)
    assert isinstance(vae.likelihood, BernoulliObservations) and out.recon < 0
    p = vae.predict(x, x, y)
    assert p.event_shape == (20,) and p.noise is None and ((p.mean >= 0) & (p.mean <= 1)).all()
    assert vae.sample(x, 2).shape == (2, 20, 4, 5)
    assert set(vae.sample(x, 2, noise=True).unique().tolist()) <= {0.0, 1.0}
    assert vae.impute(x, y, torch.arange(20) > 15).batch_shape == (20,)


def test_weights_of_the_divergence():
    x, y = series()
    noise = [torch.Generator().manual_seed(0) for _ in range(3)]
    one, four = model()(x, y, generator=noise[0]), model(beta=4.0)(x, y, generator=noise[1])
    torch.testing.assert_close(four.elbo, one.elbo)
    torch.testing.assert_close(four.loss - one.loss, 3 * one.kl.sum().float(), rtol=1e-4, atol=1e-4)


def test_geco_raises_its_weight_until_the_error_is_small_enough():
    strict, loose = model(geco=Geco(1e-6)), model(geco=Geco(1e6))
    x, y = series()
    for vae in (strict, loose):
        for _ in range(3):
            vae(x, y).loss.backward()
    assert strict.geco.multiplier > 1 > loose.geco.multiplier
    before = strict.geco.multiplier.clone()
    strict.eval()(x, y)
    assert torch.equal(strict.geco.multiplier, before)
    with pytest.raises(ValueError, match="tolerance: expected a positive number"):
        Geco(0.0)


def test_windows_count_for_all():
    vae, (x, y) = model(dtype=torch.float64), series(dtype=torch.float64)
    out = vae(x[:5], y[:5], num_data=20)
    information = vae(x[:5], y[:5]).posterior.state.G
    torch.testing.assert_close(out.posterior.state.G, 4 * information)


def test_training_lowers_the_loss_and_imputes_better_than_nothing():
    vae, (x, y) = model(), series(40)
    optimiser = torch.optim.Adam(vae.parameters(), 0.02)
    missing = torch.zeros(40, dtype=torch.bool)
    missing[10:18] = True
    first = vae(x, y, missing).loss.item()
    for _ in range(150):
        optimiser.zero_grad()
        vae(x, y, missing).loss.backward()
        optimiser.step()
    assert vae(x, y, missing).loss.item() < 0.2 * first
    holes = torch.where(missing[:, None], torch.nan, y)
    p = vae.impute(x, holes, missing)
    assert (p.mean[missing] - y[missing]).square().mean().sqrt() < 0.4 * y[missing].std()
    assert p.samples.shape[1:] == y.shape and (p.samples[:, ~missing] == y[~missing]).all()
    assert (p.noise[:, ~missing] == 0).all() and (p.noise[:, missing] > 0).all()


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_tasks_on_a_fixed_basis_are_one_batch():
    vae, (x, y) = model(dtype=torch.float64), series(30, dtype=torch.float64)
    batch = copy.deepcopy(vae)
    vae.update(x[:12], y[:12])
    vae.update(x[12:], y[12:])
    batch.update(x, y, batch_size=7)
    torch.testing.assert_close(vae.state.G, batch.state.G)
    torch.testing.assert_close(vae.state.r, batch.state.r)
    draws = [v.predict(x, generator=torch.Generator().manual_seed(0)).mean for v in (vae, batch)]
    torch.testing.assert_close(*draws, rtol=1e-5, atol=1e-5)
    direct = model(dtype=torch.float64).predict(x, x, y, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws[0], direct.mean, rtol=1e-5, atol=1e-5)


def test_the_bound_of_a_task_adds_up():
    """On a fixed basis and kernel, what each task adds to the evidence of the pseudo-data is that of all."""
    vae, (x, y) = model(dtype=torch.float64), series(30, dtype=torch.float64)
    whole = vae(x, y).posterior.log_evidence
    vae.update(x[:12], y[:12])
    torch.testing.assert_close(vae(x[12:], y[12:]).posterior.log_evidence, whole)


def test_a_horizon_moves_with_the_tasks_and_forward_leaves_all_as_it_was():
    vae, (x, y) = model(), series()
    vae.update(x, y)
    before = {name: value.clone() for name, value in vae.state_dict().items() if isinstance(value, torch.Tensor)}
    vae(x + 5, y).loss.backward()
    for name, value in vae.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, before[name]), name
    vae.update(x + 5, y)
    assert vae.prior.features.horizon >= 10 and vae.state.count.tolist() == [40, 40]
    assert vae.predict(torch.tensor([1.0, 9.0])).mean.isfinite().all()


def test_selected_points_serve_one_kernel():
    kernel = gpytorch.kernels.RBFKernel()
    vae = GPPriorVAE(Network(D, 2 * L), Network(L, D), SelectedPoints(6), kernel, L)
    x, y = series()
    vae.update(x, y)
    vae(x + 5, y).loss.backward()
    vae.update(x + 5, y)
    assert vae.prior.features.num_features == 6 and vae.state.count.tolist() == [40, 40]


def test_a_failed_update_changes_nothing():
    vae, (x, y) = model(), series()
    vae.update(x, y)
    state, features = vae.state, vae.prior.features
    for bad in (torch.full_like(y, torch.nan), y[:5]):
        with pytest.raises(ValueError, match="y: expected"):
            vae.update(x + 20, bad)
    assert vae.prior.features is features
    assert all(a is b for (_, a), (_, b) in zip(vae.state.items(), state.items(), strict=True))


def test_a_stream_goes_on_from_a_file():
    vae, (x, y) = model(), series()
    vae.update(x, y)
    vae.update(x + 3, y)
    file = io.BytesIO()
    torch.save(vae.state_dict(), file)
    file.seek(0)
    other = model()
    other.load_state_dict(torch.load(file, weights_only=True))
    for v in (vae, other):
        v.update(x + 8, y)
    for (name, a), (_, b) in zip(vae.state.items(), other.state.items(), strict=True):
        assert torch.equal(a, b), name
    assert other.prior.features.horizon == vae.prior.features.horizon


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": torch.zeros(19, D)}, ValueError, r"y: expected shape \(20, '\*obs'\)"),
        ({"y": torch.zeros(20, D, dtype=torch.long)}, TypeError, "y: expected a floating-point tensor"),
        ({"y": torch.full((20, D), torch.inf)}, ValueError, "y: expected finite data"),
        ({"missing": torch.ones(20, dtype=torch.bool)}, ValueError, "missing: expected some observed data"),
        ({"missing": torch.zeros(20)}, TypeError, "missing: expected bool"),
        ({"missing": torch.zeros(7, dtype=torch.bool)}, ValueError, "missing: expected shape"),
        ({"x": torch.full((20,), torch.nan)}, ValueError, "x: expected finite times"),
        ({"num_data": 0}, ValueError, "num_data: expected at least 1"),
        ({"x": torch.zeros(0), "y": torch.zeros(0, D)}, ValueError, "x: expected at least one time"),
    ],
)
def test_bad_data_are_refused(change, error, message):
    x, y = series()
    with pytest.raises(error, match=message):
        model()(**({"x": x, "y": y} | change))


def test_bad_models_are_refused():
    features, networks = HippoFeatures(8, horizon=5.0), (Network(D, 2 * L), Network(L, D))
    for options, error, message in (
        ({}, ValueError, "features: expected either features with a kernel, or a prior"),
        ({"features": features, "prior": "matern32"}, ValueError, "features: expected either"),
        ({"features": features}, TypeError, "features: expected inducing features and a kernel"),
        ({"prior": "matern32", "likelihood": "poisson"}, ValueError, "likelihood: expected one of"),
        ({"prior": "matern32", "beta": -1.0}, ValueError, "beta: expected"),
    ):
        with pytest.raises(error, match=message):
            GPPriorVAE(*networks, num_latents=L, **options)
    with pytest.raises(TypeError, match="decoder: expected a module, got function"):
        GPPriorVAE(networks[0], lambda x: x, prior="matern32")
    x, y = series()
    with pytest.raises(ValueError, match=r"encoder: expected output \(20, 6\), got \(20, 4\)"):
        GPPriorVAE(*networks, num_latents=3, prior="matern32")(x, y)
    with pytest.raises(ValueError, match="decoder: expected output of the shape of y"):
        GPPriorVAE(networks[0], Network(L, 5), num_latents=L, prior="matern32")(x, y)
    markov = model("markov")
    with pytest.raises(TypeError, match="prior: expected a sparse one"):
        markov.update(x, y)
    with pytest.raises(ValueError, match="x: expected series to predict from"):
        markov.predict(x)
    with pytest.raises(ValueError, match="x: expected both x and y"):
        markov.predict(x, x)
    with pytest.raises(ValueError, match="x: expected one series"):
        model().update(*series(batch=(2,)))


@pytest.mark.parametrize("prior", ["sparse", "matern32"])
def test_series_of_one_time_are_series(prior: str) -> None:
    """(b, 1) beside data is b series, not b inputs of one column; with (b, 1, 1) nobody has to guess."""
    options: dict = {"prior": prior}
    if prior == "sparse":
        kernel = gpytorch.kernels.RBFKernel(batch_shape=torch.Size([2]))
        options = {"features": InducingPoints(torch.linspace(0, 1, 8)), "covar_module": kernel}
    vae = GPPriorVAE(nn.Linear(6, 4), nn.Linear(2, 6), num_latents=2, **options)
    x, y = torch.linspace(0, 1, 8).expand(3, 8), torch.randn(3, 8, 6)
    new = torch.tensor([[0.1], [0.2], [0.3]])
    drawn = [
        vae.predict(at, x, y, generator=torch.Generator().manual_seed(0))
        for at in (new, new.unsqueeze(-1), torch.cat([new, new], 1))
    ]
    assert [tuple(p.batch_shape) for p in drawn] == [(3, 1), (3, 1), (3, 2)]
    torch.testing.assert_close(drawn[0].samples, drawn[1].samples)
    alone = vae.predict(new[1], x[1], y[1], num_samples=4000, generator=torch.Generator().manual_seed(1))
    together = vae.predict(new, x, y, num_samples=4000, generator=torch.Generator().manual_seed(2))
    assert (alone.mean - together.mean[1]).abs().max() < 0.1
    assert vae(x[:, :1], y[:, :1]).recon.shape == (3,)
    shared = vae.predict(torch.tensor([0.4, 0.6]), x, y)
    assert tuple(shared.batch_shape) == (3, 2)
    with pytest.raises(ValueError, match="x_new: expected shape"):
        vae.predict(torch.zeros(3, 2, 2), x, y)
