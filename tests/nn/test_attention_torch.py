"""SGPAttention and what torch does with modules: dtypes, copies, compilation, transforms, devices."""

import copy
import io
import pickle
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gpseq.nn import SGPAttention, kl_divergence
from tests.layers import COVARIANCES, EVERY_MEAN, KERNELS, MODES, SAMPLING, mean_of, name_of, small

every_mean = pytest.mark.parametrize("options", EVERY_MEAN, ids=name_of)
PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 0, 0, 1]]).bool()


def called(layer: SGPAttention) -> SGPAttention:
    """The layer after a forward pass with a graph."""
    x = torch.randn(3, 5, 8, dtype=layer.query_weight.dtype, requires_grad=True)
    layer(x, x, x)
    return layer


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_state_dict_is_all_there_is(covariance):
    layer = called(small(covariance=covariance))
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    other = small(covariance=covariance)
    assert other.load_state_dict(torch.load(stored)).missing_keys == []
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    assert mean_of(other, x, x, x).equal(mean_of(layer, x, x, x))
    assert other.kl_divergence().equal(layer.kl_divergence())
    assert set(layer.state_dict()) == {name for name, _ in (*layer.named_parameters(), *layer.named_buffers())}


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_copies_after_a_forward_pass(way):
    for mode in MODES:
        layer = called(small(mode=mode))
        layer.generator = torch.Generator().manual_seed(1)
        other = way(layer)
        assert other.generator is None
        if mode != "residual":
            with pytest.raises(RuntimeError, match="expected a call of the layer before"):
                other.kl_divergence()
        x = torch.randn(3, 5, 8, dtype=torch.float64)
        assert mean_of(other, x, x, x).equal(mean_of(layer, x, x, x))
        torch.testing.assert_close(other.kl_divergence(), layer.kl_divergence())
        assert layer.generator is not None
        assert (other.mode, other.sampling, other.num_samples) == (mode, "marginal", 1)


def test_whole_modules_can_be_saved():
    stored = io.BytesIO()
    torch.save(called(small()), stored)
    stored.seek(0)
    assert isinstance(torch.load(stored, weights_only=False), SGPAttention)


@every_mean
def test_dtypes(options):
    layer = small(torch.float32, **options)
    x = torch.randn(3, 5, 8)
    want = mean_of(layer, x, x, x, PADDING)
    cost = layer.kl_divergence()
    double, z = layer.double(), x.double()
    out = mean_of(double, z, z, z, PADDING)
    assert out.dtype == torch.float64
    torch.testing.assert_close(want, out.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(cost, double.kl_divergence().float(), rtol=1e-3, atol=1e-3)
    for dtype, tolerance in ((torch.bfloat16, 0.15), (torch.float16, 0.03)):
        short = copy.deepcopy(double).to(dtype)
        y = x.to(dtype)
        for sampling in SAMPLING:
            short.sampling = sampling
            got, weights = short(y, y, y, PADDING)
            assert got.dtype == dtype
            assert got.isfinite().all()
            assert weights.isfinite().all()
            assert short.kl_divergence().isfinite()
        assert (got - out).abs().max() < tolerance * (1 + out.abs().max())


@every_mean
@pytest.mark.parametrize("sampling", SAMPLING)
def test_autocast(options, sampling):
    layer = small(torch.float32, **options, sampling=sampling)
    x = torch.randn(3, 5, 8, requires_grad=True)
    want, cost = mean_of(layer, x, x, x), layer.kl_divergence()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = layer(x, x, x)
        mean, inside = mean_of(layer, x, x, x), layer.kl_divergence()
        half, _ = layer(x.bfloat16(), x.bfloat16(), x.bfloat16())
    assert out.dtype == half.dtype == torch.bfloat16
    assert (mean - want).abs().max() < 0.1 * (1 + want.abs().max())
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, cost, rtol=0.1, atol=0.1)
    # What the inducing keys cost is the same in and out of it.
    if options["mode"] == "residual":
        assert inside.equal(cost)
    (out.float().square().sum() + inside).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("options", EVERY_MEAN, ids=name_of)
def test_gradients(options):
    layer = small(**options, covariance="low_rank", sampling="mean")
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[False] * 4, [False, True, False, True]])
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def itself(tokens, *values):
        call = torch.func.functional_call(
            layer, dict(zip(names, values, strict=True)), (tokens, tokens, tokens), {"is_causal": True}
        )
        return call[0], call[1]

    def other(tokens, memory, *values):
        call = torch.func.functional_call(
            layer, dict(zip(names, values, strict=True)), (tokens, memory, memory, padding)
        )
        return call[0]

    assert torch.autograd.gradcheck(itself, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradcheck(other, (x, y, *parameters), fast_mode=True)


@pytest.mark.parametrize("sampling", SAMPLING)
def test_gradients_of_draws_and_of_the_divergence(sampling):
    for mode, covariance in product(MODES, ("per_dim", "low_rank")):
        layer = small(mode=mode, covariance=covariance, sampling=sampling)
        x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)

        def draw(tokens, *_, layer=layer):
            torch.manual_seed(0)
            out = layer(tokens, tokens, tokens, need_weights=False)[0]
            return out, layer.kl_divergence(10)

        assert torch.autograd.gradcheck(draw, (x, *layer.parameters()), fast_mode=True, atol=1e-4)


def test_backward_twice_needs_the_graph_only():
    layer = small()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    out, _ = layer(x, x, x)
    loss = out.square().sum() + layer.kl_divergence()
    first = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(layer.parameters()))
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one, two)
    layer(x, x, x)[0].sum().backward()
    layer(x, x, x)[0].sum().backward()


@pytest.mark.parametrize("sampling", SAMPLING)
def test_activation_checkpointing(sampling):
    for mode in MODES:
        layer = small(mode=mode, sampling=sampling)
        x = torch.randn(2, 3, 8, dtype=torch.float64)

        def loss(wrap, layer=layer, x=x):
            torch.manual_seed(1)
            out = wrap(lambda t: layer(t, t, t, need_weights=False)[0], x)
            return out.square().sum() + layer.kl_divergence(10)

        want = torch.autograd.grad(loss(lambda f, t: f(t)), list(layer.parameters()))
        got = torch.autograd.grad(loss(lambda f, t: checkpoint(f, t, use_reentrant=False)), list(layer.parameters()))
        for one, two in zip(got, want, strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_functional_transforms():
    for options in EVERY_MEAN:
        layer = small(**options, sampling="mean")
        parameters = {k: v.detach() for k, v in layer.named_parameters()}
        x = torch.randn(3, 5, 8, dtype=torch.float64)

        def loss(values, tokens, layer=layer):
            out, _ = torch.func.functional_call(layer, values, (tokens, tokens, tokens), {"need_weights": False})
            return out.square().sum() + layer.kl_divergence(10)

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        for index in range(3):
            alone = torch.func.grad(loss)(parameters, x[index])
            for name, value in alone.items():
                torch.testing.assert_close(each[name][index], value)


def test_ensembles_by_vmap():
    layers = [small() for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(layers)
    x = torch.randn(2, 5, 8, dtype=torch.float64)

    def run(values):
        return torch.func.functional_call(layers[0], values, (x, x, x), {"need_weights": False})[0]

    layers[0].sampling = "mean"
    out = torch.func.vmap(run)(parameters)
    for one, layer in zip(out, layers, strict=True):
        torch.testing.assert_close(one, mean_of(layer, x, x, x))
    layers[0].sampling = "marginal"
    draws = torch.func.vmap(run, randomness="different")(parameters)
    assert draws.shape == out.shape


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_construction_on_the_meta_device(mode, kernel):
    with torch.device("meta"):
        layer = SGPAttention(8, 2, num_inducing=3, mode=mode, kernel=kernel, batch_first=True)
    assert all(p.is_meta for p in layer.parameters())
    other = SGPAttention(8, 2, num_inducing=3, mode=mode, kernel=kernel, batch_first=True, device="meta")
    assert all(p.is_meta for p in other.parameters())
    layer.to_empty(device="cpu")
    torch.manual_seed(4)
    layer.reset_parameters()
    torch.manual_seed(4)
    fresh = SGPAttention(8, 2, num_inducing=3, mode=mode, kernel=kernel, batch_first=True)
    fresh.reset_parameters()
    torch.manual_seed(4)
    again = SGPAttention(8, 2, num_inducing=3, mode=mode, kernel=kernel, batch_first=True)
    assert all(p.isfinite().all() for p in layer.parameters())
    assert {k: v.shape for k, v in layer.state_dict().items()} == {k: v.shape for k, v in again.state_dict().items()}
    x = torch.randn(2, 3, 8)
    assert layer(x, x, x)[0].isfinite().all()
    assert layer.kl_divergence(1, "per_sequence") < 3.0


def test_shapes_on_the_meta_device():
    for mode, sampling in product(MODES, SAMPLING):
        layer = small(torch.float32, moved=False, mode=mode, sampling=sampling).to("meta")
        x = torch.empty(2, 3, 8, device="meta")
        out, weights = layer(x, x, x, torch.empty(2, 3, dtype=torch.bool, device="meta"))
        assert out.is_meta
        assert (out.shape, weights.shape) == ((2, 3, 8), (2, 3, 3))


def test_device_and_dtype_of_construction():
    layer = SGPAttention(8, 2, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    torch.set_default_dtype(torch.float64)
    assert {p.dtype for p in SGPAttention(8, 2).parameters()} == {torch.float64}


def test_frozen_parameters_get_no_gradient():
    layer = small(mode="residual")
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    layer.inducing.requires_grad_(True)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    (layer(x, x, x)[0].square().sum() + layer.kl_divergence()).backward()
    assert all((p.grad is not None) == n.startswith("inducing") for n, p in layer.named_parameters())


@pytest.mark.parametrize("sampling", ["marginal", "mean"])
@pytest.mark.parametrize("length", [5, 300])
def test_weights_on_request_change_nothing_else(sampling, length, dtype):
    # Calls without weights have a path of their own, where the derivatives are written out.
    for options in ({}, {"value_scale": None}, {"covariance": "per_dim"}, {"form": "cheng_boots"}):
        layer = small(dtype, **options, sampling=sampling)
        x = torch.randn(3, length, 8, dtype=dtype, requires_grad=True)
        lengths = torch.tensor([[length], [length - 2], [1]])
        padding = torch.arange(length) >= lengths
        floating = torch.zeros(3, length).masked_fill(padding, -torch.inf)
        for mask in (None, padding, floating, floating + 0.5 * torch.rand(3, length)):
            results = []
            for need_weights in (True, False):
                torch.manual_seed(2)
                out, _ = layer(x, x, x, mask, need_weights=need_weights)
                cost = layer.kl_divergence(10)
                loss = out.square().mean() + 1e-2 * cost
                results.append([out, cost, *torch.autograd.grad(loss, [x, *layer.parameters()])])
            tolerance = {} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 2e-4}
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(got, want, **tolerance)


def test_an_optimiser_step_between_call_and_divergence():
    layer, x = small(), torch.randn(3, 5, 8, dtype=torch.float64)
    for _ in range(3):
        optimiser = torch.optim.SGD(layer.parameters(), 1e-3)
        out, _ = layer(x, x, x, need_weights=False)
        (out.square().sum() + layer.kl_divergence()).backward()
        optimiser.step()
        optimiser.zero_grad()
        assert layer.kl_divergence().isfinite()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", MODES)
def test_compiles_into_one_graph(mode):
    torch._dynamo.reset()
    layer = small(torch.float32, mode=mode, kernel="exponential" if mode == "softmax_kernel" else "rbf")
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, 8)
    given = {"key_padding_mask": PADDING, "is_causal": mode == "sgpa"}
    want = mean_of(layer, x, x, x, **given)
    cost, layer.sampling = layer.kl_divergence(), "mean"
    out, _ = fast(x, x, x, need_weights=False, **given)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.kl_divergence(), cost, rtol=1e-4, atol=1e-4)
    layer.sampling = "marginal"
    drawn, _ = fast(x, x, x, need_weights=False, **given)
    assert not drawn.equal(out)
    (drawn.square().sum() + layer.kl_divergence()).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


cuda = pytest.mark.cuda


@cuda
@every_mean
def test_posterior_on_a_gpu(options):
    layer = small(**options, covariance="per_dim")
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    want = layer.posterior(x, x, x, PADDING)
    mean, variance = want.mean, want.variance
    other = copy.deepcopy(layer).cuda()
    y = x.cuda()
    for full in (False, True):
        posterior = other.posterior(y, y, y, PADDING.cuda(), full=full)
        torch.testing.assert_close(posterior.mean.cpu(), mean)
        torch.testing.assert_close(posterior.variance.cpu(), variance)
        assert posterior.rsample().is_cuda
        assert posterior.log_prob(posterior.mean).isfinite().all()


@cuda
@every_mean
@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_gpu_computes_the_same_and_is_never_waited_for(options, sampling):
    layer = small(torch.float32, **options, sampling=sampling)
    x = torch.randn(3, 300, 8)
    padding = torch.arange(300) >= torch.tensor([[300], [200], [100]])
    want = mean_of(layer, x, x, x, padding)
    cost = layer.kl_divergence(10)
    layer, x, padding = layer.cuda(), x.cuda().requires_grad_(), padding.cuda()
    with torch.no_grad():
        torch.testing.assert_close(mean_of(layer, x, x, x, padding).cpu(), want, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(layer.kl_divergence(10).cpu(), cost, rtol=1e-2, atol=1e-2)
    for _ in range(2):  # the first call may set libraries up
        out, _ = layer(x, x, x, padding, need_weights=False, is_causal=True)
        (out.square().sum() + kl_divergence(layer, num_data=10)).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = layer(x, x, x, padding, need_weights=False, is_causal=True)
        (out.square().sum() + kl_divergence(layer, num_data=10)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@cuda
def test_short_dtypes_and_generators_on_a_gpu():
    for mode, dtype in product(MODES, (torch.bfloat16, torch.float16)):
        layer = small(torch.float32, mode=mode).cuda()
        x = torch.randn(3, 64, 8, device="cuda")
        with torch.autocast("cuda", dtype=dtype):
            assert layer(x, x, x)[0].isfinite().all()
        layer.generator = torch.Generator("cuda").manual_seed(1)
        first = layer(x, x, x)[0]
        layer.generator.manual_seed(1)
        assert layer(x, x, x)[0].equal(first)
        layer.generator = None
        short = layer.to(dtype)
        assert short(x.to(dtype), x.to(dtype), x.to(dtype))[0].isfinite().all()


def test_models_of_several_layers_share_nothing():
    model = nn.ModuleList([small(), small()])
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    model[0](x, x, x)
    with pytest.raises(RuntimeError):
        model[1].kl_divergence()
