"""Training under the noise of Gaussian processes that always know where the tokens are at the moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from gpseq.checks import check_count, check_number
from gpseq.nn.capture import called, check_fittable, layers_with_keys, mean_depends_on_keys
from gpseq.nn.covariance import fit_covariance
from gpseq.nn.surgery import is_replaced, replace_attention, unchanged_on_error
from gpseq.sgpa.arguments import check_choice

DRAWS = ("marginal", "joint", "pathwise")


class CovarianceRefit:
    r"""Lets a model train under Gaussian noise in its attention, whose covariance is set again from time to time.

    Learnt by a bound on the evidence, such noise goes away, or attention does, and inducing keys lose sight of the
    tokens. Here nothing of it is learnt: :func:`gpseq.nn.fit_covariance` puts inducing keys on tokens that the model
    sees now, and holds the noise on them at ``noise`` times the standard deviation of the heads. Between two fits the
    noise of a token grows with its distance from those tokens. Attention stays softmax attention, the mean of the
    process, and the loss is that of ordinary training, without a divergence.

    Noise costs accuracy where there is much of it. Beside dropout it may be too much, or just right: in the benchmarks
    images and intents want both, and sentences whose grammar is judged want noise in the place of dropout. Choose on
    validation data.

    Call the object before each step. It keeps no state besides what is in the model, and the draws of a fit depend on
    ``generator`` as it was at the start and on the step, so that a run that goes on from a checkpoint
    (:func:`gpseq.training.fit`) fits at the same steps and ends the same, if the loader does.

    After training, fit once more (:func:`gpseq.nn.fit_covariance`) and calibrate on held-out labels
    (:func:`gpseq.nn.calibrate`, for one pass; :func:`gpseq.nn.calibrate_noise`, for draws).

    Args:
        model: any module with attention that can be replaced, or was. Attention gets Gaussian processes in mode
            ``"residual"``, unless some has them already; then it stays at those. Their parameters are no longer
            trained. Build the optimiser afterwards.
        loader: batches of training data, as for :func:`gpseq.nn.fit_covariance`; a few that are always the same, or a
            loader that gives others every time. It is gone through at every fit: no iterator.
        noise: standard deviation of the noise on real tokens, relative to that of the heads.
        every: steps from one fit to the next. In the first of these spans, in which tokens move most, there are three
            more, after 1/8, 1/4 and 1/2 of it.
        num_inducing: M, inducing keys a head, for attention that is replaced here.
        sampling: ``"marginal"``, ``"joint"`` or ``"pathwise"``, see :class:`gpseq.nn.SGPAttention`.
        num_batches: how many batches a fit uses at most.
        max_tokens: how many tokens of a layer a fit uses at most.
        forward: called as ``forward(model, batch)`` in place of ``model(batch[0])``.
        generator: of the choice of inducing keys, on the CPU: one number is drawn from it here, which with the step
            decides all later draws. ``None`` is torch's default generator at every fit.

    Attributes:
        model: the model, with Gaussian processes; where it is itself an attention, what replaced it.

    Raises:
        TypeError: the loader is an iterator.
        ValueError: there is no attention, a layer's mean depends on inducing keys (any mode but ``"residual"`` with
            inducing values of zero) or its covariance is of low rank, or a number or option is out of its range. The
            model is as it was.

    Source:
        Liu et al. (2020), Simple and principled uncertainty estimation with deterministic deep learning, reset the
        covariance of a network's last layer at each epoch; here it is that of every attention, and it makes noise.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 1)
        >>> batches = [torch.randn(16, 5, 8) for _ in range(4)]
        >>> refit = CovarianceRefit(model, batches, num_inducing=8, every=50)
        >>> optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        >>> for step, x in enumerate(batches):
        ...     refit(step)
        ...     optimizer.zero_grad()
        ...     (model(x) - x).square().mean().backward()
        ...     optimizer.step()
        >>> [step for step in range(120) if refit.is_due(step)]
        [0, 6, 12, 25, 50, 100]
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loader: Iterable[Any],
        noise: float = 0.3,
        every: int = 150,
        num_inducing: int = 32,
        sampling: str = "marginal",
        num_batches: int = 10,
        max_tokens: int = 4096,
        forward: Callable[[torch.nn.Module, Any], Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.noise = check_number("noise", noise, above=0.0, expected="a positive number")
        self.every = check_count("every", every)
        check_choice("sampling", sampling, DRAWS)
        if isinstance(loader, Iterator):
            raise TypeError(
                f"loader: expected batches that can be gone through at every fit, such as a list or a DataLoader, got "
                f"{type(loader).__name__}, an iterator, which is empty after the first."
            )
        self.loader, self.forward = loader, forward
        self.num_batches = check_count("num_batches", num_batches)
        self.max_tokens = check_count("max_tokens", max_tokens)
        check_count("num_inducing", num_inducing)
        with unchanged_on_error(model):
            if not any(is_replaced(module) for module in model.modules()):
                model = replace_attention(model, mode="residual", num_inducing=num_inducing, sampling=sampling)
            layers = layers_with_keys(model)
            for name, layer in layers.items():
                if mean_depends_on_keys(layer):
                    raise ValueError(
                        f"model: expected layers whose mean does not depend on inducing keys, {called(name)} has "
                        "another; see mode 'residual'."
                    )
            check_fittable(layers)
            self._seed = None if generator is None else int(torch.randint(2**62, (), generator=generator))
        self.model = model
        for layer in layers.values():
            layer.sampling = sampling
            layer.inducing.requires_grad_(False)

    def is_due(self, step: int) -> bool:
        """Whether a fit comes before a step.

        Args:
            step: from 0, over all epochs.
        """
        step = check_count("step", step, least=0)
        return step % self.every == 0 or step in {self.every // part for part in (8, 4, 2)}

    def __call__(self, step: int) -> None:
        """Fit, if it is time.

        Args:
            step: the number of the training step that comes next, from 0, over all epochs.
        """
        if self.is_due(step):
            self.fit(step)

    def fit(self, step: int = 0) -> None:
        """Set keys, length-scales, covariances and the noise's scale from the tokens that the model sees now.

        Args:
            step: whose draws are made, where a generator was given.

        Raises:
            RuntimeError: as :func:`gpseq.nn.fit_covariance`.
            TypeError: as :func:`gpseq.nn.fit_covariance`.
            ValueError: as :func:`gpseq.nn.fit_covariance`. The model is as it was.
        """
        generator = None if self._seed is None else torch.Generator().manual_seed(self._seed + step)
        fit_covariance(
            self.model,
            self.loader,
            noise=self.noise,
            num_batches=self.num_batches,
            max_tokens=self.max_tokens,
            forward=self.forward,
            generator=generator,
        )
