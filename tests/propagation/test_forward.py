"""The door: what it refuses, what it leaves alone, and what must not depend on how the work is divided."""

import math

import pytest
import torch
from torch import nn

import gpseq.propagation.forward as door
from gpseq.nn import SGPAttention
from gpseq.predictive import Predictive
from gpseq.propagation import (
    WeightPosterior,
    check,
    fit_laplace,
    from_covariance,
    from_factors,
    from_variances,
    linearised,
    plan,
    propagate,
    register,
    sample,
    streamline,
)
from gpseq.propagation.laws import Diagonal
from gpseq.propagation.registry import _by_type
from tests.oracles_propagation import posterior as relative
from tests.oracles_propagation import relative_variances

FORMS = ["diag", "blockdiag", "lowrank", "full"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mlp(dtype=torch.float64, dropout=0.0):
    torch.manual_seed(1)
    layers = nn.Linear(3, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 2)
    return nn.Sequential(*layers).to(dtype).eval()


def encoder(dtype=torch.float64, batch_first=True):
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, "relu", batch_first=batch_first, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(dtype).eval()


def same(one, other, tolerance=1e-12):
    torch.testing.assert_close(one.mean, other.mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(one.covariance.to_dense(), other.covariance.to_dense(), rtol=tolerance, atol=tolerance)


@pytest.fixture
def rules():
    """Rules that a test registers are gone afterwards."""
    before = dict(_by_type)
    yield
    _by_type.clear()
    _by_type.update(before)


X = torch.zeros(4, 3, dtype=torch.float64)
GOOD = {"0.weight": torch.full((8, 3), 0.1, dtype=torch.float64)}


# Bad input


@pytest.mark.parametrize(
    ("posterior", "error", "message"),
    [
        (
            lambda: from_variances({"1.weight": GOOD["0.weight"]}),
            ValueError,
            r"posterior: expected names of parameters \(0.weight, 0.bias, 3.weight, 3.bias\), got 1.weight",
        ),
        (
            lambda: from_variances({"0.weight": torch.ones(3, 8).double()}),
            ValueError,
            r"posterior: expected a law of shape \(8, 3\) for 0.weight, which has shape \(8, 3\), got \(3, 8\)",
        ),
        (
            lambda: from_variances({"0.weight": -GOOD["0.weight"]}),
            ValueError,
            r"variances\['0.weight'\]: expected numbers that are not negative, got -0.1",
        ),
        (
            lambda: from_variances({"0.weight": GOOD["0.weight"] * math.nan}),
            ValueError,
            r"variances\['0.weight'\]: expected finite numbers, got 24 that are not",
        ),
        (
            lambda: from_variances({"0.weight": torch.ones(8, 3).long()}),
            TypeError,
            r"variances\['0.weight'\]: expected a floating-point tensor, got torch.int64",
        ),
        (
            lambda: from_variances(GOOD, means={"0.weight": torch.zeros(3)}),
            ValueError,
            r"posterior: expected a mean of shape \(8, 3\) for 0.weight, got \(3,\)",
        ),
        (lambda: from_variances(GOOD, means={"4.weight": torch.zeros(3)}), ValueError, "got 4.weight"),
        (
            lambda: from_factors({"0.weight": (torch.eye(3).double(), torch.eye(8).double())}),
            ValueError,
            r"posterior: expected a law of shape \(8, 3\) for 0.weight, .* got \(3, 8\)",
        ),
        (
            lambda: from_covariance(["0.weight", "0.bias"], torch.eye(24).double()),
            ValueError,
            "posterior: expected 32 entries for 0.weight, 0.bias, got 24",
        ),
        (lambda: from_variances(GOOD) | from_variances(GOOD), ValueError, "each parameter once, got 0.weight in both"),
    ],
)
def test_posteriors_that_do_not_fit(posterior, error, message):
    with pytest.raises(error, match=message):
        propagate(mlp(), posterior(), X)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (X * math.nan, ValueError, "x: expected finite numbers, got 12 that are not"),
        (X + torch.tensor([0.0, math.inf, 0.0]), ValueError, "x: expected finite numbers, got 4 that are not"),
        (X.half(), TypeError, "x: expected float32 or float64, got torch.float16"),
        (X.bfloat16(), TypeError, "x: expected float32 or float64, got torch.bfloat16"),
        (X.float(), TypeError, "x: expected the dtype of the weights, torch.float64, got torch.float32"),
        (X.to(torch.complex128), TypeError, "x: expected float32 or float64, got torch.complex128"),
        (X.long(), TypeError, "x: expected a dtype that the model takes, such as float32, got torch.int64"),
        (X[:0], ValueError, r"x: expected at least one element along dimension 0, got \(0, 3\)"),
        (X[:, :0], ValueError, r"x: expected at least one element along dimension 0, got \(4, 0\)"),
        (X[0, 0], ValueError, r"x: expected at least one element along dimension 0, got \(\)"),
        (X[0], ValueError, r"x: expected a batch of inputs, \(B, ...\), got shape \(3,\)"),
        (X.view(2, 1, 2, 3), ValueError, r"model: expected outputs \(B, K\) or \(B, T, K\), got \(2, 1, 2, 2\)"),
        (X.numpy(), TypeError, "x: expected a tensor or a mapping of tensors, got ndarray"),
        ({"input": 3}, TypeError, "x: expected a tensor or a mapping with tensors, got none"),
    ],
)
def test_inputs_that_are_none(x, error, message):
    with pytest.raises(error, match=message):
        propagate(mlp(), from_variances(GOOD), x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"covariance": "dense"}, ValueError, "covariance: expected one of auto, diag, .* got 'dense'"),
        ({"activations": "exact"}, ValueError, "activations: expected one of moments, tangent, got 'exact'"),
        ({"layer_norm": "first"}, ValueError, "layer_norm: expected one of jacobian, frozen, got 'first'"),
        ({"on_unknown": "skip"}, ValueError, "on_unknown: expected one of raise, linearise, got 'skip'"),
        ({"dropout": True}, ValueError, "dropout: expected one of off, variance, got True"),
        ({"preset": "suq"}, ValueError, "preset: expected one of None, streamlined, got 'suq'"),
        ({"num_tangents": 0}, ValueError, "num_tangents: expected at least 1, got 0"),
        ({"num_tangents": 2.0}, TypeError, "num_tangents: expected an integer, got 2.0"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1, got 0"),
        ({"batch_dim": -1}, ValueError, "batch_dim: expected at least 0, got -1"),
        ({"generator": 3}, TypeError, "generator: expected a torch.Generator or None, got int"),
        ({"noise": -1.0}, ValueError, "noise: "),
        ({"noise": torch.ones(3).double()}, ValueError, "noise: "),
    ],
)
def test_unknown_options(options, error, message):
    with pytest.raises(error, match=message):
        propagate(mlp(), from_variances(GOOD), X, **options)


def test_a_model_in_train_mode():
    model = mlp(dropout=0.1)
    model.train()
    with pytest.raises(ValueError, match=r"model: expected it in eval mode, but 2 \(Dropout\) trains"):
        propagate(model, from_variances(GOOD), X)
    propagate(mlp(dropout=0.0).train(), from_variances(GOOD), X)  # nothing that acts
    model.eval()
    model[2].train()
    with pytest.raises(ValueError, match="but 2"):
        propagate(model, from_variances(GOOD), X)
    norm = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\) trains"):
        propagate(norm, from_variances({"0.weight": torch.ones(2, 3).double()}), X)


@pytest.mark.parametrize(
    "part",
    [
        nn.MultiheadAttention(4, 2, dropout=0.1),
        nn.LSTM(4, 4, 2, dropout=0.1),
        nn.InstanceNorm1d(4, track_running_stats=True),
    ],
    ids=["attention", "recurrent", "norm"],
)
def test_parts_that_drop_or_count_without_a_layer_for_it(part):
    model = nn.Sequential(nn.Linear(3, 4), part)
    with pytest.raises(ValueError, match=rf"eval mode, but 1 \({type(part).__name__}\) trains; call model.eval"):
        propagate(model, from_variances({"0.bias": torch.ones(4)}), X.float())


def test_a_model_in_half_precision():
    model = mlp().bfloat16()
    with pytest.raises(TypeError, match=r"model: expected weights in float32 or float64, got torch\.bfloat16"):
        propagate(model, from_variances(GOOD), X)


class Gated(nn.Module):
    """Uses a parameter by a functional call."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.gate = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.inner(x) * self.gate


def test_a_parameter_that_no_rule_has_asked_for(rules):
    model = nn.Sequential(Gated(), nn.Linear(3, 2)).eval()
    posterior = from_variances({"0.inner.weight": torch.ones(3, 3), "0.gate": torch.ones(3)})

    @register(Gated)
    def gated(module, state, walk):
        return walk(module.inner, state).scale(module.gate)  # forgets the noise of the gate

    with pytest.raises(RuntimeError, match=r"posterior: 0.gate is uncertain, and no rule has asked for it"):
        propagate(model, posterior, torch.zeros(2, 3))
    propagate(model, from_variances({"0.inner.weight": torch.ones(3, 3)}), torch.zeros(2, 3))


class Branching(Gated):
    """Looks at its numbers, so that its forward cannot be followed."""

    def forward(self, x):
        out = super().forward(x)
        return out if float(out.detach().sum()) < 1e9 else x


def test_a_module_without_a_rule_is_named():
    model = nn.Sequential(Branching(), nn.Linear(3, 2)).eval()
    with pytest.raises(NotImplementedError, match=r"there is no rule for 0, a Branching.* on_unknown='linearise'"):
        propagate(model, from_variances({"0.gate": torch.ones(3)}), torch.zeros(2, 3))
    # Behind it, all is well.
    propagate(model, from_variances({"1.weight": torch.ones(2, 3)}), torch.zeros(2, 3))


def test_a_request_that_cannot_fit_states_the_estimate(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 200_000), nn.Linear(200_000, 1)).eval()
    posterior = from_variances({"0.bias": torch.ones(200_000)})
    with pytest.raises(
        RuntimeError, match=r"an estimate of 1788.1 GiB an element for 'full', 1 at a time, with .* free"
    ):
        propagate(model, posterior, torch.zeros(2, 3), covariance="full", chunk_size=1)
    monkeypatch.setattr(door, "free_bytes", lambda device: 1 << 30)
    assert plan(model, posterior, torch.zeros(2, 3)).form == "lowrank"
    assert plan(model, posterior, torch.zeros(500, 3), num_tangents=9).chunk_size == 1  # one fills the caches
    monkeypatch.setattr(door, "CACHED", 1 << 40)
    found = plan(model, posterior, torch.zeros(500, 3), num_tangents=9)
    assert found.bytes_per_element == 6 * 200_000 * 10 * 4 and found.chunk_size == (1 << 30) // (2 * 48_000_000)
    with pytest.raises(RuntimeError, match=r"0.0 GiB an element for 'lowrank', 100 at a time"):
        propagate(model, posterior, torch.zeros(100, 3), num_tangents=9, chunk_size=100)


# The plan


def test_the_choice_of_the_form_can_be_read(monkeypatch):
    model, posterior, x = mlp(), from_variances(GOOD), torch.randn(10, 3).double()
    assert plan(model, posterior, x) == door.Plan("full", 8, 12 * 64 * 8, 10)
    p = propagate(model, posterior, x)
    assert (
        p.notes["covariance"]
        == p[2:4].notes["covariance"]
        == Predictive.cat([p[:3], p[3:]]).notes["covariance"]
        == "full"
    )
    for form in FORMS:
        assert propagate(model, posterior, x, form, chunk_size=3).notes["covariance"] == form
        assert plan(model, posterior, x, form, chunk_size=3).chunk_size == 3
    assert propagate(model, posterior, x, preset="streamlined").notes["covariance"] == "diag"
    assert plan(model, posterior, x, preset="streamlined").form == "diag"
    monkeypatch.setattr(door, "FULL_UP_TO", 7)
    assert plan(model, posterior, x).form == "lowrank"
    assert propagate(model, posterior, x, num_tangents=4).notes["covariance"] == "lowrank"
    tokens = encoder()
    one = {"layers.1.linear1.weight": torch.ones(8, 4).double()}
    assert plan(tokens, from_variances(one), torch.zeros(2, 5, 4).double()).largest >= 5 * 8


def test_memory_that_full_does_not_have_is_a_reason_for_low_rank(monkeypatch):
    monkeypatch.setattr(door, "free_bytes", lambda device: 12 * 64 * 8 - 1)
    assert plan(mlp(), from_variances(GOOD), X[:1], num_tangents=2).form == "lowrank"


# What must not matter


@pytest.mark.parametrize("form", FORMS)
def test_chunks_do_not_matter(form):
    model = mlp()
    posterior, x = relative(model, 0.3), torch.randn(7, 3).double()

    def run(chunk_size):
        noise = torch.arange(1.0, 15.0).double().view(7, 2)
        return propagate(model, posterior, x, form, chunk_size=chunk_size, generator=seeded(), noise=noise)

    whole = run(None)
    for chunk_size in (1, 2, 3, 7, 100):
        part = run(chunk_size)
        same(part, whole)
        torch.testing.assert_close(part.noise, whole.noise)


@pytest.mark.parametrize("form", FORMS)
def test_chunks_do_not_matter_to_tokens_and_masks(form):
    model = encoder()
    posterior = relative(model, 0.1)
    x = torch.randn(5, 4, 4).double()
    padding = torch.zeros(5, 4, dtype=torch.bool)
    padding[1, 3] = padding[4, 2:] = True
    for inputs in (
        {"src_key_padding_mask": padding},
        {"mask": torch.ones(4, 4, dtype=torch.bool).triu(1)},
        {"mask": torch.randn(5 * 2, 4, 4).double()},  # one for each element and head
    ):
        whole = propagate(model, posterior, x, form, generator=seeded(), **inputs)
        same(propagate(model, posterior, x, form, generator=seeded(), chunk_size=2, **inputs), whole, 1e-11)
        for i in (1, 4):
            alone = {
                k: v[i : i + 1] if k != "mask" else v if v.dim() == 2 else v[2 * i : 2 * i + 2]
                for k, v in inputs.items()
            }
            same(propagate(model, posterior, x[i : i + 1], form, generator=seeded(), **alone), whole[i : i + 1], 1e-11)


def test_five_tokens_and_a_batch_of_five():
    """A square mask on pairs of positions is not cut."""
    model = encoder()
    posterior, x = relative(model, 0.1, ["linear1"]), torch.randn(4, 4, 4).double()
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    same(propagate(model, posterior, x, mask=mask, chunk_size=3), propagate(model, posterior, x, mask=mask), 1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_leading_dimensions(form):
    """A network on the last dimension takes (B, K) and (B, T, K); a token has the moments that it has alone."""
    model = mlp()
    posterior, x = relative(model, 0.3), torch.randn(2, 5, 3).double()
    found = propagate(model, posterior, x, form, generator=seeded())
    assert found.batch_shape == (2,) and found.event_shape == (5, 2) and found.event_dim == 2
    alone = propagate(model, posterior, x.view(10, 3), form, generator=seeded())
    assert alone.batch_shape == (10,) and alone.event_shape == (2,)
    tokens = found.pointwise()
    torch.testing.assert_close(tokens.mean.view(10, 2), alone.mean)
    torch.testing.assert_close(tokens.covariance.to_dense().view(10, 2, 2), alone.covariance.to_dense())


@pytest.mark.parametrize("form", FORMS)
def test_the_batch_elsewhere(form):
    model, turned = encoder(), encoder(batch_first=False)
    posterior, x = relative(model, 0.1), torch.randn(3, 4, 4).double()
    padding = torch.tensor([[False] * 4, [False] * 3 + [True], [False] * 4])
    expected = propagate(model, posterior, x, form, generator=seeded(), src_key_padding_mask=padding)
    found = propagate(
        turned, posterior, x.transpose(0, 1), form, generator=seeded(), batch_dim=1, src_key_padding_mask=padding
    )
    assert found.batch_shape == (3,)
    same(found, expected)
    # Its first block is certain, and runs as it is.
    late = relative(model, 0.1, ["layers.1"])
    expected = propagate(model, late, x, form, generator=seeded())
    same(propagate(turned, late, x.transpose(0, 1), form, generator=seeded(), batch_dim=1), expected)


def test_names_of_arguments():
    model = encoder()
    posterior, x = relative(model, 0.1, ["linear2"]), torch.randn(3, 4, 4).double()
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 2:] = True
    expected = propagate(model, posterior, x, src_key_padding_mask=mask)
    same(propagate(model, posterior, {"src": x, "src_key_padding_mask": mask}), expected)
    same(propagate(model, posterior, {"src": x}, src_key_padding_mask=mask, chunk_size=2), expected)


@pytest.mark.parametrize("form", FORMS)
def test_the_generator_decides(form):
    model, x = mlp(), torch.randn(4, 3).double()
    posterior = relative(model, 0.3)

    def run(seed):
        return propagate(model, posterior, x, form, num_tangents=8, generator=seeded(seed))

    one, other = run(0), run(0)
    assert torch.equal(one.mean, other.mean) and torch.equal(one.covariance.to_dense(), other.covariance.to_dense())
    drawn = torch.equal(run(1).covariance.to_dense(), one.covariance.to_dense())
    assert drawn == (form != "lowrank")
    # None is torch's default generator, and a given one leaves it alone.
    torch.manual_seed(5)
    state = torch.get_rng_state()
    run(0)
    assert torch.equal(torch.get_rng_state(), state)
    first = propagate(model, posterior, x, form, num_tangents=8)
    torch.manual_seed(5)
    assert torch.equal(
        first.covariance.to_dense(), propagate(model, posterior, x, form, num_tangents=8).covariance.to_dense()
    )


@pytest.mark.parametrize("form", ["diag", "blockdiag", "full"])
def test_precisions_agree(form):
    for model, x in ((mlp(), torch.randn(4, 3).double()), (encoder(), torch.randn(2, 4, 4).double())):
        posterior = relative(model, 0.2)
        wide = propagate(model, posterior, x, form)
        assert wide.dtype == torch.float64
        narrow = propagate(model.float(), posterior, x.float(), form)  # a posterior in another dtype is cast
        assert narrow.dtype == narrow.covariance.dtype == torch.float32
        torch.testing.assert_close(narrow.mean.double(), wide.mean, rtol=1e-4, atol=1e-4)
        scale = wide.covariance.to_dense().abs().max()
        torch.testing.assert_close(
            narrow.covariance.to_dense().double() / scale, wide.covariance.to_dense() / scale, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("build", [mlp, encoder])
def test_gradients_flow(form, build):
    model = build()
    x = torch.randn(2, 3).double() if build is mlp else torch.randn(2, 3, 4).double()
    variances = {name: v.requires_grad_() for name, v in relative_variances(model, 0.2).items()}
    found = propagate(model, from_variances(variances), x.requires_grad_(), form, generator=seeded(), noise=0.1)
    assert found.mean.requires_grad and found.variance.requires_grad
    found.log_prob(torch.zeros_like(found.mean)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and variances[name].grad.isfinite().all(), name
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0
    heard = [name for name in variances if variances[name].grad.abs().max() > 0]
    # One shift of all keys is nothing to a softmax, but a part of the packed bias is that of the values.
    assert sorted(heard) == sorted(variances)


@pytest.mark.parametrize("form", ["diag", "full"])
def test_gradients_are_those_of_differences(form):
    model = nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 2)).double().eval()
    weight = model[0].weight.detach().clone().requires_grad_()
    variance = torch.full((3, 2), 0.2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 2).double()

    def moments(weight, variance):
        posterior = from_variances({"0.weight": variance}, means={"0.weight": weight})
        p = propagate(model, posterior, x, form)
        return p.mean, p.covariance.to_dense()

    assert torch.autograd.gradcheck(moments, (weight, variance))


def test_the_model_is_left_as_it_was(monkeypatch):
    model = encoder()
    model.layers[0].linear1.weight.requires_grad_(False)
    model.layers[1].linear1.weight.grad = torch.ones(8, 4).double()
    called = []
    handle = model.layers[0].register_forward_hook(lambda *a: called.append(1))
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = {name: dict(module._forward_hooks) for name, module in model.named_modules()}
    modes = [module.training for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    means = {"layers.0.linear2.weight": torch.zeros(4, 8).double()}
    posterior = WeightPosterior({"layers.0.linear2.weight": Diagonal(torch.ones(4, 8).double())}, means=means)
    propagate(model, posterior, torch.randn(2, 3, 4).double())
    # And after an error in the middle.
    monkeypatch.setattr(door, "as_predictive", lambda state: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        propagate(model, posterior, torch.randn(2, 3, 4).double())
    for name, p in model.named_parameters():
        assert torch.equal(p, values[name]) and p.requires_grad == flags[name]
    assert hooks == {name: dict(module._forward_hooks) for name, module in model.named_modules()}
    assert modes == [module.training for module in model.modules()]
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert (model.layers[1].linear1.weight.grad == 1).all() and model.layers[0].linear2.weight.grad is None
    handle.remove()


class Noting(nn.Module):
    """Draws, notes what it saw, and counts."""

    def __init__(self, generator=None):
        super().__init__()
        self.linear, self.generator, self.seen, self.calls = nn.Linear(3, 3), generator, None, 0
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen, self.later, self.last = x, self.calls, x.sum()
        torch.rand(1, generator=self.generator)
        torch.rand(1)
        return self.linear(x)


def test_finding_the_size_draws_nothing_and_leaves_no_notes():
    generator = seeded()
    model = nn.Sequential(Noting(generator), nn.Linear(3, 2)).double().eval()
    posterior, x = from_variances({"1.bias": torch.ones(2).double()}), torch.randn(4, 3).double()
    model(x)
    before = {name: value for name, value in vars(model[0]).items() if name != "_buffers"}
    last, states = model[0].last, (generator.get_state(), torch.get_rng_state())
    plan(model, posterior, x)
    assert torch.equal(generator.get_state(), states[0]) and torch.equal(torch.get_rng_state(), states[1])
    propagate(model, posterior, x)
    linearised(model, posterior, x)
    sample(model, posterior, x, 5)
    check(model, posterior, x, 5, quiet=True)
    fit_laplace(model, [(x, torch.zeros(4).long())])
    now = vars(model[0])
    assert all(now[name] is value for name, value in before.items()) and now.keys() - before.keys() == {"_buffers"}
    assert model[0].last is last


def test_attention_remembers_the_divergence_of_the_users_own_call():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = SGPAttention(4, 2, num_inducing=3, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0].mean(1))

    model, x = Net().eval(), torch.randn(2, 3, 4)
    model(x)
    kept, state = model.attention._kl, torch.get_rng_state()
    posterior = from_variances({"head.bias": torch.ones(2)})
    propagate(model, posterior, x)
    assert model.attention._kl is kept and torch.equal(torch.get_rng_state(), state)
    sample(model, posterior, x, 5)  # whose calls are mapped over draws
    assert model.attention._kl is kept


@pytest.mark.parametrize("place", ["after", "before", "in place", "model"])
def test_hooks_that_change_something_are_an_error(place):
    """Rules do not call modules, so that they would leave out what a hook does."""
    model, posterior = mlp(), from_variances(GOOD)
    x = torch.randn(2, 3).double()
    harmless = [model[0].register_forward_hook(lambda *a: None), model[0].register_forward_pre_hook(lambda *a: None)]
    expected = propagate(model, posterior, x).variance
    part = model if place == "model" else model[0]
    handle = {
        "after": lambda: part.register_forward_hook(lambda m, args, output: 2 * output),
        "before": lambda: part.register_forward_pre_hook(lambda m, args: (2 * args[0],)),
        "in place": lambda: part.register_forward_hook(lambda m, args, output: 0 * output.mul_(2).sum().item() or None),
        "model": lambda: part.register_forward_hook(lambda m, args, output: 2 * output),
    }[place]()
    name = "the model itself" if place == "model" else "0"
    with pytest.raises(NotImplementedError, match=f"model: hooks of {name} change what these get or return"):
        propagate(model, posterior, x)
    linearised(model, posterior, x)  # runs them
    handle.remove()
    torch.testing.assert_close(propagate(model, posterior, x).variance, expected)
    for other in harmless:
        other.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_token_ids_keep_the_errors_of_the_model():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.table(x))

    posterior = from_variances({"head.bias": torch.ones(2)})
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        propagate(Net().eval(), posterior, torch.zeros(2, 3).long())


def test_noise_is_looked_at_first():
    for noise, error in ((-1.0, ValueError), (torch.tensor([0.1, math.nan]), ValueError), ("some", TypeError)):
        with pytest.raises(error, match="noise: expected"):
            streamline(mlp(), from_variances(GOOD), noise=noise)


@pytest.mark.parametrize("form", FORMS)
def test_a_certain_network_is_its_forward_pass(form):
    """No variance at all, whether there is no posterior or one of zeros."""
    for model, x in ((mlp(), torch.randn(4, 3).double()), (encoder(), torch.randn(2, 4, 4).double())):
        zeros = from_variances({name: torch.zeros_like(p) for name, p in model.named_parameters()})
        for posterior in (zeros, WeightPosterior()):
            found = propagate(model, posterior, x, form, activations="tangent")
            torch.testing.assert_close(found.mean, model(x), rtol=1e-12, atol=1e-12)
            assert found.variance.abs().max() < 1e-20


@pytest.mark.cuda
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu(form):
    for model, x in ((mlp(), torch.randn(4, 3).double()), (encoder(), torch.randn(2, 4, 4).double())):
        posterior = relative(model, 0.2)
        here = propagate(model, posterior, x, form, num_tangents=512, generator=seeded())
        there = propagate(
            model.cuda(), posterior, x.cuda(), form, num_tangents=512, generator=torch.Generator("cuda").manual_seed(0)
        )
        assert there.device.type == "cuda"
        torch.testing.assert_close(there.mean.cpu(), here.mean, rtol=1e-8, atol=1e-8)
        if form != "lowrank":
            torch.testing.assert_close(there.variance.cpu(), here.variance, rtol=1e-8, atol=1e-8)
