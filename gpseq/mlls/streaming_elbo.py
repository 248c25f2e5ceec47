"""The evidence lower bound of one chunk of a stream."""

from __future__ import annotations

from typing import Any

from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import Likelihood
from gpytorch.mlls import VariationalELBO
from gpytorch.models import ApproximateGP
from torch import Tensor

from gpseq.checks import check_count


class StreamingELBO(VariationalELBO):
    r"""Online evidence lower bound, for training an ordinary model chunk by chunk.

    .. math::
        \frac{1}{n} \Bigl( \sum_{i=1}^{n} E_{q(f_i)} \log p(y_i \mid f_i) - \mathrm{KL}_{online} \Bigr)

    It is GPyTorch's ``VariationalELBO`` whose number of data is that of the chunk: what the past has to say is inside
    the divergence of the strategy, see ``InterdomainVariationalStrategy.kl_divergence`` and ``advance``. Train q (and,
    with care, the hyperparameters) on a chunk, then ``advance``. With a Gaussian likelihood the closed form of
    ``StreamingGP.update`` is where this ends; one natural-gradient step of length one goes there.

    Args:
        likelihood: any likelihood with ``expected_log_prob``.
        model: its ``variational_strategy`` is an ``InterdomainVariationalStrategy``, or one of the wrappers of
            :mod:`gpseq.variational` around it.
        num_data: size of the chunk, where a batch is only a part of it; ``None`` means that each batch is a chunk.
        beta: weight of the divergence.
        combine_terms: as in GPyTorch.

    Raises:
        TypeError: ``num_data`` is no integer.
        ValueError: it is less than one.

    Source:
        Bui, Nguyen and Turner (2017), Streaming sparse Gaussian process approximations.

    Example:
        >>> import gpytorch, torch, gpseq
        >>> class Model(gpytorch.models.ApproximateGP):
        ...     def __init__(self, features):
        ...         q = gpytorch.variational.NaturalVariationalDistribution(features.num_features)
        ...         super().__init__(gpseq.variational.InterdomainVariationalStrategy(self, features, q))
        ...         self.mean_module = gpytorch.means.ZeroMean()
        ...         self.covar_module = gpytorch.kernels.RBFKernel()
        ...
        ...     def forward(self, x):
        ...         return MultivariateNormal(self.mean_module(x), self.covar_module(x))
        >>> model = Model(gpseq.features.HippoFeatures(8, horizon=4.0))
        >>> mll = StreamingELBO(gpytorch.likelihoods.GaussianLikelihood(), model)
        >>> for chunk in torch.linspace(0.0, 4.0, 40).split(20):
        ...     optimiser = gpytorch.optim.NGD(model.variational_parameters(), num_data=20, lr=1.0)
        ...     loss = -mll(model(chunk), chunk.sin())
        ...     loss.backward()
        ...     optimiser.step()
        ...     model.variational_strategy.advance()  # the chunk is not needed any more
        >>> bool((model.eval()(torch.tensor([2.0])).mean - 0.9).abs() < 0.1)
        True
    """

    def __init__(
        self,
        likelihood: Likelihood,
        model: ApproximateGP,
        num_data: int | None = None,
        beta: float = 1.0,
        combine_terms: bool = True,
    ) -> None:
        chunk = 1 if num_data is None else check_count("num_data", num_data)
        super().__init__(likelihood, model, num_data=chunk, beta=beta, combine_terms=combine_terms)
        self.one_batch_a_chunk = num_data is None

    def forward(self, approximate_dist_f: MultivariateNormal, target: Tensor, **kwargs: Any) -> Tensor:
        """The bound per observation, ``(*batch)``, in nats.

        Args:
            approximate_dist_f: q(f) at the inputs of the batch.
            target: ``(*batch, n)``.
            kwargs: handed to the likelihood.
        """
        if self.one_batch_a_chunk:
            self.num_data = approximate_dist_f.event_shape[0]
        return super().forward(approximate_dist_f, target, **kwargs)
