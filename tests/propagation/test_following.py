"""Modules with a forward of their own: every operation against the network's exact tangent, and Monte Carlo."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpseq.propagation import from_variances, propagate
from gpseq.propagation.following import follow
from gpseq.propagation.forward import as_predictive
from gpseq.propagation.linearisation import forward_mode, linearised
from gpseq.propagation.moments import GaussianState
from gpseq.propagation.tracing import CannotFollow
from gpseq.propagation.walk import Options, Walk
from tests.oracles_propagation import monte_carlo, posterior, relative_variances


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def tangent(network, bound, x, form="full", num_draws=64, **inputs):
    """What travels, to first order: the same as the linearised network where nothing is dropped."""
    options = Options(form=form, activations="tangent", products=False, rescale=False)
    walk = Walk(network, bound, options, num_draws, torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = as_predictive(walk(network, GaussianState(x), **inputs))
    assert walk.unused() == ()
    return found


def used(network, x, **inputs):
    """Names of the parameters that an output depends on."""
    names, parameters = zip(*network.named_parameters(), strict=True)
    grads = torch.autograd.grad(network(x, **inputs).sum(), parameters, allow_unused=True)
    return [name for name, grad in zip(names, grads, strict=True) if grad is not None]


def assert_exact(network, x, ratio=0.1, names=None, **inputs):
    """The full form is the exact tangent, for several operations that share what is uncertain."""
    network.eval()
    weights = posterior(network, ratio, names or used(network, x, **inputs))
    with torch.no_grad():
        expected = linearised(network, weights, x, method="exact", **inputs)
        plain = network(x, **inputs)
    found = tangent(network, weights.bind(network), x, **inputs)
    torch.testing.assert_close(found.mean, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.covariance.to_dense(), expected.covariance.to_dense(), rtol=1e-10, atol=1e-12)
    return weights, expected


class Block(nn.Module):
    """Pre-norm attention and perceptron with scales, by hand."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.0, width))

    def forward(self, x):
        h = self.norm1(x)
        attended, _ = self.attention(h, h, h, need_weights=False)
        x = x + attended
        return x + self.scale * self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Patches by unfold, a class token, a position parameter, layers in a list, mean pooling."""

    def __init__(self, width=8, heads=2, depth=2):
        super().__init__()
        self.patch = nn.Linear(4, width)
        self.token = nn.Parameter(0.5 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.5 * torch.randn(1, 5, width))
        self.layers = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, images):
        batch, channels = images.shape[:2]
        patches = images.unfold(2, 2, 2).unfold(3, 2, 2).reshape(batch, channels, -1, 4).squeeze(1)
        x = torch.cat([self.token.expand(batch, -1, -1), self.patch(patches)], dim=1)
        if x.shape[1] > self.position.shape[1]:
            raise ValueError("too many patches")
        x += self.position[:, : x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 1:].mean(dim=1))


def test_a_vit_is_exact_to_first_order():
    torch.manual_seed(1)
    assert_exact(ViT(depth=1), torch.randn(2, 1, 4, 4))


@pytest.mark.slow
def test_a_vit_agrees_with_monte_carlo_in_all_forms():
    torch.manual_seed(1)
    network, x = ViT().eval(), torch.randn(2, 1, 4, 4)
    variances = relative_variances(network, 0.05)
    with forward_mode(network):  # which fused attention has not, and no batches of weights
        mean, covariance = monte_carlo(network, variances, x, 6000, torch.Generator().manual_seed(0), chunk=1000)
    deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    weights = from_variances(variances)
    allowed = {"full": 0.04, "lowrank": 0.15, "diag": 0.6, "blockdiag": 0.6}
    for form, error in allowed.items():
        with torch.no_grad():
            found = propagate(
                network, weights, x, covariance=form, num_tangents=400, generator=torch.Generator().manual_seed(0)
            )
        assert ((found.mean - mean) / deviation).abs().max() < 0.15
        assert (found.variance.sqrt() / deviation - 1).abs().max() < error


class ResidualMLP(nn.Module):
    """Values that are used again and again, differences, gates, and two branches side by side."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.last = nn.Linear(12, 2)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        u = h + F.relu(self.second(h))
        v = h - torch.sigmoid(self.third(u)) * u
        return self.last(torch.cat([u, v], -1)) / 2


def test_a_residual_network_is_exact_and_agrees_with_monte_carlo():
    torch.manual_seed(2)
    network, x = ResidualMLP(), torch.randn(3, 4)
    assert_exact(network, x)
    variances = relative_variances(network, 0.2)
    mean, covariance = monte_carlo(network, variances, x, 30_000, torch.Generator().manual_seed(0))
    deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    for form, error in (("full", 0.03), ("lowrank", 0.15)):
        with torch.no_grad():
            found = propagate(
                network,
                from_variances(variances),
                x,
                covariance=form,
                num_tangents=1000,
                generator=torch.Generator().manual_seed(0),
            )
        assert ((found.mean - mean) / deviation).abs().max() < 0.1
        assert (found.variance.sqrt() / deviation - 1).abs().max() < error


class ConvNet(nn.Module):
    """A convolutional network as people write them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 2)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = F.avg_pool2d(x, 2)
        x = F.relu(self.second(x) + x, inplace=True)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def test_a_convolutional_network_is_exact():
    torch.manual_seed(3)
    network = ConvNet()
    network.norm.running_var.uniform_(0.5, 2.0)
    assert_exact(network, torch.randn(2, 1, 4, 4))


class Causal(nn.Module):
    """Attention through torch's function, with packed projections."""

    def __init__(self, width=6, heads=2):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.packed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.size()
        query, key, value = self.packed(self.norm(x)).split(width, dim=2)
        query, key, value = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for part in (query, key, value)
        )
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.out(out.transpose(1, 2).contiguous().view(batch, length, width))


def test_attention_by_function_is_exact():
    torch.manual_seed(4)
    network = nn.Sequential(nn.Linear(3, 6), Causal(), nn.Linear(6, 2))
    assert_exact(network, torch.randn(2, 4, 3))


def test_attention_by_function_asks_for_another_form_where_it_has_no_rule():
    network = nn.Sequential(nn.Linear(3, 6), Causal(), nn.Linear(6, 2)).eval()
    with pytest.raises(NotImplementedError, match=r"1, a Causal.*'full' and 'lowrank'"):
        propagate(network, posterior(network, 0.1), torch.randn(2, 4, 3), covariance="diag")


# Single operations: each as the middle of a network that is uncertain before and behind it.


class Middle(nn.Module):
    def __init__(self, operation, width=4):
        super().__init__()
        self.operation = operation
        self.before, self.weight = nn.Linear(3, width), nn.Parameter(torch.randn(width))
        self.matrix, self.number = nn.Parameter(torch.randn(width, width)), nn.Parameter(torch.tensor(0.5))
        self.register_buffer("mixer", torch.randn(5, 5))

    def forward(self, x):
        return self.operation(self, self.before(x))


def masked_mean(module, h):
    mask = torch.tensor([1.0, 1, 1, 0, 0]).unsqueeze(-1)
    return (h * mask).sum(1) / mask.sum(0)


def in_place(module, h):
    g = h
    g = g * 2.0
    residual = g
    g += module.weight
    return residual + g  # both names are one tensor


def asked_in_place(module, h):
    g = h @ module.matrix
    activated = F.relu(g, True)
    return activated * module.weight + g


def by_hand(module, h):
    """As small language models have it: heads, a causal mask, softmax."""
    query, key, value = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in (h, h @ module.matrix, h * 2.0))
    scores = query @ key.transpose(-2, -1) / 2**0.5
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    return (F.softmax(scores, dim=-1) @ value).transpose(1, 2).reshape(h.shape)


def dead_ends(module, h):
    unused = torch.sort(h)[0]
    del unused
    return h * module.weight


OPERATIONS = {
    "matmul with a parameter": lambda m, h: h @ m.matrix * m.weight,
    "matmul with its transpose": lambda m, h: h @ m.matrix.T + m.weight,
    "F.linear": lambda m, h: F.linear(h, m.matrix, m.weight),
    "mixing tokens": lambda m, h: m.mixer @ h * m.weight + m.matrix.mean(0) * m.number + m.number,
    "masked mean": lambda m, h: F.linear(masked_mean(m, h), m.matrix, m.weight),
    "reversed sums": lambda m, h: 1.0 - (2.0 + 3.0 * h - m.weight) + h.mT.mT @ m.matrix,
    "subtraction of a tensor": lambda m, h: (torch.ones(4) - h) * m.weight.unsqueeze(0) - m.matrix[0],
    "stack and unbind": lambda m, h: torch.stack(torch.stack([h, h * m.weight, h @ m.matrix], 2).unbind(2)[1:], 1).sum(
        1
    ),
    "chunks that meet": lambda m, h: (
        torch.cat([a * b for a, b in zip(h.chunk(2, -1), (h * m.weight).chunk(2, -1), strict=True)], -1) @ m.matrix
    ),
    "permute and back": lambda m, h: (h.permute(1, 0, 2) @ m.matrix + h.transpose(0, 1) * m.weight).transpose(0, 1),
    "mean over time first": lambda m, h: (h.permute(1, 0, 2) * m.weight).mean(0) @ m.matrix,
    "where": lambda m, h: torch.where(torch.arange(4) > 1, h * m.weight, h @ m.matrix),
    "masked_fill": lambda m, h: (h @ m.matrix).masked_fill(torch.arange(4) == 2, 7.0) * m.weight,
    "norms": lambda m, h: F.layer_norm(h, (4,), m.weight, None, 1e-3) + F.rms_norm(h @ m.matrix, (4,), eps=1e-3),
    "unit length": lambda m, h: F.normalize(h @ m.matrix, dim=-1) * m.weight,
    "flatten and back": lambda m, h: (h.flatten(1).view(len(h), 5, -1) @ m.matrix).reshape(h.shape) * m.weight,
    "choices": lambda m, h: torch.cat([h[:, [0, 2]], (h * m.weight)[:, 1:3], h[..., 1:2, :] @ m.matrix], 1),
    "select and squeeze": lambda m, h: h.select(1, 0) @ m.matrix + (h[:, None, -1] * m.weight).squeeze(1),
    "repeat and flip": lambda m, h: (h[:, :1].repeat(1, 3, 1) @ m.matrix).flip(1, -1) * m.weight + h.narrow(1, 0, 3),
    "square": lambda m, h: h * h + (h**2 @ m.matrix) * m.weight.abs(),
    "in place": lambda m, h: in_place(m, h) @ m.matrix,
    "in place when asked": lambda m, h: asked_in_place(m, h),
    "constants through layers": lambda m, h: F.linear(m.mixer[None, :, :4], m.matrix) * m.weight + h,
    "dead ends": lambda m, h: dead_ends(m, h) @ m.matrix,
    "functions of modules": lambda m, h: F.dropout(F.silu(h @ m.matrix), 0.5, m.training) * m.weight.exp(),
    "new tensors": lambda m, h: h.new_ones(4) * h + torch.zeros_like(h) + (h.to(torch.float64) @ m.matrix) * m.weight,
    "attention by hand": lambda m, h: by_hand(m, h) * m.weight,
    "products of matrices": lambda m, h: (h @ h.mT).log_softmax(1) @ (h @ m.matrix) * m.weight + torch.bmm(h, h.mT) @ h,
    "products with certain ones": lambda m, h: (
        (h[:, None] @ m.mixer[None, :4] @ m.mixer[:, :4] @ m.matrix).squeeze(1) * m.weight
    ),
    "roll": lambda m, h: h.roll(1, 1) @ m.matrix + h.roll((1, 2), (1, 2)) * m.weight,
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_operations_are_exact_to_first_order(operation):
    network = nn.Sequential(Middle(operation), nn.Linear(4, 2))
    weights, expected = assert_exact(network, torch.randn(2, 5, 3))
    # A low rank has the same up to its draws.
    found = tangent(network, weights.bind(network), torch.randn(2, 5, 3), "lowrank")
    assert found.mean.shape == expected.mean.shape


@pytest.mark.parametrize("name", ["stack and unbind", "chunks that meet", "in place", "choices", "mixing tokens"])
def test_low_rank_columns_are_those_of_the_linearised_network(name):
    network = nn.Sequential(Middle(OPERATIONS[name]), nn.Linear(4, 2)).eval()
    x = torch.randn(2, 5, 3)
    weights = posterior(network, 0.1, used(network, x))
    with torch.no_grad():
        expected = linearised(network, weights, x, 16, generator=torch.Generator().manual_seed(0))
    found = tangent(network, weights.bind(network), x, "lowrank", 16)
    torch.testing.assert_close(found.covariance.to_dense(), expected.covariance.to_dense(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["full", "lowrank", "diag"])
def test_products_of_second_order_agree_with_monte_carlo(form):
    """A gate whose two sides come from one layer."""
    network = Middle(lambda m, h: torch.sigmoid(h @ m.matrix) * h + m.weight).eval()
    x = torch.randn(3, 3)
    variances = relative_variances(network, 0.3, used(network, x))
    mean, covariance = monte_carlo(network, variances, x, 20_000, torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = propagate(
            network,
            from_variances(variances),
            x,
            covariance=form,
            num_tangents=2000,
            generator=torch.Generator().manual_seed(0),
        )
    deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((found.mean - mean) / deviation).abs().max() < (0.2 if form == "diag" else 0.06)
    assert (found.variance.sqrt() / deviation - 1).abs().max() < (0.5 if form == "diag" else 0.08)


def test_blocks_of_tokens_follow_what_keeps_tokens_whole():
    network = Middle(lambda m, h: torch.cat([h[:, :1], F.relu(h)[:, 1:]], 1).mean(1) @ m.matrix + m.weight).eval()
    x, weights = torch.randn(2, 5, 3), posterior(network, 0.1, ["matrix"])
    with torch.no_grad():
        expected = linearised(network, weights, x, method="exact")
    found = tangent(network, weights.bind(network), x, "blockdiag")  # certain tokens: nothing is dropped
    torch.testing.assert_close(found.covariance.to_dense(), expected.covariance.to_dense())


def test_blocks_of_tokens_are_not_torn():
    network = Middle(lambda m, h: h[..., :2]).eval()
    with pytest.raises(NotImplementedError, match="'blockdiag'"):
        propagate(network, posterior(network, 0.1, ["before"]), torch.randn(2, 5, 3), covariance="blockdiag")


# What is certain is plain torch


class Looks(nn.Module):
    """Control flow on what is certain, buffers, several outputs, keywords, and a mask."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("shift", torch.tensor(1.5))

    def forward(self, x, keep=None, flip=False):
        if x.sum() > 1e6:
            return None
        h = self.body(x) + self.shift
        if flip:
            h = -h
        if keep is not None and keep.any():
            h = h * keep.unsqueeze(-1)
        return {"other": x, "logits": self.head(h.mean(1))}


def test_a_forward_may_look_at_what_is_certain():
    network = Looks().eval()
    x, mask = torch.randn(2, 5, 3), torch.ones(2, 5)
    mask[0, 3:] = 0
    weights = posterior(network, 0.1)
    with torch.no_grad():
        expected = linearised(network, weights, x, method="exact", keep=mask, flip=True)
    found = tangent(network, weights.bind(network), x, keep=mask, flip=True)
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.covariance.to_dense(), expected.covariance.to_dense())
    with torch.no_grad():
        chunked = propagate(network, weights, x, keep=mask, flip=True, chunk_size=1, activations="tangent")
        whole = propagate(network, weights, {"keep": mask, "x": x, "flip": True}, activations="tangent")
    torch.testing.assert_close(chunked.mean, whole.mean)
    torch.testing.assert_close(chunked.covariance.to_dense(), whole.covariance.to_dense())


def test_posterior_means_are_taken_in_following():
    network = ResidualMLP().eval()
    variances = relative_variances(network, 0.1)
    means = {name: p.detach() + 0.1 for name, p in network.named_parameters()}
    moved = ResidualMLP().eval()
    moved.load_state_dict(means)
    x = torch.randn(2, 4)
    with torch.no_grad():
        found = propagate(network, from_variances(variances, means), x)
        expected = propagate(moved, from_variances(variances), x)
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.covariance.to_dense(), expected.covariance.to_dense())


class TimeFirst(nn.Module):
    """Batch first outside, time first inside."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        h = self.embed(x).permute(1, 0, 2)
        return self.head(self.layer(h).mean(0))


@pytest.mark.parametrize("names", [None, ["layer", "head"]], ids=["all", "behind a certain embedding"])
def test_layers_that_have_time_first_inside(names):
    assert_exact(TimeFirst(), torch.randn(2, 3, 3), names=names)


def test_the_model_itself_may_have_time_first():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer = nn.Linear(3, 4), nn.TransformerEncoderLayer(4, 2, 8, 0.0)

        def forward(self, x):
            return self.layer(self.embed(x)) * torch.arange(1.0, 4.0).view(3, 1, 1)

    network, x = Outer().eval(), torch.randn(3, 2, 3)  # three tokens of two sequences
    weights = posterior(network, 0.1)
    with torch.no_grad():
        expected = linearised(network, weights, x, method="exact", batch_dim=1)
        found = propagate(network, weights, x, activations="tangent", batch_dim=1)
    assert found.mean.shape == (2, 3, 4)
    torch.testing.assert_close(found.mean, network(x).transpose(0, 1))
    ratio = found.variance.sqrt() / expected.variance.sqrt()
    assert (ratio - 1).abs().max() < 0.1  # products of variances, which the tangent has not


def test_one_element_is_as_many():
    network = ViT(depth=1).eval()
    x, weights = torch.randn(3, 1, 4, 4), posterior(network, 0.1)
    with torch.no_grad():
        many, one = propagate(network, weights, x), propagate(network, weights, x[1:2])
    torch.testing.assert_close(one.mean, many.mean[1:2])
    torch.testing.assert_close(one.covariance.to_dense(), many.covariance.to_dense()[1:2])


class Words(nn.Module):
    """Tables of words and positions, all uncertain, and as many tokens as sequences."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, ids):
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.norm(self.words(ids) + self.places(places)).mean(1))


def test_as_many_tokens_as_sequences():
    network, ids = Words(), torch.randint(7, (3, 3))
    assert_exact(network, ids)
    assert_exact(network, ids[:2])
    assert_exact(network, ids[:, :1].expand(3, 1))


def test_what_a_module_remembers_stays_as_it_was():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.seen = nn.Linear(3, 3), None

        def forward(self, x):
            self.seen = self.new = self.linear(x)
            return self.seen + 1.0

    network = Remembers().eval()
    walk = Walk(network, posterior(network, 0.1).bind(network), Options())
    walk(network, GaussianState(torch.randn(2, 3)))
    assert all(isinstance(value, torch.Tensor) for value in (network.seen, network.new))


class Counting(nn.Module):
    """Notes how many elements it gets."""

    def __init__(self, operation):
        super().__init__()
        self.linear, self.operation, self.sizes = nn.Linear(3, 2), operation, []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.operation(self.linear(x))


def needs_several(h):
    if len(h) < 2:
        raise ValueError("a batch of several, please")
    return h + 1


@pytest.mark.parametrize(
    ("operation", "batch", "sizes"),
    [
        pytest.param(lambda h: h + 1, 3, [3, 1], id="first element"),
        pytest.param(lambda h: h * len(h), 3, [3, 1, 3], id="depends on the size of the batch"),
        pytest.param(needs_several, 3, [3, 1, 3], id="wants several"),
        pytest.param(lambda h: h + 1, 1, [1, 1], id="a single one"),
    ],
)
def test_what_was_followed_is_compared_on_one_element_where_that_is_enough(operation, batch, sizes):
    network = Counting(operation).eval()
    walk = Walk(network, posterior(network, 0.1).bind(network), Options())
    x = torch.randn(batch, 3)
    found = walk(network, GaussianState(x))
    assert network.sizes == sizes
    torch.testing.assert_close(found.mean, operation(network.linear(x)))


# What cannot be followed


def mutated_view(module, h):
    view = h[:, 0]
    h = h.mul_(2.0)
    return view


CANNOT = {
    "cumsum": (lambda m, h: h.cumsum(1), "cumsum has no rule"),
    "numbers": (lambda m, h: h * float(h.sum()), "Python numbers"),
    "item": (lambda m, h: h * h.sum().item(), "item"),
    "control flow": (lambda m, h: h if h.sum() > 0 else -h, "control flow looks at uncertain numbers"),
    "division": (lambda m, h: 1 / h, "divides by uncertain numbers"),
    "weights that are computed": (lambda m, h: F.linear(h, h[0]), "batch"),
    "vectors": (lambda m, h: h[:, 0] @ torch.ones(4), "matrices only"),
    "batch": (lambda m, h: h.mean(0), "over the batch"),
    "one number": (lambda m, h: h.sum((1, 2)), "single number"),
    "merged batch": (lambda m, h: h.reshape(-1, 4), "batch"),
    "one of the batch": (lambda m, h: h[0], "batch"),
    "writing": (lambda m, h: h.new_zeros(h.shape).index_copy_(1, torch.arange(5), h), "index_copy_"),
    "mutated view": (mutated_view, "in place"),
    "training dropout": (lambda m, h: F.dropout(h), "dropout"),
    "types": (lambda m, h: h * 2.0 if isinstance(h, torch.Tensor) else h, "another one when it is traced"),
    "attribute": (lambda m, h: h.real.mT, "real"),
}


@pytest.mark.parametrize(("operation", "reason"), CANNOT.values(), ids=CANNOT)
def test_the_error_names_module_operation_and_both_ways_out(operation, reason):
    network = nn.Sequential(nn.Identity(), Middle(operation)).eval()
    weights = posterior(network, 0.1, ["before"])
    with pytest.raises(NotImplementedError, match=reason) as caught:
        propagate(network, weights, torch.randn(2, 5, 3))
    message = str(caught.value)
    assert "1, a Middle" in message and "register" in message and "on_unknown='linearise'" in message
    assert "{operation}" not in message


def added(module, h):
    total = torch.zeros(len(h), 5, 4)
    total += h
    return total


def added_under_another_name(module, h):
    total = torch.zeros(len(h), 5, 4)
    view = total[:, :1]
    view.add_(h[:, :1])
    return total


def written(module, h):
    total = torch.zeros(len(h), 5, 4)
    total[:, 0] = h[:, 0]
    return total


def multiplied(module, h):
    total = torch.ones(len(h), 5, 4)
    torch.mul(h, 2.0, out=total)
    return total


@pytest.mark.parametrize("operation", [added, added_under_another_name, written, multiplied])
@pytest.mark.parametrize("inference", [False, True])
def test_what_is_uncertain_is_not_written_into_what_is_certain(operation, inference):
    network = nn.Sequential(Middle(operation), nn.Linear(4, 2)).eval()
    weights, x = posterior(network, 0.1, ["before", "1."]), torch.randn(2, 5, 3)
    with torch.inference_mode(inference), pytest.raises(NotImplementedError, match="a tensor that is certain"):
        propagate(network, weights, x)


def test_a_written_tensor_is_linearised():
    network = nn.Sequential(Middle(added), nn.Linear(4, 2)).eval()
    weights, x = posterior(network, 0.1, ["before", "1."]), torch.randn(2, 5, 3)
    with torch.no_grad():
        found = propagate(network, weights, x, on_unknown="linearise", activations="tangent")
        expected = linearised(network, weights, x, method="exact")
        torch.testing.assert_close(found.mean, network(x))
    assert (found.variance / expected.variance - 1).abs().max() < 0.05  # products of both layers are ours


def test_an_inner_module_says_what_it_lacks():
    class Inner(nn.Module):
        def forward(self, x):
            return x.sort(-1)[0]

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.first = Inner(), nn.Linear(3, 3)

        def forward(self, x):
            return self.inner(self.first(x)) + 1.0

    network = nn.Sequential(Outer()).eval()
    with pytest.raises(NotImplementedError, match=r"0\.inner, a Inner, .*sort"):
        propagate(network, posterior(network, 0.1), torch.randn(2, 3))
    weights, x = posterior(network, 0.1), torch.randn(2, 3)
    with torch.no_grad():
        found = propagate(network, weights, x, on_unknown="linearise", activations="tangent")
        expected = linearised(network, weights, x, method="exact")
    torch.testing.assert_close(found.covariance.to_dense(), expected.covariance.to_dense())


def test_the_second_output_of_a_module_is_not_known():
    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            _, weights = self.attention(x, x, x)
            return weights

    network = Uses().eval()
    with pytest.raises(NotImplementedError, match="more than the first output of attention"):
        propagate(network, posterior(network, 0.1), torch.randn(2, 3, 4))


def test_parameters_out_of_sight_are_not_lost():
    class Hides(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.hidden = [self.linear.weight]

        def forward(self, x):
            return F.linear(x, self.hidden[0])

    network = nn.Sequential(Hides()).eval()
    with pytest.raises(NotImplementedError, match=r"0\.linear\.weight"):
        propagate(network, posterior(network, 0.1), torch.randn(2, 3))


def test_no_forward_to_look_into():
    network = nn.Linear(3, 3)
    walk = Walk(network, posterior(network, 0.1).bind(network), Options())
    network.forward = lambda x: x
    with pytest.raises(CannotFollow, match="not a method"):
        follow(network, GaussianState(torch.randn(2, 3)), walk)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    network = nn.Sequential(ViT(depth=1), Middle(lambda m, h: h.cumsum(-1)) if fails else nn.Identity()).eval()
    network[0].head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    keys = [sorted(vars(module)) for module in network.modules()]
    grads = [p.requires_grad for p in network.parameters()]
    call, get = nn.Module.__call__, nn.Module.__getattr__
    fast = torch.backends.mha.get_fastpath_enabled()
    x = torch.randn(2, 1, 4, 4)
    kept = x.clone()
    if fails:
        with pytest.raises(NotImplementedError):
            propagate(network, posterior(network, 0.1), x)
    else:
        propagate(network, posterior(network, 0.1), x)
    assert nn.Module.__call__ is call and nn.Module.__getattr__ is get
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert [sorted(vars(module)) for module in network.modules()] == keys
    assert [p.requires_grad for p in network.parameters()] == grads
    assert all(not module._forward_hooks and not module.training for module in network.modules())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert torch.equal(x, kept)


def test_gradients_flow_through_what_is_followed():
    network = ResidualMLP().eval()
    x = torch.randn(2, 4, requires_grad=True)
    found = propagate(network, posterior(network, 0.1), x)
    found.variance.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and (x.grad != 0).any()
