"""Training under noise that is fitted again and again: its scale holds, nothing of it is learnt, runs can go on."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from gpseq import training
from gpseq.nn import SGPAttention, replace_attention, use_sampling
from gpseq.nn.refitting import CovarianceRefit

WIDTH, HEADS, LENGTH = 8, 2, 5


class Classifier(nn.Module):
    """Two layers, pooled."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x).mean(1))


def batches(count: int = 4, size: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draws = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, LENGTH, WIDTH, generator=draws), torch.randint(3, (size,), generator=draws))
        for _ in range(count)
    ]


def attentions(model: nn.Module) -> list[SGPAttention]:
    return [module for module in model.modules() if isinstance(module, SGPAttention)]


def heads_of(model: nn.Module, x: torch.Tensor) -> list[tuple[SGPAttention, torch.Tensor]]:
    """What each attention is called with, without draws."""
    seen: list[tuple[SGPAttention, torch.Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: seen.append((layer, args[0].detach())))
        for layer in attentions(model)
    ]
    with use_sampling(model, "mean"), torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return seen


def relative_noise(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each head's noise by that of the head itself, over inputs, ``(layers, H)``."""
    found = []
    for layer, tokens in heads_of(model, x):
        posterior = layer.posterior(tokens, tokens, tokens)  # event (T, D), batch (B, H)
        # Of the heads' mean, each dimension about its own mean.
        signal = posterior.mean.detach().var((0, 2), correction=0).mean(-1)
        found.append((posterior.variance.detach().mean((0, 2, 3)) / signal).sqrt())
    return torch.stack(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.1, 0.7])
def test_the_noise_on_tokens_that_the_model_sees_is_held(noise: float, dtype: torch.dtype) -> None:
    data = [(x.to(dtype), y) for x, y in batches()]
    refit = CovarianceRefit(Classifier().to(dtype), data, noise=noise, num_inducing=8)
    refit(0)
    x = torch.cat([x for x, _ in data])
    assert (relative_noise(refit.model, x) / noise - 1).abs().max() < 0.02
    with torch.no_grad():  # tokens and heads move, as they do in training
        for parameter in refit.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5).add_(0.1 * torch.randn_like(parameter))
    refit(1)  # not yet
    assert (relative_noise(refit.model, x) / noise - 1).abs().max() > 0.05
    refit(refit.every)
    assert (relative_noise(refit.model, x) / noise - 1).abs().max() < 0.02


def test_what_the_model_computes_without_draws_stays() -> None:
    model = Classifier(dropout=0.1)
    x = batches()[0][0]
    before = copy.deepcopy(model).eval()(x)
    refit = CovarianceRefit(model.train(), batches(), num_inducing=8)
    refit(0)
    assert (
        refit.model is model and model.training and [layer.sampling for layer in attentions(model)] == ["marginal"] * 2
    )
    model.eval()
    with use_sampling(model, "mean"):
        assert torch.allclose(model(x), before, atol=1e-5)
    assert not torch.allclose(model(x), before, atol=1e-3)


def test_training_moves_the_backbone_alone() -> None:
    model = Classifier()
    data = batches()
    refit = CovarianceRefit(model, data, num_inducing=8)
    refit(0)
    held = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for x, y in data:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    inducing = {name for name in held if ".inducing." in name}
    assert inducing
    after = model.state_dict()
    assert all(torch.equal(after[name], held[name]) for name in inducing)
    moved = {name for name, _ in model.named_parameters() if not torch.equal(after[name], held[name])}
    assert moved == {name for name, _ in model.named_parameters()} - inducing


def test_tokens_elsewhere_get_more_noise() -> None:
    refit = CovarianceRefit(Classifier(), batches(), num_inducing=16, noise=0.3)
    refit.fit()
    (layer, tokens), *_ = heads_of(refit.model, batches()[0][0])
    near = layer.posterior(tokens, tokens, tokens).variance.mean()
    far = layer.posterior(9 * tokens, 9 * tokens, 9 * tokens).variance.mean()
    assert near < 0.9 * layer.inducing.log_variance.exp().mean() and far > 1.5 * near


@pytest.mark.parametrize("every", [1, 5, 8, 100])
def test_when_it_is_due(every: int) -> None:
    calls = []
    refit = CovarianceRefit(Classifier(), batches(), every=every)
    refit.fit = calls.append  # type: ignore[method-assign]
    for step in range(3 * every + 1):
        refit(step)
    early = {every // 8, every // 4, every // 2}
    assert calls == sorted({0, every, 2 * every, 3 * every} | early)


def test_layers_that_are_there_stay_the_only_ones() -> None:
    model = replace_attention(Classifier(), "last", num_inducing=6, covariance="diagonal")
    refit = CovarianceRefit(model, batches(), sampling="joint")
    refit(0)
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention
    (layer,) = attentions(model)
    assert (layer.sampling, layer.inducing.location.shape[1]) == ("joint", 6)
    assert torch.allclose(relative_noise(model, torch.cat([x for x, _ in batches()])), torch.tensor(0.3), rtol=0.02)


def test_a_model_that_is_an_attention_is_replaced() -> None:
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    x = batches()[0][0]
    refit = CovarianceRefit(attention, [x], num_inducing=4, forward=lambda layer, x: layer(x, x, x))
    refit(0)
    assert isinstance(refit.model, SGPAttention)
    assert refit.model.inducing.typical_variance.min() > 0


@pytest.mark.parametrize("seed", [None, 5])
def test_a_run_that_was_interrupted_ends_the_same(tmp_path, seed: int | None) -> None:
    def run(epochs: int, checkpoint) -> tuple[nn.Module, training.History]:
        torch.manual_seed(1)
        model = Classifier(dropout=0.1)
        data = batches()
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        refit = CovarianceRefit(model, data, num_inducing=8, every=3, max_tokens=60, generator=generator)

        def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], step: int) -> torch.Tensor:
            refit(step)
            return functional.cross_entropy(model(batch[0]), batch[1])

        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        history = training.fit(
            model, loss, data, optimizer=optimizer, epochs=epochs, checkpoint=checkpoint, progress=False
        )
        return model, history

    whole, history = run(4, tmp_path / "whole")
    run(2, tmp_path / "parts")
    rest, again = run(4, tmp_path / "parts")
    assert again == history
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), rest.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0.0}, "noise: expected a positive number"),
        ({"every": 0}, "every: "),
        ({"sampling": "mean"}, "sampling: "),
        ({"num_batches": 0}, "num_batches: "),
        ({"max_tokens": 0}, "max_tokens: "),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    model = Classifier()
    with pytest.raises(ValueError, match=message):
        CovarianceRefit(model, batches(), **options)
    assert not attentions(model)


def test_the_draws_of_a_fit_are_those_of_its_step() -> None:
    model = Classifier()
    states = []
    for steps in ((0, 50), (50,), (0,)):
        refit = CovarianceRefit(
            copy.deepcopy(model), batches(), every=50, num_inducing=4, generator=torch.Generator().manual_seed(1)
        )
        before = torch.get_rng_state()
        for step in steps:
            refit(step)
        assert torch.get_rng_state().equal(before)
        states.append(attentions(refit.model)[0].inducing.location.detach())
    assert states[0].equal(states[1])
    assert not states[0].equal(states[2])


def test_a_loader_that_can_be_gone_through_only_once() -> None:
    model = Classifier()
    for loader in ((batch for batch in batches()), iter(batches())):
        with pytest.raises(
            TypeError, match=r"loader: expected batches that can be gone through at every fit.* iterator"
        ):
            CovarianceRefit(model, loader)
    assert not attentions(model)
    data = torch.utils.data.TensorDataset(torch.randn(20, LENGTH, WIDTH))
    refit = CovarianceRefit(model, torch.utils.data.DataLoader(data, batch_size=10), num_inducing=4)
    refit.fit()
    refit.fit()


def test_means_that_depend_on_inducing_keys() -> None:
    model = replace_attention(Classifier(), num_inducing=4)
    with torch.no_grad():
        attentions(model)[1].inducing.value.fill_(0.1)
    with pytest.raises(ValueError, match=r"expected layers whose mean does not depend on inducing keys, .*layers.1"):
        CovarianceRefit(model, batches())
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="low_rank"):
        CovarianceRefit(replace_attention(Classifier(), num_inducing=4, covariance="low_rank"), batches())
    with pytest.raises(ValueError, match="expected"):
        CovarianceRefit(nn.Linear(3, 3), batches())
