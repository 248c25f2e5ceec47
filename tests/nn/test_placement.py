"""Inducing keys on real tokens."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gpseq.nn import (
    RFFAttention,
    SGPAttention,
    fit_covariance,
    init_inducing,
    kl_divergence,
    replace_attention,
    use_generator,
)
from gpseq.nn.capture import Seen, TokenSample
from gpseq.nn.placement import spread_tokens
from gpseq.nn.residual import ResidualGP

PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()


class Model(nn.Module):
    """A stack that remembers what its attention saw."""

    def __init__(self, batch_first=True, norm_first=False, **options):
        super().__init__()
        stock = nn.TransformerEncoderLayer(8, 2, 8, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(stock, 3, enable_nested_tensor=False)
        replace_attention(self.encoder, **{"num_inducing": 4, **options})
        self.batch_first = batch_first

    def forward(self, x, padding=None, labels=None):
        x = x if self.batch_first else x.transpose(0, 1)
        out = self.encoder(x, src_key_padding_mask=padding)
        return out if self.batch_first else out.transpose(0, 1)

    @property
    def attentions(self):
        return [layer.self_attn for layer in self.encoder.layers]


def inputs_of(model, x, padding=None):
    """Real tokens of each layer, of a pass without draws in evaluation mode: the slow way."""
    model = copy.deepcopy(model).eval()
    for attention in model.attentions:
        attention.sampling = "mean"
    seen = []
    for layer in model.encoder.layers:
        layer.self_attn.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    with torch.no_grad():
        model(x, padding)
    seen = seen if model.batch_first else [tokens.transpose(0, 1) for tokens in seen]
    return [tokens.flatten(0, 1) if padding is None else tokens[~padding] for tokens in seen]


@pytest.mark.parametrize("method", ["kmeans++", "random"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_every_head_gets_distinct_real_tokens_of_its_own_layer(method, batch_first):
    model = Model(batch_first)
    x = torch.randn(3, 5, 8)
    assert init_inducing(model, [{"x": x, "padding": PADDING}], method) is model
    wanted = inputs_of(model, x, PADDING)
    for attention, tokens in zip(model.attentions, wanted, strict=True):
        for head in attention.inducing.location:
            assert torch.cdist(head, tokens).min(-1).values.max() < 1e-4
            assert torch.pdist(head).min() > 1e-3
    first, second, third = (attention.inducing.location for attention in model.attentions)
    assert not torch.isclose(first, second).all(-1).any()
    assert not torch.isclose(second, third).all(-1).any()


def test_batches_of_every_kind():
    x, y = torch.randn(6, 5, 8), torch.zeros(6)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3)
    start, places = Model(), []
    for loader in (
        [x[:3], x[3:]],
        [(x[:3], y[:3]), [x[3:], y[3:]]],
        [{"x": x[:3], "labels": y[:3]}, {"x": x[3:], "labels": y[3:]}],
        data,
        (batch for batch in data),
    ):
        model = init_inducing(copy.deepcopy(start), loader, generator=torch.Generator().manual_seed(1))
        places.append(model.attentions[1].inducing.location)
    for place in places[1:]:
        torch.testing.assert_close(place, places[0])
    model = init_inducing(copy.deepcopy(start), [("name", x)], forward=lambda model, batch: model(batch[1]))
    assert not model.attentions[0].inducing.location.equal(start.attentions[0].inducing.location)


def test_length_scales_are_median_distances():
    x = torch.randn(3, 5, 8)
    model = init_inducing(Model(), [x])
    for attention, tokens in zip(model.attentions, inputs_of(model, x), strict=True):
        for head, projected in enumerate(attention.project_query(tokens.unsqueeze(0))[0].detach()):
            want = torch.pdist(projected.double()).median().log().float().expand(4)
            torch.testing.assert_close(attention.inducing.log_lengthscale[head].detach(), want, atol=1e-4, rtol=1e-4)
    model = init_inducing(Model(kernel="exponential"), [x])
    query = model.attentions[0].project_query(x)
    scale = model.attentions[0].inducing.log_lengthscale.exp()
    norm = (query / scale[:, None]).norm(dim=-1).transpose(0, 1).flatten(1).median(-1).values
    torch.testing.assert_close(norm, torch.full((2,), 0.5**0.5))
    before = Model()
    model = init_inducing(copy.deepcopy(before), [x], lengthscale=False)
    assert model.attentions[0].inducing.log_lengthscale.equal(before.attentions[0].inducing.log_lengthscale)


@pytest.mark.filterwarnings("ignore::gpseq.nn.ConversionWarning")
def test_the_temperature_of_converted_scores_stays():
    before = Model(mode="softmax_kernel", kernel="exponential")
    model = init_inducing(copy.deepcopy(before), [torch.randn(3, 5, 8)])
    assert model.attentions[0].inducing.log_lengthscale.equal(before.attentions[0].inducing.log_lengthscale)
    assert not model.attentions[0].inducing.location.equal(before.attentions[0].inducing.location)


def test_all_else_stays_as_it_was():
    model = Model()
    model.train()
    model.encoder.layers[1].eval()
    model.attentions[2].sampling = "joint"
    x = torch.randn(3, 5, 8)
    model(x)
    modes = [module.training for module in model.modules()]
    mean = copy.deepcopy(model).eval()
    for attention in mean.attentions:
        attention.sampling = "mean"
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    init_inducing(model, [x], generator=torch.Generator().manual_seed(2))
    assert torch.get_rng_state().equal(state)
    assert [module.training for module in model.modules()] == modes
    assert [attention.sampling for attention in model.attentions] == ["marginal", "marginal", "joint"]
    changed = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"location", "log_lengthscale"}
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert kl_divergence(model) == 0
    for attention in model.attentions:
        attention.sampling = "mean"
    torch.testing.assert_close(model.eval()(x), mean(x))  # a residual's mean is not moved


def test_calls_are_forgotten():
    layer = SGPAttention(8, 2, num_inducing=4, batch_first=True)
    x = torch.randn(3, 5, 8)
    for calls in range(2):
        if calls:
            layer(x, x, x)
            assert layer.kl_divergence() > 0
        with use_generator(layer, torch.Generator()):
            generator = layer.generator
            init_inducing(layer, [x], forward=lambda layer, x: layer(x, x, x))
            assert layer.generator is generator
        with pytest.raises(RuntimeError, match="expected a call of the layer before"):
            layer.kl_divergence()


def test_a_generator_makes_it_the_same_again():
    start, x = Model(), torch.randn(30, 5, 8)
    places = [
        init_inducing(copy.deepcopy(start), [x], generator=torch.Generator().manual_seed(seed)).state_dict()
        for seed in (1, 1, 2)
    ]
    name = "encoder.layers.2.self_attn.inducing.location"
    assert places[0][name].equal(places[1][name])
    assert not places[0][name].equal(places[2][name])


def test_how_many_batches_and_tokens():
    calls = []

    def loader():
        for _ in range(10):
            calls.append(1)
            yield torch.randn(3, 5, 8)

    init_inducing(Model(), loader(), num_batches=3)
    assert len(calls) == 3
    with pytest.raises(ValueError, match=r"loader: tokens of encoder.layers.0.self_attn: .* at least 4 .* got 3"):
        init_inducing(Model(), [torch.randn(3, 5, 8)], max_tokens=3, num_batches=1)


def calls_of(layer, *sizes):
    """Calls with tokens that are numbered, sequences of one."""
    start = 0
    for size in sizes:
        tokens = torch.arange(start, start + size, dtype=torch.float32).view(1, 1, size, 1).expand(1, 2, size, 4)
        start += size
        yield Seen.of(layer, {"query": tokens, "heads": -tokens})


def test_few_batches_give_as_many_tokens_as_many():
    layer = ResidualGP(2, 4, 4)
    for sizes, most in (((100,), 64), ((30, 70), 64), ((1,) * 100, 64), ((100,), 100), ((40, 60), 200), ((1, 5), 3)):
        sample = TokenSample(most, heads=True)
        for seen in calls_of(layer, *sizes):
            sample.add("gp", seen)
        found = sample.queries("gp")[:, 0, 0]
        assert len(found) == min(most, sum(sizes))
        assert found.equal(found.unique())  # distinct, in their order
        assert sample.rows("gp").equal(sample.queries("gp"))
        torch.testing.assert_close(sample.heads("gp")[:, 0, 0], -found)


def test_every_token_has_the_same_chance():
    layer, draws = ResidualGP(2, 4, 4), torch.Generator().manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(2000):
        sample = TokenSample(3, draws)
        for seen in calls_of(layer, 2, 5, 3):  # as of a layer that is called several times
            sample.add("gp", seen)
        counts[sample.queries("gp")[:, 0, 0].long()] += 1
    # Binomial, of mean 600 and standard deviation 20.5.
    assert (counts - 600).abs().max() < 4.5 * 20.5
    state = torch.get_rng_state()
    one, two = (TokenSample(3, torch.Generator().manual_seed(5)) for _ in range(2))
    for sample in (one, two):
        for seen in calls_of(layer, 2, 5, 3):
            sample.add("gp", seen)
    assert one.queries("gp").equal(two.queries("gp"))
    assert torch.get_rng_state().equal(state)


def test_new_keys_make_a_fit_forgotten():
    model, x = Model(sampling="mean"), torch.randn(12, 5, 8)
    fit_covariance(model, [x])
    for attention in model.attentions:
        attention.inducing.temperature.fill_(1.0)
    with pytest.raises(ValueError, match="at least one batch"):
        init_inducing(model, [])
    assert all(attention.inducing.temperature.all() for attention in model.attentions)
    init_inducing(model, [x])
    for attention in model.attentions:
        assert not attention.inducing.typical_variance.any() and not attention.inducing.temperature.any()


def test_gaussian_processes_in_projected_space():
    layer = SGPAttention(8, 2, num_inducing=4, inducing_space="projected", batch_first=True, dtype=torch.float64)
    gp = ResidualGP(2, 4, 4)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    init_inducing(layer, [x], forward=lambda layer, x: layer(x, x, x, key_padding_mask=PADDING))
    for head, tokens in zip(layer.inducing.location, layer.project_query(x).transpose(0, 1), strict=True):
        assert torch.cdist(head, tokens[~PADDING]).min(-1).values.max() < 1e-6
    query = torch.randn(3, 2, 5, 4)
    visible = ~PADDING[:, None, None, :].expand(3, 1, 5, 5)
    lower = ~torch.ones(5, 5).triu(1).bool()
    floating = torch.zeros(3, 1, 5, 5).masked_fill(~visible, torch.finfo(torch.float32).min)
    for mask in (visible, visible & lower, floating, ~PADDING[:, None, None, :]):
        init_inducing(gp, [query], forward=lambda gp, query, mask=mask: gp(query, query, mask))
        for head, tokens in zip(gp.inducing.location, query.transpose(0, 1), strict=True):
            assert torch.cdist(head, tokens[~PADDING]).min(-1).values.max() < 1e-5
    init_inducing(gp, [query], forward=lambda gp, query: gp(query, query))


def test_inputs_without_a_batch():
    layer = SGPAttention(8, 2, num_inducing=4)
    x = torch.randn(9, 8)
    init_inducing(layer, [x], forward=lambda layer, x: layer(x, x, x))
    assert torch.cdist(layer.inducing.location[1], x).min(-1).values.max() < 1e-5


@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 2**31))
def test_spread_tokens_are_distinct(count, copies, seed):
    draws = torch.Generator().manual_seed(seed)
    points = torch.randn(30, 3, generator=draws).repeat(copies, 1)
    chosen = points[spread_tokens(points, count, draws)]
    assert len(torch.unique(chosen, dim=0)) == count


def test_spread_tokens_find_every_cluster():
    centres = 100.0 * torch.randn(6, 4)
    points = (centres[:, None] + 0.01 * torch.randn(6, 50, 4)).flatten(0, 1)
    for seed in range(5):
        chosen = spread_tokens(points, 6, torch.Generator().manual_seed(seed))
        assert len(set((chosen // 50).tolist())) == 6


def test_bad_input():
    model, x = Model(), torch.randn(3, 5, 8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="model: expected layers with inducing keys, got a Linear with none"):
        init_inducing(nn.Linear(8, 8), [x])
    with pytest.raises(ValueError, match="model: expected layers with inducing keys"):
        init_inducing(RFFAttention(8, 2), [x])
    with pytest.raises(ValueError, match="method: expected one of"):
        init_inducing(model, [x], "grid")
    with pytest.raises(ValueError, match="loader: expected at least one batch, got none"):
        init_inducing(model, [])
    with pytest.raises(TypeError, match="loader: expected tensors, sequences or mappings, got int; see forward"):
        init_inducing(model, [3])
    with pytest.raises(RuntimeError, match=r"every layer to be called, encoder.layers.0.self_attn, .* was not"):
        init_inducing(model, [x], forward=lambda model, x: None)
    same = torch.ones(3, 5, 8)
    for method in ("kmeans++", "random"):
        with pytest.raises(ValueError, match=r"encoder.layers.0.self_attn: points: expected at least 4 distinct ones"):
            init_inducing(model, [same], method)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
