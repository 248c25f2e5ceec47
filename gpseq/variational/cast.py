"""A covariance computed in one dtype and handed out in another."""

from __future__ import annotations

from typing import Any

import torch
from linear_operator import LinearOperator
from linear_operator.operators import TriangularLinearOperator
from torch import Tensor


class CastLinearOperator(LinearOperator):
    """``base`` as seen in another dtype; every number is computed in the dtype of ``base`` and rounded once.

    A posterior variance is a difference of nearly equal numbers: computed in float32 it can be negative, computed in
    float64 and rounded it cannot.

    Args:
        base: the operator, ``(*batch, n, m)``.
        dtype: the dtype that is shown.

    Example:
        >>> from linear_operator.operators import DiagLinearOperator
        >>> CastLinearOperator(DiagLinearOperator(torch.ones(2).double()), dtype=torch.float32).to_dense().dtype
        torch.float32
    """

    def __init__(self, base: LinearOperator, dtype: torch.dtype) -> None:
        super().__init__(base, dtype=dtype)
        self.base = base
        self._dtype = dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that is shown."""
        return self._dtype

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self.base._matmul(rhs.to(self.base.dtype)).to(self._dtype)

    def _size(self) -> torch.Size:
        return self.base.shape

    def _transpose_nonbatch(self) -> LinearOperator:
        return CastLinearOperator(self.base._transpose_nonbatch(), dtype=self._dtype)

    def _bilinear_derivative(self, left_vecs: Tensor, right_vecs: Tensor) -> tuple[Any, ...]:
        return self.base._bilinear_derivative(left_vecs.to(self.base.dtype), right_vecs.to(self.base.dtype))

    def _diagonal(self) -> Tensor:
        return self.base._diagonal().to(self._dtype)

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        return CastLinearOperator(self.base._getitem(row_index, col_index, *batch_indices), dtype=self._dtype)

    def _get_indices(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Tensor:
        return self.base._get_indices(row_index, col_index, *batch_indices).to(self._dtype)

    def _expand_batch(self, batch_shape: torch.Size) -> LinearOperator:
        return CastLinearOperator(self.base._expand_batch(batch_shape), dtype=self._dtype)

    def _unsqueeze_batch(self, dim: int) -> LinearOperator:
        return CastLinearOperator(self.base._unsqueeze_batch(dim), dtype=self._dtype)

    def _sum_batch(self, dim: int) -> LinearOperator:
        return CastLinearOperator(self.base._sum_batch(dim), dtype=self._dtype)

    def _permute_batch(self, *dims: int) -> LinearOperator:
        return CastLinearOperator(self.base._permute_batch(*dims), dtype=self._dtype)

    def _cholesky(self, upper: bool = False) -> LinearOperator:
        # A covariance that is positive definite in the dtype of the base may not be so after rounding.
        return TriangularLinearOperator(self.base.cholesky(upper=upper).to_dense().to(self._dtype), upper=upper)

    def zero_mean_mvn_samples(self, num_samples: int) -> Tensor:
        """Samples drawn in the dtype of the base and rounded, ``(num_samples, *batch, n)``."""
        return self.base.zero_mean_mvn_samples(num_samples).to(self._dtype)

    def type(self, dtype: torch.dtype) -> LinearOperator:
        """The same operator seen in another dtype."""
        return self.base if dtype == self.base.dtype else CastLinearOperator(self.base, dtype=dtype)

    def to(self, *args: Any, **kwargs: Any) -> LinearOperator:
        """The same operator on another device or seen in another dtype."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        base = self.base if device is None else self.base.to(device)
        return CastLinearOperator(base, dtype=self._dtype).type(self._dtype if dtype is None else dtype)

    def float(self, device_id: Any = None) -> LinearOperator:
        """Seen in float32."""
        return self.type(torch.float32)

    def double(self, device_id: Any = None) -> LinearOperator:
        """Seen in float64."""
        return self.type(torch.float64)

    def half(self, device_id: Any = None) -> LinearOperator:
        """Seen in float16."""
        return self.type(torch.float16)

    def to_dense(self) -> Tensor:
        """The dense matrix, rounded once."""
        return self.base.to_dense().to(self._dtype)
