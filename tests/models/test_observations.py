"""Bad input: each error names the argument, what came and what was expected, and leaves the model bit-identical."""

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpseq.features import HippoFeatures, InducingPoints
from gpseq.models import StreamingGP
from tests.oracles_streaming import F64, assert_identical, draw, gpytorch_kernel, snapshot, stream, variance_of

AT = torch.linspace(0, 10, 5, dtype=F64)
META = torch.device("meta")
INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool)

#: One model a kind, taught a little; tests work on copies.
MODELS: dict[str, StreamingGP] = {
    "plain": stream(12, horizon_growth="fixed").update(*draw(5)),
    "batch": stream(13, lengthscale=torch.ones(3), batch_shape=(3,), horizon_growth="fixed").update(*draw(5)),
    "fixed noise": StreamingGP(
        HippoFeatures(13, 10.0),
        gpytorch_kernel(),
        FixedNoiseGaussianLikelihood(torch.full((2,), 0.1)),
        horizon_growth="fixed",
    ).eval().update(*draw(5), noise=0.2),
    "points": stream(InducingPoints(AT)).update(*draw(5)),
    "two columns": StreamingGP(
        HippoFeatures(13, 10.0, other_inputs=torch.zeros(1)),
        gpytorch_kernel(),
        gpytorch.likelihoods.GaussianLikelihood(),
        horizon_growth="fixed",
    ).eval(),
}  # fmt: skip
BEFORE = {name: snapshot(model) for name, model in MODELS.items()}


def fresh(name: str) -> StreamingGP:
    return copy.deepcopy(MODELS[name])


def refused(name: str, kind: type[Exception], pattern: str, *args: Any, **kwargs: Any) -> None:
    """`update` and `condition_on_observations` both refuse, in the same words, and nothing has changed."""
    messages = []
    for call in ("update", "condition_on_observations"):
        model = fresh(name)
        with pytest.raises(kind, match=pattern) as caught:
            getattr(model, call)(*args, **kwargs)
        assert type(caught.value) is kind
        messages.append(str(caught.value))
        assert_identical(model, BEFORE[name])
    assert messages[0] == messages[1]


# One fault at a time, in chunks of any size


def fault(pattern: str, kind: type[Exception] = ValueError) -> Callable[..., Any]:
    """Registers a way to spoil a good chunk: (x, y, noise, draw a number below n) -> keyword arguments."""

    def register(spoil: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        FAULTS[spoil.__name__] = (kind, pattern, spoil)
        return spoil

    return register


FAULTS: dict[str, tuple[type[Exception], str, Callable[..., dict[str, Any]]]] = {}


def replaced(tensor: Tensor, index: int, value: float) -> Tensor:
    return torch.where(torch.arange(len(tensor)) == index, torch.tensor(value, dtype=tensor.dtype), tensor)


@fault(r"^x: expected finite inputs, got NaN or infinity in a tensor of shape \(\d+,\)")
def nan_x(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": replaced(x, i, math.nan), "y": y}


@fault(r"^x: expected finite inputs")
def infinite_x(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": replaced(x, i, -math.inf), "y": y, "noise": s}


@fault(r"^x: expected finite inputs")
def nan_x_where_y_is_missing(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": replaced(x, i, math.nan), "y": replaced(y, i, math.nan), "missing": "skip"}


@fault(
    r"^y: expected finite targets, got NaN or infinity in a tensor of shape \(\d+,\) \(missing='skip' passes over NaN\)"
)
def nan_y(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": replaced(y, i, math.nan)}


@fault(r"^y: expected finite targets")
def infinite_y(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": replaced(y, i, math.inf)}


@fault(r"^y: expected finite targets, got NaN or infinity in a tensor of shape \(\d+,\)\.")
def infinite_y_is_not_missing(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": replaced(y, i, math.inf), "missing": "skip"}


@fault(r"^noise: expected finite positive variances")
def nan_noise(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": y, "noise": replaced(s, i, math.nan)}


@fault(r"^noise: expected finite positive variances")
def infinite_noise(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": y, "noise": replaced(s, i, math.inf)}


@fault(r"^noise: expected finite positive variances")
def negative_noise(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": y, "noise": replaced(s, i, -1e-9)}


@fault(r"^noise: expected finite positive variances")
def zero_noise(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": y, "noise": replaced(s, i, 0.0)}


@fault(r"^noise: expected finite positive variances")
def negative_number_as_noise(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": y, "noise": -0.1}


@fault(r"^noise: expected a scalar or variances for y of shape \(\d+,\), got (shape )?\(\d+,\)")
def mismatched_noise(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": y, "noise": torch.cat([s, s, s])}


@fault(r"^noise: expected a floating-point tensor, got torch.int64", TypeError)
def integer_noise(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": y, "noise": torch.ones(len(y), dtype=torch.int64)}


@fault(r"^noise: expected .*got str", TypeError)
def text_as_noise(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": y, "noise": "small"}


@fault(r"^y: expected \d+ targets for x of shape \(\d+,\), got shape \(\d+,\)")
def too_many_targets(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": torch.cat([y, y[:1]])}


@fault(r"^y: expected \d+ targets for x of shape \(\d+,\), got shape \(\d+,\)")
def too_few_targets(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": torch.cat([x, x, x[:1]]), "y": y}


@fault(r"^y: expected 0 targets for x of shape \(0,\), got shape \(\d+,\)")
def targets_without_inputs(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x[:0], "y": y}


@fault(r"^x: expected 1 input columns, as the features have, got shape \(\d+, 3\)")
def too_many_columns(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x.unsqueeze(-1).expand(-1, 3), "y": y}


@fault(r"^x: expected 1 input columns, as the features have, got shape \(\d+, 0\)")
def no_columns(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x.unsqueeze(-1)[:, :0], "y": y}


@fault(r"^x: expected at least one dimension, got a scalar")
def scalar_x(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x[i], "y": y}


@fault(r"^y: expected at least one dimension, got a scalar")
def scalar_y(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": y[i]}


@fault(r"^x: expected a floating-point tensor, got list", TypeError)
def list_x(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x.tolist(), "y": y}


@fault(r"^y: expected a floating-point tensor, got ndarray", TypeError)
def numpy_y(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": y.numpy()}


@fault(r"^y: expected a floating-point tensor, got NoneType", TypeError)
def no_y(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": None}


@fault(r"^x: expected a floating-point tensor, got torch\.(u?int|bool)", TypeError)
def integer_x(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x.to(INTEGERS[i % len(INTEGERS)]), "y": y}


@fault(r"^y: expected a floating-point tensor, got torch\.(u?int|bool)", TypeError)
def integer_y(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": y.to(INTEGERS[i % len(INTEGERS)])}


@fault(r"^x: expected a floating-point tensor, got torch\.complex", TypeError)
def complex_x(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x + 0j, "y": y}


@fault(r"^y: expected a floating-point tensor, got torch\.complex", TypeError)
def complex_y(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": y + 0j}


@fault(r"^x: expected a tensor on cpu, where the model is, got one on meta")
def x_elsewhere(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x.to(META), "y": y}


@fault(r"^y: expected a tensor on cpu, where the model is, got one on meta")
def y_elsewhere(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": y.to(META)}


@fault(r"^noise: expected a tensor on cpu, where the model is, got one on meta")
def noise_elsewhere(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": y, "noise": s.to(META)}


@fault(r"^missing: expected 'error' or 'skip', got 'drop'")
def unknown_missing(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": y, "missing": "drop"}


@fault(r"^missing: expected 'error' or 'skip', got None")
def no_missing(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": y, "missing": None}


@fault(r"^(y|noise): .*too large")
def enormous_targets(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": replaced(y.double(), i, 1e200)}


@fault(r"^(y|noise): .*too (large|small)")
def vanishing_noise(x: Tensor, y: Tensor, s: Tensor, i: int) -> dict[str, Any]:
    return {"x": x, "y": y, "noise": 5e-324}


@pytest.mark.parametrize("name", FAULTS)
@given(
    num=st.integers(1, 12),
    index=st.integers(0, 11),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, F64]),
)
@settings(max_examples=8)
def test_one_fault_in_a_good_chunk(name: str, num: int, index: int, seed: int, dtype: torch.dtype) -> None:
    kind, pattern, spoil = FAULTS[name]
    x, y = draw(num, 9.9, seed=seed, dtype=dtype)
    good_noise = torch.full_like(y, 0.1)
    refused("plain", kind, pattern, **spoil(x, y, good_noise, index % num))


@given(shape=st.lists(st.integers(0, 4), max_size=4), other=st.lists(st.integers(0, 4), max_size=4))
def test_batch_shapes_that_an_update_cannot_change(shape: list[int], other: list[int]) -> None:
    """A single stream stays single; `condition_on_observations` is for batches, and the message says so."""
    model = fresh("plain")
    x, y = torch.ones(*shape, 3, 1, dtype=F64), torch.ones(*other, 3, dtype=F64)
    if not shape and not other:
        return
    with pytest.raises(ValueError, match=r"^(x|y): .*(batch shape|condition_on_observations)"):
        model.update(x, y)
    assert_identical(model, BEFORE["plain"])


@pytest.mark.parametrize("shape", [(3, 5), (1, 5), (5, 1), (3, 1), (2, 3, 5)])
def test_noise_does_not_change_the_batch_shape_either(shape: tuple[int, ...]) -> None:
    """A column of variances would broadcast against the row of targets, to a batch of models."""
    model = fresh("plain")
    with pytest.raises(ValueError, match=rf"^noise: .*{re.escape(str(shape))}"):
        model.update(*draw(5), noise=torch.ones(shape, dtype=F64))
    assert_identical(model, BEFORE["plain"])


@pytest.mark.parametrize("shape", [(2, 5), (4, 5), (2, 3, 5), (3, 3, 5)])
def test_a_batch_of_models_keeps_its_shape(shape: tuple[int, ...]) -> None:
    model = fresh("batch")
    with pytest.raises(ValueError, match=r"^y: "):
        model.update(draw(5)[0], torch.ones(shape, dtype=F64))
    with pytest.raises(ValueError, match=r"^(x|y): "):
        model.update(torch.ones(*shape, 1, dtype=F64), torch.ones(5, dtype=F64))
    with pytest.raises(ValueError, match=r"^noise: "):
        model.update(*draw(5), noise=torch.ones(shape, dtype=F64))
    assert_identical(model, BEFORE["batch"])


def test_a_likelihood_of_another_batch_shape_does_not_change_the_model() -> None:
    """Three noise levels for one stream: refused where it is said, not found out by the shape of G."""
    likelihood = gpytorch.likelihoods.GaussianLikelihood(batch_shape=torch.Size([3])).double()
    with pytest.raises(ValueError, match=r"^(likelihood|noise): "):
        StreamingGP(HippoFeatures(13, 10.0), gpytorch_kernel(), likelihood).update(*draw(5))


@pytest.mark.parametrize("name", ["fixed noise", "points", "two columns"])
def test_other_models_refuse_too(name: str) -> None:
    x, y = draw(4)
    if name == "two columns":
        refused(name, ValueError, r"^x: expected 2 input columns, as the features have, got shape \(4,\)", x, y)
        x = torch.stack([x, x], -1)
        refused(name, ValueError, r"^x: expected finite inputs", x.masked_fill(x == x[2, 0], math.nan), y)
    if name == "fixed noise":
        refused(name, ValueError, r"^noise: a FixedNoiseGaussianLikelihood needs .*got None", x, y)
    refused(name, ValueError, r"^y: expected finite targets", x, y * math.nan, noise=0.1)
    refused(name, ValueError, r"^noise: expected finite positive variances", x, y, noise=torch.zeros(4, dtype=F64))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(0,), (0, 1)])
def test_an_empty_chunk_is_a_no_op(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = fresh(name)
    columns = model.state.nodes.shape[-1]
    x = torch.zeros(0, columns, dtype=dtype) if columns > 1 or len(shape) > 1 else torch.zeros(0, dtype=dtype)
    noise = torch.zeros(0, dtype=dtype) if name == "fixed noise" else None
    model.covar_module.train()
    assert model.update(x, torch.zeros(0, dtype=dtype), noise=noise) is model
    assert model.update(x, torch.zeros(0, dtype=dtype), noise=noise, missing="skip") is model
    assert_identical(model, BEFORE[name])


def test_an_empty_chunk_is_checked_as_well() -> None:
    """Nothing to learn is no reason to accept anything."""
    refused("plain", TypeError, "^x: expected a floating-point tensor, got torch.int64", AT[:0].long(), AT[:0])
    refused("plain", ValueError, "^missing: ", AT[:0], AT[:0], missing="?")
    refused("plain", ValueError, "^noise: expected finite positive variances", AT[:0], AT[:0], noise=-1.0)


# Anything at all

SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
DTYPES = st.sampled_from(
    [F64] * 8 + [torch.float32] * 3 + [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex128]
)
NUMBERS = st.sampled_from(
    [0.0, 0.5, 1.0, 9.9, -1.0, 11.0, 1e-20, 1e-12, 1e30, 1e160, 1e308, -1e308, 5e-324, math.nan, math.inf]
)


@st.composite
def tensors(draw: Any, shapes: list[tuple[int, ...]]) -> Any:
    """Mostly an ordinary tensor of one of the shapes; sometimes odd numbers, another shape, or no tensor at all."""
    if draw(st.integers(0, 40)) == 0:
        return draw(st.sampled_from([None, 1.0, 2, True, "a", [1.0], (0.5, 0.6), {}, 1j]))
    shape = draw(SHAPES if draw(st.integers(0, 8)) == 0 else st.sampled_from(shapes))
    count = math.prod(shape)
    odd = draw(st.integers(0, 5)) == 0
    values = draw(st.lists(NUMBERS if odd else st.floats(0.1, 9.9), min_size=count, max_size=count))
    return torch.tensor(values, dtype=F64).reshape(shape).to(draw(DTYPES))


@st.composite
def chunks(draw: Any) -> dict[str, Any]:
    """Arguments of an update that might fit one another, with all the ways in which they may not."""
    n, b = draw(st.integers(0, 4)), draw(st.sampled_from([1, 2, 3]))
    x = [(n,), (n, 1), (n, 1), (n, 2), (b, n, 1), (b, n, 2)]
    y = [(n,), (n,), (n,), (b, n), (1, n), (2, b, n)]
    noise = [(), (1,), (n,), (n,), (b, n), (b, 1), (n, 1), (2, b, n)]
    return {
        "x": draw(tensors(x)),
        "y": draw(tensors(y)),
        "noise": draw(st.one_of(st.none(), tensors(noise))),
        "missing": draw(st.sampled_from(["error"] * 4 + ["skip"] * 4 + ["other"])),
    }


@given(name=st.sampled_from(list(MODELS)), chunk=chunks())
@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@pytest.mark.filterwarnings("ignore:x. times from:UserWarning")
def test_anything_is_learnt_or_refused_by_name(name: str, chunk: dict[str, Any]) -> None:
    """Either the model has learnt and predicts, in the shape that it had, or an error names what was wrong."""
    model = fresh(name)
    kept = model.state
    try:
        model.update(**chunk)
    except (TypeError, ValueError) as error:
        assert re.match(r"(x|y|noise|missing): ", str(error)), error
        assert_identical(model, BEFORE[name])
    else:
        for field, value in kept.items():
            assert getattr(model.state, field).shape == value.shape, f"{field} has another shape"
        with torch.no_grad():
            at = AT if model.state.nodes.shape[-1] == 1 else torch.stack([AT, AT], -1)
            posterior = model(at)
            assert posterior.mean.isfinite().all() and variance_of(posterior).isfinite().all()
            assert model.log_evidence.isfinite().all()


@given(name=st.sampled_from(list(MODELS)), first=chunks(), second=chunks())
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@pytest.mark.filterwarnings("ignore:x. times from:UserWarning")
def test_anything_is_conditioned_on_or_refused_by_name(
    name: str, first: dict[str, Any], second: dict[str, Any]
) -> None:
    """Twice in a row: the new model has the batch shape that model, inputs, targets and noise broadcast to."""
    model = fresh(name)
    for chunk in (first, second):
        before, batch = snapshot(model), model.state.r.shape[:-1]
        try:
            child = model.condition_on_observations(**chunk)
        except (TypeError, ValueError) as error:
            assert re.match(r"(x|y|noise|missing): ", str(error)), error
            assert_identical(model, before)
            return
        assert_identical(model, before)
        x, y, noise = chunk["x"], chunk["y"], chunk["noise"]
        parts = [batch, x.shape[:-2], y.shape[:-1], getattr(noise, "shape", ())[:-1]]
        seen = y.numel() > 0 and (chunk["missing"] == "error" or not y.isnan().all())
        with torch.no_grad():
            at = AT if child.state.nodes.shape[-1] == 1 else torch.stack([AT, AT], -1)
            posterior = child(at)
            if seen:
                assert posterior.batch_shape == torch.broadcast_shapes(*parts)
                assert child.log_evidence.shape == posterior.batch_shape
            assert posterior.mean.isfinite().all() and variance_of(posterior).isfinite().all()
            assert child.log_evidence.isfinite().all()
        model = child


# Constructors


class NotAModule:
    pass


def constructed(**changes: Any) -> StreamingGP:
    kept: dict[str, Any] = {
        "features": HippoFeatures(8, 10.0),
        "covar_module": gpytorch_kernel(),
        "likelihood": gpytorch.likelihoods.GaussianLikelihood(),
    }
    return StreamingGP(**(kept | changes))


@pytest.mark.parametrize(
    ("name", "values", "kind", "expected"),
    [
        ("features", [None, 8, torch.ones(3), NotAModule()], TypeError, "expected InducingFeatures"),
        ("covar_module", [None, NotAModule(), gpytorch.means.ZeroMean()], TypeError, "expected Kernel"),
        ("mean_module", [0.0, NotAModule(), gpytorch.kernels.RBFKernel()], TypeError, "expected Mean"),
        (
            "likelihood",
            [None, 0.1, NotAModule(), gpytorch.kernels.RBFKernel()],
            TypeError,
            "expected Likelihood",
        ),
        (
            "likelihood",
            [
                gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=2),
                gpytorch.likelihoods.SoftmaxLikelihood(num_classes=3, mixing_weights=False),
            ],
            TypeError,
            "expected one of a single output",
        ),
        (
            "horizon_growth",
            [1.0, 0.5, 0, -2, math.inf, math.nan, "free", True, [1.5]],
            ValueError,
            "expected a factor above 1",
        ),
        ("transfer", ["ep", 1, ""], ValueError, r"expected one of \('vfe', 'adf'\)"),
        (
            "learn",
            ["always", "Warmup", None, True],
            ValueError,
            r"expected one of \('never', 'warmup', 'basis_change'\)",
        ),
        ("max_features", [7, 0, -3], ValueError, "expected at least 8"),
        ("tolerance", [0.0, -1e-3, math.nan], ValueError, "expected a positive fraction"),
        ("jitter", [-1e-6, 1.0, 2, math.nan, math.inf], ValueError, r"expected a relative number in \[0, 1\)"),
    ],
)
def test_constructor_arguments(name: str, values: list[Any], kind: type[Exception], expected: str) -> None:
    for value in values:
        with pytest.raises(kind, match=f"^{name}: {expected}") as caught:
            constructed(**{name: value})
        got = type(value).__name__ if kind is TypeError else repr(value)
        assert str(caught.value).endswith(f"got {got}.")


@pytest.mark.parametrize("name", ["max_features", "tolerance", "jitter"])
@pytest.mark.parametrize("value", ["many", [3], True, 8.5 + 2j])
def test_constructor_numbers_that_are_none(name: str, value: Any) -> None:
    """A word or a bool where a number belongs is named too."""
    with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
        constructed(**{name: value})


def test_max_features_is_a_whole_number() -> None:
    with pytest.raises((TypeError, ValueError), match=r"^max_features: "):
        constructed(max_features=20.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": -1.0}, r"^horizon: expected a time after start=0\.0, got -1\.0"),
        ({"horizon": 5.0, "start": 5.0}, r"^horizon: expected a time after start=5\.0, got 5\.0"),
        ({"horizon": math.nan}, r"^horizon: expected a finite number, got nan"),
        ({"horizon": 5.0, "start": -math.inf}, r"^start: expected a finite number, got -inf"),
        ({"horizon": 5.0, "num_nodes": 5}, r"^num_nodes: expected at least num_features=8, got 5"),
    ],
)
def test_features_that_make_no_memory(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HippoFeatures(8, **options)


@pytest.mark.parametrize("value", [None, 8, torch.ones(3)])
def test_rebase_wants_features(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^features: expected InducingFeatures, got"):
        (model := fresh("plain")).rebase(value)
    assert_identical(model, BEFORE["plain"])
