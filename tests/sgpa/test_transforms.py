"""Derivatives, torch.func, torch.compile, autocast and short dtypes."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpseq.sgpa import decoupled_posterior, pathwise_noise, standard_posterior
from tests.oracles_sgpa import Problem, problem

OPTIONS = [
    {},
    {"kernel": "exponential"},
    {"form": "cheng_boots", "is_causal": True},
    {"normalise": True, "kernel": "exponential", "form": "cheng_boots"},
    {"normalise": True, "is_causal": True},
    {"value_scale": "length", "attn_mask": torch.tensor([[False, True, True], [False, False, True], [False] * 3])},
]


def outputs(post):
    return tuple(
        t for t in (post.mean, post.variance, post.kl_global, post.kl_amortised, post.kl_prefix) if t is not None
    )


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("queries", [None, 3], ids=["self", "cross"])
def test_gradients(options, queries):
    p = problem(batch=(), tokens=3, queries=queries, inducing=2, dims=1)

    def f(*leaves):
        key = leaves[0] if queries is None else leaves[-1]
        return outputs(decoupled_posterior(leaves[0], key, *leaves[1:7], **options))

    leaves = [p.query, *p[2:]] + ([] if queries is None else [p.key])
    assert torch.autograd.gradcheck(f, [t.clone().requires_grad_() for t in leaves])


def test_second_derivatives():
    p = problem(batch=(), tokens=2, queries=2, inducing=2, dims=1, heads=1, width=1)

    def f(*leaves):
        return outputs(decoupled_posterior(*leaves))

    assert torch.autograd.gradgradcheck(f, [t.clone().requires_grad_() for t in p])


@pytest.mark.parametrize("options", OPTIONS[:5], ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("tokens", [4, 200])
def test_functional_gradients_are_autograd(options, tokens):
    p = problem(batch=(2,), tokens=tokens, heads=1)

    def loss(*leaves):
        post = decoupled_posterior(leaves[0], leaves[0], *leaves[1:], **options)
        return sum(t.square().mean() for t in outputs(post))

    leaves = [p.query, *p[2:]]
    found = grad(loss, argnums=tuple(range(7)))(*leaves)
    required = [t.clone().requires_grad_() for t in leaves]
    torch.testing.assert_close(found, torch.autograd.grad(loss(*required), required))


# What torch says where it loops over a fused kernel: right, not fast.
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("options", OPTIONS[:5], ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("tokens", [4, 200])
def test_vmap_over_sequences_and_over_parameters(options, tokens):
    p = problem(batch=(3,), tokens=tokens)
    whole = outputs(decoupled_posterior(*p, **options))
    shared = [None] * 5
    mapped = vmap(lambda x, v, *rest: outputs(decoupled_posterior(x, x, v, *rest, **options)), in_dims=(0, 0, *shared))
    for name, one, other in zip("mvgap", mapped(p.query, *p[2:]), whole, strict=False):
        torch.testing.assert_close(one, other.expand_as(one), msg=name)
    # Two tensors to map over hide that queries are the keys; the numbers are the same.
    apart = vmap(
        lambda x, y, v, *rest: outputs(decoupled_posterior(x, y, v, *rest, **options)), in_dims=(0, 0, 0, *shared)
    )
    for one, other in zip(apart(*p), whole, strict=True):
        torch.testing.assert_close(one, other.expand_as(one))
    models = [problem(batch=(3,), tokens=tokens)[3:] for _ in range(2)]
    stacked = [torch.stack(t) for t in zip(*models, strict=True)]
    many = vmap(lambda *rest: outputs(decoupled_posterior(*p[:3], *rest, **options)))(*stacked)
    for i, model in enumerate(models):
        for one, other in zip(many, outputs(decoupled_posterior(*p[:3], *model, **options)), strict=True):
            torch.testing.assert_close(one[i], other)


@pytest.mark.parametrize("options", OPTIONS[:5], ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("tokens", [4, 200])
def test_forward_mode(options, tokens):
    """Fused kernels have no forward derivative; torch's switch takes the one that has."""
    p = problem(batch=(), tokens=tokens)

    def f(x):
        return torch.cat([t.flatten() for t in outputs(decoupled_posterior(x, x, *p[2:], **options))])

    direction, step = torch.randn_like(p.query), 1e-6
    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = jvp(f, (p.query,), (direction,))
    difference = (f(p.query + step * direction) - f(p.query - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-5, atol=1e-6)


def test_per_example_gradients():
    p = problem(batch=(3,), tokens=4)

    def loss(parameters, x, v):
        return sum(t.sum() for t in outputs(decoupled_posterior(x, x, v, *parameters)))

    found = vmap(grad(loss), in_dims=(None, 0, 0))(tuple(p[3:]), p.query, p.value)
    for b in range(3):
        alone = grad(loss)(tuple(p[3:]), p.query[b], p.value[b])
        torch.testing.assert_close(tuple(t[b] for t in found), alone)


class Module(torch.nn.Module):
    def __init__(self, p: Problem):
        super().__init__()
        self.parameters_ = torch.nn.ParameterList([torch.nn.Parameter(t) for t in p[3:]])

    def forward(self, x, v):
        post = decoupled_posterior(x, x, v, *self.parameters_, is_causal=True)
        return post.mean, post.variance, post.kl_global, post.kl_amortised


def test_functional_call():
    p = problem()
    module = Module(p)
    doubled = {name: 2 * t for name, t in module.named_parameters()}
    found = functional_call(module, doubled, (p.query, p.value))
    wanted = decoupled_posterior(*p[:3], *(2 * t for t in p[3:]), is_causal=True)
    torch.testing.assert_close(found[0], wanted.mean)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("options", [OPTIONS[i] for i in (0, 2, 3, 5)], ids=lambda o: "-".join(o) or "plain")
def test_it_compiles_into_one_graph(options):
    tokens = 3 if "attn_mask" in options else 200
    p = problem(tokens=tokens)

    def f(x, *rest):
        return outputs(decoupled_posterior(x, x, *rest, **options))

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    eager_leaves, leaves = ([t.clone().requires_grad_() for t in (p.query, *p[2:])] for _ in range(2))
    eager, found = f(*eager_leaves), compiled(*leaves)
    torch.testing.assert_close(found, eager)
    wanted = torch.autograd.grad(sum(t.sum() for t in eager), eager_leaves)
    torch.testing.assert_close(torch.autograd.grad(sum(t.sum() for t in found), leaves), wanted)


@pytest.mark.parametrize("options", OPTIONS[:5], ids=lambda o: "-".join(o) or "plain")
def test_autocast_leaves_the_algebra_alone(options):
    """Under autocast the tokens come short; parameters stay long, and variances and divergences are in float32."""
    p = problem(tokens=6)
    p = Problem(*(t.float() for t in p))
    p = p._replace(key=p.query)
    outside = decoupled_posterior(*p, **options)
    with torch.autocast("cpu", torch.bfloat16):
        inside = decoupled_posterior(*p, **options)
        short = decoupled_posterior(*(3 * (p.query.bfloat16(),))[:2], p.value.bfloat16(), *p[3:], **options)
        noise = pathwise_noise(p.query, *p[3:4], *p[5:], num_dims=2)
    torch.testing.assert_close(inside, outside)
    assert short.mean.dtype == torch.bfloat16 and noise.dtype == torch.float32
    assert short.variance.dtype == short.kl_global.dtype == short.kl_amortised.dtype == torch.float32
    torch.testing.assert_close(short.kl_global, outside.kl_global)
    torch.testing.assert_close(short.variance, outside.variance, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("options", OPTIONS[:5], ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("short", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [5, 220])
def test_short_tokens(options, short, tokens):
    """Close to float64 at the rounded tokens, with gradients."""
    p = problem(batch=(2,), tokens=tokens)
    if short == torch.float16 and options == {"kernel": "exponential"}:
        p = p._replace(query=0.3 * p.key, key=0.3 * p.key)  # the mean itself outgrows the dtype
    rounded = Problem(*(t.to(short) for t in p[:3]), *p[3:])
    query, value = rounded.query.clone().requires_grad_(), rounded.value.clone().requires_grad_()
    post = decoupled_posterior(query, query, value, *p[3:], **options)
    x, v = rounded.query.double(), rounded.value.double()
    exact = decoupled_posterior(x, x, v, *p[3:], jitter=1e-6, **options)
    assert post.mean.dtype == short
    for name in ("mean", "variance", "kl_amortised"):
        found, wanted = getattr(post, name).double(), getattr(exact, name)
        assert ((found - wanted).abs().max() / wanted.abs().max()) < 0.06, name
    (post.mean.float().square().mean() + post.variance.mean() + post.kl_amortised.mean()).backward()
    assert query.grad.isfinite().all() and value.grad.isfinite().all()


def test_the_exponential_kernel_outgrows_float16_and_does_not_overflow():
    """exp(|x|^2 / 2) of tokens at 5 is 3e5: past the largest float16."""
    p = problem(batch=(), tokens=5)
    ones = torch.ones_like(p.lengthscale)
    x = (5.0 * torch.nn.functional.normalize(p.key, dim=-1)).half()
    post = decoupled_posterior(
        x, x, p.value.half(), *p[3:6], ones, p.variance, kernel="exponential", form="cheng_boots", normalise=True
    )
    assert post.mean.isfinite().all() and post.variance.isfinite().all()
    scores = x.double() @ x.double().mT
    free = decoupled_posterior(
        x,
        x,
        p.value.half(),
        p.inducing_key,
        0 * p.inducing_value,
        p.inducing_scale_tril,
        ones,
        p.variance,
        kernel="exponential",
        form="cheng_boots",
        normalise=True,
    )
    wanted = scores.softmax(-1) @ p.value.half().double()
    torch.testing.assert_close(free.mean.double(), wanted, rtol=2e-2, atol=2e-2)


def test_the_standard_posterior_has_gradients():
    p = problem(batch=(), tokens=3, dims=1)
    tril = torch.eye(3, dtype=torch.float64) + 0.1 * torch.randn(2, 1, 3, 3, dtype=torch.float64).tril(-1)

    def f(x, v, tril, lengthscale, variance):
        post = standard_posterior(x, x, v, tril, lengthscale, variance, kernel="exponential", output="full")
        return post.mean, post.covariance, post.kl_amortised

    leaves = (p.key, p.value, tril, p.lengthscale, p.variance)
    assert torch.autograd.gradcheck(f, [t.clone().requires_grad_() for t in leaves])


@pytest.mark.cuda
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("tokens", [3, 300])
def test_on_a_gpu_it_is_the_same(options, tokens):
    if "attn_mask" in options:
        tokens, options = 3, {**options, "attn_mask": options["attn_mask"].cuda()}
    p = problem(tokens=tokens)
    there = Problem(*(t.cuda() for t in p))
    there = there._replace(key=there.query)
    here = {name: t.cpu() if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    wanted, found = decoupled_posterior(*p, **here), decoupled_posterior(*there, **options)
    for one, other in zip(outputs(found), outputs(wanted), strict=True):
        torch.testing.assert_close(one.cpu(), other)
