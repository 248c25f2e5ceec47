"""The chain of a student: draws, records, and masks on their way."""

import pytest
import torch
from torch import nn

from gpseq.nn import use_generator
from gpseq.reconfiguration import Masks, Rollout, drawing, find_stack, recording_steps
from gpseq.reconfiguration.rollout import Record, find_rollout, knows_length, over_tokens
from gpseq.reconfiguration.student import make_student
from tests.oracles_reconfiguration import BATCH, FUTURE, LENGTH, PADDING, WIDTH, Classifier, Linear, Seen, moved


def chain(kernel=None, points="block", **options):
    model = moved(Classifier(**options))
    stack = find_stack(model, points)
    return Rollout(stack, Linear() if kernel is None else kernel).eval()


def tokens(batch=BATCH):
    return torch.randn(batch, LENGTH, WIDTH, dtype=torch.float64)


def test_the_noise_free_path():
    rollout, x = chain(), tokens()
    want = x
    for _ in range(3):
        want = rollout.kernel(want)
    assert rollout(x).equal(want)
    assert rollout.train()(x).ne(want).all()
    with drawing(rollout, draws=False):
        assert rollout(x).equal(want)
    assert rollout(x).ne(want).all()


def test_draws_have_the_moments_of_the_chain():
    rollout, x = chain(Linear(variance=0.3)), tokens(1)
    kernel, number = rollout.kernel, 20_000
    with torch.no_grad(), drawing(rollout):
        draws = rollout(x.expand(number, -1, -1))
        mean, covariance = x, torch.zeros(WIDTH, WIDTH, dtype=x.dtype)
        for _ in range(3):
            mean = kernel(mean)
            covariance = kernel.weight @ covariance @ kernel.weight.mT + kernel.variance.diag()
    error = (draws.mean(0) - mean[0]) / (covariance.diagonal() / number).sqrt()
    assert error.abs().max() < 4.5
    found = torch.cov((draws - mean).flatten(0, 1).mT)
    torch.testing.assert_close(found, covariance, rtol=0, atol=0.03 * covariance.diagonal().max().item())


@pytest.mark.parametrize("copies", [1, 2, 4, 5])
def test_opposite_signs(copies):
    rollout, x = chain(), tokens()
    with torch.no_grad(), drawing(rollout, copies):
        draws = rollout(x.repeat(copies, 1, 1)).unflatten(0, (copies, BATCH))
        path = rollout.eval()
    with torch.no_grad(), drawing(rollout, draws=False):
        mean = path(x)
    pairs = draws[: copies // 2 * 2]
    half = copies // 2
    torch.testing.assert_close(pairs[:half] + pairs[half:], 2 * mean.expand(half, -1, -1, -1))
    assert draws.ne(mean).all()
    if copies % 2:
        assert all(draws[-1].ne(draw).all() for draw in draws[:-1])


def test_draws_come_from_a_generator():
    rollout, x = chain().train(), tokens()
    state = torch.get_rng_state()
    found = []
    for seed in (1, 1, 2):
        with use_generator(rollout, torch.Generator().manual_seed(seed)):
            found.append(rollout(x))
    assert found[0].equal(found[1]) and found[0].ne(found[2]).all()
    assert torch.get_rng_state().equal(state)
    rollout.eval()(x)
    assert torch.get_rng_state().equal(state)


def test_what_is_recorded():
    rollout, x = chain(), tokens()
    with recording_steps(rollout) as records:
        last = rollout(x, src_key_padding_mask=PADDING)
        rollout(x)
    assert len(records) == 2
    record = records[0]
    assert [len(part) for part in (record.states, record.means, record.variances)] == [4, 3, 3]
    assert record.states[0].equal(x) and record.states[-1].equal(last)
    assert record.padding.equal(PADDING) and records[1].padding is None
    spread = rollout.kernel.variance.sqrt().mean()
    assert record.token_spread().shape == (BATCH, LENGTH, 3)
    torch.testing.assert_close(record.spread(), spread.expand(BATCH, 3))
    with recording_steps(rollout, times=(0.0, 1 / 3, 1.0), states=False) as records:
        rollout.kernel.conditional = lambda x, t, mask, dt=None: (x, torch.full_like(x, t))
        rollout(x)
    assert records[0].states == [] and records[0].token_spread().shape == (BATCH, LENGTH, 2)
    assert rollout._record is None and rollout._times is None and rollout._keeps_states


def test_means_over_tokens():
    values = torch.arange(6.0).view(1, 3, 2)
    padding = torch.tensor([[False, False, True]])
    assert Record(padding=padding).mean_over_tokens(values).tolist() == [[1, 2]]
    assert Record().mean_over_tokens(values).tolist() == [[2, 3]]
    assert over_tokens(values[..., 0], padding).tolist() == [1]
    assert over_tokens(values[..., 0], torch.ones(1, 3).bool()).tolist() == [0]


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "time first"])
def test_masks_arrive(batch_first):
    kernel = Seen()
    rollout = chain(kernel, "attention", batch_first=batch_first)
    x = tokens() if batch_first else tokens().transpose(0, 1)
    rollout(x, FUTURE, PADDING, True)
    rollout(x, src_mask=FUTURE, src_key_padding_mask=torch.zeros(BATCH, LENGTH).masked_fill(PADDING, -torch.inf))
    assert rollout(src=x).shape == x.shape
    for masks in (kernel.masks[0], kernel.masks[3]):
        assert masks.pairs.equal(FUTURE) and masks.keys.equal(PADDING)
    assert kernel.masks[0].causal and not kernel.masks[3].causal
    assert kernel.masks[6].pairs is None and kernel.masks[6].keys is None
    heads = torch.zeros(BATCH * 2, LENGTH, LENGTH, dtype=torch.float64)
    rollout(x, heads)
    assert kernel.masks[9].pairs.shape == (BATCH, 2, LENGTH, LENGTH)


def test_masks_that_do_not_fit():
    from gpseq.reconfiguration import TransitionKernel

    rollout = chain(TransitionKernel(WIDTH, 2, num_steps=3, dtype=torch.float64), "attention")
    for bad in ({"src_key_padding_mask": PADDING[:2]}, {"src_mask": FUTURE[:3, :3]}):
        with pytest.raises(ValueError, match="mask: expected"):
            rollout(tokens(), **bad)


class Wide(nn.Module):
    def conditional(self, x, t, mask=None):
        return x[..., :4], x.square()


class Plain(nn.Module):
    def conditional(self, x, t, mask=None):
        return x, x.square()[..., :1]


def test_kernels_of_the_wrong_width():
    with pytest.raises(ValueError, match=r"kernel: expected a mean like its input \(3, 5, 8\), got \(3, 5, 4\)"):
        chain(Wide())(tokens())
    with pytest.raises(ValueError, match=r"kernel: expected a variance like its input \(3, 5, 8\), got \(3, 5, 1\)"):
        chain(Plain())(tokens())


def test_which_kernels_know_the_length_of_a_step():
    class Any(nn.Module):
        def conditional(self, x, t, **options):
            return x, x

    class Some(nn.Module):
        def conditional(self, x, t, mask=None, dt=None):
            return x, x

    assert knows_length(Any()) and knows_length(Some()) and not knows_length(Linear())


def test_times_and_steps():
    rollout = chain()
    assert rollout.times() == (0, 1 / 3, 2 / 3, 1)
    assert "num_steps=3" in repr(rollout)
    seen = []
    rollout.kernel.conditional = lambda x, t, mask, **dt: (seen.append((t, dt)), (x, x.square()))[1]
    rollout(tokens())
    assert [t for t, _ in seen] == pytest.approx([1 / 3, 2 / 3, 1]) and all(dt == {} for _, dt in seen)
    rollout.num_steps = 2
    seen.clear()
    rollout(tokens())
    assert [dt["dt"] for _, dt in seen] == [0.5, 0.5]
    assert rollout.step(tokens(), 0.5, Masks(), 0.25)[0].shape == (BATCH, LENGTH, WIDTH)


def test_contexts_end_after_an_exception():
    rollout = chain()
    for context in (lambda: drawing(rollout, 4), lambda: recording_steps(rollout, (0.0, 1.0))):
        with pytest.raises(RuntimeError, match="stop"), context():
            raise RuntimeError("stop")
    assert (rollout._copies, rollout._draws, rollout._record, rollout._times) == (0, None, None, None)


def test_students_are_found():
    model = moved(Classifier())
    student, rollout = make_student(model, find_stack(model), Linear())
    assert find_rollout(student) is rollout
    with pytest.raises(TypeError, match="got Sequential with 2 chains"):
        find_rollout(nn.Sequential(student, chain()))
