"""What SGPAttention costs: conventions, mini-batches, and the start."""

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from torch.distributions import kl_divergence as gaussian_kl

import gpseq.nn
from gpseq.nn import SGPAttention, kl_divergence
from gpseq.nn.divergence import divergence_of_data
from tests.layers import EVERY_MEAN, MODES, mean_of, name_of, small

every_mean = pytest.mark.parametrize("options", EVERY_MEAN, ids=name_of)
GLOBAL = [options for options in EVERY_MEAN if options["form"] != "cheng_boots"]


def tokens(batch: int, length: int = 5) -> torch.Tensor:
    return torch.randn(batch, length, 8, dtype=torch.float64)


@every_mean
def test_before_any_call(options):
    layer = small(**options)
    if options["mode"] == "residual":
        assert layer.kl_divergence() > 0
        torch.testing.assert_close(layer.kl_divergence(10, "per_sequence"), 10 * layer.kl_divergence())
    else:
        with pytest.raises(RuntimeError, match="kl_divergence: expected a call of the layer before"):
            layer.kl_divergence()
    with pytest.raises(RuntimeError, match="kl_divergence: expected a call of the layer before"):
        layer.kl_divergence(convention="per_sequence")
    x = tokens(2)
    for call in (layer.posterior, layer.conditional):  # these are no calls
        call(x, x, x)
    with pytest.raises(RuntimeError, match="kl_divergence: expected a call of the layer before"):
        kl_divergence(layer, convention="per_sequence")


@pytest.mark.parametrize("options", GLOBAL, ids=name_of)
@pytest.mark.parametrize("padded", [False, True])
def test_conventions_from_their_parts(options, padded):
    layer, x = small(**options), tokens(6)
    mask = torch.rand(6, 5) < 0.3 if padded else None
    shared, own = _parts(layer, x, mask)
    mean_of(layer, x, x, x, mask)
    torch.testing.assert_close(layer.kl_divergence(), shared + own.sum())
    torch.testing.assert_close(layer.kl_divergence(convention="global"), shared + own.sum())
    torch.testing.assert_close(layer.kl_divergence(100), shared + 100 / 6 * own.sum())
    torch.testing.assert_close(layer.kl_divergence(100, "per_sequence"), 100 * (shared + own.mean()))
    torch.testing.assert_close(layer.kl_divergence(convention="per_sequence"), 6 * (shared + own.mean()))
    if options["mode"] == "residual":
        assert own.eq(0).all()
    else:
        assert own.gt(0).all()


def _parts(layer: SGPAttention, x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What all sequences share, and what each pays: from a sequence and from two copies of it."""
    own, shared = [], []
    for index, sequence in enumerate(x):
        keys = None if mask is None else mask[index]
        mean_of(layer, sequence, sequence, sequence, keys)
        one, two = layer.kl_divergence(1), layer.kl_divergence(2)
        own.append(two - one)
        shared.append(2 * one - two)
    torch.testing.assert_close(torch.stack(shared), shared[0].expand(len(x)))
    return shared[0].detach(), torch.stack(own).detach()


@pytest.mark.parametrize("options", GLOBAL, ids=name_of)
def test_mini_batches_are_unbiased(options):
    layer, x = small(**options), tokens(12)
    estimates = {"global": [], "per_sequence": []}
    for batch in x.split(4):
        mean_of(layer, batch, batch, batch)
        for convention, values in estimates.items():
            values.append(layer.kl_divergence(12, convention))
    mean_of(layer, x, x, x)
    for convention, values in estimates.items():
        torch.testing.assert_close(torch.stack(values).mean(), layer.kl_divergence(convention=convention))


@every_mean
def test_repeated_sequences_count_once(options):
    layer, x = small(**options), tokens(3)
    mean_of(layer, x, x, x)
    wanted = [layer.kl_divergence(n, c) for n in (None, 10) for c in (None, "per_sequence")]
    repeated = x.repeat(4, 1, 1)
    mean_of(layer, repeated, repeated, repeated)
    layer.num_samples = 4
    for want, (n, c) in zip(wanted, ((n, c) for n in (None, 10) for c in (None, "per_sequence")), strict=True):
        torch.testing.assert_close(layer.kl_divergence(n, c), want)
    layer.num_samples = 5
    with pytest.raises(ValueError, match="num_samples: expected a number that divides the batch of 12, got 5"):
        layer.kl_divergence()


def test_the_cheng_boots_form_is_per_sequence():
    x = tokens(3)
    for mode in ("sgpa", "softmax_kernel"):
        layer = small(mode=mode, form="cheng_boots")
        mean_of(layer, x, x, x)
        torch.testing.assert_close(layer.kl_divergence(7), layer.kl_divergence(7, "per_sequence"))
        with pytest.raises(ValueError, match="convention: expected 'per_sequence' in the Cheng-Boots form"):
            layer.kl_divergence(convention="global")
        with pytest.raises(ValueError, match="convention: expected 'per_sequence' in the Cheng-Boots form"):
            kl_divergence(nn.Sequential(layer), convention="global")


def test_both_forms_cost_the_same_for_one_sequence():
    # v_g = w + K_gg^-1 K_ga v_a
    layer, x = small(jitter=0.0, value_scale=None), tokens(1)
    other = small(form="cheng_boots", jitter=0.0, value_scale=None)
    other.load_state_dict(layer.state_dict())
    heads, keys = layer.project_query(x)[0], layer.inducing.key(layer.query_weight, None)
    scale, variance = layer.inducing.log_lengthscale.exp(), layer.inducing.log_variance.exp()
    for h in range(2):
        a, g = heads[h] / scale[h], keys[h] / scale[h]
        gram = variance[h] * torch.exp(-0.5 * torch.cdist(g, g).square())
        cross = variance[h] * torch.exp(-0.5 * torch.cdist(g, a).square())
        with torch.no_grad():
            layer.inducing.value[h] = other.inducing.value[h] + torch.linalg.solve(
                gram, cross @ layer.project_value(x)[0, h]
            )
    torch.testing.assert_close(mean_of(layer, x, x, x), mean_of(other, x, x, x))
    torch.testing.assert_close(layer.kl_divergence(), other.kl_divergence())
    with torch.no_grad():
        assert (layer.kl_divergence() - other._kl_global()).abs() > 1e-2  # not for nothing


@pytest.mark.parametrize("covariance", ["shared", "per_dim", "diagonal", "low_rank"])
def test_what_inducing_keys_cost_is_a_gaussian_divergence(covariance):
    layer = small(mode="residual", covariance=covariance, jitter=0.0)
    keys = layer.inducing.key(layer.query_weight, layer.query_bias)
    scale, variance = layer.inducing.log_lengthscale.exp(), layer.inducing.log_variance.exp()
    total = torch.zeros((), dtype=torch.float64)
    for h in range(2):
        g = keys[h] / scale[h]
        gram = variance[h] * torch.exp(-0.5 * torch.cdist(g, g).square())
        tril = torch.linalg.cholesky(gram)
        for d in range(4):
            own = 0 if covariance == "shared" else d
            std = layer.inducing.log_diagonal[h, own].exp()
            whitened = torch.diag(std.square())
            if layer.inducing.lower is not None:
                root = layer.inducing.lower[h, own].tril(-1) + torch.diag(std)
                whitened = root @ root.mT
            elif layer.inducing.root is not None:
                whitened = whitened + layer.inducing.root[h, own] @ layer.inducing.root[h, own].mT
            q = MultivariateNormal(gram @ layer.inducing.value[h, :, d], tril @ whitened @ tril.mT)
            total = total + gaussian_kl(q, MultivariateNormal(torch.zeros(3).double(), gram))
    torch.testing.assert_close(layer.kl_divergence(), total)


@pytest.mark.parametrize("embed_dim", [16, 96, 768])
def test_less_than_one_nat_a_sequence_at_the_start(embed_dim):
    for options in EVERY_MEAN:
        for heads, covariance in ((1, "low_rank"), (4, "per_dim"), (8, "shared")):
            layer = SGPAttention(
                embed_dim, heads, 8, batch_first=True, sampling="mean", covariance=covariance, **options
            )
            for length in (1, 2, 16, 256):
                batch = max(64 // length, 2)  # the exponential kernel has a heavy tail
                x = torch.randn(batch, length, embed_dim)
                with torch.no_grad():
                    layer(x, x, x, need_weights=False)
                    assert layer.kl_divergence(1, "per_sequence") < 1.0, (options, heads, length)


def test_a_prior_costs_nothing_and_published_values_cost_more_with_the_length():
    layer = small(moved=False)
    published = small(moved=False, value_scale=None)
    published.load_state_dict(layer.state_dict())
    costs = []
    for length in (8, 64):
        x = tokens(1, length)
        for one in (layer, published):
            mean_of(one, x, x, x)
            costs.append(one.kl_divergence())
    assert costs[3] > 2 * costs[1]
    assert costs[2] < costs[0]
    torch.testing.assert_close(costs[1], 64 * costs[0])
    with torch.no_grad():
        layer.value_weight.zero_()
        layer.value_bias.zero_()
    mean_of(layer, x, x, x)
    assert layer.kl_divergence().abs() < 1e-12


def test_the_last_call_counts_and_a_failed_one_does_not():
    layer = small()
    x, y = tokens(2), tokens(3)
    mean_of(layer, x, x, x)
    first = layer.kl_divergence()
    mean_of(layer, y, y, y)
    second = layer.kl_divergence()
    assert not first.equal(second)
    layer.generator = object()  # fails in the draw
    with pytest.raises(TypeError):
        layer(x, x, x)
    assert layer.kl_divergence().equal(second)


def test_gradients_reach_every_parameter_of_the_cost():
    layer, x = small(covariance="per_dim"), tokens(2)
    mean_of(layer, x, x, x)
    layer.kl_divergence(10).backward()
    spared = {"out_proj.weight", "out_proj.bias"}
    assert {n for n, p in layer.named_parameters() if p.grad is None or p.grad.eq(0).all()} == spared


def test_bad_arguments():
    layer, x = small(), tokens(2)
    mean_of(layer, x, x, x)
    with pytest.raises(ValueError, match="convention: expected one of 'global', 'per_sequence', None"):
        layer.kl_divergence(convention="mean")
    with pytest.raises(ValueError, match="num_data: expected at least 1, got 0"):
        layer.kl_divergence(0)
    with pytest.raises(TypeError, match="num_data: expected an integer"):
        kl_divergence(layer, 10.0)


class TestOfAModel:
    def test_sums_layers_at_any_depth(self):
        layers = [small(mode=mode) for mode in MODES]
        model = nn.ModuleDict({"a": layers[0], "b": nn.Sequential(nn.Linear(2, 2), nn.ModuleList(layers[1:]))})
        x = tokens(3)
        for layer in layers:
            mean_of(layer, x, x, x)
        for arguments in ({}, {"num_data": 50}, {"num_data": 50, "convention": "per_sequence"}):
            want = sum(layer.kl_divergence(**arguments) for layer in layers)
            torch.testing.assert_close(kl_divergence(model, **arguments), want)
        assert kl_divergence(layers[0]).equal(layers[0].kl_divergence())

    def test_counts_a_shared_layer_once(self):
        layer, x = small(), tokens(3)
        mean_of(layer, x, x, x)
        assert kl_divergence(nn.ModuleList([layer, layer, nn.Sequential(layer)])).equal(layer.kl_divergence())

    def test_layers_of_two_dtypes(self):
        model = nn.ModuleList([small(torch.float32, mode="residual"), small(mode="residual")])
        total = model[0].kl_divergence() + model[1].kl_divergence()
        torch.testing.assert_close(kl_divergence(model), total.float())

    def test_needs_a_layer(self):
        with pytest.raises(ValueError, match=r"model: expected a layer of .* with a divergence, got a Linear"):
            kl_divergence(nn.Linear(2, 2))
        with pytest.raises(ValueError, match=r"got a Draws with none"):
            kl_divergence(gpseq.nn.generator.Draws())

    def test_one_layer_that_was_not_called(self):
        layer, x = small(), tokens(3)
        mean_of(layer, x, x, x)
        with pytest.raises(RuntimeError, match="expected a call of the layer before"):
            kl_divergence(nn.ModuleList([layer, small()]))


def test_an_empty_batch_costs_what_all_share():
    layer, x = small(), tokens(0)
    mean_of(layer, x, x, x)
    torch.testing.assert_close(layer.kl_divergence(), layer._kl_global())
    assert layer.kl_divergence(convention="per_sequence") == 0
    assert divergence_of_data(torch.ones(()), torch.ones(0), 1, 5, False) == 1
