"""What an inducing variable is: a weighted sum of function values, seen through any kernel."""

from __future__ import annotations

from typing import Any, Protocol

import gpytorch
import torch
from gpytorch.kernels import Kernel
from linear_operator import LinearOperator, to_dense, to_linear_operator
from torch import Tensor

from gpseq.precision import Float64Buffers, in_float64

#: Residual variances are averaged over this many inputs, spread evenly over what a memory covers.
NUM_PROBES = 256


def evaluate(kernel: Kernel, x1: Tensor, x2: Tensor, frozen: bool = False) -> Tensor:
    """Dense ``kernel(x1, x2)`` in float64, whatever the dtype of the kernel's hyperparameters.

    Args:
        kernel: any GPyTorch kernel.
        x1: ``(*batch, n, d)``.
        x2: ``(*batch, m, d)``; its batch shape broadcasts with that of ``x1`` and of the kernel.
        frozen: keep gradients away from the kernel's parameters; they still reach the inputs.

    Returns:
        ``(*batch, n, m)``, float64.
    """
    x1, x2 = align(x1, x2)
    return in_float64(lambda a, b: dense(kernel, a, b), (kernel,), x1, x2, frozen=frozen).double()


def unchecked(kernel: Kernel, x1: Tensor, x2: Tensor, diag: bool = False) -> Tensor:
    """Values of a kernel without its checks and the lazy object in between, which take as long as a small update.

    GPyTorch's own lazy kernels take their diagonal in this way, and scale kernels their base kernel.

    Args:
        kernel: any GPyTorch kernel, evaluated in the dtype that it has.
        x1: ``(*batch, n, d)``; that d suits the kernel has been seen before.
        x2: ``(*batch, m, d)``, the same batch shape.
        diag: the diagonal only, where both inputs are the same.

    Returns:
        ``(*batch, n, m)``, or ``(*batch, n)``.
    """
    if type(kernel).__call__ is not Kernel.__call__:
        return to_dense(kernel(x1, x2, diag=diag))
    if kernel.active_dims is not None:
        x1, x2 = x1.index_select(-1, kernel.active_dims), x2.index_select(-1, kernel.active_dims)
    return to_dense(gpytorch.Module.__call__(kernel, x1, x2, diag=diag))


def dense(kernel: Kernel, x1: Tensor, x2: Tensor, **params: Any) -> Tensor:
    """Values of ``kernel(x1, x2)``, never factored on the way.

    Where both inputs are the same, linear_operator factors one term of a sum with a linear kernel, which is slow and
    fails if the outputscale is large. One more column makes them different.
    """
    if x1.shape != x2.shape:
        return to_dense(kernel(x1, x2, **params))
    return to_dense(kernel(x1, torch.cat([x2, x2[..., -1:, :]], dim=-2), **params))[..., :-1]


def align(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """Two sets of inputs in float64 with one batch shape; not every kernel broadcasts by itself."""
    x1, x2 = x1.double(), x2.double()
    if x1.shape[:-2] == x2.shape[:-2]:
        return x1, x2
    batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
    return x1.expand(*batch, *x1.shape[-2:]), x2.expand(*batch, *x2.shape[-2:])


def evaluate_diagonal(kernel: Kernel, x: Tensor, frozen: bool = False) -> Tensor:
    """Diagonal of ``kernel(x, x)``, ``(*batch, n)`` for inputs ``(*batch, n, d)``; otherwise as :func:`evaluate`."""
    return in_float64(lambda a: to_dense(kernel(a, diag=True)), (kernel,), x.double(), frozen=frozen).double()


def project(
    weights: Tensor | LinearOperator, covariance: Tensor, other: Tensor | LinearOperator | None = None
) -> Tensor:
    r"""Covariances of linear functionals from covariances of function values, :math:`W K` or :math:`W K W'^\top`.

    The one place where weights meet a kernel: the strategies (which ask the user's model for the prior) and
    `InducingFeatures` (which is handed a kernel) both end here.

    Args:
        weights: W, ``(*batch, M, Q)``.
        covariance: K, ``(*batch, Q, n)``.
        other: W', ``(*batch, M', n)``, or ``None`` for the identity.

    Returns:
        ``(*batch, M, n)`` or ``(*batch, M, M')``.
    """
    left = weights @ covariance
    return left if other is None else (other @ left.mT).mT


class Embedding(Protocol):
    """Features of inputs in which f is linear, see ``InducingFeatures.embedding``."""

    def __call__(self, x: Tensor) -> Tensor:
        """``(*batch, n, d)`` to ``(*batch, n, F)``, float64."""

    def same_as(self, other: Any) -> bool:
        """Whether both are the same features of the same function."""

    def belongs_to(self, kernel: Kernel) -> bool:
        """Whether they stand for this kernel, with the values that it has."""


class InducingFeatures(Float64Buffers):
    r"""Inducing variables :math:`u = W f(z)`: a linear functional of f, by quadrature nodes z and weights W.

    From these two alone follow, for any kernel k,

    .. math::
        K_{uu} = W k(z, z) W^\top, \qquad K_{uf} = W k(z, x), \qquad K_{uu'} = W k(z, z') W'^\top .

    The model is exactly valid for whatever W and z are: one functional appears in every block. How well :math:`W f(z)`
    approximates an integral decides only what u *means*.

    Subclasses define :meth:`nodes`, :meth:`weights` and :attr:`num_features`. Where f has a mean function, u is
    defined on f minus its mean.

    Example:
        >>> import gpytorch, gpseq
        >>> features = gpseq.features.InducingPoints(torch.linspace(0, 1, 5))
        >>> features.kuu(gpytorch.kernels.RBFKernel()).shape
        torch.Size([5, 5])
    """

    @property
    def num_features(self) -> int:
        """M, the number of inducing variables."""
        raise NotImplementedError(f"{type(self).__name__} must define num_features.")

    @property
    def num_dims(self) -> int:
        """d, the number of input columns."""
        return self.nodes().shape[-1]

    @property
    def embedding(self) -> Embedding | None:
        r"""``None`` where f is seen through its kernel, as by all features but random ones.

        Otherwise a map :math:`\psi` from inputs ``(*batch, n, d)`` to ``(*batch, n, F)``, float64. Then f minus its
        mean is the linear model :math:`\psi(x)^\top w`, :math:`w \sim N(0, I)`, the nodes stand for the F numbers w and
        have shape ``(F, 0)``, and every covariance follows from :math:`\psi` instead of the kernel.
        """
        return None

    def nodes(self) -> Tensor:
        """Inputs at which f is summed, ``(*batch, Q, d)``, float64."""
        raise NotImplementedError(f"{type(self).__name__} must define nodes().")

    def weights(self) -> Tensor | LinearOperator:
        """Weights of the sum, ``(*batch, M, Q)``, float64."""
        raise NotImplementedError(f"{type(self).__name__} must define weights().")

    def kuu(self, kernel: Kernel) -> LinearOperator:
        """Prior covariance of the inducing variables.

        Args:
            kernel: any GPyTorch kernel; its batch shape broadcasts.

        Returns:
            ``(*batch, M, M)``, symmetric, float64, without jitter. Dense inside: the benchmarks show what the parity
            of stationary kernels would spare, up to a thousand features, and that forming the matrix costs more.
        """
        nodes, weights = self.nodes(), self.weights()
        covariance = project(weights, evaluate(kernel, nodes, nodes), weights)
        return to_linear_operator(0.5 * (covariance + covariance.mT))

    def kuf(self, kernel: Kernel, x: Tensor) -> Tensor:
        """Prior covariance between the inducing variables and f at ``x``.

        Args:
            kernel: any GPyTorch kernel.
            x: ``(*batch, n, d)``, or ``(n,)`` for one-dimensional inputs.

        Returns:
            ``(*batch, M, n)``, float64.
        """
        return project(self.weights(), evaluate(kernel, self.nodes(), as_inputs(x)))

    def cross(self, kernel: Kernel, other: InducingFeatures) -> Tensor:
        """Prior covariance with other features of the same f.

        Args:
            kernel: any GPyTorch kernel.
            other: M' features.

        Returns:
            ``(*batch, M, M')``, float64.
        """
        return project(self.weights(), evaluate(kernel, self.nodes(), other.nodes()), other.weights())

    def check_embedding(self, other: InducingFeatures) -> None:
        """Check that others see f as these do, so that a belief can pass from one to the other.

        Raises:
            ValueError: one of the two sees it through random features, or both through different ones.
        """
        mine, theirs = self.embedding, other.embedding
        if mine is not theirs and not (mine is not None and theirs is not None and mine.same_as(theirs)):
            raise ValueError(
                f"features: {type(other).__name__} and {type(self).__name__} see f through different random features, "
                "or only one of them does; no belief can pass between them."
            )

    @property
    def forgets(self) -> bool:
        """Whether these features give up detail by design as they follow a stream; decides how beliefs are carried."""
        return False

    def following(self, x: Tensor, kernel: Kernel, growth: float | str | None = 1.25) -> InducingFeatures:
        """Features for a stream that has come to ``x``.

        Args:
            x: new inputs, ``(n, d)``, float64.
            kernel: the kernel, for features that choose by it.
            growth: how a stretching horizon grows, see ``StreamingGP``.

        Returns:
            New features, or these where nothing has to change. Points that were given stay where they are.
        """
        return self

    @property
    def interval(self) -> tuple[float, float] | None:
        """First and last time that a memory of time covers; ``None`` for features that are none."""
        return None

    def probes(self, num_probes: int = NUM_PROBES) -> Tensor | None:
        """Inputs at which the memory is judged, ``(n, d)``, float64; ``None`` where there is nothing to cover."""
        return None


def as_inputs(x: Tensor) -> Tensor:
    """Inputs with a column axis: ``(n,)`` becomes ``(n, 1)``, everything else is returned as it is."""
    return x.unsqueeze(-1) if x.dim() == 1 else x
