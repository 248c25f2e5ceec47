"""The prior of tokens: causality, cross-entropy, drawing with kept keys, mixers, and both stages together."""

import itertools
import math

import pytest
import torch
from torch import nn

from gpseq.generative.token_prior import TokenPrior
from gpseq.generative.two_stage import VideoTokenModel
from gpseq.generative.video_vq import VideoVQ
from gpseq.nn import SGPAttention
from tests.oracles_generative_tokens import sample_by_hand, tiny_prior, tiny_vq, videos


class Subclass(nn.MultiheadAttention):
    """Torch's attention by another name."""


def mixers(kind, dtype=torch.float64):
    """Two layers of a kind."""
    made = {"batch_first": True, "dtype": dtype}
    options = {SGPAttention: {"num_inducing": 3, "sampling": "mean"}, nn.MultiheadAttention: {"add_bias_kv": True}}.get(
        kind, {}
    )
    return [kind(8, 2, **options, **made) for _ in range(2)]


KINDS = [None, Subclass, nn.MultiheadAttention, SGPAttention]
NAMES = ["default", "subclass", "extra key", "sgpa"]


def prior_with(kind, **options):
    """A small prior with mixers of a kind; ``None`` is its own."""
    return tiny_prior(mixers=mixers(kind) if kind is not None else None, **options)


@pytest.mark.parametrize("kind", KINDS[:2] + KINDS[3:], ids=NAMES[:2] + NAMES[3:])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_it_is_causal(kind, mode):
    prior = prior_with(kind).train(mode)
    tokens = torch.randint(5, (3, 6))
    logits = prior.logits(tokens.view(3, 2, 3)).flatten(1, 2)
    for place in range(6):
        other = tokens.clone()
        other[:, place:] = (other[:, place:] + 1) % 5
        changed = prior.logits(other.view(3, 2, 3)).flatten(1, 2)
        torch.testing.assert_close(changed[:, : place + 1], logits[:, : place + 1])
        if place < 5:
            assert not changed[:, place + 1].allclose(logits[:, place + 1])


@pytest.mark.parametrize("batch", [1, 4])
def test_a_uniform_model(dtype, batch):
    prior = TokenPrior(7, (2, 3), dim=8, num_heads=2, depth=1, dtype=dtype)
    tokens = torch.randint(7, (batch, 2, 3))
    torch.testing.assert_close(prior(tokens), torch.tensor(math.log(7), dtype=dtype))
    torch.testing.assert_close(prior.log_prob(tokens), torch.full((batch,), -6 * math.log(7), dtype=dtype))


def test_probabilities_sum_to_one(dtype):
    prior = tiny_prior(dtype, num_codes=3, token_shape=(2, 2))
    tokens = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    log_prob = prior.log_prob(tokens)
    assert log_prob.exp().sum().item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(prior(tokens), -log_prob.mean() / 4)


@pytest.mark.parametrize("kind", [None, Subclass, SGPAttention], ids=["default", "subclass", "sgpa"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_are_those_of_whole_passes(kind, temperature):
    prior = prior_with(kind).eval()
    drawn = prior.sample(20, temperature, torch.Generator().manual_seed(5))
    assert drawn.equal(sample_by_hand(prior, 20, temperature, seed=5))
    assert drawn.equal(prior.sample(20, temperature, torch.Generator().manual_seed(5)))
    assert not drawn.equal(prior.sample(20, temperature, torch.Generator().manual_seed(6)))


def test_samples_are_reproducible(dtype):
    prior = tiny_prior(dtype, dropout=0.5)
    drawn = prior.sample(30, generator=torch.Generator().manual_seed(5))
    assert drawn.shape == (30, 2, 3)
    assert drawn.equal(prior.sample(30, generator=torch.Generator().manual_seed(5)))  # whatever dropout does
    assert all(part.training for part in prior.modules())
    torch.manual_seed(1)
    first = prior.sample(30)
    torch.manual_seed(1)
    assert first.equal(prior.sample(30))


def test_modes_are_restored():
    prior = tiny_prior()
    prior.blocks[0].eval()
    prior.sample(2)
    assert prior.training
    assert prior.blocks[1].training
    assert not prior.blocks[0].training
    assert not prior.blocks[0].mixer.training


def test_frequencies_are_those_of_the_model():
    prior = tiny_prior(num_codes=3, token_shape=(1, 2))
    tokens = torch.tensor(list(itertools.product(range(3), repeat=2))).view(-1, 1, 2)
    want = prior.log_prob(tokens).exp()
    drawn = prior.sample(20_000, generator=torch.Generator().manual_seed(0)).flatten(1)
    counts = torch.bincount(3 * drawn[:, 0] + drawn[:, 1], minlength=9)
    error = (counts / 20_000 - want) / (want * (1 - want) / 20_000).sqrt()
    assert error.abs().max() < 4


def test_low_temperatures_pick_the_likeliest():
    prior = tiny_prior()
    for temperature in (1e-6, 1e-300):
        drawn = prior.sample(3, temperature)
        assert drawn.equal(prior.logits(drawn).argmax(-1))


@pytest.mark.parametrize("kind", KINDS[:2], ids=NAMES[:2])
def test_one_token_at_a_time(kind):
    prior = prior_with(kind)
    seen = []
    for block in prior.blocks:
        block.perceptron.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:2].numel()))
    prior.sample(3)
    assert seen == [3] * 6 * 2


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_mixers_learn(kind):
    prior = prior_with(kind) if kind is not nn.MultiheadAttention else prior_with(Subclass)
    prior(torch.randint(5, (4, 2, 3))).backward()
    for block in prior.blocks:
        assert any(value.grad is not None and value.grad.ne(0).any() for value in block.mixer.parameters())


def test_training():
    prior = TokenPrior(6, (3, 2), dim=16, num_heads=2, depth=1)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    start = torch.randint(6, (64, 1))
    tokens = ((start + torch.arange(6)) % 6).view(64, 3, 2)  # counts upwards: the first token says all
    for _ in range(60):
        loss = prior(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.5 * math.log(6) / 6
    drawn = prior.sample(50, temperature=0.5, generator=torch.Generator().manual_seed(0)).flatten(1)
    assert ((drawn.diff(dim=1) % 6) == 1).float().mean() > 0.95


@pytest.mark.parametrize("frames", [1, 4])
def test_both_stages(frames):
    autoencoder = tiny_vq(num_frames=frames)
    autoencoder(videos(8, frames))
    model = VideoTokenModel(autoencoder, TokenPrior(16, autoencoder.token_shape, 8, 2, 1, dtype=torch.float64))
    video = videos(3, frames)
    loss = model(video)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(16))
    assert all(value.grad is None for value in autoencoder.parameters())
    assert model.prior.head.weight.grad.ne(0).any()
    whole = model.sample(5, last_only=False, generator=torch.Generator().manual_seed(2))
    images = model.sample(5, generator=torch.Generator().manual_seed(2))
    assert whole.shape == (5, frames, 1, 8, 8)
    assert images.equal(whole[:, -1])
    assert not images.requires_grad
    other = VideoTokenModel(tiny_vq(num_frames=frames), TokenPrior(16, model.prior.token_shape, 8, 2, 1).double())
    other.load_state_dict(model.state_dict())
    assert other.sample(5, generator=torch.Generator().manual_seed(2)).equal(images)


def test_the_video_and_its_twin_have_equal_priors():
    video = VideoVQ((1, 8, 8), num_frames=4, dim=8, num_heads=2, num_codes=16)
    priors = [TokenPrior(made.num_codes, made.token_shape, 8, 2, 1) for made in (video, video.image_twin())]
    sizes = [{name: value.shape for name, value in prior.named_parameters()} for prior in priors]
    assert sizes[0] == sizes[1]


def test_stages_that_do_not_fit():
    autoencoder = tiny_vq()
    for prior in (tiny_prior(num_codes=16), tiny_prior(num_codes=15, token_shape=(4, 4))):
        with pytest.raises(ValueError, match=r"prior: expected 16 codes and tokens of shape \(4, 4\)"):
            VideoTokenModel(autoencoder, prior)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.full((2, 2, 3), 5), ValueError, "tokens: expected integers from 0 to 4, got 5 to 5"),
        (torch.full((2, 2, 3), -1), ValueError, "tokens: expected integers"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), ValueError, r"tokens: expected shape \(B, 2, 3\)"),
        (torch.zeros(2, 6, dtype=torch.int64), ValueError, "tokens: expected shape"),
        (torch.zeros(2, 2, 3), TypeError, "tokens: expected a tensor of integers"),
        ([[0]], TypeError, "tokens: expected a tensor of integers, got list"),
    ],
    ids=["high", "low", "sites", "flat", "floats", "list"],
)
def test_bad_tokens(tokens, error, message):
    prior = tiny_prior()
    for call in (prior, prior.logits, prior.log_prob):
        with pytest.raises(error, match=message):
            call(tokens)


def test_no_tokens():
    with pytest.raises(ValueError, match="tokens: expected at least one video"):
        tiny_prior()(torch.zeros(0, 2, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads: expected a divisor of dim = 8"),
        ({"token_shape": (2, 3, 4)}, r"token_shape: expected \(T', S\)"),
        ({"token_shape": (0, 3)}, "token_shape"),
        ({"dropout": 1.0}, "dropout"),
        ({"depth": 0}, "depth"),
        ({"mixers": []}, "mixers: expected one for each of 2 blocks, got 0"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_prior(**options)


def test_bad_mixers():
    with pytest.raises(TypeError, match="mixers: expected a sequence, one module for each block"):
        tiny_prior(mixers=nn.MultiheadAttention(8, 2))
    with pytest.raises(TypeError, match="mixers: expected modules, got str"):
        tiny_prior(mixers=["a", "b"])
    with pytest.raises(ValueError, match="mixers: expected batch_first=True"):
        tiny_prior(mixers=[nn.MultiheadAttention(8, 2) for _ in range(2)])


def test_bad_draws():
    with pytest.raises(ValueError, match="n: expected at least 1"):
        tiny_prior().sample(0)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature: expected a positive number"):
            tiny_prior().sample(2, temperature)
