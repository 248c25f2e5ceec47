"""Temperatures from variances: against grids and formulas, and through the one door of predict."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gpseq import predict
from gpseq.nn import calibrate, calibrate_noise, fit_covariance, replace_attention, use_sampling
from gpseq.nn.calibration import fit_temperature
from gpseq.nn.capture import layers_with_keys


class Model(nn.Module):
    """Labels for sequences or for tokens."""

    def __init__(self, dtype=torch.float64, batch_first=True, per_token=False, classes=3):
        super().__init__()
        stock = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, norm_first=True, dtype=dtype)
        self.encoder = nn.TransformerEncoder(stock, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, classes, dtype=dtype)
        self.batch_first, self.per_token = batch_first, per_token

    def forward(self, x, padding=None, labels=None):
        h = self.encoder(x, src_key_padding_mask=padding)
        if self.per_token:
            return self.head(h)
        dim = 1 if self.batch_first else 0
        if padding is None:
            return self.head(h.mean(dim))
        present = ~padding.unsqueeze(-1)
        return self.head(torch.where(present, h, 0.0).sum(1) / present.sum(1))


def fitted(x, y, **options):
    model = fit_covariance(Model(x.dtype, **options), [x], num_inducing=8)
    calibrate(model, [(x, y)], batch_dim=0 if model.batch_first else 1)
    return model


def set_temperature(model, a, b, power):
    layers = layers_with_keys(model)
    for layer in layers.values():
        layer.inducing.temperature.copy_(torch.tensor([a / len(layers), b / len(layers), power]))


def generated(n, a, b, seed, classes=4, power=2):
    """Labels drawn with the temperature that variances ask for."""
    g = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(n, classes, generator=g, dtype=torch.float64)
    level = torch.randn(n, generator=g, dtype=torch.float64).square() + 0.2
    probs = F.softmax(logits / (a + b * level).sqrt().unsqueeze(-1), -1)
    return logits, torch.multinomial(probs, 1, generator=g).squeeze(-1), level.pow(1 / power).unsqueeze(-1)


@pytest.mark.parametrize("power", [2, 4, 8])
@pytest.mark.parametrize(("a", "b"), [(0.5, 2.0), (2.0, 0.3), (1.0, 0.0)])
def test_scalars_that_made_the_labels_are_found(a, b, power):
    found = fit_temperature(*generated(200_000, a, b, 0, power=power))
    assert found.power == power or not b
    assert found.a == pytest.approx(a, rel=0.15)
    assert found.b == pytest.approx(b, rel=0.15, abs=0.05)


@given(seed=st.integers(0, 1000), a=st.floats(0.1, 4.0), b=st.floats(0.0, 4.0), n=st.integers(20, 200))
def test_no_point_of_a_grid_is_better(seed, a, b, n):
    logits, labels, variances = generated(n, a, b, seed)
    variances = torch.cat([variances, 2 * variances.flip(0)], -1)
    found = fit_temperature(logits, labels, variances)

    def nlpd(a, b, power):
        tau = (a + b * (variances**power).mean(-1)).sqrt()
        return F.cross_entropy(logits / tau.unsqueeze(-1), labels).item()

    grid = [10 ** (k / 2) for k in range(-4, 7)]  # within the bounds of the fit
    best = min(nlpd(a, b, power) for a, b, power in itertools.product(grid, [0.0, *grid], (2, 4, 8)))
    assert found.nlpd <= best + 1e-6
    assert found.nlpd == pytest.approx(nlpd(found.a, found.b, found.power), abs=1e-9)
    assert found.nlpd <= found.nlpd_temperature + 1e-9
    assert found.nlpd_temperature <= found.nlpd_before + 1e-9
    assert found.num_labels == n


def test_variances_that_say_nothing_get_nothing():
    logits, labels, level = generated(500, 1.0, 1.0, 3)
    found = fit_temperature(logits, labels, torch.zeros_like(level))
    assert found.b == 0.0
    assert found.nlpd == found.nlpd_temperature


def test_a_set_without_errors_gives_a_finite_temperature():
    logits = 5 * F.one_hot(torch.arange(30) % 3).double()
    found = fit_temperature(logits, torch.arange(30) % 3, torch.rand(30).double())
    assert 0 < found.a < 100
    assert 0 <= found.b < 1e5
    assert found.nlpd < 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda z, y, s: (z[:0], y[:0], s[:0]), "at least one that counts"),
        (lambda z, y, s: (z, y + 7, s), "expected 0 to 3"),
        (lambda z, y, s: (z * torch.nan, y, s), "logits"),
        (lambda z, y, s: (z, y, s * torch.inf), "variances: expected finite"),
    ],
)
def test_what_cannot_be_fitted(change, words):
    with pytest.raises(ValueError, match=words):
        fit_temperature(*change(*generated(20, 1.0, 1.0, 0)))


def test_forbidden_classes_stay_forbidden():
    logits, labels, level = generated(100, 1.0, 1.0, 0)
    logits = torch.cat([logits, torch.full((100, 1), -torch.inf)], -1)
    found = fit_temperature(logits, labels, level)
    wanted = fit_temperature(logits[:, :-1], labels, level)
    assert (found.a, found.b, found.nlpd) == pytest.approx((wanted.a, wanted.b, wanted.nlpd))


# --- through a model --------------------------------------------------------------------------------------------------


def slow_scores(model, x, padding=None):
    """Relative variances of each layer and head, token by token, from the layer's own posterior."""
    model = copy.deepcopy(model).eval()
    seen = {}
    layers = layers_with_keys(model)
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda layer, args, name=name: seen.__setitem__(name, args[0]))
    with use_sampling(model, "mean"):
        model(x, padding)
    found = {}
    for name, layer in layers.items():
        tokens = seen[name] if layer.batch_first else seen[name].transpose(0, 1)
        rows = []
        for b, sequence in enumerate(tokens):
            real = sequence if padding is None else sequence[~padding[b]]
            variance = layer.posterior(real, real, real).variance.mean(-1)  # (H, T)
            rows.append(variance / layer.inducing.typical_variance.unsqueeze(-1))
        found[name] = rows
    return found


@pytest.mark.parametrize(("batch_first", "power"), [(True, 2), (True, 4), (False, 4)])
def test_predictions_by_the_formula(dtype, batch_first, power):
    x = torch.randn(30, 6, 8, dtype=dtype)
    x = x if batch_first else x.transpose(0, 1)
    model = fit_covariance(Model(dtype, batch_first), [x], num_inducing=8)
    set_temperature(model, 0.7, 0.4, power)
    p = predict(model, x, "variance_temperature", batch_dim=0 if batch_first else 1)
    scores = slow_scores(model, x)
    v = torch.stack([torch.stack([row.mean(-1) for row in rows]) for rows in scores.values()], -1)  # (B, H, L)
    tau = (0.7 + 0.4 * v.mean(1).pow(power).mean(-1)).sqrt()
    close = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(p.scores["temperature"], tau, **close)
    torch.testing.assert_close(p.scores["variance"], v.mean((1, 2)), **close)
    for index, name in enumerate(scores):
        torch.testing.assert_close(p.scores[f"variance.{name}"], v[..., index], **close)
    with use_sampling(model, "mean"):
        logits = model.eval()(x)
    torch.testing.assert_close(p.probs(), F.softmax(logits / tau.unsqueeze(-1), -1), **close)
    assert p.probs().argmax(-1).equal(logits.argmax(-1))
    assert p.mutual_information().abs().max() < 1e-6


@pytest.mark.parametrize("batch_first", [True, False])
def test_tokens_have_temperatures_of_their_own(batch_first):
    x, y = torch.randn(20, 6, 8, dtype=torch.float64), torch.randint(3, (20, 6))
    x, y = (x, y) if batch_first else (x.transpose(0, 1), y.mT)
    y[0, :3] = -100
    model = fitted(x, y, batch_first=batch_first, per_token=True)
    p = predict(model, x, "variance_temperature", batch_dim=0 if batch_first else 1)
    assert p.batch_shape == y.shape
    rows = slow_scores(model, x)
    v = torch.stack([torch.stack(list(r)) for r in rows.values()], -1).mean(1)  # (B, T, L)
    parts = torch.stack([layer.inducing.temperature for layer in layers_with_keys(model).values()])
    tau = (parts[:, 0].sum() + (v ** parts[0, 2] * parts[:, 1]).sum(-1)).sqrt()
    torch.testing.assert_close(p.scores["temperature"], tau if batch_first else tau.mT, rtol=1e-6, atol=1e-8)


def test_padding_changes_nothing():
    x, y = torch.randn(30, 6, 8, dtype=torch.float64), torch.randint(3, (30,))
    padding = torch.arange(6) >= torch.randint(2, 7, (30, 1))
    padding[0] = False
    batches = [{"x": x, "padding": padding, "labels": y}]
    other = [{"x": torch.where(padding.unsqueeze(-1), 50.0, x), "padding": padding, "labels": y}]
    model = fit_covariance(Model(), batches, num_inducing=8)
    one, two = calibrate(model, batches), calibrate(model, other)
    assert one.a == pytest.approx(two.a)
    assert one.b == pytest.approx(two.b, rel=1e-4)
    p = predict(model, {"x": x, "padding": padding}, "variance_temperature")
    scores = slow_scores(model, x, padding)
    v = torch.stack([torch.stack([row.mean(-1) for row in rows]) for rows in scores.values()], -1)
    torch.testing.assert_close(p.scores["variance"], v.mean((1, 2)), rtol=1e-6, atol=1e-8)


def test_pieces_of_a_batch_give_the_same():
    x, y = torch.randn(30, 6, 8, dtype=torch.float64), torch.randint(3, (30,))
    model = fitted(x, y)
    whole, pieces = (predict(model, x, "variance_temperature", batch_size=size) for size in (None, 7))
    torch.testing.assert_close(whole.probs(), pieces.probs())
    torch.testing.assert_close(whole.scores["temperature"], pieces.scores["temperature"])


def test_the_scalars_are_kept_with_the_weights():
    x, y = torch.randn(40, 6, 8, dtype=torch.float64), torch.randint(3, (40,))
    model = fitted(x, y)
    other = replace_attention(Model(), num_inducing=8, sampling="mean")
    other.load_state_dict(model.state_dict())
    one, two = (predict(m, x, "variance_temperature").probs() for m in (model, other))
    assert one.equal(two)


def test_a_prediction_leaves_the_model_as_it_was():
    x, y = torch.randn(40, 6, 8, dtype=torch.float64), torch.randint(3, (40,))
    model = fitted(x, y).train()
    for layer in layers_with_keys(model).values():
        layer.sampling = "marginal"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(x)
    cost = [layer.kl_divergence() for layer in layers_with_keys(model).values()]
    predict(model, x, "variance_temperature")
    assert model.training
    assert all(layer.sampling == "marginal" for layer in layers_with_keys(model).values())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert [layer.kl_divergence() for layer in layers_with_keys(model).values()] == cost


def test_layers_that_were_not_chosen_do_not_count():
    x, y = torch.randn(60, 6, 8, dtype=torch.float64), torch.randint(3, (60,))
    model = fit_covariance(Model(), [x], num_inducing=8)
    found = calibrate(model, [(x, y)], layers="*.1.*")
    first, second = layers_with_keys(model).values()
    assert first.inducing.temperature.tolist()[:2] == [0.0, 0.0]
    assert second.inducing.temperature.tolist() == pytest.approx([found.a, found.b, found.power])
    with pytest.raises(ValueError, match=r"layers: expected a pattern that matches attention.*got '\*\.7\.\*'"):
        calibrate(model, [(x, y)], layers="*.7.*")
    assert second.inducing.temperature.tolist() == pytest.approx([found.a, found.b, found.power])


def test_one_logit_is_that_of_the_second_of_two_classes():
    x, y = torch.randn(60, 6, 8, dtype=torch.float64), torch.randint(2, (60,))
    model = fit_covariance(Model(classes=1), [x], num_inducing=8)
    assert calibrate(model, [(x, y)]).num_labels == 60
    assert predict(model, x, "variance_temperature").probs().shape == (60, 2)


def test_gradients_flow():
    x, y = torch.randn(10, 6, 8, dtype=torch.float64), torch.randint(3, (10,))
    model = fitted(x, y)
    x.requires_grad_()
    predict(model, x, "variance_temperature").scores["temperature"].sum().backward()
    assert x.grad.abs().sum() > 0


def test_order_of_the_calls():
    x, y = torch.randn(10, 6, 8, dtype=torch.float64), torch.randint(3, (10,))
    with pytest.raises(ValueError, match="layers with inducing keys"):
        predict(Model(), x, "variance_temperature")
    model = replace_attention(Model(), num_inducing=4)
    for call in (lambda: predict(model, x, "variance_temperature"), lambda: calibrate(model, [(x, y)])):
        with pytest.raises(RuntimeError, match=r"call gpseq\.nn\.fit_covariance first"):
            call()
    fit_covariance(model, [x])
    with pytest.raises(RuntimeError, match=r"call gpseq\.nn\.calibrate first"):
        predict(model, x, "variance_temperature")
    calibrate(model, [(x, y)])
    fit_covariance(model, [x])  # other variances: the temperature is not theirs
    with pytest.raises(RuntimeError, match=r"call gpseq\.nn\.calibrate first"):
        predict(model, x, "variance_temperature")


@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        (lambda x, y: x, TypeError, r"\(x, labels\)"),
        (lambda x, y: (x,), TypeError, r"\(x, labels\).* got 1 elements"),
        (lambda x, y: (x, y, y), TypeError, r"\(x, labels\).* got 3 elements"),
        (lambda x, y: {"x": x}, TypeError, "got a mapping with x"),
        (lambda x, y: (x, y.double()), TypeError, "integer labels"),
        (lambda x, y: (x, y[:3]), ValueError, "labels for logits of shape"),
        (lambda x, y: (x, y * 0 - 100), ValueError, "at least one that counts"),
        (lambda x, y: (x, y + 5), ValueError, "expected labels from 0 to 2, got"),
    ],
)
def test_labels_that_do_not_fit(batch, error, words):
    x, y = torch.randn(10, 6, 8, dtype=torch.float64), torch.randint(3, (10,))
    model = fitted(x, y)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for function in (calibrate, calibrate_noise):
        with pytest.raises(error, match=words):
            function(model, [batch(x, y)])
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 1e3])
def test_what_is_reported_is_what_a_prediction_has(scale):
    x, y = torch.randn(80, 6, 8, dtype=torch.float64), torch.randint(3, (80,))
    model = fit_covariance(Model(), [x], num_inducing=8)
    with torch.no_grad():
        model.head.weight.mul_(scale)
        model.head.bias.mul_(scale)
    for labels in (y, model.eval()(x).argmax(-1), model(x).argmin(-1)):
        found = calibrate(model, [(x, labels)])
        p = predict(model, x, "variance_temperature")
        assert -p.log_prob(labels).mean().item() == pytest.approx(found.nlpd, rel=1e-5)
        assert found.nlpd <= found.nlpd_temperature + 1e-9
        assert p.scores["temperature"].isfinite().all()


@pytest.mark.parametrize("short", [torch.bfloat16, torch.float16])
def test_half_precision(short):
    x, y = torch.randn(60, 6, 8), torch.randint(3, (60,))
    model = fitted(x, y).to(short)
    p = predict(model, x.to(short), "variance_temperature")
    assert p.dtype == short
    assert p.scores["temperature"].dtype == torch.float32
    full = predict(model.float(), x, "variance_temperature")
    torch.testing.assert_close(p.scores["temperature"], full.scores["temperature"], rtol=0.05, atol=0.05)


def test_variances_that_do_not_count_may_be_infinite():
    x, y = torch.randn(30, 6, 8, dtype=torch.float64), torch.randint(3, (30,))
    model = fitted(x, y)
    set_temperature(model, 1.2, 0.0, 2)
    next(iter(layers_with_keys(model).values())).inducing.typical_variance.fill_(1e-320)
    p = predict(model, x, "variance_temperature")
    torch.testing.assert_close(p.scores["temperature"], torch.full((30,), 1.2, dtype=torch.float64).sqrt())
    set_temperature(model, 1.2, 0.5, 4)
    assert predict(model, x, "variance_temperature").probs().isfinite().all()


def test_labels_that_are_the_tokens_are_shifted():
    class Language(Model):
        def __init__(self):
            super().__init__(per_token=True, classes=9)
            self.embed = nn.Embedding(9, 8, dtype=torch.float64)

        def forward(self, input_ids, labels=None):
            mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1], dtype=torch.float64)
            return self.head(self.encoder(self.embed(input_ids), mask=mask, is_causal=True))

    ids = torch.randint(9, (20, 6))
    model = fit_covariance(Language(), [ids], num_inducing=6)
    with pytest.raises(ValueError, match="expected shift=True"):
        calibrate(model, [{"input_ids": ids, "labels": ids}])
    found = calibrate(model, [{"input_ids": ids, "labels": ids}], shift=True)
    with torch.no_grad():
        logits = model.eval()(ids)
    assert found.num_labels == 100
    assert found.nlpd_before == pytest.approx(
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    )
    with pytest.raises(ValueError, match="shift: expected logits of tokens"):
        x, y = torch.randn(10, 6, 8, dtype=torch.float64), torch.randint(3, (10,))
        calibrate(fitted(x, y), [(x, y)], shift=True)


def test_batches_of_another_kind():
    x, y = torch.randn(30, 6, 8, dtype=torch.float64), torch.randint(3, (30,))
    padding = torch.zeros(30, 6, dtype=torch.bool)
    model = fitted(x, y)
    one = calibrate(model, [(x, y)])
    two = calibrate(model, [(x, padding, y)], forward=lambda m, b: m(b[0], b[1]), labels=lambda b: b[2])
    assert one == two


def test_under_inference_mode():
    x, y = torch.randn(30, 6, 8, dtype=torch.float64), torch.randint(3, (30,))
    model = fitted(x, y)
    one = calibrate(model, [(x, y)])
    with torch.inference_mode():
        assert calibrate(model, [(x, y)]) == one


def test_a_sequence_of_padding_is_typical():
    x, y = torch.randn(30, 6, 8, dtype=torch.float64), torch.randint(3, (30,))
    padding = torch.zeros(30, 6, dtype=torch.bool)

    class First(Model):
        def forward(self, x, padding=None):
            return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])

    model = fit_covariance(First(), [x], num_inducing=8)
    calibrate(model, [(x, y)])
    padding[0] = True
    p = predict(model, {"x": x, "padding": padding}, "variance_temperature")
    assert p.scores["variance"][0] == 1.0


class Translator(nn.Module):
    """Tokens of an output attend to those of an input of another length."""

    def __init__(self):
        super().__init__()
        self.reader = Model(per_token=True).encoder
        self.writer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64)
        self.head = nn.Linear(8, 3, dtype=torch.float64)

    def forward(self, source, target):
        return self.head(self.writer(target, self.reader(source)))


def test_an_encoder_and_a_decoder_of_other_lengths():
    source, target = torch.randn(30, 7, 8, dtype=torch.float64), torch.randn(30, 5, 8, dtype=torch.float64)
    batch, y = {"source": source, "target": target}, torch.randint(3, (30, 5))
    model = fit_covariance(Translator(), [batch], num_inducing=8)
    with pytest.raises(ValueError, match=r"logits of the tokens that its layers see.*see layers"):
        calibrate(model, [batch], labels=lambda batch: y)
    calibrate(model, [batch], layers="writer*", labels=lambda batch: y)
    p = predict(model, batch, "variance_temperature")
    assert p.scores["temperature"].shape == (30, 5)
    assert sorted(name for name in p.scores if name.startswith("variance.")) == [
        "variance.writer.multihead_attn",
        "variance.writer.self_attn",
    ]


def test_outputs_that_are_no_logits():
    x, y = torch.randn(10, 6, 8, dtype=torch.float64), torch.randint(3, (10,))

    class Loss(Model):
        def forward(self, x):
            return super().forward(x).sum(), x

    class Normal(Model):
        def forward(self, x):
            return torch.distributions.Normal(super().forward(x), 1.0)

    for kind, words in ((Loss, "begin with a loss"), (Normal, "got a Normal")):
        model = fit_covariance(kind(), [x], num_inducing=8)
        with pytest.raises(TypeError, match=words):
            calibrate(model, [(x, y)])


@pytest.mark.parametrize("loader", [torch.randn(3, 6, 8), {"x": torch.randn(3, 6, 8)}, None])
def test_what_is_no_loader(loader):
    x, y = torch.randn(10, 6, 8, dtype=torch.float64), torch.randint(3, (10,))
    model = fitted(x, y)
    for function in (calibrate, calibrate_noise):
        with pytest.raises(TypeError, match="loader: expected batches"):
            function(model, loader)


def test_nothing_to_calibrate_with():
    x, y = torch.randn(10, 6, 8, dtype=torch.float64), torch.randint(3, (10,))
    model = fitted(x, y)
    for function in (calibrate, calibrate_noise):
        with pytest.raises(ValueError, match="at least one batch"):
            function(model, [])


@pytest.mark.cuda
def test_on_a_gpu(dtype):
    x, y = torch.randn(30, 6, 8, dtype=dtype), torch.randint(3, (30,))
    model = fit_covariance(Model(dtype).cuda(), [x], num_inducing=8)
    calibrate(model, [(x, y)])
    calibrate_noise(model, [(x, y)])
    p = predict(model, x.cuda(), "variance_temperature")
    assert p.probs().is_cuda
    assert p.scores["temperature"].is_cuda
