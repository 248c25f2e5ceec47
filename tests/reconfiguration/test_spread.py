"""Where a teacher's spread comes from, each source against draws."""

import copy

import pytest
import torch
from linear_operator.operators import DiagLinearOperator
from torch import nn

from gpseq.nn import SGPATransformerEncoder, SGPATransformerEncoderLayer, replace_attention
from gpseq.propagation import PartMoments, from_variances
from gpseq.reconfiguration import (
    Distiller,
    Ensemble,
    GaussianAttention,
    MonteCarlo,
    capture,
    teacher_moments,
    transitions,
)
from gpseq.reconfiguration.spread import as_source
from tests.oracles_reconfiguration import BATCH, FUTURE, HOSTS, LENGTH, PADDING, WIDTH, Classifier, moved

FLOOR = torch.zeros(3)


def gaussian_teacher(norm_first=True, batch_first=True, small=0.2):
    layer = SGPATransformerEncoderLayer(
        WIDTH, 2, 12, 0.0, batch_first=batch_first, norm_first=norm_first, num_inducing=3, dtype=torch.float64
    )
    model = moved(SGPATransformerEncoder(layer, 2), by=0.1)
    with torch.no_grad():  # a small spread, where a norm is close to linear
        for layer in model.layers:
            layer.self_attn.inducing.log_variance.fill_(-2.0)
            layer.self_attn.out_proj.weight.mul_(small)
    return model


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "time first"])
def test_gaussian_attention_against_draws(norm_first, batch_first):
    model = gaussian_teacher(norm_first, batch_first)
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    padding = PADDING[:2]
    number, seen = 3000, ~padding

    def captured(times):
        many = x.repeat(times, 1, 1)
        given = {"mask": FUTURE, "src_key_padding_mask": padding.repeat(times, 1)}
        return capture(model, many if batch_first else many.transpose(0, 1), **given)

    with torch.no_grad():
        path, many = captured(1), captured(number)
        for step, of_many, state in zip(transitions(path), transitions(many), path.states[:-1], strict=True):
            mean, variance = GaussianAttention()(step, state)
            assert mean.shape == variance.shape == state.shape
            draws = of_many(state.repeat(number, 1, 1)).unflatten(0, (number, 2))
            error = (draws.mean(0) - mean)[seen].abs() / (draws.std(0)[seen] / number**0.5)
            assert error.max() < (5 if norm_first else 9)  # a norm moves the mean a little
            ratio = (draws.var(0) / variance)[seen]
            assert (ratio - 1).abs().max() < 0.17
            assert (variance[seen] > 0).all()


def test_gaussian_attention_after_surgery():
    model = moved(replace_attention(Classifier(norm_first=True), num_inducing=3))
    made = Distiller(model, spread="gp", task_loss=None)
    losses = made.losses(torch.randn(BATCH, LENGTH, 3, dtype=torch.float64))
    assert losses["loss"].isfinite()


def test_gaussian_attention_needs_gaussian_attention():
    model = moved(Classifier())
    x = torch.randn(BATCH, LENGTH, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"spread: 'gp' expects layers of torch's kind .* got TransformerEncoderLayer"):
        Distiller(model, spread="gp").loss(x)
    teacher = gaussian_teacher()
    with pytest.raises(TypeError, match="spread: 'gp' expects points='attention'"):
        Distiller(teacher, points="block", spread="gp", task_loss=None).loss(x @ torch.ones(3, WIDTH, dtype=x.dtype))
    with pytest.raises(TypeError, match="got Linear"):
        GaussianAttention()(nn.Linear(2, 2), x)


@pytest.mark.parametrize("points", ["attention", "block"])
@pytest.mark.parametrize("name", ["torch pre", "torch post padded", "vit", "bert", "bert eager padded", "gpt2", "timm"])
def test_dropout_is_on_for_a_while(name, points):
    host = HOSTS[name](torch.float32)
    with torch.no_grad():
        path = capture(host.model, host.inputs, points)
        for step, x in zip(transitions(path), path.states[:-1], strict=True):
            _mean, variance = MonteCarlo(16)(step, x)
            seen = slice(None) if path.padding is None else ~path.padding
            assert (variance[seen].sum(-1) > 0).all()  # nothing is fused away
            assert MonteCarlo(2, dropout=False)(step, x)[1].eq(0).all()
        assert not any(part.training for part in host.model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_dropout_of_attention_alone():
    """It has no layer of dropout but a rate, and asks for its own mode."""
    transformers = pytest.importorskip("transformers", minversion="5")
    from tests.oracles_reconfiguration import IMAGE

    config = transformers.ViTConfig(**{**IMAGE, "attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0})
    model = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        path = capture(model, {"pixel_values": torch.randn(2, 3, 8, 8)})
        assert (MonteCarlo(8)(transitions(path)[0], path.states[0])[1] > 0).all()


def test_dropout_against_many_draws():
    layer = nn.Sequential(nn.Dropout(0.5))
    x = torch.full((2, 3, 4), 2.0)
    mean, variance = MonteCarlo(5000)(layer.eval(), x)
    torch.testing.assert_close(mean, x, rtol=0, atol=0.2)
    torch.testing.assert_close(variance, x.square(), rtol=0.1, atol=0)
    with pytest.raises(ValueError, match="num_passes: expected at least 2, got 1"):
        MonteCarlo(1)


def ensemble(model, number=4, by=0.05):
    return [moved(copy.deepcopy(model), by=by) for _ in range(number)]


def test_ensembles():
    model = moved(Classifier(norm_first=True))
    members = ensemble(model)
    x = torch.randn(BATCH, LENGTH, 3, dtype=torch.float64)
    with torch.no_grad():
        path = capture(model, x, first_block=1)
        mean, variance = Ensemble(members)(transitions(path)[1], path.states[1])
        draws = []
        for member in members:
            one, two = member.encoder.layers[1:3]
            u = path.states[1] + one.linear2(torch.relu(one.linear1(one.norm2(path.states[1]))))
            n = two.norm1(u)
            draws.append(u + two.self_attn(n, n, n)[0])
        torch.testing.assert_close(mean, torch.stack(draws).mean(0))
        torch.testing.assert_close(variance, torch.stack(draws).var(0))
    assert Distiller(model, spread=Ensemble(members), floor=0.0).loss(x).isfinite()


def test_ensembles_whose_members_differ():
    model = moved(Classifier(norm_first=True))
    x = torch.randn(BATCH, LENGTH, 3, dtype=torch.float64)
    cases = {
        r"got one without encoder\.layers\.2": moved(Classifier(depth=2, norm_first=True)),
        "got one without": nn.Linear(2, 2).eval(),
        r"got one with another encoder\.layers\.0": moved(Classifier(norm_first=True, bias=False)),
        r"in eval mode, got one with encoder\.layers\.0 in train mode": copy.deepcopy(model).train(),
    }
    for match, member in cases.items():
        with pytest.raises(ValueError, match="members: expected.*" + match):
            Distiller(model, spread=Ensemble([model, member])).loss(x)
    with pytest.raises(ValueError, match="members: expected at least two models, got 1"):
        Ensemble([model])
    with pytest.raises(TypeError, match="transition: expected a Transition of the teacher, got Linear"):
        Ensemble([model, model])(nn.Linear(2, 2), x)


@pytest.mark.parametrize("points", ["attention", "block"])
def test_propagation_as_a_source(points):
    """Moments that uncertain weights give a step, against networks whose weights are drawn."""
    model = moved(Classifier(norm_first=True, activation="gelu"))
    variances = {
        name: (0.03 * value.detach()).square() + 1e-6
        for name, value in model.named_parameters()
        if "linear" in name or "out_proj" in name
    }
    source = PartMoments(model, from_variances(variances), covariance="lowrank", num_tangents=32)
    x = torch.randn(2, LENGTH, 3, dtype=torch.float64)
    made = Distiller(model, points=points, spread=source, task_loss=None)
    assert made.loss(x).isfinite()
    with torch.no_grad():
        path = capture(model, x, points)
        means, found = teacher_moments(path, source, FLOOR)
        number = 200
        draws = [[] for _ in means]
        other = copy.deepcopy(model)
        held = dict(other.named_parameters())
        for _ in range(number):
            for name, variance in variances.items():
                held[name].copy_(dict(model.named_parameters())[name] + variance.sqrt() * torch.randn_like(variance))
            steps = Ensemble([other, other])
            for step, state, into in zip(transitions(path), path.states[:-1], draws, strict=True):
                into.append(steps._twin(other, step)(state))
    for mean, variance, drawn in zip(means, found, draws, strict=True):
        drawn = torch.stack(drawn)
        assert (drawn.mean(0) - mean).abs().max() < 0.1
        ratio = drawn.var(0).mean() / variance.mean()
        assert 0.8 < ratio < 1.25


class Known:
    """An object that knows the time."""

    def __init__(self, wrap=lambda v: v):
        self.times, self.wrap = [], wrap

    def conditional(self, x, t=None):
        self.times.append(t)
        return x + t, self.wrap(torch.full_like(x, t))


@pytest.mark.parametrize("wrap", [lambda v: v, DiagLinearOperator], ids=["variances", "operator"])
def test_objects_with_conditional(wrap):
    model, x = moved(Classifier()), torch.randn(BATCH, LENGTH, 3, dtype=torch.float64)
    known = Known(wrap)
    path = capture(model, x)
    means, variances = teacher_moments(path, as_source(known), torch.tensor([0.0, 1.0, 2.0]))
    assert known.times == pytest.approx([1 / 3, 2 / 3, 1])
    for number, (mean, variance, state) in enumerate(zip(means, variances, path.states[:-1], strict=True)):
        torch.testing.assert_close(mean, state + (number + 1) / 3)
        torch.testing.assert_close(variance, torch.full_like(state, (number + 1) / 3 + number**2))


def test_the_floor_is_added_in_quadrature_to_every_source():
    model, x = moved(Classifier()), torch.randn(BATCH, LENGTH, 3, dtype=torch.float64)
    path = capture(model, x)
    floor = torch.tensor([0.1, 0.2, 0.3])
    means, variances = teacher_moments(path, None, floor)
    for mean, variance, state, least in zip(means, variances, path.states[1:], floor, strict=True):
        assert mean.equal(state)
        torch.testing.assert_close(variance, torch.full_like(state, least.item() ** 2), rtol=1e-6, atol=0)
    made = Distiller(model, floor=0.1)
    made.calibrate(x)
    increments = [(b - a).square().mean().sqrt() for a, b in zip(path.states[:-1], path.states[1:], strict=True)]
    torch.testing.assert_close(made.rollout.increments.double(), torch.stack(increments), rtol=1e-6, atol=0)


def test_sources_that_do_not_fit():
    model, x = moved(Classifier()), torch.randn(BATCH, LENGTH, 3, dtype=torch.float64)
    cases = {
        r"expected a mean of shape \(3, 5, 8\) from the source, got \(3, 5, 4\)": lambda s, v: (v[..., :4], v),
        r"expected a variance of shape \(3, 5, 8\) from the source, got \(3, 5, 1\)": lambda s, v: (v, v[..., :1] ** 2),
        "expected a variance of shape .* got float": lambda s, v: (v, 1.0),
        "expected variances that are not negative": lambda s, v: (v, -v.square()),
        "expected variances that are not negative from": lambda s, v: (v, v * torch.nan),
    }
    for match, source in cases.items():
        made = Distiller(model, spread=source)
        with pytest.raises(ValueError, match="spread: " + match):
            made.loss(x)
        made.source = None
        assert made.loss(x).isfinite()  # still usable
    for spread in (3, None, [1]):
        with pytest.raises(TypeError, match="spread: expected one of floor, gp, mc_dropout, a callable"):
            Distiller(model, spread=spread)
    with pytest.raises(ValueError, match="spread: expected one of floor, gp, mc_dropout or a source, got 'dropout'"):
        Distiller(model, spread="dropout")


@pytest.mark.parametrize("loss", ["kl", "reverse_kl"])
def test_a_zero_spread_with_a_divergence(loss):
    model, x = moved(Classifier()), torch.randn(BATCH, LENGTH, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"floor: expected a positive number.*path_loss='{loss}'"):
        Distiller(model, path_loss=loss, floor=0.0)

    def certain(step, v):
        return (step(v), torch.zeros_like(v))

    made = Distiller(model, path_loss=loss, spread=certain, floor=0.0)
    with pytest.raises(ValueError, match=f"spread: expected variances that are positive with path_loss='{loss}'"):
        made.loss(x)
    assert Distiller(model, path_loss=loss, spread=certain).loss(x).isfinite()
    for other in ("mse", "nll"):
        assert Distiller(model, path_loss=other, floor=0.0).loss(x).isfinite()
