"""What does not fit is named, with what came and what was expected."""

import pytest
import torch

from gpseq.sgpa import DiagonalScale, LowRankScale, decoupled_posterior
from tests.oracles_sgpa import problem

P = problem(batch=(2,), tokens=4, queries=3)


def call(options=None, **changes):
    return decoupled_posterior(*P._replace(**changes), **(options or {}))


BAD_SHAPES = {
    "integers": (TypeError, {"query": torch.ones(2, 2, 3, 2, dtype=torch.long)}, r"query: .*floating.*torch.int64"),
    "complex": (TypeError, {"key": P.key.to(torch.complex64)}, r"key: expected a floating-point .*complex64"),
    "no tensor": (TypeError, {"value": [1.0]}, r"value: expected a floating-point tensor, got list"),
    "dtypes": (TypeError, {"value": P.value.float()}, r"value: expected the dtype of query, .*float64, got .*float32"),
    "no heads": (
        ValueError,
        {"query": torch.ones(3, 2).double()},
        r"query: expected shape \(\*batch, heads, .*\(3, 2\)",
    ),
    "no queries": (
        ValueError,
        {"query": P.query[..., :0, :]},
        r"query: expected at least one token, got .*\(2, 2, 0, 2\)",
    ),
    "no keys": (
        ValueError,
        {"key": P.key[..., :0, :], "value": P.value[..., :0, :]},
        r"key: expected at least one token, got shape \(2, 2, 0, 2\)",
    ),
    "widths": (
        ValueError,
        {"key": torch.ones(2, 2, 4, 3).double()},
        r"key: expected the width of query, 2, .*\(2, 2, 4, 3\)",
    ),
    "values": (ValueError, {"value": P.value[..., :3, :]}, r"value: expected \(2, 2, 4\) .* got \(2, 2, 3, 2\)"),
    "heads": (ValueError, {"query": P.query[:, :1]}, r"query: expected leading dimensions \(2, 2\), got \(2, 1\)"),
    "lengthscale": (ValueError, {"lengthscale": torch.ones(2)}, r"lengthscale: expected shape \(2, 2\), got \(2,\)"),
    "variance": (ValueError, {"variance": torch.tensor(1.0)}, r"variance: expected shape \(2,\), got \(\)"),
    "inducing_key": (
        ValueError,
        {"inducing_key": P.inducing_key[:1]},
        r"inducing_key: expected .*\(2, M, 2\).*\(1, 3, 2\)",
    ),
    "inducing_value": (
        ValueError,
        {"inducing_value": P.inducing_value[:, :2]},
        r"inducing_value: expected shape \(2, 3, 2\), got \(2, 2, 2\)",
    ),
    "scale": (
        ValueError,
        {"inducing_scale_tril": torch.eye(4)},
        r"inducing_scale_tril: expected shape \(2, 2, 3, 3\) or \(2, 1, 3, 3\), got \(4, 4\)",
    ),
    "diagonal scale": (
        ValueError,
        {"inducing_scale_tril": DiagonalScale(torch.ones(2, 2, 4))},
        r"inducing_scale_tril: expected shape \(2, 2, 3\) or \(2, 1, 3\), got \(2, 2, 4\)",
    ),
    "low-rank scale": (
        ValueError,
        {"inducing_scale_tril": LowRankScale(torch.ones(2, 2, 3), torch.ones(2, 2, 4, 1))},
        r"inducing_scale_tril: expected std of shape \(2, 2, 4\), got \(2, 2, 3\)",
    ),
    "no scale": (TypeError, {"inducing_scale_tril": None}, r"inducing_scale_tril: expected a tensor, .*got NoneType"),
}
BAD_OPTIONS = {
    "kernel": (ValueError, {"kernel": "laplace"}, r"kernel: expected one of 'rbf', 'exponential', got 'laplace'"),
    "form": (ValueError, {"form": "dual"}, r"form: expected one of 'orthogonal', 'cheng_boots', got 'dual'"),
    "output": (ValueError, {"output": "all"}, r"output: expected one of 'diagonal', 'full', 'mean', got 'all'"),
    "value_scale": (ValueError, {"value_scale": 2.0}, r"value_scale: expected one of 'length', None, got 2.0"),
    "causal lengths": (
        ValueError,
        {"is_causal": True},
        r"is_causal: .*as many queries as keys.*got 3 queries and 4 keys",
    ),
    "mask shape": (
        ValueError,
        {"attn_mask": torch.zeros(4, 3, dtype=torch.bool)},
        r"attn_mask: expected a shape that broadcasts to \(2, 2, 3, 4\), got \(4, 3\)",
    ),
    "mask of too many dimensions": (
        ValueError,
        {"attn_mask": torch.zeros(1, 2, 2, 3, 4)},
        r"attn_mask: expected a shape that broadcasts to \(2, 2, 3, 4\), got \(1, 2, 2, 3, 4\)",
    ),
    "mask kind": (
        TypeError,
        {"attn_mask": torch.zeros(3, 4).long()},
        r"attn_mask: expected a boolean or floating.*int64",
    ),
    "mask list": (
        TypeError,
        {"attn_mask": [[True]]},
        r"attn_mask: expected a boolean or floating-point tensor, got list",
    ),
    "padding shape": (
        ValueError,
        {"key_padding_mask": torch.zeros(2, 3, dtype=torch.bool)},
        r"key_padding_mask: expected a shape that broadcasts to \(2, 4\), got \(2, 3\)",
    ),
    "padding kind": (TypeError, {"key_padding_mask": torch.zeros(2, 4).int()}, r"key_padding_mask: .*int32"),
    "bias between two": (
        ValueError,
        {"inducing_bias": (torch.zeros(3, 3), torch.zeros(3, 3))},
        r"inducing_bias: expected query and key to be the same tensor, got two",
    ),
}


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_tensors_that_do_not_fit(name):
    error, changes, message = BAD_SHAPES[name]
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_that_there_are_not(name):
    error, options, message = BAD_OPTIONS[name]
    with pytest.raises(error, match=message):
        call(options)


def test_causal_and_a_mask_exclude_each_other():
    p = problem(batch=(), tokens=3)
    with pytest.raises(ValueError, match=r"is_causal: .*no attn_mask, got 3 queries and 3 keys with an attn_mask"):
        decoupled_posterior(*p, is_causal=True, attn_mask=torch.zeros(3, 3))


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        ((torch.zeros(4, 2), torch.zeros(3, 3)), ValueError, r"inducing_bias\[0\]: .*\(2, 4, 3\), got \(4, 2\)"),
        ((torch.zeros(4, 3), torch.zeros(2, 2)), ValueError, r"inducing_bias\[1\]: .*\(2, 3, 3\), got \(2, 2\)"),
        ((torch.zeros(4, 3), torch.zeros(3, 3, dtype=torch.bool)), TypeError, r"inducing_bias: .*two floating-point"),
    ],
)
def test_a_bias_of_inducing_keys_that_does_not_fit(bias, error, message):
    p = problem(batch=(), tokens=4)
    with pytest.raises(error, match=message):
        decoupled_posterior(*p, inducing_bias=bias)
