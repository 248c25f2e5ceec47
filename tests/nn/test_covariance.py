"""Covariances in closed form: against a dense sparse GP, and what may not change."""

import copy

import pytest
import torch
from torch import nn

from gpseq.nn import RFFAttention, SGPAttention, fit_covariance, replace_attention, use_sampling
from gpseq.nn.capture import Seen, called, layers_with_keys, look_through, mean_depends_on_keys
from gpseq.nn.covariance import _features
from gpseq.nn.placement import centres
from gpseq.nn.residual import ResidualGP
from tests.layers import small, trained_attention

OPTIONS = {"num_inducing": 4, "max_tokens": 10**6, "num_batches": 100}


class Plain(nn.Module):
    """A trained encoder with a head, with or without padding."""

    def __init__(self, dtype=torch.float64, batch_first=True, depth=2):
        super().__init__()
        stock = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, norm_first=True, dtype=dtype)
        self.encoder = nn.TransformerEncoder(stock, depth, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3, dtype=dtype)
        self.batch_first = batch_first
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def forward(self, x, padding=None, labels=None):
        h = self.encoder(x if self.batch_first else x.transpose(0, 1), src_key_padding_mask=padding)
        h = h if self.batch_first else h.transpose(0, 1)
        if padding is None:
            return self.head(h.mean(1))
        present = ~padding.unsqueeze(-1)
        return self.head(torch.where(present, h, 0.0).sum(1) / present.sum(1))


def dense_variance(query, keys, tokens, lengthscale, variance, weight):
    """Variance of a sparse GP regression on n tokens with noise of variance ``n variance / weight``, by its formula."""

    def kernel(a, b):
        return variance * torch.exp(-0.5 * torch.cdist(a / lengthscale, b / lengthscale).square())

    cross, own = kernel(query, keys), kernel(keys, keys)
    noise = len(tokens) * variance / weight
    among = kernel(keys, tokens)
    explained = cross @ torch.linalg.solve(own, cross.mT)
    unsure = cross @ torch.linalg.solve(own + among @ among.mT / noise, cross.mT)
    return variance - explained.diagonal() + unsure.diagonal()


@pytest.mark.parametrize("inducing_space", ["input", "projected"])
@pytest.mark.parametrize("covariance", ["shared", "per_dim"])
def test_the_variance_is_that_of_a_dense_sparse_regression(covariance, inducing_space):
    layer = small(mode="residual", covariance=covariance, inducing_space=inducing_space, num_inducing=5)
    layer.inducing.value.data.zero_()
    x = torch.randn(7, 6, 8, dtype=torch.float64)
    fit_covariance(layer, [x[:4], x[4:]], weight=37.0, forward=lambda m, x: m(x, x, x), **OPTIONS)
    new = 2 * torch.randn(1, 9, 8, dtype=torch.float64)
    found = layer.posterior(new, new, new).variance.view(1, 2, 9, 4)
    keys = layer.inducing.key(*layer._key_projection()).detach()
    tokens, query = layer.project_query(x).detach(), layer.project_query(new).detach()
    for head in range(2):
        wanted = dense_variance(
            query[0, head],
            keys[head],
            tokens[:, head].flatten(0, 1),
            layer.inducing.log_lengthscale[head].exp().detach(),
            layer.inducing.log_variance[head].exp().detach(),
            37.0,
        )
        torch.testing.assert_close(found[0, head], wanted.unsqueeze(-1).expand(9, 4), rtol=1e-5, atol=1e-9)


def test_a_diagonal_covariance_is_the_best_one_for_the_same_regression():
    """Of all diagonal q, that with the inverse of the precision's diagonal has the least divergence."""
    full = small(mode="residual", num_inducing=5)
    full.inducing.value.data.zero_()
    diagonal = small(mode="residual", num_inducing=5, covariance="diagonal")
    diagonal.load_state_dict(
        {k: v for k, v in full.state_dict().items() if "log_diagonal" not in k and "lower" not in k}, strict=False
    )
    x = torch.randn(7, 6, 8, dtype=torch.float64)
    for layer in (full, diagonal):
        fit_covariance(
            layer, [x], generator=torch.Generator().manual_seed(0), forward=lambda m, x: m(x, x, x), **OPTIONS
        )
    torch.testing.assert_close(full.inducing.location, diagonal.inducing.location)
    root = full.inducing.scale.detach()[:, 0]
    precision = torch.linalg.inv(root @ root.mT)
    wanted = precision.diagonal(dim1=-2, dim2=-1).rsqrt()
    torch.testing.assert_close(diagonal.inducing.log_diagonal.detach().exp()[:, 0], wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_mean_of_a_plain_model_stays(dtype, batch_first):
    model, x = Plain(dtype, batch_first).eval(), torch.randn(20, 6, 8, dtype=dtype)
    padding = torch.arange(6) >= torch.randint(2, 7, (20, 1))
    before = model(x), model(x, padding)
    assert fit_covariance(model, [{"x": x, "padding": padding}], **OPTIONS) is model
    assert all(isinstance(layer.self_attn, SGPAttention) for layer in model.encoder.layers)
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(model(x), before[0], rtol=0, atol=limit)
    torch.testing.assert_close(model(x, padding), before[1], rtol=0, atol=limit)


@pytest.mark.parametrize("options", [{}, {"mode": "sgpa"}, {"mode": "softmax_kernel", "kernel": "exponential"}])
def test_the_mean_of_a_layer_with_values_stays_and_so_do_its_keys(options):
    layer = small(**{"mode": "residual", **options})
    x = torch.randn(6, 5, 8, dtype=torch.float64)
    keys = layer.inducing.location.detach().clone()
    with use_sampling(layer, "mean"):
        before = layer(x, x, x)[0]
        fit_covariance(layer, [x], forward=lambda m, x: m(x, x, x), **OPTIONS)
        torch.testing.assert_close(layer(x, x, x)[0], before, rtol=1e-9, atol=1e-10)
    assert layer.sampling == "marginal"
    assert keys.equal(layer.inducing.location)
    assert layer.inducing.typical_variance.min() > 0


@pytest.mark.parametrize("covariance", ["shared", "per_dim", "diagonal"])
def test_typical_variances_are_means_over_the_tokens_of_the_fit_and_noise_has_the_size_that_was_asked_for(covariance):
    model, x = Plain(), torch.randn(30, 6, 8, dtype=torch.float64)
    replace_attention(model, num_inducing=4, covariance=covariance, sampling="mean")
    fit_covariance(model, [x], noise=0.25, **OPTIONS)
    for name, layer in layers_with_keys(model).items():
        seen = []
        hook = layer.register_forward_pre_hook(
            lambda layer, args, kwargs, seen=seen: seen.append(
                {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
            ),
            with_kwargs=True,
        )
        model.eval()(x)
        hook.remove()
        sight = Seen.of(layer, seen[0])
        variance = sight.variance().mean((0, 2))
        torch.testing.assert_close(variance, layer.inducing.typical_variance, rtol=1e-6, atol=0, msg=name)
        signal = sight.moments("mean").mean.transpose(0, 1).flatten(1, 2).var(1, correction=0).mean(-1)
        torch.testing.assert_close((variance / signal).sqrt(), torch.full_like(variance, 0.25), rtol=1e-6, atol=0)


def test_padding_changes_nothing():
    model, x = Plain(), torch.randn(12, 6, 8, dtype=torch.float64)
    padding = torch.arange(6) >= torch.randint(2, 7, (12, 1))
    padding[0] = False
    other = copy.deepcopy(model)
    filled = torch.where(padding.unsqueeze(-1), 99.0, x)
    for which, tokens in ((model, x), (other, filled)):
        generator = torch.Generator().manual_seed(3)
        fit_covariance(which, [{"x": tokens, "padding": padding}], generator=generator, **OPTIONS)
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11, msg=name)


def test_variance_is_low_on_data_and_the_priors_far_away(dtype):
    model, x = Plain(dtype), torch.randn(200, 6, 8, dtype=dtype)
    fit_covariance(model, [x], num_inducing=32)
    layer = model.encoder.layers[0].self_attn
    tokens = model.encoder.layers[0].norm1(x[:20])
    prior = layer.inducing.log_variance.exp()
    near = layer.posterior(tokens, tokens, tokens).variance.mean((0, 2, 3)) / prior
    far = layer.posterior(20 * tokens, 20 * tokens, 20 * tokens).variance.mean((0, 2, 3)) / prior
    assert near.max() < 0.6
    assert far.min() > 0.9


def test_weight_hardly_matters_above_a_thousand_and_nothing_is_learnt_at_a_small_one():
    x = torch.randn(100, 6, 8, dtype=torch.float64)
    model = Plain()
    left = {}
    for weight in (1e-6, 1e3, 1e5):
        fitted = fit_covariance(copy.deepcopy(model), [x], weight=weight, generator=torch.Generator().manual_seed(0))
        inducing = fitted.encoder.layers[1].self_attn.inducing
        left[weight] = inducing.typical_variance / inducing.log_variance.exp()
    torch.testing.assert_close(left[1e-6], torch.ones(2, dtype=torch.float64), rtol=1e-4, atol=0)
    assert (left[1e3] - left[1e5]).abs().max() < 0.05
    assert (left[1e5] < left[1e3]).all()


def test_save_and_load():
    model, x = Plain(), torch.randn(12, 6, 8, dtype=torch.float64)
    fit_covariance(model, [x], **OPTIONS)
    other = replace_attention(Plain(), num_inducing=4, sampling="mean")
    other.load_state_dict(model.state_dict())
    one, two = (m.encoder.layers[0].self_attn.posterior(x, x, x).variance for m in (model, other))
    assert one.equal(two)
    assert other.encoder.layers[1].self_attn.inducing.typical_variance.min() > 0


def test_hosts_that_compute_attention_themselves():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(8, 24, dtype=torch.float64)
            self.gp = ResidualGP(2, 4, num_inducing=4, sampling="mean", dtype=torch.float64)

        def forward(self, x):
            q, k, v = self.map(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            return self.gp(q, nn.functional.scaled_dot_product_attention(q, k, v)).transpose(1, 2).flatten(-2)

    model, x = Attending(), torch.randn(15, 6, 8, dtype=torch.float64)
    before = model(x)
    fit_covariance(model, [x], **OPTIONS)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert model.gp.inducing.typical_variance.min() > 0


@pytest.mark.parametrize("kernel", ["rbf", "exponential"])
def test_features_at_a_unit_variance_give_the_variance_of_the_layer(kernel):
    layer = small(mode="residual", kernel=kernel)
    layer.inducing.value.data.zero_()
    query = torch.randn(11, 2, 4, dtype=torch.float64)
    features, prior = _features(
        layer, query, layer.inducing.location.detach(), layer.inducing.log_lengthscale.detach().exp()
    )
    root = layer.inducing.scale[:, 0]
    explained = features.square().sum(-1) - (features @ root).square().sum(-1)
    wanted = layer.inducing.posterior(query.transpose(0, 1)[None], **layer.kernel_options()).variance[0, :, 0]
    torch.testing.assert_close((prior - explained) * layer.inducing.log_variance.exp()[:, None], wanted)


def test_constant_heads_have_a_finite_variance():
    model = Plain()
    for layer in model.encoder.layers:
        layer.self_attn.in_proj_weight.data[16:].zero_()
    fit_covariance(model, [torch.randn(12, 6, 8, dtype=torch.float64)], **OPTIONS)
    assert all(v.isfinite().all() for v in model.state_dict().values())


def test_centres_are_those_of_a_slow_iteration():
    points = torch.randn(60, 3, dtype=torch.float64)
    found = centres(points, 5, torch.Generator().manual_seed(1), steps=4) @ points
    slow = centres(points, 5, torch.Generator().manual_seed(1), steps=0) @ points
    for _ in range(4):
        groups = [[] for _ in slow]
        for point in points:
            groups[min(range(5), key=lambda k: float((point - slow[k]).norm()))].append(point)
        slow = torch.stack([torch.stack(g).mean(0) if g else slow[k] for k, g in enumerate(groups)])
    torch.testing.assert_close(found, slow)


def unchanged(model, before, kinds):
    assert [type(module) for module in model.modules()] == kinds
    after = model.state_dict()
    return set(after) == set(before) and all(after[name].equal(value) for name, value in before.items())


@pytest.mark.parametrize(
    ("loader", "options", "error", "words"),
    [
        ([], {}, ValueError, "at least one batch"),
        (["text"], {}, RuntimeError, None),
        ([torch.randn(1, 2, 8, dtype=torch.float64)], {"num_inducing": 9}, ValueError, "at least 9 distinct"),
        ([torch.randn(4, 2, 8, dtype=torch.float64)], {"weight": 0}, ValueError, "weight: expected a positive number"),
        ([torch.randn(4, 2, 8, dtype=torch.float64)], {"noise": -1.0}, ValueError, "noise: expected a positive number"),
        ([torch.randn(4, 2, 8, dtype=torch.float64)], {"max_tokens": 0}, ValueError, "max_tokens"),
        ([torch.full((9, 2, 8), torch.nan, dtype=torch.float64)], {"num_inducing": 2}, ValueError, None),
    ],
)
def test_after_an_error_the_model_is_as_it_was(loader, options, error, words):
    model = Plain()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises((error, TypeError, AttributeError) if words is None else error, match=words):
        fit_covariance(model, loader, **options)
    assert unchanged(model, before, kinds)
    assert model.training


def test_models_that_cannot_be_fitted():
    with pytest.raises(ValueError, match="attention to replace"):
        fit_covariance(nn.Linear(3, 3), [torch.randn(2, 3)])
    layer = small(mode="residual", covariance="low_rank")
    with pytest.raises(ValueError, match="low_rank"):
        fit_covariance(layer, [torch.randn(2, 3, 8)], forward=lambda m, x: m(x, x, x))


def test_attention_by_itself_is_replaced_and_returned():
    attention, x = trained_attention(), torch.randn(9, 5, 8, dtype=torch.float64)
    fitted = fit_covariance(attention, [x], forward=lambda m, x: m(x, x, x), **OPTIONS)
    assert isinstance(fitted, SGPAttention)
    torch.testing.assert_close(fitted(x, x, x)[0], attention(x, x, x)[0])


FITTED = ("typical_variance", "temperature")


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_what_was_fitted_keeps_its_precision_when_a_model_is_cast_to_less(dtype, half):
    model, x = Plain(dtype), torch.randn(20, 6, 8, dtype=dtype)
    fit_covariance(model, [x], **OPTIONS)
    inducing = model.encoder.layers[0].self_attn.inducing
    inducing.temperature.copy_(torch.tensor([0.1, 1e-6, 4.0]))
    before = [getattr(inducing, name).float() for name in FITTED]

    def check(model):
        found = [getattr(model.encoder.layers[0].self_attn.inducing, name) for name in FITTED]
        assert [value.dtype for value in found] == [torch.float32] * 2
        assert all(one.equal(two) for one, two in zip(found, before, strict=True))

    assert inducing.typical_variance.dtype == dtype
    model.to(half)
    assert inducing.location.dtype == half
    check(model)
    check(copy.deepcopy(model))
    check(model.to(half))
    for assign in (False, True):
        other = replace_attention(Plain(half), num_inducing=4)
        assert other.encoder.layers[0].self_attn.inducing.typical_variance.dtype == torch.float32
        other.load_state_dict(model.state_dict(), assign=assign)
        check(other)
    rounded = {name: value.to(half) for name, value in model.state_dict().items()}
    other.load_state_dict(rounded, assign=True)
    assert other.encoder.layers[0].self_attn.inducing.temperature.dtype == torch.float32
    empty = copy.deepcopy(model).to("meta").to(half)
    assert empty.encoder.layers[0].self_attn.inducing.temperature.dtype == torch.float32
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    check(empty)
    assert model.double().encoder.layers[0].self_attn.inducing.temperature.dtype == torch.float64


def test_a_state_of_a_time_without_fits_loads_and_is_not_fitted():
    model = Plain()
    fit_covariance(model, [torch.randn(20, 6, 8, dtype=torch.float64)], **OPTIONS)
    old = {name: value for name, value in model.state_dict().items() if not name.endswith(FITTED)}
    assert len(old) == len(model.state_dict()) - 4
    for assign in (False, True):
        other = copy.deepcopy(model)
        other.load_state_dict(old, assign=assign)  # strictly
        inducing = other.encoder.layers[1].self_attn.inducing
        assert not inducing.typical_variance.any() and not inducing.temperature.any()
        assert inducing.typical_variance.dtype == torch.float64
    plain = {name: value for name, value in old.items() if ".inducing." not in name}
    other = copy.deepcopy(model)
    assert any(name.endswith(FITTED) for name in other.load_state_dict(plain, strict=False).missing_keys)
    assert other.encoder.layers[1].self_attn.inducing.typical_variance.all()  # its keys are the same


class Translator(nn.Module):
    """A decoder whose sources and targets are equally long, with paddings of their own."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, target, source, padding=None, source_padding=None):
        return self.decoder(target, source, tgt_key_padding_mask=padding, memory_key_padding_mask=source_padding)


def test_padded_targets_count_nowhere_in_cross_attention_either():
    model = Translator()
    target, source = torch.randn(2, 12, 6, 8, dtype=torch.float64)
    padding = torch.arange(6) >= torch.randint(2, 7, (12, 1))
    hidden = torch.arange(6) >= torch.randint(2, 7, (12, 1))
    states = []
    for fill in (1.0, 50.0):
        fitted, draws = copy.deepcopy(model), torch.Generator().manual_seed(3)
        batch = {
            "target": torch.where(padding.unsqueeze(-1), fill, target),
            "source": torch.where(hidden.unsqueeze(-1), fill, source),
            "padding": padding,
            "source_padding": hidden,
        }
        fit_covariance(fitted, [batch], generator=draws, **OPTIONS)
        states.append(fitted.state_dict())
    for name, one in states[0].items():
        torch.testing.assert_close(one, states[1][name], rtol=1e-9, atol=1e-11, msg=name)
    seen = {}
    layers = look_through(fitted, [batch], lambda name, sight: seen.update({name: sight}))
    assert len(layers) == 4
    assert all(sight.present.equal(~padding) for sight in seen.values())
    assert sorted(name for name, sight in seen.items() if sight.is_self) == [
        f"decoder.layers.{i}.self_attn" for i in (0, 1)
    ]


def test_a_mask_of_sources_is_not_that_of_queries():
    gp = ResidualGP(2, 4, num_inducing=3, dtype=torch.float64)
    gp.self_attention = False
    query, seen = torch.randn(3, 2, 5, 4, dtype=torch.float64), []
    mask = torch.ones(3, 1, 5, 5).bool()
    mask[..., 2:] = False
    look_through(gp, [query], lambda name, sight: seen.append(sight), forward=lambda gp, q: gp(q, q, mask))
    assert seen[0].present.all()


@pytest.mark.slow  # importing the compiler
def test_a_compiled_model_is_seen():
    model, x = Plain().eval(), torch.randn(20, 6, 8, dtype=torch.float64)
    replace_attention(model, num_inducing=4, sampling="mean")
    compiled = torch.compile(model, backend="eager")
    before = compiled(x)
    fit_covariance(compiled, [x], **OPTIONS)
    assert model.encoder.layers[0].self_attn.inducing.typical_variance.all()
    torch.testing.assert_close(compiled(x), before)


def test_attention_that_has_no_keys():
    class Pair(nn.Module):
        def __init__(self, *layers):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x, x, x)[0]
            return x

    x = torch.randn(9, 5, 8, dtype=torch.float64)
    features = RFFAttention(8, 2, batch_first=True, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"with none, but RFFAttention"):
        fit_covariance(Pair(features), [x])
    model = Pair(features, small(mode="residual"))
    assert fit_covariance(model, [x], **OPTIONS).layers[0] is features
    assert model.layers[1].inducing.typical_variance.all()
    with pytest.raises(ValueError, match="num_inducing"):
        fit_covariance(model, [x], num_inducing=0)
    with pytest.raises(ValueError, match="num_batches"):
        fit_covariance(model, [x], num_batches=0)


def test_whose_mean_depends_on_keys():
    layer = small(mode="residual")
    assert mean_depends_on_keys(layer)
    layer.inducing.value.data.zero_()
    assert not mean_depends_on_keys(layer)
    assert mean_depends_on_keys(small(mode="sgpa", moved=False))
    assert not mean_depends_on_keys(ResidualGP(2, 4))
    assert called("") == "the model itself" and called("a.b") == "a.b"


@pytest.mark.cuda
def test_on_a_gpu(dtype):
    model, x = Plain(dtype).cuda().eval(), torch.randn(20, 6, 8, dtype=dtype)
    before = model(x.cuda())
    fit_covariance(model, [x], **OPTIONS)
    torch.testing.assert_close(model(x.cuda()), before, rtol=0, atol=1e-5)
    assert model.encoder.layers[0].self_attn.inducing.typical_variance.is_cuda
