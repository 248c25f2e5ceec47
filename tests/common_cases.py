"""Every public module of the package, with an example of how it is called: what ``gpseq.testing.check`` is run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.models import ApproximateGP
from torch import Tensor, nn

import gpseq
from gpseq.features import HippoFeatures, InducingPoints, PathFeatures, PyramidFeatures, SelectedPoints

#: An object, its arguments, and options of the checks.
Case = tuple[Any, tuple[Any, ...], dict[str, Any]]

TIMES = torch.linspace(0.1, 4.9, 12)


class Process(ApproximateGP):
    """A model whose strategy is made by ``make(model)``."""

    def __init__(self, make: Callable[[ApproximateGP], Any], batch: tuple[int, ...] = ()) -> None:
        super().__init__(make(self))
        shape = torch.Size(batch)
        self.mean_module = gpytorch.means.ConstantMean(batch_shape=shape)
        self.covar_module = gpytorch.kernels.ScaleKernel(
            gpytorch.kernels.RBFKernel(batch_shape=shape), batch_shape=shape
        )

    def forward(self, x: Tensor) -> MultivariateNormal:
        """Prior."""
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def cholesky(size: int, batch: tuple[int, ...] = ()) -> Any:
    """A free q(u)."""
    return gpytorch.variational.CholeskyVariationalDistribution(size, batch_shape=torch.Size(batch), mean_init_std=0.3)


def interdomain(batch: tuple[int, ...] = ()) -> Callable[[ApproximateGP], Any]:
    """Its strategy."""
    return lambda model: gpseq.variational.InterdomainVariationalStrategy(
        model, HippoFeatures(8, horizon=5.0), cholesky(8, batch)
    )


def began(model: Any) -> Any:
    """A model whose q(u) has its start."""
    model.variational_strategy.variational_params_initialized.fill_(1)
    return model.eval()


def marginals(model: Any, x: Tensor, **inputs: Any) -> Any:
    """Mean and variance of a model."""
    return model(x, **inputs)


def updated(model: Any, x: Tensor, y: Tensor) -> Any:
    """What a stream says after a chunk."""
    return model.update(x, y)(x)


def stream(**options: Any) -> Any:
    """A stream that has seen something."""
    model = gpseq.models.StreamingGP(
        HippoFeatures(10, horizon=6.0),
        gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()),
        gpytorch.likelihoods.GaussianLikelihood(),
        **options,
    ).eval()
    return model.update(TIMES[:6], TIMES[:6].sin())


NAN = torch.full((12,), torch.nan)
BAD_CHUNKS = [(TIMES, NAN), (TIMES, torch.zeros(11)), (NAN, TIMES), ("times", TIMES), (TIMES, TIMES.to(torch.int64))]


def streaming() -> Case:
    """A stream."""
    # Beliefs are buffers, closed in form: there is nothing to pass a gradient to within an update.
    return stream(), (TIMES, TIMES.sin()), {"call": updated, "bad": BAD_CHUNKS, "empty": True, "skip": ["gradients"]}


def predicting() -> Case:
    """The prediction of a stream."""
    return stream(), (TIMES,), {"call": marginals, "skip": ["gradients"]}


def fleet() -> Case:
    """Three streams."""
    model = gpseq.models.StreamingFleet(
        3, HippoFeatures(10, horizon=6.0), gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.GaussianLikelihood()
    ).eval()
    y = torch.stack([TIMES.sin(), TIMES.cos(), TIMES / 5])
    bad = [(TIMES, TIMES), (TIMES, torch.full((3, 12), torch.inf)), (NAN, y)]
    return model, (TIMES, y), {"call": updated, "bad": bad, "skip": ["gradients", "empty"]}


def ensemble() -> Case:
    """Two streams with weights."""
    model = gpseq.models.StreamingEnsemble([stream(), stream()])

    return model, (TIMES, TIMES.sin()), {"call": _mixture, "bad": BAD_CHUNKS[:3], "skip": ["gradients", "empty"]}


def _mixture(model: Any, x: Tensor, y: Tensor) -> Any:
    return model.update(x, y).predict(x)


def space_time() -> Case:
    """Sensors in space."""
    places = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    model = gpseq.models.SpaceTimeStreamingGP(
        HippoFeatures(14, horizon=6.0),
        places,
        places,
        gpytorch.kernels.RBFKernel(),
        gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()),
        gpytorch.likelihoods.GaussianLikelihood(),
    ).eval()
    readings = torch.stack([TIMES.sin(), TIMES.cos(), TIMES / 5], -1)
    bad = [(TIMES, readings[:, :2]), (TIMES, readings * torch.nan)]
    return model, (TIMES, readings), {"call": _readings, "bad": bad, "skip": ["gradients", "empty"]}


def _readings(model: Any, x: Tensor, y: Tensor) -> Any:
    return model.update(x, y).marginals(x[:4], torch.tensor([[0.5, 0.5]]))


def strategy(make: Callable[[ApproximateGP], Any], batch: tuple[int, ...] = ()) -> Case:
    """A model with a strategy."""
    return began(Process(make, batch)), (TIMES.unsqueeze(-1),), {"call": marginals}


def sgpa_strategy(decoupled: bool) -> Case:
    """A process over the tokens of a sequence."""
    tokens = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    points = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    if decoupled:
        make = lambda model: gpseq.variational.DecoupledSGPAVariationalStrategy(  # noqa: E731
            model, points, cholesky(3), tokens, torch.linspace(-1, 1, 4)
        )
        return began(Process(make)), (tokens,), {"call": marginals}
    model = began(Process(lambda model: gpseq.variational.SGPAVariationalStrategy(model, tokens, cholesky(4))))
    return model, (tokens, tokens, tokens[:, 0]), {"call": _attended, "empty": False, "skip": ["gradients", "empty"]}


def _attended(model: Any, x: Tensor, key: Tensor, value: Tensor) -> Any:
    return model(x, key=key, value=value)


def attention(name: str, **options: Any) -> Case:
    """A layer with the call of torch's attention; x is query, key and value."""
    layer = getattr(gpseq.nn, name)(8, 2, batch_first=True, sampling="mean", **options)
    return layer, (tokens(3, 5, 8),), {"call": _self_attention, "batched": True, "skip": ["gradients"]}


def _self_attention(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x, need_weights=False)[0]


def drawn_attention(name: str, **options: Any) -> Case:
    """The same with draws, and everything that is learnt."""
    layer = getattr(gpseq.nn, name)(8, 2, batch_first=True, **options)
    return layer, (tokens(3, 5, 8),), {"call": _with_divergence, "random": True}


def _with_divergence(layer: nn.Module, x: Tensor) -> list[Tensor]:
    return [layer(x, x, x, need_weights=False)[0], layer.kl_divergence()]  # type: ignore[operator]


def encoder(layers: int) -> Case:
    """A transformer whose attention is a process."""
    layer = gpseq.nn.SGPATransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True, num_inducing=4)
    model = layer if not layers else gpseq.nn.SGPATransformerEncoder(layer, layers)
    return model, (tokens(3, 5, 8),), {"random": True, "call": _encoded}


def _encoded(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [model(x), *(part.kl_divergence() for part in model.modules() if isinstance(part, gpseq.nn.SGPAttention))]


def tokens(*shape: int) -> Tensor:
    """The same in each test."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def video(frames: int = 3) -> Tensor:
    """Four small ones."""
    return torch.rand(4, frames, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def hvae() -> Case:
    """With supervised stages."""
    model = gpseq.generative.HVAE(num_stages=3, image_shape=(1, 8, 8), latent_dim=4, hidden=16, width=4)
    return model, (video(),), {"random": True, "bad": [(video(2),), (video() * torch.nan,)]}


def image_features() -> Case:
    """Features, and what the classes are made of."""
    network = gpseq.generative.ImageFeatures(num_classes=3, image_shape=(1, 8, 8), num_features=6, width=4)
    images = video(1)[:, 0]
    return network, (images,), {"call": _classified, "batched": True, "bad": [(images[:, 0],), (images * torch.nan,)]}


def _classified(network: Any, x: Tensor) -> list[Tensor]:
    return [network(x), network.logits(x)]


def video_vq(codebook: str) -> Case:
    """An autoencoder; the codebook is a buffer where it is an average."""
    model = gpseq.generative.VideoVQ((1, 8, 8), num_frames=3, dim=16, num_heads=2, num_codes=8, codebook=codebook)
    model(video())  # the codebook starts at the first batch
    return model.eval(), (video(),), {"bad": [(video()[..., :7],)], "skip": ["generator"]}


def token_prior() -> Case:
    """Of tokens, which are whole numbers."""
    prior = gpseq.generative.TokenPrior(num_codes=8, token_shape=(3, 4), dim=16, num_heads=2, depth=1)
    whole = torch.randint(8, (5, 3, 4), generator=torch.Generator().manual_seed(4))
    return prior, (whole,), {"bad": [(whole + 8,), (whole[:, :2],)]}


def two_stages() -> Case:
    """Autoencoder and prior: the loss is that of the prior, the autoencoder is fixed."""
    first = video_vq("ema")[0].requires_grad_(False)
    prior = gpseq.generative.TokenPrior(first.num_codes, first.token_shape, dim=16, num_heads=2, depth=1)
    return gpseq.generative.VideoTokenModel(first, prior).eval(), (video(),), {}


def diffusion() -> Case:
    """A small network."""
    model = gpseq.generative.VideoDiffusion(3, (1, 8, 8), num_steps=50, channels=(8, 16))
    with torch.no_grad():  # the last convolution starts at zero, where nothing behind it has a gradient
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.ones_like(parameter))
    return model, (video(),), {"random": True, "bad": [(video(2),)]}


def unet() -> Case:
    """The network alone."""
    network = gpseq.generative.SpaceTimeUNet((1, 8, 8), num_frames=3, channels=(8, 16))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.ones_like(parameter))
    return network, (video(), torch.linspace(0.1, 0.9, 4)), {"batched": True}


def quantiser() -> Case:
    """A codebook that is learnt by gradient."""
    layer = gpseq.generative.VectorQuantiser(num_codes=4, dim=2, codebook="gradient")
    x = tokens(3, 5, 2)
    layer(x)
    return layer.eval(), (x,), {"skip": ["generator"]}


def vae(prior: str) -> Case:
    """Of a series."""
    x, y = TIMES, tokens(12, 6)
    networks = nn.Linear(6, 4), nn.Linear(2, 6)
    if prior == "sparse":
        kernel = gpytorch.kernels.RBFKernel(batch_shape=torch.Size([2]))
        model = gpseq.generative.GPPriorVAE(*networks, HippoFeatures(8, horizon=5.0), kernel, num_latents=2)
    else:
        model = gpseq.generative.GPPriorVAE(*networks, num_latents=2, prior=prior)
    bad = [(x, y[:5]), (x, y * torch.nan), (x * torch.nan, y)]
    return model, (x, y), {"call": _bound, "random": True, "bad": bad}


def _bound(model: Any, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Any:
    out = model(x, y, generator=generator)
    return [out.loss, out.elbo, out.recon, out.kl]


def latent_prior(name: str) -> Case:
    """Of a VAE."""
    if name == "sparse":
        kernel = gpytorch.kernels.RBFKernel(batch_shape=torch.Size([2]))
        prior: Any = gpseq.generative.SparsePrior(HippoFeatures(8, horizon=5.0), kernel, num_latents=2)
    else:
        prior = gpseq.generative.MarkovPrior(name, num_latents=2)
    mean, variance = tokens(2, 12), torch.full((2, 12), 0.3)
    bad = [(TIMES, mean, -variance), (TIMES[:4], mean, variance), (NAN, mean, variance)]
    return prior, (TIMES, mean, variance), {"call": _posterior, "bad": bad, "skip": ["empty"]}


def _posterior(prior: Any, x: Tensor, mean: Tensor, variance: Tensor) -> Any:
    found = prior.posterior(x, mean, variance)
    return [found.mean, found.variance, found.kl]


def observations(name: str) -> Case:
    """A decoder's likelihood."""
    return getattr(gpseq.generative, name)(), (tokens(4, 3), torch.rand(4, 3)), {"call": _log_prob, "batched": True}


def _log_prob(likelihood: Any, output: Tensor, y: Tensor) -> Tensor:
    return likelihood.log_prob(output, y)


def geco() -> Case:
    """A weight that finds itself."""
    return gpseq.generative.Geco(0.02), (torch.tensor(10.0), torch.tensor(0.1), True), {"skip": ["empty"]}


def features(make: Callable[[], Any]) -> Case:
    """Their covariances with function values."""
    return make(), (TIMES.unsqueeze(-1),), {"call": _covariances, "skip": ["gradients", "dtype"], "empty": True}


def _covariances(thing: Any, x: Tensor) -> list[Tensor]:
    kernel = gpytorch.kernels.RBFKernel()
    return [thing.kuu(kernel), thing.kuf(kernel, x)]


def path_features() -> Any:
    """Of points that have been seen."""
    return PathFeatures(num_features=4, num_dims=1).following(TIMES.unsqueeze(-1), gpytorch.kernels.RBFKernel())


def selected() -> Any:
    """Points that have been chosen."""
    return SelectedPoints(4).following(TIMES.unsqueeze(-1).double(), gpytorch.kernels.RBFKernel())


def likelihood(name: str) -> Case:
    """Of counts."""
    counts = torch.tensor([0.0, 1.0, 2.0, 5.0])
    return getattr(gpseq.likelihoods, name)(), (torch.zeros(4), counts), {"call": _expected}


def _expected(thing: Any, mean: Tensor, y: Tensor) -> Tensor:
    covariance = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    return thing.expected_log_prob(y, MultivariateNormal(mean, covariance))


def exponential_kernel() -> Case:
    """Positive inputs."""
    return gpseq.kernels.ExponentialKernel(), (TIMES.unsqueeze(-1),), {"call": _gram}


def _gram(kernel: Any, x: Tensor) -> Tensor:
    return kernel(x).to_dense()


def streaming_elbo() -> Case:
    """Of a stream with a free q(u)."""
    model = Process(
        lambda model: gpseq.variational.InterdomainVariationalStrategy(
            model, HippoFeatures(8, horizon=5.0), cholesky(8)
        )
    )
    model.variational_strategy.variational_params_initialized.fill_(1)
    mll = gpseq.mlls.StreamingELBO(gpytorch.likelihoods.GaussianLikelihood(), model)
    return mll, (TIMES.unsqueeze(-1), TIMES.sin()), {"call": _elbo, "skip": ["empty"]}


def _elbo(mll: Any, x: Tensor, y: Tensor) -> Tensor:
    return mll(mll.model(x), y)


def transition_kernel() -> Case:
    """One step of a chain."""
    kernel = gpseq.reconfiguration.TransitionKernel(dim=8, num_heads=2, num_steps=3)
    with torch.no_grad():  # gates start at zero
        for parameter in kernel.parameters():
            parameter.add_(0.02)
    return kernel.eval(), (tokens(5, 4, 8),), {"call": _step, "batched": True}


def _step(kernel: Any, x: Tensor) -> Any:
    return kernel.conditional(x, t=1 / 3)


def teacher() -> nn.Module:
    """Three blocks and a head."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(8, 2)).eval()


def student() -> Case:
    """With a chain in the place of its blocks, by its mean."""
    torch.manual_seed(0)
    return (
        gpseq.reconfiguration.Distiller(teacher()).student,
        (tokens(3, 4, 8),),
        {
            "batched": True,
            "skip": ["gradients"],
        },
    )


def streamlined() -> Case:
    """One pass with moments."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    variances = {name: torch.full_like(value, 0.01) for name, value in model.named_parameters()}
    posterior = gpseq.propagation.from_variances(variances)
    return gpseq.propagation.Streamlined(model, posterior), (tokens(5, 4),), {"batched": True, "skip": ["gradients"]}


CASES: dict[str, Callable[[], Case]] = {
    "StreamingGP": streaming,
    "StreamingGP, prediction": predicting,
    "StreamingFleet": fleet,
    "StreamingEnsemble": ensemble,
    "SpaceTimeStreamingGP": space_time,
    "InterdomainVariationalStrategy": lambda: strategy(interdomain()),
    "IndependentMultitaskVariationalStrategy": lambda: strategy(
        lambda model: gpseq.variational.IndependentMultitaskVariationalStrategy(interdomain((2,))(model), num_tasks=2),
        (2,),
    ),
    "LMCVariationalStrategy": lambda: strategy(
        lambda model: gpseq.variational.LMCVariationalStrategy(interdomain((2,))(model), num_tasks=3, num_latents=2),
        (2,),
    ),
    "SGPAVariationalStrategy": lambda: sgpa_strategy(False),
    "DecoupledSGPAVariationalStrategy": lambda: sgpa_strategy(True),
    "SGPAttention, mean": lambda: attention("SGPAttention", num_inducing=4),
    "SGPAttention": lambda: drawn_attention("SGPAttention", num_inducing=4),
    "SGPAttention, joint": lambda: drawn_attention("SGPAttention", num_inducing=4, sampling="joint"),
    "KEPAttention": lambda: drawn_attention("KEPAttention", rank=3),
    "RFFAttention": lambda: drawn_attention("RFFAttention", num_frequencies=8),
    "SGPATransformerEncoderLayer": lambda: encoder(0),
    "SGPATransformerEncoder": lambda: encoder(2),
    "HVAE": hvae,
    "ImageFeatures": image_features,
    "VideoVQ": lambda: video_vq("ema"),
    "VideoVQ, gradient": lambda: video_vq("gradient"),
    "VectorQuantiser": quantiser,
    "TokenPrior": token_prior,
    "VideoTokenModel": two_stages,
    "VideoDiffusion": diffusion,
    "SpaceTimeUNet": unet,
    "GPPriorVAE, sparse": lambda: vae("sparse"),
    "GPPriorVAE, Markov": lambda: vae("matern32"),
    "SparsePrior": lambda: latent_prior("sparse"),
    "MarkovPrior": lambda: latent_prior("matern52"),
    "GaussianObservations": lambda: observations("GaussianObservations"),
    "BernoulliObservations": lambda: observations("BernoulliObservations"),
    "Geco": geco,
    "HippoFeatures": lambda: features(lambda: HippoFeatures(8, horizon=5.0)),
    "InducingPoints": lambda: features(lambda: InducingPoints(torch.linspace(0, 5, 6))),
    "CompositeFeatures": lambda: features(
        lambda: gpseq.features.CompositeFeatures(
            [HippoFeatures(6, 5.0), HippoFeatures(4, 5.0, measure="legt", window=1.0)]
        )
    ),
    "PyramidFeatures": lambda: features(lambda: PyramidFeatures(12, horizon=5.0)),
    "PathFeatures": lambda: features(path_features),
    "SelectedPoints": lambda: features(selected),
    "PoissonLikelihood": lambda: likelihood("PoissonLikelihood"),
    "NegativeBinomialLikelihood": lambda: likelihood("NegativeBinomialLikelihood"),
    "ExponentialKernel": exponential_kernel,
    "StreamingELBO": streaming_elbo,
    "TransitionKernel": transition_kernel,
    "Rollout": student,
    "Streamlined": streamlined,
}

#: Public modules that are parts of others, or that others stand for, and why they have no case of their own.
PARTS = {
    "InducingFeatures": "a base class",
    "Belief": "part of StreamingGP",
    "StreamingVariationalStrategy": "part of StreamingGP",
    "GatedBlock": "part of TransitionKernel",
    "Transition": "shares the parameters of a teacher",
    "ProjectedAttention": "a base class",
    "WhitenedPointsStrategy": "a base class",
}
