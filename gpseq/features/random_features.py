"""Random Fourier features: a stationary kernel as a linear model with finitely many weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel, ScaleKernel
from torch import Tensor

from gpseq.checks import check_count, check_inputs
from gpseq.precision import Float64Buffers, in_float64


class RandomFeatures(Float64Buffers):
    r"""Random Fourier features :math:`\psi` of an RBF or Matérn kernel, frozen when they are drawn.

    .. math::
        \psi(x) = \frac{s_f}{\sqrt{R}} \bigl[\cos(\omega_1^\top x), \dots, \cos(\omega_R^\top x),
        \sin(\omega_1^\top x), \dots, \sin(\omega_R^\top x)\bigr], \qquad
        \psi(x)^\top \psi(x') \approx k(x, x')

    The frequencies come from the normalised spectrum of the kernel: for RBF :math:`\mathcal N(0, \ell^{-2})`, for
    Matérn a multivariate Student-t with :math:`2\nu` degrees of freedom and scales :math:`1/\ell`. The variance
    :math:`|\psi(x)|^2 = s_f^2` is exact; the error elsewhere falls as :math:`R^{-1/2}`. Later changes of the kernel are
    not followed.

    Args:
        kernel: `RBFKernel` or `MaternKernel`, with or without ARD and ``active_dims``, also inside `ScaleKernel`.
        num_dims: d, columns of the inputs.
        num_frequencies: R.
        generator: draws the frequencies; ``None`` is torch's default generator.

    Raises:
        TypeError: another kernel, or one with a batch shape; a count that is no integer.
        ValueError: the kernel asks for other columns; a count below 1.

    Source:
        Rahimi and Recht (2007), Random features for large-scale kernel machines.

    Example:
        >>> import gpytorch
        >>> psi = RandomFeatures(gpytorch.kernels.RBFKernel(), num_dims=2, num_frequencies=50)
        >>> psi(torch.zeros(3, 2)).shape
        torch.Size([3, 100])
        >>> psi(torch.randn(3, 2)).square().sum(-1)
        tensor([1.0000, 1.0000, 1.0000], dtype=torch.float64)
    """

    frequencies: Tensor
    variance: Tensor
    lengthscale: Tensor
    kind: Tensor
    columns: Tensor

    def __init__(
        self,
        kernel: Kernel,
        num_dims: int,
        num_frequencies: int = 1000,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_count("num_dims", num_dims)
        check_count("num_frequencies", num_frequencies)
        base, scales = _unwrapped(kernel)
        lengthscale, variance = in_float64(lambda: _values(base, scales), (kernel,))
        # Scale kernels take over the columns of what they scale, and the outermost kernel selects.
        columns = torch.arange(num_dims) if kernel.active_dims is None else kernel.active_dims.cpu().reshape(-1)
        if columns.max() >= num_dims or columns.min() < 0 or len(lengthscale) not in (1, len(columns)):
            raise ValueError(
                f"kernel: expected one for {num_dims} input columns, got active_dims={columns.tolist()} and "
                f"{len(lengthscale)} lengthscales."
            )
        device = lengthscale.device
        source = None if generator is None else generator.device
        normal = torch.randn(num_frequencies, len(columns), generator=generator, dtype=torch.float64, device=source)
        if isinstance(base, MaternKernel):
            degrees = round(2 * base.nu)
            squares = torch.randn(num_frequencies, degrees, generator=generator, dtype=torch.float64, device=source)
            normal = normal * (degrees / squares.square().sum(-1, keepdim=True)).sqrt()
        frequencies = torch.zeros(num_frequencies, num_dims, dtype=torch.float64, device=device)
        frequencies[:, columns.to(device)] = normal.to(device) / lengthscale
        self.register_buffer("frequencies", frequencies)
        self.register_buffer("variance", variance)
        self.register_buffer("lengthscale", lengthscale)
        kind, chosen = _signature(kernel, num_dims)
        self.register_buffer("kind", torch.tensor(kind, dtype=torch.float64, device=device))
        self.register_buffer("columns", torch.tensor(chosen, device=device))

    def belongs_to(self, kernel: Kernel) -> bool:
        """Whether a kernel has the values that these features were drawn with."""
        try:
            kind, columns = _signature(kernel, self.num_dims)
            base, scales = _unwrapped(kernel)
        except TypeError:
            return False
        if kind != self.kind.item() or columns != self.columns.tolist():
            return False
        lengthscale, variance = in_float64(lambda: _values(base, scales), (kernel,))
        return lengthscale.shape == self.lengthscale.shape and all(
            torch.allclose(now.to(then.device), then, rtol=1e-6, atol=0.0)
            for now, then in ((lengthscale, self.lengthscale), (variance, self.variance))
        )

    @property
    def num_dims(self) -> int:
        """Input columns d."""
        return self.frequencies.shape[-1]

    @property
    def num_outputs(self) -> int:
        """2 R, the number of features."""
        return 2 * self.frequencies.shape[-2]

    def forward(self, x: Tensor) -> Tensor:
        """The features, differentiable in x.

        Args:
            x: ``(*batch, n, d)``, or ``(n,)`` for one-dimensional inputs.

        Returns:
            ``(*batch, n, 2 R)``, float64.

        Raises:
            TypeError: ``x`` is no floating-point tensor.
            ValueError: it has another number of columns.
        """
        angles = check_inputs(x, self.num_dims).double() @ self.frequencies.mT
        scale = (self.variance / self.frequencies.shape[-2]).sqrt()
        return scale * torch.cat([angles.cos(), angles.sin()], dim=-1)

    def same_as(self, other: RandomFeatures) -> bool:
        """Whether these are the same features of the same function."""
        return self is other or (
            self.frequencies.device == other.frequencies.device
            and torch.equal(self.frequencies, other.frequencies)
            and torch.equal(self.variance, other.variance)
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(f"{prefix}frequencies")
        if isinstance(saved, Tensor):
            self.frequencies = self.frequencies.new_empty(saved.shape)
        for name in ("lengthscale", "columns"):
            saved = state_dict.get(f"{prefix}{name}")
            if isinstance(saved, Tensor):
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Their number."""
        return f"num_dims={self.num_dims}, num_frequencies={self.frequencies.shape[-2]}"


def _unwrapped(kernel: Any) -> tuple[Kernel, list[ScaleKernel]]:
    """The kernel inside of scale kernels, and these."""
    base, scales = kernel, []
    while type(base) is ScaleKernel and not base.batch_shape:
        scales.append(base)
        base = base.base_kernel
    # A subclass may compute anything, so that only these themselves will do.
    if type(base) not in (RBFKernel, MaternKernel) or base.batch_shape:
        batch = f" with batch shape {tuple(base.batch_shape)}" if isinstance(base, Kernel) and base.batch_shape else ""
        raise TypeError(
            f"kernel: expected RBFKernel or MaternKernel, possibly inside ScaleKernel, without a batch shape, got "
            f"{type(base).__name__}{batch}."
        )
    return base, scales


def _signature(kernel: Kernel, num_dims: int) -> tuple[float, list[int]]:
    """Smoothness of the kernel (infinite for RBF) and the input columns that it looks at."""
    base, _ = _unwrapped(kernel)
    columns = range(num_dims) if kernel.active_dims is None else kernel.active_dims.reshape(-1).tolist()
    return (base.nu if isinstance(base, MaternKernel) else math.inf), list(columns)


@torch.no_grad()
def _values(base: Kernel, scales: list[ScaleKernel]) -> tuple[Tensor, Tensor]:
    """Lengthscales, one or one for each column, and variance; copies, in float64 where the kernel is."""
    lengthscale = base.lengthscale.double().reshape(-1).clone()
    variance = torch.ones((), dtype=torch.float64, device=lengthscale.device)
    for scale in scales:
        variance = variance * scale.outputscale.double().reshape(())
    return lengthscale, variance
