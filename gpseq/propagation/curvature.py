"""What data say of weights before any prior: the curvature that a Laplace approximation is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from gpseq.checks import check_number
from gpseq.propagation.laws import Diagonal, KroneckerLaplace, Law
from gpseq.propagation.posteriors import WeightPosterior

#: Prior precisions that are tried where a score says which is best.
GRID = tuple(10.0**power for power in torch.arange(-4, 4.5, 0.5).tolist())
#: Prior precisions that the evidence may choose from.
BOUNDS = (1e-8, 1e8)


@dataclass(frozen=True, eq=False)
class Factors:
    r"""A curvature :math:`B \otimes A` of a matrix of weights, ``(K, D)``, by its eigendecompositions.

    Attributes:
        output_vectors: of B, ``(K, K)``.
        output_values: of B, ``(K,)``.
        input_vectors: of A, ``(D, D)``.
        input_values: of A, ``(D,)``.
    """

    output_vectors: Tensor
    output_values: Tensor
    input_vectors: Tensor
    input_values: Tensor

    @property
    def spectrum(self) -> Tensor:
        """All eigenvalues, ``(K, D)``."""
        return self.output_values.unsqueeze(-1) * self.input_values


def eigenbasis(matrix: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of a factor, found in float64.

    Args:
        matrix: positive semidefinite, ``(K, K)``.
        like: gives the dtype in which they are kept.
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    return vectors.to(like), values.clamp_min(0).to(like)


@dataclass(frozen=True, eq=False)
class Curvature:
    r"""The generalised Gauss-Newton matrix H of a data set at a model's weights, block by block.

    A Gaussian prior :math:`N(0, \lambda^{-1} I)` of the weights makes it a posterior with the covariance
    :math:`(H + \lambda I)^{-1}`, at no further cost: :meth:`posterior`.

    Attributes:
        blocks: by names of parameters: the diagonal of H, ``(K, D)``, or its Kronecker factors; of the parameter as a
            matrix, with the first dimension as rows and all others flattened.
        squares: by names, the sum of the squares of the weights.
        num_data: examples that it is the sum of.
    """

    blocks: Mapping[str, Tensor | Factors]
    squares: Mapping[str, float]
    num_data: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters."""
        return tuple(self.blocks)

    def spectrum(self, names: Sequence[str] | None = None) -> Tensor:
        """Eigenvalues of H in float64, ``(n,)``.

        Args:
            names: of parameters; ``None`` is all.
        """
        chosen = self.names if names is None else names
        found = [self.blocks[name] for name in chosen]
        return torch.cat([(x.spectrum if isinstance(x, Factors) else x).flatten().double().cpu() for x in found])

    def posterior(self, prior_precision: float | Mapping[str, float] = 1.0, factor: float = 1.0) -> WeightPosterior:
        r"""The Laplace approximation, with the covariance :math:`(c H + \lambda I)^{-1}`.

        Args:
            prior_precision: lambda, positive; or one for each parameter, by names or patterns such as ``"*.bias"``,
                of which the first that fits is taken.
            factor: c, positive, of the likelihood: one by its temperature, or by a noise variance if H was made for
                unit noise.

        Returns:
            The posterior; its mean is the model's weights.

        Raises:
            ValueError: a number is not positive, a parameter has no precision, or a pattern fits none.

        Example:
            >>> curvature = Curvature({"weight": torch.tensor([[1.0, 3.0]])}, {"weight": 2.0}, num_data=4)
            >>> curvature.posterior(prior_precision=1.0).laws["weight"].marginals()
            tensor([[0.5000, 0.2500]])
        """
        check_number("factor", factor, above=0.0, expected="a positive number")
        precisions = _precisions(prior_precision, self.names)
        laws: dict[str, Law] = {}
        for name, block in self.blocks.items():
            if isinstance(block, Factors):
                precision = block.input_values.new_tensor(precisions[name])
                values = factor * block.output_values
                laws[name] = KroneckerLaplace(
                    block.output_vectors, values, block.input_vectors, block.input_values, precision
                )
            else:
                laws[name] = Diagonal(1 / (factor * block + precisions[name]))
        return WeightPosterior(laws)


def optimise_prior_precision(
    curvature: Curvature,
    score: Callable[[WeightPosterior], float] | None = None,
    grid: Sequence[float] | None = None,
    each: bool = False,
) -> float | dict[str, float]:
    r"""The prior precision that data prefer: by the evidence, or by a score on held-out data.

    Without a score it maximises the marginal likelihood of the Laplace approximation, whose only maximum solves

    .. math:: \lambda\, \lVert \theta \rVert^2 = \sum_i \frac{h_i}{h_i + \lambda}

    for the eigenvalues :math:`h_i` of the curvature; no data are needed for it.

    Args:
        curvature: of the weights.
        score: of a posterior, the lower the better, such as the negative log likelihood of held-out data under
            ``propagate(model, posterior, x)``.
        grid: precisions that the score chooses from; ``None`` is 17 of them from 1e-4 to 1e4.
        each: whether each parameter has one of its own; by the evidence only.

    Returns:
        What :meth:`Curvature.posterior` takes as ``prior_precision``. The evidence's choice is between 1e-8 and 1e8.

    Raises:
        ValueError: ``each`` with a score, a grid without, or a score that is not finite anywhere.

    Source:
        MacKay (1992), Bayesian interpolation; Immer et al. (2021), Scalable marginal likelihood estimation for model
        selection in deep learning.

    Example:
        >>> curvature = Curvature({"weight": torch.tensor([[3.0, 3.0]])}, {"weight": 1.0}, num_data=4)
        >>> round(optimise_prior_precision(curvature), 4)
        1.3723
    """
    if score is None:
        if grid is not None:
            raise ValueError("grid: expected None without a score, the evidence needs none.")
        if each:
            return {name: _evidence_precision(curvature, [name]) for name in curvature.names}
        return _evidence_precision(curvature, curvature.names)
    if each:
        raise ValueError("each: expected False with a score, which chooses one precision for all.")
    scores = {value: float(score(curvature.posterior(value))) for value in (GRID if grid is None else grid)}
    finite = {value: found for value, found in scores.items() if found == found and abs(found) != float("inf")}
    if not finite:
        raise ValueError(f"score: expected a finite number for one precision of the grid, got {scores}.")
    return min(finite, key=finite.__getitem__)


def _evidence_precision(curvature: Curvature, names: Sequence[str]) -> float:
    """The root by bisection: what is left over falls with the precision."""
    spectrum = curvature.spectrum(names)
    square = sum(curvature.squares[name] for name in names)
    low, high = (torch.tensor(bound, dtype=torch.float64).log() for bound in BOUNDS)
    for _ in range(60):
        middle = (low + high) / 2
        precision = middle.exp()
        if (spectrum / (spectrum + precision)).sum() > precision * square:
            low = middle
        else:
            high = middle
    return float(((low + high) / 2).exp())


def _precisions(given: float | Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """A prior precision for each parameter."""
    expected = "a positive number"
    if not isinstance(given, Mapping):
        number = check_number("prior_precision", given, above=0.0, expected=expected)
        return dict.fromkeys(names, number)
    numbers = {
        pattern: check_number(f"prior_precision[{pattern!r}]", value, above=0.0, expected=expected)
        for pattern, value in given.items()
    }
    found: dict[str, float] = {}
    used = set()
    for name in names:
        fitting = [pattern for pattern in numbers if fnmatchcase(name, pattern)]
        if not fitting:
            raise ValueError(f"prior_precision: expected one for {name}, got {', '.join(given) or 'none'}.")
        found[name] = numbers[fitting[0]]
        used.update(fitting)
    unused = [pattern for pattern in numbers if pattern not in used]
    if unused:
        raise ValueError(f"prior_precision: expected names of parameters of the curvature, got {', '.join(unused)}.")
    return found
