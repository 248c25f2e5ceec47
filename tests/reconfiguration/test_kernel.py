"""The step: it starts as the identity, knows time and masks, and every parameter of it learns."""

import math

import pytest
import torch
from torch import nn

from gpseq.reconfiguration import Masks, TransitionKernel
from gpseq.reconfiguration.blocks import find_kind
from gpseq.reconfiguration.kernel import INITIAL_SPREAD
from tests.oracles_reconfiguration import FUTURE, HOSTS, PADDING, Classifier, moved

WIDTH, HEADS, STEPS = 8, 2, 4


def kernel(dtype=torch.float64, trained=True, **options):
    made = TransitionKernel(WIDTH, HEADS, **{"num_steps": STEPS, "dtype": dtype, **options}).eval()
    return moved(made, dtype) if trained else made


def tokens(dtype=torch.float64, batch=3, length=5):
    return torch.randn(batch, length, WIDTH, dtype=dtype)


@pytest.mark.parametrize("depth", [1, 2])
def test_it_starts_as_the_identity(depth, dtype):
    made, x = kernel(dtype, trained=False, depth=depth), 3 * tokens(dtype)
    for t in (0.25, 1.0, torch.tensor([0.25, 0.5, 1.0])):
        mean, variance = made.conditional(x, t)
        assert mean.equal(x)
        assert mean.dtype == variance.dtype == dtype
        assert variance.sqrt().mean().item() == pytest.approx(INITIAL_SPREAD, rel=0.3)


def test_the_spread_has_a_floor(dtype):
    made, x = kernel(dtype, trained=False, min_spread=0.05), tokens(dtype)
    with torch.no_grad():
        made.spread.bias.fill_(-200.0)
    assert made.conditional(x, 0.5)[1].sqrt().allclose(torch.tensor(0.05, dtype=dtype))
    made.set_increments(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    for number in range(1, 5):
        spread = made.conditional(x, number / 4)[1].sqrt()
        torch.testing.assert_close(spread, torch.full_like(x, 0.05 * number))
    assert (kernel(dtype).conditional(100 * x, 1.0)[1] > 0).all()


@pytest.mark.parametrize("depth", [1, 2])
def test_gradients_reach_every_parameter_after_a_step(depth):
    made, x, want = kernel(trained=False, depth=depth), tokens(), tokens()
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)

    def loss():
        mean, variance = made.conditional(x, 0.5)
        return (0.5 * variance.log() + (mean - want).square() / (2 * variance)).mean()

    for _ in range(2):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    optimizer.zero_grad()
    loss().backward()
    for name, value in made.named_parameters():
        if name.endswith("in_proj_bias"):  # a shift of all keys changes no softmax
            value = value.grad[: WIDTH // 2]
            assert value.ne(0).any()
        else:
            assert value.grad is not None and value.grad.ne(0).any(), name


def test_by_hand():
    made, x, t = kernel(), tokens(), 0.75
    made.set_increments(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    number = made.num_time_features // 4
    code = []
    for value in (t, 1 / STEPS):
        angles = [1000 * value * 10_000 ** (-place / number) for place in range(number)]
        code += [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
    code = made.time(torch.tensor(code, dtype=x.dtype))
    block, size = made.blocks[0], 2.0  # of the third step
    b1, a1, g1, b2, a2, g2 = block.code(code).chunk(6)

    def norm(v):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()

    n = norm(x) * (1 + a1) + b1
    z = x + size * g1 * block.attention(n, n, n)[0]
    z = z + size * g2 * block.down(nn.functional.gelu(block.up(norm(z) * (1 + a2) + b2)))
    n = norm(z) * made.norm.weight + made.norm.bias
    mean, variance = made.conditional(x, t)
    torch.testing.assert_close(mean, z + size * made.mean(n), rtol=1e-6, atol=1e-6)
    spread = size * (nn.functional.softplus(made.spread(n)) + made.min_spread)
    torch.testing.assert_close(variance, spread.square(), rtol=1e-6, atol=1e-6)


def test_times_of_each_element():
    made, x = kernel(), tokens()
    times = torch.tensor([0.25, 0.5, 1.0])
    mean, variance = made.conditional(x, times)
    for row, t in enumerate(times.tolist()):
        for one, each in zip(made.conditional(x[row : row + 1], t), (mean, variance), strict=True):
            torch.testing.assert_close(one, each[row : row + 1])
    for t in (torch.tensor(0.5), torch.tensor([0.5])):
        torch.testing.assert_close(made.conditional(x, t)[0], made.conditional(x, 0.5)[0])
    assert not torch.allclose(made.conditional(x, 0.25)[0], made.conditional(x, 1.0)[0])


def test_lengths_of_steps():
    made, x = kernel(), tokens()
    assert made.conditional(x, 0.5)[0].equal(made.conditional(x, 0.5, dt=1 / STEPS)[0])
    lengths = torch.tensor([0.25, 0.5, 1.0])
    mean, _ = made.conditional(x, 1.0, dt=lengths)
    for row, dt in enumerate(lengths.tolist()):
        torch.testing.assert_close(mean[row : row + 1], made.conditional(x[row : row + 1], 1.0, dt=dt)[0])
    assert not torch.allclose(made.conditional(x, 1.0)[0], made.conditional(x, 1.0, dt=0.5)[0])


def test_sizes_of_increments_lie_on_lines():
    made = kernel()
    made.set_increments(torch.tensor([1.0, 2.0, 4.0, 8.0]))

    def size(t, dt=0.25):
        return made._size(torch.full((1, 1, 1), t), torch.full((1, 1, 1), dt)).item()

    assert [size(t) for t in (0.25, 0.5, 0.75, 1.0)] == pytest.approx([1, 2, 4, 8])
    assert size(0.625) == pytest.approx(3)
    assert size(0.5, 0.5) == pytest.approx(1.5 * 2)  # two steps at once, around 0.25
    assert size(1.0, 1.0) == pytest.approx(3 * 4)
    assert size(0.25, 0.125) == pytest.approx((1 + 0.25) / 2)


@pytest.mark.parametrize(
    "sizes",
    [
        torch.ones(3),
        torch.ones(4, 1),
        torch.tensor([1.0, 0, 1, 1]),
        torch.tensor([1, 1, 1, math.nan]),
        torch.tensor([1, 1, 1, math.inf]),
        -torch.ones(4),
    ],
    ids=["few", "shape", "zero", "nan", "infinite", "negative"],
)
def test_sizes_that_are_none(sizes):
    made = kernel()
    with pytest.raises(ValueError, match="sizes: expected 4 positive numbers, got"):
        made.set_increments(sizes)
    assert made.increments.eq(1).all()


def test_masks():
    made, x = kernel(), tokens()
    other = x.clone()
    other[PADDING] = 30.0
    for mask in (PADDING, Masks(keys=PADDING)):
        one, two = made.conditional(x, 0.5, mask), made.conditional(other, 0.5, mask)
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a[~PADDING], b[~PADDING], rtol=0, atol=1e-12)
    later = x.clone()
    later[:, 3:] = 2.0
    causal = kernel(causal=True)
    causal.load_state_dict(made.state_dict())
    want = made.conditional(x, 0.5, FUTURE)
    for mask, of in ((FUTURE, made), (Masks(causal=True), made), (None, causal), (PADDING & False, causal)):
        found = of.conditional(x, 0.5, mask)
        torch.testing.assert_close(found[0], want[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(found[0][:, :3], of.conditional(later, 0.5, mask)[0][:, :3], rtol=0, atol=1e-12)
    float_mask = torch.zeros(5, 5, dtype=x.dtype).masked_fill(FUTURE, -math.inf)
    torch.testing.assert_close(made.conditional(x, 0.5, float_mask)[0], want[0], rtol=0, atol=1e-12)


def test_bad_calls():
    made, x = kernel(), tokens()
    for bad in (x[..., :4], x[0], x[None]):
        with pytest.raises(ValueError, match=r"x: expected tokens \(B, T, 8\), got shape"):
            made.conditional(bad, 0.5)
    for t in (0.0, -1.0, 3, math.nan):
        with pytest.raises(ValueError, match=r"t: expected a number in \(0, 1\]"):
            made.conditional(x, t)
    with pytest.raises(ValueError, match=r"dt: expected a number in \(0, 1\]"):
        made.conditional(x, 0.5, dt=2)
    with pytest.raises(ValueError, match=r"t: expected a number or shape \(3,\), got shape \(2,\)"):
        made.conditional(x, torch.tensor([0.5, 1.0]))
    with pytest.raises(ValueError, match="mask: expected"):
        made.conditional(x, 0.5, PADDING[:, :4])
    with pytest.raises(ValueError, match=r"Masks\(keys=mask\) or Masks\(pairs=mask\)"):
        made.conditional(tokens(batch=5), 0.5, FUTURE)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dim": 9}, "num_heads: expected a divisor of dim = 9, got 2"),
        ({"dim": 0}, "dim: expected at least 1"),
        ({"num_heads": 0}, "num_heads: expected at least 1"),
        ({"depth": 0}, "depth: expected at least 1"),
        ({"num_steps": 0}, "num_steps: expected at least 1"),
        ({"mlp_ratio": 0}, "mlp_ratio: expected a positive number"),
        ({"min_spread": 0.0}, "min_spread: expected a positive number"),
        ({"num_time_features": 6}, "num_time_features: expected a multiple of 4, got 6"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_sizes(options, match):
    with pytest.raises(ValueError, match=match):
        TransitionKernel(**{"dim": 8, "num_heads": 2, **options})


@pytest.mark.parametrize("name", ["torch pre", "torch post", "vit", "bert", "gpt2", "timm"])
def test_start_from_the_mean_of_blocks(name):
    host = HOSTS[name](torch.float64)
    stack = next(m for m in host.model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and find_kind(m[0]))
    parts = [find_kind(block).parts(block) for block in stack]
    made = kernel(trained=False, mlp_ratio=1.5)
    made.set_increments(torch.full((4,), 0.5))
    assert made.start_from(parts)
    block = made.blocks[0]
    for key, value in {
        "in": block.attention.in_proj_weight,
        "in.bias": block.attention.in_proj_bias,
        "out": block.attention.out_proj.weight,
        "out.bias": block.attention.out_proj.bias,
        "up": block.up.weight,
        "up.bias": block.up.bias,
        "down": block.down.weight,
        "down.bias": block.down.bias,
    }.items():
        torch.testing.assert_close(value.data, sum(part[key] for part in parts).detach() / 3)
    x = tokens()
    n = block.norm(x)
    step = x + block.attention(n, n, n)[0]  # gates of one, with the size of increments undone
    step = step + block.down(block.activation(block.up(block.norm(step))))
    torch.testing.assert_close(made.conditional(x, 0.5)[0], step, rtol=1e-9, atol=1e-9)


def test_starts_that_do_not_fit():
    block = Classifier().encoder.layers[0]
    parts = find_kind(block).parts(block)
    narrow = kernel(torch.float32, trained=False, mlp_ratio=1.0)
    assert narrow.start_from([parts])  # attention alone
    assert narrow.blocks[0].attention.in_proj_weight.equal(parts["in"])
    gates = narrow.blocks[0].code[1].bias.chunk(6)
    assert gates[2].eq(1).all() and gates[5].eq(0).all()
    wide = TransitionKernel(16, 2)
    assert not wide.start_from([parts])
    assert not wide.start_from([]) and not wide.start_from([{}])
    x = torch.randn(2, 3, 16)
    assert wide.conditional(x, 1.0)[0].equal(x)


def test_it_can_be_made_anew():
    made, x = kernel(), tokens()
    assert not made.conditional(x, 0.5)[0].equal(x)
    made.reset_parameters()
    assert made.conditional(x, 0.5)[0].equal(x)
    assert "num_steps=4" in repr(made)
