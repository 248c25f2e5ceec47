"""The published rules against loops written from them, and a network with its posterior as one module."""

import copy
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import gpseq
from gpseq.propagation import (
    Calibration,
    Plan,
    Streamlined,
    WeightPosterior,
    from_columns,
    from_covariance,
    from_factors,
    from_variances,
    propagate,
    streamline,
)
from gpseq.propagation.laws import Diagonal, KroneckerLaplace
from gpseq.propagation.rules.attention import multihead_attention
from gpseq.storage import StorageError, save
from tests.oracles_propagation import posterior as relative


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# The published rules, one number at a time: marginal variances, tangents, and independence of whatever is shared.


def linear(mean, variance, M, b, S, s):
    """h = W a + b for lists of numbers: var h = S m^2 + (M^2 + S) v + s."""
    out, spread = [], []
    for k in range(len(M)):
        out.append(sum(M[k][i] * mean[i] for i in range(len(mean))) + b[k])
        spread.append(
            sum(S[k][i] * mean[i] ** 2 + (M[k][i] ** 2 + S[k][i]) * variance[i] for i in range(len(mean))) + s[k]
        )
    return out, spread


def activation(mean, variance, function, slope):
    return [function(m) for m in mean], [slope(m) ** 2 * v for m, v in zip(mean, variance, strict=True)]


def layer_norm(mean, variance, weight, bias, eps):
    """Mean and deviation of the token are constants: var gamma^2 / (sigma^2 + eps)."""
    size = len(mean)
    centre = sum(mean) / size
    scale = sum((m - centre) ** 2 for m in mean) / size + eps
    out = [(m - centre) / math.sqrt(scale) * g + b for m, g, b in zip(mean, weight, bias, strict=True)]
    return out, [v * g**2 / scale for v, g in zip(variance, weight, strict=True)]


def relu_slope(x):
    return 1.0 if x > 0 else 0.0


def gelu(x):
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def gelu_slope(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2))) + x * math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def attention(means, variances, parts, heads):
    """Frozen scores; every token has value weights of its own."""
    (Mq, bq), (Mk, bk), (Mv, bv, Sv, sv) = parts
    T, D = len(means), len(means[0])
    width = D // heads
    zeros = [[0.0] * D] * D
    query = [linear(m, [0.0] * D, Mq, bq, zeros, [0.0] * D)[0] for m in means]
    key = [linear(m, [0.0] * D, Mk, bk, zeros, [0.0] * D)[0] for m in means]
    values = [linear(m, v, Mv, bv, Sv, sv) for m, v in zip(means, variances, strict=True)]
    out, spread = [[0.0] * D for _ in range(T)], [[0.0] * D for _ in range(T)]
    for h in range(heads):
        columns = range(h * width, (h + 1) * width)
        for t in range(T):
            scores = [sum(query[t][j] * key[s][j] for j in columns) / math.sqrt(width) for s in range(T)]
            top = max(scores)
            weights = [math.exp(score - top) for score in scores]
            weights = [w / sum(weights) for w in weights]
            for j in columns:
                out[t][j] = sum(weights[s] * values[s][0][j] for s in range(T))
                spread[t][j] = sum(weights[s] ** 2 * values[s][1][j] for s in range(T))
    return out, spread


def lists(value):
    return value.detach().tolist()


@pytest.mark.parametrize("function", ["relu", "gelu", "tanh"])
def test_the_published_rules_of_a_perceptron(function):
    torch.manual_seed(0)
    module, g, slope = {
        "relu": (nn.ReLU(), lambda x: max(x, 0.0), relu_slope),
        "gelu": (nn.GELU(), gelu, gelu_slope),
        "tanh": (nn.Tanh(), math.tanh, lambda x: 1 - math.tanh(x) ** 2),
    }[function]
    model = nn.Sequential(
        nn.Linear(3, 5), module, nn.LayerNorm(5, eps=0.01), nn.Linear(5, 5), module, nn.Linear(5, 2)
    ).double()
    nn.init.normal_(model[2].weight)
    nn.init.normal_(model[2].bias)
    variances = {name: 0.2 * torch.rand_like(p) for name, p in model.named_parameters() if not name.startswith("2.")}
    x = torch.randn(3, 3).double()
    found = propagate(model.eval(), from_variances(variances), x, preset="streamlined")
    assert found.covariance.to_dense().count_nonzero() == 3 * 2  # marginals
    for row in range(3):
        mean, variance = lists(x[row]), [0.0] * 3
        for number in range(6):
            if number in (1, 4):
                mean, variance = activation(mean, variance, g, slope)
            elif number == 2:
                mean, variance = layer_norm(mean, variance, lists(model[2].weight), lists(model[2].bias), 0.01)
            else:
                parts = [lists(getattr(model[number], name)) for name in ("weight", "bias")]
                parts += [lists(variances[f"{number}.{name}"]) for name in ("weight", "bias")]
                mean, variance = linear(mean, variance, *parts)
        torch.testing.assert_close(found.mean[row], torch.tensor(mean).double())
        torch.testing.assert_close(found.variance[row], torch.tensor(variance).double())
        # The probit rule, each logit by its own variance.
        scaled = [m / math.sqrt(1 + math.pi / 8 * v) for m, v in zip(mean, variance, strict=True)]
        weights = [math.exp(value) for value in scaled]
        expected = torch.tensor([weight / sum(weights) for weight in weights]).double()
        torch.testing.assert_close(found.probs("probit")[row], expected)


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_published_rules_of_a_transformer(norm_first):
    torch.manual_seed(0)
    T, D, F, H = 3, 4, 6, 2
    layer = nn.TransformerEncoderLayer(D, H, F, 0.0, "relu", batch_first=True, norm_first=norm_first).double().eval()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.7)
    names = [name for name, _ in layer.named_parameters() if "norm" not in name]
    variances = {name: 0.1 * torch.rand_like(layer.get_parameter(name)) for name in names}
    x = torch.randn(2, T, D).double()
    found = propagate(layer, from_variances(variances), x, preset="streamlined")
    torch.testing.assert_close(found.mean, layer(x))
    packed, offset = layer.self_attn.in_proj_weight.chunk(3), layer.self_attn.in_proj_bias.chunk(3)
    parts = [(lists(packed[i]), lists(offset[i])) for i in range(2)]
    spread = variances["self_attn.in_proj_weight"].chunk(3)[2], variances["self_attn.in_proj_bias"].chunk(3)[2]
    parts.append((lists(packed[2]), lists(offset[2]), *map(lists, spread)))

    def norm(module, mean, variance):
        return layer_norm(mean, variance, lists(module.weight), lists(module.bias), module.eps)

    def matrix(module, name, mean, variance):
        own = [lists(module.weight), lists(module.bias)]
        return linear(mean, variance, *own, *(lists(variances[f"{name}.{part}"]) for part in ("weight", "bias")))

    def attend(tokens):
        out = zip(*attention([m for m, _ in tokens], [v for _, v in tokens], parts, H), strict=True)
        return [matrix(layer.self_attn.out_proj, "self_attn.out_proj", *token) for token in out]

    def perceptron(tokens):
        hidden = [matrix(layer.linear1, "linear1", *token) for token in tokens]
        hidden = [activation(*token, lambda x: max(x, 0.0), relu_slope) for token in hidden]
        return [matrix(layer.linear2, "linear2", *token) for token in hidden]

    def added(one, other):  # variances of a residual sum add up
        return [
            ([a + b for a, b in zip(m, n, strict=True)], [a + b for a, b in zip(v, w, strict=True)])
            for (m, v), (n, w) in zip(one, other, strict=True)
        ]

    for row in range(2):
        tokens = [(lists(x[row, t]), [0.0] * D) for t in range(T)]
        for function, module in ((attend, layer.norm1), (perceptron, layer.norm2)):
            if norm_first:
                tokens = added(tokens, function([norm(module, *token) for token in tokens]))
            else:
                tokens = [norm(module, *token) for token in added(tokens, function(tokens))]
        expected = torch.tensor([v for _, v in tokens]).double()
        torch.testing.assert_close(found.variance[row], expected)


class SelfAttention(nn.MultiheadAttention):
    """Attention that is a model by itself."""

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]

    def propagate_moments(self, state, walk):
        return multihead_attention(self, state, walk)


def test_what_the_published_rules_do_to_alike_tokens():
    """T independent value weights in place of one: the variance is T times too small."""
    layer = SelfAttention(4, 2, batch_first=True).double().eval()
    names = ["in_proj_weight", "in_proj_bias"]
    variances = {name: torch.zeros_like(layer.get_parameter(name)) for name in names}
    for value in variances.values():
        value[8:] = 0.1
    x = torch.randn(2, 1, 4).double().expand(2, 5, 4)
    right = propagate(layer, from_variances(variances), x)
    published = propagate(layer, from_variances(variances), x, preset="streamlined")
    torch.testing.assert_close(published.variance * 5, right.variance)
    scores = {"in_proj_weight": variances["in_proj_weight"].roll(4, 0)}
    x = torch.randn(2, 5, 4).double()
    assert propagate(layer, from_variances(scores), x, preset="streamlined").variance.abs().max() == 0
    assert propagate(layer, from_variances(scores), x).variance.min() > 0


# The module


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Dropout(0.1), nn.Linear(4, 2)).double().eval()


def spd(size, seed=0):
    root = torch.randn(size, size + 2, generator=seeded(seed)).double()
    return 0.02 * root @ root.mT / size


def laplace(rows, columns):
    values, vectors = torch.linalg.eigh(spd(rows, 1))
    others, turned = torch.linalg.eigh(spd(columns, 2))
    return KroneckerLaplace(vectors, values, turned, others, torch.tensor(40.0).double())


def posteriors():
    variances = {name: 0.02 * torch.rand_like(p) for name, p in network().named_parameters()}
    first = {"0.weight": variances["0.weight"], "0.bias": variances["0.bias"]}
    means = {"3.weight": torch.randn(2, 4, generator=seeded()).double()}
    columns = {name: 0.1 * torch.randn(3, *v.shape, generator=seeded()).double() for name, v in variances.items()}
    return {
        "variances": from_variances(variances, means),
        "factors": from_factors({"3.weight": (spd(2), spd(4)), "3.bias": (spd(2), torch.eye(1).double())}),
        "laplace": WeightPosterior({"3.weight": laplace(2, 4)}) | from_variances(first),
        "covariance": from_covariance(["3.weight", "3.bias"], spd(10)) | from_variances(first),
        "columns": from_columns(columns, variances),
    }


POSTERIORS = posteriors()
POSTERIOR = POSTERIORS["variances"]
CALIBRATION = Calibration(scale=1.7, temperature=1.3, noise=torch.tensor([0.1, 0.2]).double())
X = torch.randn(6, 3, generator=seeded(7)).double()


def same(one, other):
    """Bit for bit."""
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.covariance.to_dense(), other.covariance.to_dense())
    assert (one.noise is None) == (other.noise is None)
    assert one.noise is None or torch.equal(one.noise, other.noise)


@pytest.mark.parametrize("name", POSTERIORS)
@pytest.mark.parametrize("form", ["full", "lowrank", "diag"])
@pytest.mark.filterwarnings("ignore:posterior. covariances between layers")
def test_a_call_is_a_propagation(name, form):
    model, posterior = network(), POSTERIORS[name]
    module = streamline(model, posterior, CALIBRATION, covariance=form, num_tangents=8, noise=0.5)
    expected = CALIBRATION.apply(propagate(model, posterior, X, form, num_tangents=8, noise=0.5, generator=seeded()))
    assert module.last_plan is None
    found = module(X, generator=seeded())
    same(found, expected)
    same(module(X, generator=seeded()), found)  # again
    assert found.notes["covariance"] == form
    assert isinstance(module.last_plan, Plan) and module.last_plan.form == form and module.last_plan.largest == 4
    assert module.posterior.names == posterior.names and module.calibration.scale == 1.7


@pytest.mark.parametrize("name", POSTERIORS)
@pytest.mark.filterwarnings("ignore:posterior. covariances between layers")
def test_round_trips(name, tmp_path):
    posterior = POSTERIORS[name]
    module = streamline(network(), posterior, CALIBRATION, activations="tangent", noise=torch.ones(2).double())
    expected = module(X)
    path = tmp_path / "module.safetensors"
    module.save(path)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    torch.save(module, tmp_path / "module.pt")
    # Into one of the same kind with other numbers.
    model = network()
    nn.init.zeros_(model[0].weight)
    other = streamline(
        model,
        posterior.scaled(3.0),
        Calibration(noise=torch.zeros(2).double()),
        activations="tangent",
        noise=torch.zeros(2).double(),
    )
    assert not torch.equal(other(X).variance, expected.variance)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    model = network()
    nn.init.zeros_(model[0].weight)
    read = Streamlined.load(path, model)
    assert read.model is model and read.options == {"activations": "tangent"}
    assert read.posterior.names == posterior.names and read.posterior.num_columns == posterior.num_columns
    for made in (
        read,
        other,
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(tmp_path / "module.pt", weights_only=False),
    ):
        same(made(X), expected)
        assert made.calibration.scale == 1.7 and made.calibration.temperature == 1.3


def test_all_tensors_are_buffers():
    for name, posterior in POSTERIORS.items():
        module = streamline(network(), posterior, CALIBRATION)
        own = {key for key in module.state_dict() if key.startswith("held.")}
        assert own == {f"held.{key}" for key, _ in module.held.named_buffers()}, name
        narrow = module.to(torch.float32)
        assert all(value.dtype == torch.float32 for value in narrow.state_dict().values())
        with pytest.warns() if name in ("columns",) else nothing():
            found = narrow(X.float())
        assert found.dtype == torch.float32 and found.noise.dtype == torch.float32
    keys = set(streamline(network(), POSTERIOR, CALIBRATION).state_dict())
    assert "held.posterior/laws/0/weight/entries" in keys and "held.posterior/means/3/weight" in keys
    assert {"model.0.weight", "held.calibration/noise", "held.calibration/scale"} <= keys


class nothing:
    def __enter__(self):
        return None

    def __exit__(self, *error):
        return None


def test_the_posterior_that_came_is_not_touched():
    variances = {"0.weight": torch.full((4, 3), 0.1, dtype=torch.float64, requires_grad=True)}
    posterior = from_variances(variances)
    module = streamline(network(), posterior)
    with torch.no_grad():
        next(module.held.buffers()).zero_()
    assert module(X).variance.abs().max() == 0 and (variances["0.weight"] == 0.1).all()
    expanded = from_variances({"0.weight": torch.tensor(0.1).double().expand(4, 3)})
    module = streamline(network(), expanded)
    module.load_state_dict(module.state_dict())
    copy.deepcopy(streamline(network(), posterior))


def test_gradients_reach_the_network():
    module = streamline(network(), POSTERIOR)
    module(X).variance.sum().backward()
    assert module.model[0].weight.grad.abs().max() > 0
    assert [name for name, _ in module.named_parameters()] == [
        f"model.{name}" for name, _ in network().named_parameters()
    ]


def test_through_the_one_door():
    model = network()
    module = streamline(model, POSTERIOR, Calibration(scale=2.0), covariance="full")
    mean, covariance = module.conditional(X)
    expected = module(X)
    assert torch.equal(mean, expected.mean) and torch.equal(covariance.to_dense(), expected.covariance.to_dense())
    same(gpseq.predict(module, X, method="moments"), expected)
    parts = gpseq.predict(module, X, method="moments", batch_size=4)
    torch.testing.assert_close(parts.covariance.to_dense(), expected.covariance.to_dense())
    module.train()
    with pytest.raises(ValueError, match=r"model: expected it in eval mode, but 2 \(Dropout\) trains"):
        module(X)
    same(gpseq.predict(module, X, method="moments"), expected)  # which knows about modes
    assert model.training


def test_tokens_through_the_one_door():
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True).double().eval()
    module = streamline(layer, relative(layer, 0.1))
    x = torch.randn(3, 5, 4).double()
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    expected = module(x, src_key_padding_mask=mask)
    mean, covariance = module.conditional(x, src_key_padding_mask=mask)
    assert mean.shape == (3, 5, 4) and covariance.shape == (3, 5, 4, 4)
    found = gpseq.predict(module, x, method="moments", src_key_padding_mask=mask)
    torch.testing.assert_close(found.covariance.to_dense(), expected.pointwise().covariance.to_dense())
    named = gpseq.predict(module, {"src": x, "src_key_padding_mask": mask}, method="moments")
    torch.testing.assert_close(named.covariance.to_dense(), found.covariance.to_dense())
    same(module(src=x, src_key_padding_mask=mask), expected)
    same(module({"src": x}, src_key_padding_mask=mask), expected)


def test_draws_come_from_torch_without_a_generator():
    module = streamline(network(), POSTERIOR, covariance="lowrank", num_tangents=2)
    torch.manual_seed(3)
    one, other = module(X), module(X)
    assert not torch.equal(one.covariance.to_dense(), other.covariance.to_dense())
    torch.manual_seed(3)
    same(gpseq.predict(module, X, method="moments"), one)


def test_repr():
    assert "uncertain=4, covariance='diag'" in repr(streamline(network(), POSTERIOR, covariance="diag"))


def test_bad_modules():
    with pytest.raises(ValueError, match=r"model: expected it in eval mode, but 2 \(Dropout\) trains"):
        streamline(network().train(), POSTERIOR)
    with pytest.raises(ValueError, match=r"posterior: expected names of parameters .* got 1.weight"):
        streamline(network(), from_variances({"1.weight": torch.ones(4, 3)}))
    with pytest.raises(TypeError, match=r"options: expected those of propagate \(covariance, .* got chunks, generator"):
        streamline(network(), POSTERIOR, chunks=3, generator=seeded())
    with pytest.raises(ValueError, match=r"covariance: expected one of auto, .* got 'all'"):
        streamline(network(), POSTERIOR, covariance="all")
    with pytest.raises(TypeError, match="calibration: expected that of calibrate, got float"):
        streamline(network(), POSTERIOR, 2.0)
    module = streamline(network(), POSTERIOR)
    with pytest.raises(ValueError, match="x: expected finite numbers"):
        module(X * math.nan)
    with pytest.raises(RuntimeError, match=r"held\.posterior/laws/0/weight/entries"):
        module.load_state_dict(network().state_dict())


def test_laws_of_others(tmp_path):
    @dataclass(frozen=True, eq=False)
    class Doubled(Diagonal):
        factor: float = 2.0

        def variance(self, mean, variance=None):
            return self.factor * super().variance(mean, variance)

    posterior = WeightPosterior({"0.weight": Doubled(torch.full((4, 3), 0.1).double(), 3.0)})
    module = streamline(network(), posterior, covariance="diag")
    same(module(X), propagate(network(), posterior, X, "diag"))
    module.save(tmp_path / "own.safetensors")
    read = Streamlined.load(tmp_path / "own.safetensors", network())
    assert type(read.posterior.laws["0.weight"]) is Doubled and read.posterior.laws["0.weight"].factor == 3.0

    @dataclass(frozen=True, eq=False)
    class Opaque(Diagonal):
        key: object = None

    with pytest.raises(TypeError, match="posterior: expected laws that are dataclasses of tensors"):
        streamline(network(), WeightPosterior({"0.weight": Opaque(torch.full((4, 3), 0.1).double(), object())}))


def test_foreign_files(tmp_path):
    path = tmp_path / "file.safetensors"
    save(path, {"a": torch.zeros(2)})
    with pytest.raises(StorageError, match="holds no streamlined network"):
        Streamlined.load(path, network())
    module = streamline(network(), POSTERIOR)
    module.save(path)
    with pytest.raises(ValueError, match="posterior: expected"):
        Streamlined.load(path, nn.Linear(3, 2).double())
    module.held.structure["posterior"]["kind"] = "elsewhere.Posterior"
    module.save(path)
    with pytest.raises(StorageError, match=r"there is no elsewhere.Posterior here; was its module imported\?"):
        Streamlined.load(path, network())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match="damaged or truncated"):
        Streamlined.load(path, network())


@pytest.mark.cuda
def test_on_a_gpu(tmp_path):
    module = streamline(network(), POSTERIORS["laplace"], CALIBRATION).cuda()
    found = module(X.cuda())
    assert found.device.type == "cuda" and all(value.is_cuda for value in module.state_dict().values())
    module.save(tmp_path / "a.safetensors")
    read = Streamlined.load(tmp_path / "a.safetensors", network().cuda())
    torch.testing.assert_close(read(X.cuda()).variance, found.variance)
    torch.testing.assert_close(read.cpu()(X).variance, found.variance.cpu())
