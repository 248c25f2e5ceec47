"""predict: stand-in layers that draw, and GPyTorch's and our own models."""

import copy
import math
from types import SimpleNamespace

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood, MultitaskGaussianLikelihood
from linear_operator import to_linear_operator
from linear_operator.operators import DiagLinearOperator, LowRankRootLinearOperator
from torch import nn

from gpseq.features import HippoFeatures
from gpseq.models import SpaceTimeStreamingGP, StreamingEnsemble, StreamingFleet, StreamingGP
from gpseq.nn import SGPAttention, kl_divergence
from gpseq.nn.generator import Draws
from gpseq.prediction import predict
from gpseq.predictive import Predictive

pytestmark = pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")

B, T, D, K, S = 5, 4, 3, 2, 6


class Noise(Draws):
    """Adds standard normal noise to its input in eval mode too, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(tuple(x.shape))
        return x + torch.randn(x.shape, generator=self.generator, dtype=x.dtype, device=x.device)


class Network(nn.Module):
    """Tokens to logits: noise, attention, pooling over the sequence."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.noise = Noise()
        self.dropout = nn.Dropout(0.5)
        self.attention = nn.MultiheadAttention(D, 1, batch_first=batch_first)
        self.head = nn.Linear(D, K)
        self.pool = 1 if batch_first else 0

    def forward(self, x, key_padding_mask=None, attn_mask=None, scale=1.0, bias=None):
        h = self.dropout(self.noise(x))
        h = self.attention(h, h, h, key_padding_mask=key_padding_mask, attn_mask=attn_mask, need_weights=False)[0]
        out = self.head(h).mean(self.pool) * scale
        return out if bias is None else out + bias


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Networks


def test_the_batch_is_repeated_in_one_call_and_reshaped(dtype):
    model = Network().to(dtype)
    x = torch.randn(B, T, D, dtype=dtype)
    p = predict(model, x, num_samples=S, generator=seeded())
    assert model.noise.calls == [(S * B, T, D)]
    assert p.num_samples == S and p.batch_shape == (B,) and p.event_shape == (K,) and p.dtype == dtype
    # The oracle: the same noise, one draw and one sequence at a time.
    noise = torch.randn(S, B, T, D, generator=seeded(), dtype=dtype)
    model.eval()
    with torch.no_grad():
        for s in range(S):
            for b in range(B):
                h = (x[b] + noise[s, b]).unsqueeze(0)
                expected = model.head(model.attention(h, h, h, need_weights=False)[0]).mean(1)[0]
                torch.testing.assert_close(p.samples[s, b], expected, rtol=1e-4, atol=1e-5)


def test_a_seed_decides_and_torchs_own_generator_is_left_alone():
    model, x = Network(), torch.randn(B, T, D)
    before = torch.get_rng_state()
    one, two, three = (predict(model, x, generator=seeded(seed)).samples for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, two) and not torch.equal(one, three) and len(one) == 10
    torch.manual_seed(5)
    first = predict(model, x).samples
    torch.manual_seed(5)
    assert torch.equal(first, predict(model, x).samples)
    assert model.noise.generator is None


def test_draws_are_independent_over_the_batch_and_over_each_other():
    p = predict(Noise(), torch.zeros(3, 1), num_samples=20_000, generator=seeded())
    values = p.samples.squeeze(-1)
    correlation = torch.corrcoef(values.T)
    assert (correlation - torch.eye(3)).abs().max() < 0.03
    assert torch.corrcoef(torch.stack([values[:-1, 0], values[1:, 0]]))[0, 1].abs() < 0.03


def test_a_deterministic_model_gives_equal_draws():
    model, x = nn.Linear(D, K), torch.randn(B, D)
    p = predict(model, x, num_samples=3)
    torch.testing.assert_close(p.samples, model(x).expand(3, B, K))
    assert p.variance.abs().max() < 1e-12 and p.mutual_information().abs().max() < 1e-6


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_pieces_make_the_whole(batch_size):
    model, x = Network(), torch.randn(B, T, D)
    model.noise = nn.Identity()  # without noise every cut gives the same
    mask = torch.arange(T) >= torch.tensor([[4], [3], [2], [1], [4]])
    bias = torch.randn(B, K)
    inputs = {"key_padding_mask": mask, "bias": bias, "scale": 2.0, "attn_mask": torch.zeros(T, T).bool()}
    whole = predict(model, x, num_samples=2, **inputs)
    part = predict(model, x, num_samples=2, batch_size=batch_size, **inputs)
    torch.testing.assert_close(part.samples, whole.samples)
    expected = torch.stack(
        [model.eval()(x[b : b + 1], mask[b : b + 1], scale=2.0, bias=bias[b : b + 1])[0] for b in range(B)]
    )
    torch.testing.assert_close(whole.mean, expected)
    noisy = Network()
    predict(noisy, x, num_samples=2, batch_size=batch_size)
    assert sum(shape[0] for shape in noisy.noise.calls) == 2 * B
    assert max(shape[0] for shape in noisy.noise.calls) == 2 * min(batch_size, B)


def test_masks_where_the_batch_is_as_large_as_the_sequence_is_long():
    model, x = Network(), torch.randn(T, T, D)
    model.noise = nn.Identity()
    causal = torch.triu(torch.ones(T, T), 1).bool()
    padding = torch.zeros(T, T).bool()
    padding[0, -1] = True
    p = predict(model, x, num_samples=2, attn_mask=causal, key_padding_mask=padding)
    torch.testing.assert_close(p.mean, model.eval()(x, key_padding_mask=padding, attn_mask=causal))

    class Biased(nn.Module):
        def forward(self, x, table):
            return x @ table

    table = torch.randn(B, B)  # as many rows as elements of the batch: repeated, unless it is said to be shared
    x = torch.randn(B, B)
    for shared in ("table", ("table",)):
        torch.testing.assert_close(predict(Biased(), x, num_samples=2, shared=shared, table=table).mean, x @ table)
    with pytest.raises(RuntimeError):
        predict(Biased(), x, num_samples=2, table=table)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_mask_for_each_head_is_repeated_in_groups(batch_size):
    heads = 3
    model = nn.MultiheadAttention(6, heads, batch_first=True).eval()

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = model

        def forward(self, x, attn_mask):
            return self.attention(x, x, x, attn_mask=attn_mask)  # a tuple

    x, mask = torch.randn(B, T, 6), torch.randn(B * heads, T, T)
    p = predict(Whole(), x, num_samples=2, attn_mask=mask, batch_size=batch_size)
    torch.testing.assert_close(p.mean, model(x, x, x, attn_mask=mask)[0])
    assert p.batch_shape == (B, T)


def test_what_was_one_tensor_stays_one():
    """Layers see self-attention by it."""

    class Self(nn.Module):
        def forward(self, query, key, value):
            assert query is key and key is not value
            return query

    x = torch.randn(B, D)
    for batch_size in (None, 2):
        assert predict(Self(), x, batch_size=batch_size, key=x, value=x.clone()).batch_shape == (B,)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_sequence_first(batch_size):
    model = Network(batch_first=False)
    model.noise = nn.Identity()
    x, padding = torch.randn(T, B, D), torch.arange(T) >= torch.tensor([[4], [3], [2], [1], [4]])
    p = predict(model, x, num_samples=2, batch_dim=1, batch_size=batch_size, key_padding_mask=padding)
    assert p.batch_shape == (B,)  # pooled: the batch is first in the output
    torch.testing.assert_close(p.mean, model.eval()(x, padding))
    encoder = nn.TransformerEncoderLayer(D, 1, 8).eval()
    p = predict(encoder, x, num_samples=2, batch_dim=1, batch_size=batch_size, src_key_padding_mask=padding)
    assert p.batch_shape == (T, B)
    torch.testing.assert_close(p.mean, encoder(x, src_key_padding_mask=padding))
    decoder, memory = nn.TransformerDecoderLayer(D, 1, 8).eval(), torch.randn(T + 2, B, D)
    p = predict(decoder, x, num_samples=2, batch_dim=1, batch_size=batch_size, memory=memory)
    torch.testing.assert_close(p.mean, decoder(x, memory))


def test_a_mapping_of_arguments():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.noise, self.head = nn.Embedding(7, D), Noise(), nn.Linear(D, K)

        def forward(self, input_ids, attention_mask=None, labels=None, flag=False):
            assert flag and (labels is None or labels.shape == ())
            weight = attention_mask.unsqueeze(-1).float()
            h = (self.noise(self.embedding(input_ids)) * weight).sum(1) / weight.sum(1)
            return {"logits": self.head(h), "hidden": h}

    model = Language()
    batch = {"input_ids": torch.randint(7, (B, T)), "attention_mask": torch.ones(B, T).long(), "flag": True}
    p = predict(model, batch, num_samples=S, batch_size=3)
    assert p.samples.shape == (S, B, K) and model.noise.calls == [(3 * S, T, D), (2 * S, T, D)]
    p = predict(model, batch, num_samples=S, labels=torch.tensor(1))
    assert p.samples.shape == (S, B, K)
    pair_first = {"mask": torch.zeros(T, T), "x": torch.randn(B, D)}

    class Masked(nn.Module):
        def forward(self, mask, x):
            assert mask.shape == (T, T)
            return x

    assert predict(Masked(), pair_first).batch_shape == (B,)


def test_outputs_of_every_kind():
    x = torch.randn(B, D)

    class Gives(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.wrap = wrap

        def forward(self, x):
            return self.wrap(x)

    def gives(wrap, **kwargs):
        return predict(Gives(wrap), x, num_samples=2, **kwargs)

    for wrap in (
        lambda h: h,
        lambda h: (h, None),
        lambda h: {"loss": 1.0, "logits": h},
        lambda h: SimpleNamespace(logits=h),
    ):
        torch.testing.assert_close(gives(wrap).samples, x.expand(2, B, D))
    categorical = gives(lambda h: torch.distributions.Categorical(logits=h))
    torch.testing.assert_close(categorical.probs(), x.softmax(-1))
    for independent in (False, True):

        def normal(h, independent=independent):
            base = torch.distributions.Normal(h, h.exp())
            return torch.distributions.Independent(base, 1) if independent else base

        p = gives(normal)
        torch.testing.assert_close(p.noise, (2 * x).exp().expand(2, B, D))
        y = torch.randn(B, D)
        expected = torch.distributions.Normal(x, x.exp()).log_prob(y).sum(-1)
        torch.testing.assert_close(p.log_prob(y), expected)
        with pytest.raises(TypeError, match="likelihood: expected none beside a model that returns a Normal"):
            gives(normal, likelihood=GaussianLikelihood())
    assert gives(lambda h: h.sum(-1)).event_shape == (1,)
    for wrap, got in (
        (lambda h: h.long(), "a tensor in torch.int64"),
        (lambda h: None, "NoneType"),
        (lambda h: (), "tuple"),
        (lambda h: torch.distributions.Bernoulli(logits=h), "Bernoulli"),
    ):
        with pytest.raises(TypeError, match=f"model: expected an output .*, got {got}"):
            gives(wrap)
    with pytest.raises(ValueError, match=r"model: expected an output with the 10 elements .* got shape \(3, 2\)"):
        gives(lambda h: torch.zeros(3, 2))


def test_noise_of_a_likelihood_for_a_network():
    likelihood = GaussianLikelihood()
    likelihood.noise = 0.25
    model, x, y = nn.Linear(D, 1), torch.randn(B, D), torch.randn(B, 1)
    p = predict(model, x, num_samples=2, likelihood=likelihood)
    expected = torch.distributions.Normal(model(x), 0.5).log_prob(y).squeeze(-1)
    torch.testing.assert_close(p.log_prob(y), expected)


def test_modes_are_as_they_were_also_after_an_error():
    class Breaks(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    model = nn.Sequential(Network(), nn.BatchNorm1d(K), Breaks())
    model.train()
    model[0].attention.eval()
    modes = [module.training for module in model.modules()]
    generator = seeded()
    with pytest.raises(RuntimeError, match="broken"):
        predict(model, torch.randn(B, T, D), generator=generator)
    assert [module.training for module in model.modules()] == modes
    assert model[0].noise.generator is None
    model[2] = nn.Identity()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    p = predict(model, torch.randn(B, T, D))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert p.samples.shape == (10, B, K)  # and dropout was off:
    model[0].noise = nn.Identity()
    assert predict(model, torch.randn(B, T, D)).variance.max() < 1e-12


def test_gradients_flow_if_the_caller_wants_them():
    model, x = Network(), torch.randn(B, T, D)
    p = predict(model, x, generator=seeded())
    p.log_prob(torch.zeros(B).long()).sum().backward()
    assert model.head.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert not predict(model, x).samples.requires_grad
    with torch.inference_mode():
        assert predict(model, x).probs().shape == (B, K)


def test_moments_of_a_module_that_offers_them():
    class Source(nn.Module):
        def __init__(self, form):
            super().__init__()
            self.linear, self.form = nn.Linear(D, K), form

        def conditional(self, x, scale=1.0):
            assert not self.training
            mean = self.linear(x) * scale
            root = torch.ones(*mean.shape, 1)
            return mean, {
                "variances": DiagLinearOperator(mean.square()),
                "dense": root @ root.mT + torch.eye(K),
                "lazy": LowRankRootLinearOperator(root).add_diagonal(torch.ones(K)),
            }[self.form]

    x = torch.randn(B, D)
    for form in ("variances", "dense", "lazy"):
        model = Source(form)
        mean = 2 * model.linear(x)
        covariance = torch.diag_embed(mean.square()) if form == "variances" else torch.ones(K, K) + torch.eye(K)
        for batch_size in (None, 2):
            p = predict(model, x, "moments", batch_size=batch_size, likelihood=GaussianLikelihood(), scale=2.0)
            assert p.num_samples is None and p.batch_shape == (B,)
            torch.testing.assert_close(p.mean, mean)
            torch.testing.assert_close(p.covariance.to_dense(), covariance.expand(B, K, K))
            torch.testing.assert_close(p.noise, torch.full((B, K), math.log(2) + 1e-4))
            p.mean.sum().backward(retain_graph=True)
        assert model.training


@pytest.mark.parametrize("lazy", [False, True])
def test_a_tensor_is_a_covariance_also_where_it_has_the_shape_of_the_mean(lazy):
    """One covariance for all elements of a batch of as many as there are outputs."""
    root = torch.randn(K, K)
    shared = root @ root.T + torch.eye(K)

    class Source(nn.Module):
        def conditional(self, x):
            return x, to_linear_operator(shared) if lazy else shared

    for batch_size in (None, 1):
        p = predict(Source(), torch.zeros(K, K), "moments", batch_size=batch_size)
        torch.testing.assert_close(p.covariance.to_dense(), shared.expand(K, K, K))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda x: x, TypeError, r"conditional: expected it to return \(mean, covariance\), got Tensor"),
        (lambda x: (x, x, x), TypeError, r"conditional: expected it to return \(mean, covariance\), got tuple"),
        (lambda x: (x.long(), x), TypeError, "conditional: expected a mean .* got torch.int64"),
        (lambda x: (None, x), TypeError, "conditional: expected a mean .* got NoneType"),
        (lambda x: (x, 1.0), TypeError, r"conditional: expected a covariance \(..., E, E\), got float"),
        (lambda x: (x, x.square()), ValueError, r"conditional: .* got \(5, 2\); variances come as a DiagLinearOp"),
        (lambda x: (x, torch.eye(3)), ValueError, r"conditional: expected a covariance \(..., 2, 2\)"),
    ],
)
def test_what_is_no_conditional_is_named(given, error, message):
    class Source(nn.Module):
        def conditional(self, x):
            return given(x)

    with pytest.raises(error, match=message):
        predict(Source(), torch.zeros(B, K), "moments")


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda first: nn.TransformerEncoderLayer(4, 2, 8, batch_first=first),
        lambda first: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=first), 2, enable_nested_tensor=False
        ),
        lambda first: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=first), nn.Linear(4, 2)),
        lambda first: nn.TransformerDecoderLayer(4, 2, 8, batch_first=first),
        lambda first: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8, batch_first=first), 1),
        lambda first: nn.Transformer(4, 2, 1, 1, 8, batch_first=first),
        lambda first: nn.MultiheadAttention(4, 2, batch_first=first),
        lambda first: nn.GRU(4, 3, batch_first=first),
        lambda first: SGPAttention(4, 2, num_inducing=3, batch_first=first),
    ],
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_sequences_are_not_joined(make, batch_first):
    """Copies of the batch along the sequence would attend to each other."""
    model, x = make(batch_first).eval(), torch.randn(3, 5, 4)
    inputs = {
        nn.TransformerDecoderLayer: {"memory": x},
        nn.TransformerDecoder: {"memory": x},
        nn.Transformer: {"tgt": x},
        nn.MultiheadAttention: {"key": x, "value": x},
        SGPAttention: {"key": x, "value": x},
    }.get(type(model), {})
    axis = 0 if batch_first else 1
    if not batch_first:
        with pytest.raises(ValueError, match=r"batch_dim: expected 1, as the model takes \(T, B, E\) .* got 0"):
            predict(model, x, **inputs)
    with pytest.raises(ValueError, match=f"batch_dim: expected {axis}, as the model takes .* got {1 - axis}"):
        predict(model, x, batch_dim=1 - axis, **inputs)
    with pytest.raises(ValueError, match=r"x: expected a batch of sequences, .* \(5, 4\) for one sequence"):
        predict(model, x[0], batch_dim=axis, **dict.fromkeys(inputs, x[0]))
    p = predict(model, x, num_samples=2, batch_dim=axis, **inputs)
    assert p.batch_shape == (3, 5)
    if not isinstance(model, SGPAttention):  # which draws
        expected = model(x, **inputs)
        torch.testing.assert_close(p.mean, expected[0] if isinstance(expected, tuple) else expected)


def test_sequence_first_layers_inside_a_model_are_pointed_out():
    class Around(nn.Module):
        def __init__(self, turns=False, batch_first=False):
            super().__init__()
            self.layer, self.turns = nn.TransformerEncoderLayer(D, 1, 8, batch_first=batch_first), turns

        def forward(self, x):
            return self.layer(x.transpose(0, 1)).transpose(0, 1) if self.turns else self.layer(x)

    x = torch.randn(T, B, D)
    for model, axis in ((Around(), 1), (Around(turns=True), 0)):
        with pytest.warns(
            UserWarning, match="model: Around has layers inside that take sequences first .* batch_dim=1"
        ):
            predict(model, x, num_samples=2)
        p = predict(model, x, num_samples=2, batch_dim=axis)  # no warning: the caller knows
        torch.testing.assert_close(p.mean, model.eval()(x))
    assert predict(Around(batch_first=True), x, num_samples=2).batch_shape == (T, B)


def test_the_divergence_of_layers_is_that_of_the_call_before():
    for train in (True, False):
        model = nn.Sequential(SGPAttentionOnly(), nn.Linear(4, 2)).train(train)
        model(torch.randn(2, 5, 4))
        before = kl_divergence(model)
        p = predict(model, torch.randn(3, 5, 4), num_samples=4)
        assert p.batch_shape == (3, 5)
        assert torch.equal(kl_divergence(model), before)
    untouched = nn.Sequential(SGPAttentionOnly(), nn.Linear(4, 2))
    predict(untouched, torch.randn(3, 5, 4))
    with pytest.raises(RuntimeError):
        kl_divergence(untouched)  # still without a call of its own


class SGPAttentionOnly(nn.Module):
    """Self-attention without the weights."""

    def __init__(self):
        super().__init__()
        self.attention = SGPAttention(4, 2, num_inducing=3, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def test_a_padding_mask_with_the_name_of_a_mask_on_pairs():
    class Pooled(nn.Module):
        def forward(self, x, mask):
            return (x * ~mask.unsqueeze(-1)).sum(1)

    x, mask = torch.randn(T, T, D), torch.arange(T) >= torch.arange(1, T + 1).unsqueeze(-1)
    expected = Pooled()(x, mask)
    for batch_size in (None, 3):
        for batched in ("mask", ("mask",)):
            p = predict(Pooled(), x, num_samples=2, batch_size=batch_size, batched=batched, mask=mask)
            torch.testing.assert_close(p.mean, expected)
    p = predict(Pooled(), {"mask": mask, "x": x}, num_samples=2, batched=["mask"])
    torch.testing.assert_close(p.mean, expected)


# Gaussian processes

X = torch.linspace(0.0, 5.0, 12)


class Exact(gpytorch.models.ExactGP):
    def __init__(self, likelihood, x, y):
        super().__init__(x, y, likelihood)
        self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), gpytorch.kernels.RBFKernel()

    def forward(self, x):
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


class Sparse(gpytorch.models.ApproximateGP):
    def __init__(self, tasks=None):
        shape = torch.Size([] if tasks is None else [tasks])
        q = gpytorch.variational.CholeskyVariationalDistribution(4, batch_shape=shape)
        q.variational_mean.data.normal_()
        points = torch.linspace(0, 5, 4).unsqueeze(-1)
        strategy = gpytorch.variational.VariationalStrategy(self, points, q)
        if tasks is not None:
            strategy = gpytorch.variational.IndependentMultitaskVariationalStrategy(strategy, num_tasks=tasks)
        super().__init__(strategy)
        self.mean_module = gpytorch.means.ConstantMean(batch_shape=shape)
        self.covar_module = gpytorch.kernels.RBFKernel(batch_shape=shape)

    def forward(self, x):
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def exact():
    return Exact(GaussianLikelihood(), X, X.sin())


def stream(dtype=torch.float32):
    features = HippoFeatures(12, horizon=6.0)
    model = StreamingGP(features, gpytorch.kernels.RBFKernel(), GaussianLikelihood()).to(dtype)
    return model.update(X.to(dtype), X.to(dtype).sin())


def fleet():
    model = StreamingFleet(3, HippoFeatures(12, horizon=6.0), gpytorch.kernels.RBFKernel(), GaussianLikelihood())
    return model.update(X, torch.stack([X.sin(), X.cos(), X]))


def space_time():
    sensors = torch.tensor([[0.0], [1.0]])
    model = SpaceTimeStreamingGP(
        HippoFeatures(8, horizon=6.0),
        sensors,
        sensors,
        gpytorch.kernels.RBFKernel(),
        gpytorch.kernels.RBFKernel(),
        GaussianLikelihood(),
    )
    return model.update(X, torch.stack([X.sin(), X.cos()], dim=-1))


MODELS = {"exact": exact, "sparse": Sparse, "stream": stream, "fleet": fleet}


def posterior(model, x):
    modes = [module.training for module in model.modules()]
    q = model.eval()(x)
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    return q


@pytest.mark.parametrize("name", list(MODELS))
def test_moments_of_gaussian_processes_are_theirs(name):
    model, x = MODELS[name](), torch.tensor([0.5, 2.2, 7.0])
    p = predict(model, x, "moments")
    q = posterior(model, x)
    assert p.num_samples is None and p.event_shape == (3,) and p.batch_shape == q.batch_shape
    torch.testing.assert_close(p.mean, q.mean)
    torch.testing.assert_close(p.covariance.to_dense(), q.covariance_matrix)
    assert p.noise is None
    likelihood = getattr(model, "likelihood", None) or GaussianLikelihood()
    noisy = predict(model, x, "moments", likelihood=likelihood)
    observed = likelihood(q)
    torch.testing.assert_close(noisy.variance + noisy.noise, observed.variance)
    y = torch.randn(q.mean.shape)
    torch.testing.assert_close(noisy.log_prob(y), observed.log_prob(y), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", list(MODELS))
def test_draws_of_gaussian_processes_are_joint(name):
    model, x = MODELS[name](), torch.tensor([0.5, 0.6, 7.0])
    posterior(model, x)  # at its first call GPyTorch's strategy sets its own parameters, with noise
    before = torch.get_rng_state()
    p = predict(model, x, num_samples=20_000, generator=seeded())
    again = predict(model, x, num_samples=20_000, generator=seeded())
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(p.samples, again.samples)
    q = posterior(model, x)
    assert p.samples.shape == (20_000, *q.mean.shape)
    torch.testing.assert_close(p.mean, q.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(p.covariance.to_dense(), q.covariance_matrix, atol=0.04, rtol=0)


@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.filterwarnings("ignore:covariance of shape:linear_operator.utils.warnings.NumericalWarning")
def test_an_ordinary_exact_gp_in_float32(noise, graph):
    """Its posterior is smaller than the rounding of its prior."""
    x = torch.linspace(0, 10, 100)
    model = Exact(GaussianLikelihood(), x, x.sin())
    model.likelihood.noise = noise
    reference = copy.deepcopy(model).double()
    reference.set_train_data(x.double(), x.double().sin(), strict=False)
    at = torch.linspace(0.01, 9.99, 100)
    with torch.set_grad_enabled(graph):
        p = predict(model, at, num_samples=2000, generator=seeded())
        q = predict(reference, at.double(), "moments")
    assert p.samples.isfinite().all() and p.samples.requires_grad == graph
    # Rounding of the prior, 1e-5 here, is what a variance is off by.
    assert (p.variance - q.variance).abs().max() < 0.12 * q.variance.max() + 2e-5
    assert ((p.mean - q.mean).abs() < 0.1 * q.variance.sqrt() + 2e-3).all()
    if graph:
        p.samples.square().mean().backward()
        assert model.covar_module.raw_lengthscale.grad.isfinite().all()


def ensemble():
    made = StreamingEnsemble([member(lengthscale) for lengthscale in (0.5, 0.8, 1.1)])
    made.update(X, X.sin() + 0.3 * torch.randn(12))
    made.log_weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    return made


def member(lengthscale):
    kernel = gpytorch.kernels.RBFKernel()
    kernel.lengthscale = lengthscale
    return StreamingGP(HippoFeatures(12, horizon=6.0), kernel, GaussianLikelihood())


def test_an_ensemble_of_streams_is_a_mixture():
    model, x = ensemble(), torch.tensor([0.5, 2.2, 7.0])
    w = model.weights.float()
    parts = [posterior(member, x) for member in model.members]
    mean = sum(w_e * q.mean for w_e, q in zip(w, parts, strict=True))
    second = sum(w_e * (q.covariance_matrix + torch.outer(q.mean, q.mean)) for w_e, q in zip(w, parts, strict=True))
    p = predict(model, x, "moments")
    assert p.event_shape == (3,) and p.num_samples is None
    torch.testing.assert_close(p.mean, mean)
    torch.testing.assert_close(p.covariance.to_dense(), second - torch.outer(mean, mean), rtol=1e-4, atol=1e-5)
    drawn = predict(model, x, num_samples=20_000, generator=seeded())
    again = predict(model, x, num_samples=20_000, generator=seeded())
    assert torch.equal(drawn.samples, again.samples)
    torch.testing.assert_close(drawn.mean, mean, atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.covariance.to_dense(), p.covariance.to_dense(), atol=0.05, rtol=0)
    # Draws of observations have the density of the ensemble's own mixture, point by point.
    likelihood, y = model.members[0].likelihood, torch.tensor([0.3, 1.0, -0.2])
    noisy = predict(model, x, num_samples=20_000, generator=seeded(), likelihood=likelihood)
    expected = model.predict(x).log_prob(y)
    torch.testing.assert_close(noisy.pointwise().log_prob(y.unsqueeze(-1)), expected, atol=0.03, rtol=0)
    moments = predict(model, x, "moments", likelihood=likelihood)
    torch.testing.assert_close(moments.variance + moments.noise, model.predict(x).variance, rtol=1e-3, atol=1e-4)
    many = torch.linspace(0, 5, 20_000)  # dense: 1.6 GB
    assert predict(model, many, "moments").variance.shape == (20_000,)


def test_a_stream_in_float64_and_a_space_time_stream():
    p = predict(stream(torch.float64), X.double(), "moments")
    assert p.dtype == torch.float64
    model = space_time()
    x = torch.tensor([[0.5, 0.0], [2.0, 1.0], [6.5, 0.5]])
    p, q = predict(model, x, "moments"), model(x)
    torch.testing.assert_close(p.covariance.to_dense(), q.covariance_matrix)
    assert predict(model, x, num_samples=4).samples.shape == (4, 3)
    grid = Predictive.from_distribution(model.grid(X[:4]))
    assert grid.event_shape == (4, 2) and grid.rsample(3).shape == (3, 4, 2)
    means, variances = model.marginals(X[:4])
    points = grid.pointwise()
    torch.testing.assert_close(points.mean.float(), means)
    torch.testing.assert_close(points.variance.float(), variances, rtol=1e-4, atol=1e-5)


def test_classes_by_a_gaussian_process():
    """A Bernoulli GP: pointwise, one logit each."""
    p = predict(Sparse(), X, "moments").pointwise()
    assert p.probs("probit").shape == (12, 2) and p.mutual_information().shape == (12,)
    many = predict(Sparse(tasks=3), X, num_samples=S)
    assert many.event_shape == (12, 3) and many.probs().shape == (12, 3)


def test_several_tasks_with_noise():
    model, likelihood = Sparse(tasks=2), MultitaskGaussianLikelihood(num_tasks=2)
    likelihood.task_noises = torch.tensor([0.1, 0.4])
    p = predict(model, X, "moments", likelihood=likelihood)
    q = posterior(model, X)
    assert isinstance(q, MultitaskMultivariateNormal) and p.event_shape == (12, 2)
    torch.testing.assert_close(p.variance + p.noise, likelihood(q).variance)
    y = torch.randn(12, 2)
    torch.testing.assert_close(p.log_prob(y), likelihood(q).log_prob(y), rtol=1e-3, atol=1e-3)
    drawn = predict(model, X, num_samples=4, likelihood=likelihood)
    assert drawn.samples.shape == drawn.noise.shape == (4, 12, 2) and drawn.log_prob(y).shape == ()


def test_a_covariance_stays_lazy():
    x = torch.linspace(0, 5, 20_000)  # dense: 1.6 GB
    p = predict(stream(), x, "moments")
    assert p.covariance.shape == (20_000, 20_000) and p.variance.shape == (20_000,)


def test_a_module_around_a_gaussian_process():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.gp = Sparse()

        def forward(self, x):
            return self.gp(2 * x)

    model = Deep()
    for method in ("moments", "sample"):
        assert predict(model, X, method).event_shape == (12,)
    torch.testing.assert_close(predict(model, X, "moments").mean, posterior(model, X).mean)


def test_training_goes_on_after_a_prediction():
    """What an ExactGP caches for predictions is dropped, as by `train()` itself."""
    model = exact().train()
    first = predict(model, X + 0.1, "moments").mean
    assert model.training and model.prediction_strategy is None
    model.covar_module.lengthscale = 0.1
    assert not torch.allclose(first, predict(model, X + 0.1, "moments").mean)
    model.eval()
    predict(model, X + 0.1)
    assert not model.training


def test_gradients_flow_through_a_gaussian_process():
    model = Sparse()
    predict(model, X, generator=seeded(), num_samples=3).samples.square().sum().backward()
    assert model.covar_module.raw_lengthscale.grad.abs() > 0
    with torch.no_grad():
        assert not predict(model, X).samples.requires_grad


# Bad input


class Deeper(gpytorch.models.deep_gps.DeepGP):
    def forward(self, x):
        return x


class NotGaussian(gpytorch.models.GP):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda m, x: predict(m.forward, x), TypeError, "model: expected a torch module, got method"),
        (
            lambda m, x: predict(m, x, "mean"),
            ValueError,
            "method: expected one of sample, moments, variance_temperature, got 'mean'",
        ),
        (lambda m, x: predict(m, x, num_samples=0), ValueError, "num_samples: expected at least 1, got 0"),
        (lambda m, x: predict(m, x, num_samples=2.0), TypeError, "num_samples: expected an integer"),
        (lambda m, x: predict(m, x, batch_size=0), ValueError, "batch_size: expected at least 1"),
        (lambda m, x: predict(m, x, batch_dim=-1), ValueError, "batch_dim: expected at least 0"),
        (lambda m, x: predict(m, x[:0]), ValueError, r"x: expected at least one element .* got shape \(0, 3\)"),
        (lambda m, x: predict(m, x[0], batch_dim=1), ValueError, "x: expected at least one element along dimension 1"),
        (lambda m, x: predict(m, x.tolist()), TypeError, "x: expected a tensor or a mapping of tensors, got list"),
        (lambda m, x: predict(m, {"input": x[:0]}), ValueError, r"x\['input'\]: expected at least one"),
        (lambda m, x: predict(m, {"input": 1}), TypeError, "x: expected a mapping with tensors"),
        (lambda m, x: predict(m, {"input": x}, input=x), TypeError, "inputs: expected each argument once, got input"),
        (lambda m, x: predict(m, x, shared=3), TypeError, "shared: expected names of inputs, got 3"),
        (lambda m, x: predict(m, x, batched=[1]), TypeError, r"batched: expected names of inputs, got \[1\]"),
        (lambda m, x: predict(m, x, batched="a"), ValueError, "batched: expected names of inputs, got a"),
        (
            lambda m, x: predict(m, x, batched="a", shared="a", a=x),
            ValueError,
            "batched: expected names that are not in shared, got a",
        ),
        (
            lambda m, x: predict(m, x, batched="a", a=x[:3]),
            ValueError,
            r"batched: expected a to be a tensor with 5 elements along dimension 0, got \(3, 3\)",
        ),
        (
            lambda m, x: predict(gpytorch.models.IndependentModelList(exact(), exact()), x),
            TypeError,
            "model: expected one model, got IndependentModelList; predict with each",
        ),
        (lambda m, x: predict(m, x, shared=("a",)), ValueError, "shared: expected names of inputs, got a"),
        (lambda m, x: predict(m, x, generator=3), TypeError, "generator: expected a torch.Generator or None, got int"),
        (lambda m, x: predict(m, x, "moments"), TypeError, "model: method 'moments' takes a GPyTorch model"),
        (lambda m, x: predict(m, x, likelihood=1.0), TypeError, "likelihood: expected a Gaussian one, got float"),
        (
            lambda m, x: predict(m, x, likelihood=gpytorch.likelihoods.BernoulliLikelihood()),
            TypeError,
            "likelihood: expected a Gaussian one, got BernoulliLikelihood",
        ),
        (
            lambda m, x: predict(m, x, likelihood=MultitaskGaussianLikelihood(3, rank=1)),
            TypeError,
            "likelihood: expected noise that is independent between tasks",
        ),
        (lambda m, x: predict(Deeper(), x), TypeError, "model: expected one layer, .* got a DeepGP"),
        (lambda m, x: predict(NotGaussian(), x), TypeError, "gives a MultivariateNormal in eval mode, got Tensor"),
        (lambda m, x: predict(Sparse(), X[:0]), ValueError, "x: expected at least one element"),
        (lambda m, x: predict(Sparse(), X, batch_size=4), ValueError, "batch_size: a Gaussian process predicts all"),
    ],
)
def test_bad_arguments_are_named(ask, error, message):
    with pytest.raises(error, match=message):
        ask(nn.Linear(D, K), torch.randn(B, D))


def test_noise_that_is_given_for_other_points_is_refused():
    with pytest.raises(ValueError, match="likelihood: "):
        predict(Sparse(), X[:5], likelihood=FixedNoiseGaussianLikelihood(torch.full((12,), 0.1)))
    p = predict(Sparse(), X, "moments", likelihood=FixedNoiseGaussianLikelihood(torch.linspace(0.1, 1.2, 12)))
    torch.testing.assert_close(p.noise, torch.linspace(0.1, 1.2, 12))


def test_a_diagonal_from_a_conditional_is_kept():
    class Source(nn.Module):
        def conditional(self, x):
            return x, DiagLinearOperator(torch.ones_like(x))

    assert isinstance(predict(Source(), torch.zeros(4, 2), "moments").covariance, DiagLinearOperator)
