"""Training of a student that is one probabilistic step, from a teacher that is many blocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gpseq import training
from gpseq.nn.capture import evaluating
from gpseq.nn.generator import undisturbed, use_generator
from gpseq.reconfiguration.batches import batch_parts
from gpseq.reconfiguration.blocks import find_kind
from gpseq.reconfiguration.defaults import make_kernel
from gpseq.reconfiguration.kernel import TransitionKernel
from gpseq.reconfiguration.objectives import mean_over_seen, transition_loss
from gpseq.reconfiguration.options import FLOOR, Options
from gpseq.reconfiguration.path import Path, capture, check_eval
from gpseq.reconfiguration.rollout import Record, drawing, knows_length, recording_steps
from gpseq.reconfiguration.spread import as_source, teacher_moments
from gpseq.reconfiguration.stack import find_stack
from gpseq.reconfiguration.student import make_student
from gpseq.reconfiguration.tasks import choose_task, loss_of_output


class Distiller:
    r"""Distil a pre-trained transformer into one Gaussian transition that is applied again and again.

    .. math::
        \lambda_p \frac1L \sum_{l=1}^L \mathrm E\Bigl[\frac1D \sum_i \operatorname{KL}\bigl(
        N(\mu_{l,i}, \sigma_{l,i}^2) \,\|\, N(\mu_i(X_{l-1}, t_l), s_i^2(X_{l-1}, t_l))\bigr)\Bigr]
        + \lambda_t \, \text{task},

    with the teacher's moments on the left and the student's on the right, averaged over the batch and the tokens that
    are seen. The student's states are those of its own rollout, so that it learns to repair its own errors, or those of
    the teacher (``forcing``), or both.

    The student is a copy of the teacher in which the blocks' container holds the chain in their place: it takes the
    same arguments and gives the same outputs. The teacher is never changed.

    Args:
        teacher: any module with blocks behind one another, in eval mode.
        kernel: the step, any module with ``conditional(x, t, mask=None) -> (mean, variance)``, and ``dt`` for random
            steps; ``None`` makes a :class:`~gpseq.reconfiguration.TransitionKernel` of the blocks' width, no larger
            with the kept half block than 60 % of what is replaced if that can be, with a dropout of 0.1.
        points: where the chain is cut: ``"attention"``, ``"block"``, or names of blocks; see
            :func:`~gpseq.reconfiguration.find_stack`.
        first_block: how many blocks are kept.
        spread: of the teacher: ``"floor"``, ``"gp"``, ``"mc_dropout"``, or a source; see
            :mod:`gpseq.reconfiguration.spread`.
        path_loss: ``"kl"`` of the teacher's transition from the student's, ``"nll"`` of the teacher's states,
            ``"mse"``, or ``"reverse_kl"``.
        forcing: ``"rollout"``, ``"teacher"`` (each step from the teacher's state), or the weight of the latter, a
            number from 0 to 1 or a function of the step of training.
        task_loss: ``"ce"`` of labels, ``"kd"``, the divergence of the teacher's probabilities, ``None``, or a function
            of logits and labels; ``"auto"`` is ``"ce"`` where there are labels and ``"kd"`` where there are none. Of
            models that take ``labels`` beside a mapping of inputs and return a loss, that is ``"ce"``: language models
            shift them.
        weights: of ``"path"`` and ``"task"``, and for ``"mse"`` of ``"mean"`` and ``"spread"``.
        normalise: whether ``"mse"`` is relative to the size of each transition.
        steps: ``"fixed"``, or ``"random"``: the kernel sees steps of many lengths, for
            :func:`~gpseq.reconfiguration.with_steps`.
        temperature: of ``"kd"``.
        floor: of the teacher's spread, in parts of the size of the increments.
        reduction: ``"mean"`` over transitions and features, or ``"sum"``: with ``path_loss="kl"``,
            ``forcing="teacher"`` and no task it is the divergence of the two chains, averaged over tokens and the
            batch.
        init: how a kernel that is made here starts: ``"mean"``, from the mean of the replaced blocks' matrices,
            ``"zero"``, as the identity, or ``"auto"``, the former where those are known and fit.
        train_head: whether the rest of the student is trained as well; otherwise it stays the teacher's.
        preset: ``"director"`` for the published recipe: all options from ``path_loss`` to ``normalise`` are its own.
        generator: of the student's draws, and of random steps; ``None`` is torch's default generator.
        kernel_options: further arguments of the kernel that is made here.

    Attributes:
        teacher: as given.
        student: see above; draws in train mode, follows the means in eval mode.
        stack: the replaced blocks.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: the teacher trains, no blocks are found (the message lists candidates), an unknown option, a spread
            of zero with a loss that divides by it, or nothing that the student could learn from.

    Source:
        Dao et al. (2026), arXiv 2602.08920, for the idea and the preset; objectives on the student's own path, and
        divergences in the place of squared errors, are derived in the guide.

    Example:
        >>> torch.manual_seed(0)
        <torch...Generator object at ...>
        >>> layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=32, batch_first=True, norm_first=True)
        >>> teacher = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()
        >>> distiller = Distiller(teacher, task_loss=None)
        >>> history = distiller.fit([torch.randn(16, 5, 8) for _ in range(4)], epochs=2)
        >>> distiller.student(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        teacher: nn.Module,
        kernel: nn.Module | None = None,
        points: str | Sequence[str] = "attention",
        first_block: int = 0,
        spread: Any = "floor",
        path_loss: str = "kl",
        forcing: str | float | Callable[[int], float] = "rollout",
        task_loss: str | Callable[[Tensor, Tensor], Tensor] | None = "auto",
        *,
        weights: Mapping[str, float] | None = None,
        normalise: bool = True,
        steps: str = "fixed",
        temperature: float = 1.0,
        floor: float = FLOOR,
        reduction: str = "mean",
        init: str = "auto",
        train_head: bool = False,
        preset: str | None = None,
        generator: torch.Generator | None = None,
        **kernel_options: Any,
    ) -> None:
        check_eval(teacher)
        for name, value, known in (
            ("init", init, ("auto", "zero", "mean")),
            ("preset", preset, (None, "director")),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(map(str, known))}, got {value!r}.")
        if kernel is not None:
            if kernel_options:
                raise TypeError(f"kernel_options: expected none beside a kernel, got {', '.join(kernel_options)}.")
            if not isinstance(kernel, nn.Module) or not callable(getattr(kernel, "conditional", None)):
                raise TypeError(f"kernel: expected a module with conditional(x, t, mask), got {type(kernel).__name__}.")
            if init == "mean":
                raise ValueError(f"init: expected 'auto' beside a kernel, which starts as it is, got {init!r}.")
            if steps == "random" and not knows_length(kernel):
                raise ValueError(
                    f"steps: expected 'fixed', as {type(kernel).__name__}.conditional takes no dt, the length of a "
                    "step, got 'random'."
                )
        self.source = as_source(spread)
        options = Options(path_loss, forcing, task_loss, weights or {}, normalise, temperature, floor, reduction, steps)
        self.options = options if preset is None else options.director(self.source is not None)
        if self.source is None and self.options.needs_spread:
            raise ValueError(
                f"floor: expected a positive number, as the teacher has no spread and path_loss={path_loss!r} divides "
                "by it, got 0."
            )
        self.teacher = teacher
        self.stack = find_stack(teacher, points, first_block)
        self.init, self.train_head, self.generator = init if kernel is None else "zero", train_head, generator
        self._validates = False
        self._calibrated_at: int | None = None
        if kernel is None:
            kernel = make_kernel(self.stack, kernel_options)
        if self.init != "zero":
            self._start(kernel)  # once more when sizes are known, but errors come early
        self.student, self.rollout = make_student(teacher, self.stack, kernel)
        self.rollout.trained_steps = steps
        self.student.requires_grad_(train_head)
        self.rollout.kernel.requires_grad_(True)

    def loss(self, x: Any, y: Tensor | None = None, step: int | None = None) -> Tensor:
        """What is to be small, for any training loop.

        Args:
            x: inputs of the teacher, a tensor or a mapping of arguments.
            y: labels, ``(B,)`` or ``(B, T)``, of which -100 is left out; whatever a function as ``task_loss`` takes.
            step: of training, for a forcing that depends on it.

        Returns:
            A number with a graph.

        Raises:
            ValueError: labels are missing, or a zero spread meets a loss that divides by it.
        """
        return self.losses(x, y, step)["loss"]

    def losses(self, x: Any, y: Tensor | None = None, step: int | None = None) -> dict[str, Tensor]:
        """The loss and what it consists of.

        Args:
            x: as for :meth:`loss`.
            y: likewise.
            step: likewise.

        Returns:
            ``"loss"``, with its graph; ``"path"``, ``"task"`` (without their weights), ``"layers"``, the path's loss of
            each transition, and ``"spread"``, the student's mean deviation at each, without.

        Raises:
            ValueError: as for :meth:`loss`.
        """
        options = self.options
        task = choose_task(options, self.teacher, x, y)
        with torch.no_grad(), undisturbed(self.teacher):
            path = capture(self.teacher, x, self.stack)
            if not path.states[0].numel():
                raise ValueError(f"x: expected at least one token, got states {tuple(path.states[0].shape)}.")
            if not self.is_calibrated:
                self._calibrate(path)
            floor = options.floor * self.rollout.increments
            means, variances = teacher_moments(path, self.source, floor)
            if options.needs_spread and any(bool((value <= 0).any()) for value in variances):
                raise ValueError(
                    f"spread: expected variances that are positive with path_loss={options.path_loss!r}, got some of "
                    "zero; take a floor."
                )
        path = replace(path, means=means, variances=variances)
        times = self._times()
        forced = options.forced(step)
        output, record = None, None
        if task is not None or forced < 1:
            given = {**x, "labels": y} if task == "own" else x
            output, record = self._roll(given, path, times, task is not None)
        layers = torch.zeros((), device=path.states[0].device, dtype=path.states[0].dtype)
        spread = None
        if options.weight("path"):
            if forced < 1:
                assert record is not None
                layers = layers + (1 - forced) * self._compare(path, record, times)
                spread = record.spread()
            if forced > 0:
                one = self._step_by_step(path, times)
                layers = layers + forced * self._compare(path, one, times)
                spread = one.spread() if spread is None else spread
        total = layers.sum() if options.reduction == "sum" else layers.mean()
        loss = options.weight("path") * total
        found = {"path": total.detach(), "layers": layers.detach()}
        if spread is not None:
            found["spread"] = spread.detach().mean(0)
        if task is not None:
            value = loss_of_output(task, output, path, y, options.temperature)
            loss = loss + options.weight("task") * value
            found["task"] = value.detach()
        return {"loss": loss, **found}

    def fit(
        self,
        loader: Iterable[Any],
        epochs: int,
        learning_rate: float = 3e-3,
        *,
        weight_decay: float = 1e-4,
        warmup: float = 0.1,
        max_grad_norm: float | None = 1.0,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        validation: Iterable[Any] | None = None,
        validate: Callable[[nn.Module], float] | None = None,
        mode: str = "min",
        patience: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = True,
        device: torch.device | str | None = None,
        progress: bool | None = None,
    ) -> training.History:
        """Train the student: :func:`gpseq.training.fit` on :meth:`loss`.

        Args:
            loader: batches, again at each epoch: inputs, pairs of inputs and labels, or mappings, whose ``"labels"``
                are taken out of them.
            epochs: of the whole run.
            learning_rate: of AdamW at its peak; it rises in a line and falls along half a cosine.
            weight_decay: of AdamW.
            warmup: part of all steps in which the rate rises.
            max_grad_norm: gradients are shortened to this norm.
            optimizer: instead of AdamW; then there is no schedule but ``scheduler``.
            scheduler: of ``optimizer``, stepped at each step.
            validation: batches on which the loss, without dropout, is the score that the best epoch is chosen by, and
                ``patience`` counts.
            validate: instead of it, a function of the student that gives a score.
            mode: whether the best score is the smallest, ``"min"``, or the largest, ``"max"``.
            patience: stop when so many epochs were no better.
            checkpoint: a file, from which an interrupted run goes on.
            resume: whether it does.
            device: where batches are moved to.
            progress: as in :func:`gpseq.training.fit`.

        Returns:
            What happened. The student is in eval mode.

        Raises:
            ValueError: an argument is not as it should be, or as for :meth:`loss`.
        """
        if validation is not None and validate is not None:
            raise ValueError("validation: expected either batches or validate, got both.")
        if scheduler is not None and optimizer is None:
            raise ValueError("scheduler: expected one beside its optimizer, got one without.")
        trained = [value for value in self.student.parameters() if value.requires_grad]
        if optimizer is None:
            optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
            try:
                steps = epochs * len(loader)  # type: ignore[arg-type]
            except TypeError as error:
                raise ValueError(
                    "loader: expected one with a length, for the schedule; or give an optimizer."
                ) from error
            if steps > 0:
                scheduler = training.warmup_cosine(optimizer, steps, min(round(warmup * steps), steps - 1))
        check: Callable[[nn.Module], float] | None = validate
        if validation is not None:
            batches = validation

            def check(student: nn.Module) -> float:
                return self._validated(batches, device, step_now)

        step_now = 0

        def loss(model: nn.Module, batch: Any, step: int) -> Tensor:
            nonlocal step_now
            step_now = step
            return self.loss(*batch_parts(batch), step=step)

        model = self.student if self.train_head else self.rollout
        try:
            return training.fit(
                model,
                loss,
                loader,
                optimizer=optimizer,
                epochs=epochs,
                validate=None if check is None else lambda model: check(self.student),
                mode=mode,  # type: ignore[arg-type]
                patience=patience,
                max_grad_norm=max_grad_norm,
                scheduler=scheduler,
                schedule="step",
                checkpoint=checkpoint,
                resume=resume,
                generators=() if self.generator is None else (self.generator,),
                device=device,
                progress=progress,
            )
        finally:
            self.student.eval()

    # What the loss consists of

    @property
    def is_calibrated(self) -> bool:
        """Whether the sizes of the teacher's increments are known; the first batch tells them."""
        version = self.rollout.increments._version  # looked at again only where it was written to: that waits for a GPU
        if self._calibrated_at != version:
            self._calibrated_at = version if bool((self.rollout.increments > 0).all()) else None
        return self._calibrated_at == version

    def calibrate(self, x: Any) -> Tensor:
        """Measure the sizes of the teacher's increments, which the floor and the kernel's steps are relative to.

        Args:
            x: inputs of the teacher; without a call, the first batch is taken.

        Returns:
            Root mean squares over features and tokens that are seen, ``(L,)``.
        """
        with torch.no_grad(), undisturbed(self.teacher):
            return self._calibrate(capture(self.teacher, x, self.stack))

    def _calibrate(self, path: Path) -> Tensor:
        sizes = []
        for before, after in pairwise(path.states):
            sizes.append(mean_over_seen((after - before).square().mean(-1), path.padding).sqrt())
        found = torch.stack(sizes)
        if not (found > 0).all() or not found.isfinite().all():
            raise ValueError(
                f"teacher: expected increments that are finite and not zero, got root mean squares {found.tolist()}."
            )
        starts = self.init != "zero" and not self.is_calibrated  # before training, not again behind it
        self.rollout.increments.copy_(found)
        kernel = self.rollout.kernel
        if isinstance(kernel, TransitionKernel) and len(kernel.increments) == len(found):
            kernel.set_increments(found.to(kernel.increments))
        if starts:
            self._start(kernel)
        return found

    def _start(self, kernel: Any) -> None:
        """Start a kernel from the mean of the replaced blocks."""
        kind = self.stack.kind or find_kind(self.stack.blocks[0])
        parts = None if kind is None else kind.parts
        begun = parts is not None and kernel.start_from([parts(block) for block in self.stack.blocks])
        if not begun and self.init == "mean":
            raise ValueError(
                "init: expected blocks whose matrices are known and fit the kernel for 'mean', got "
                f"{type(self.stack.blocks[0]).__name__}; take 'zero'."
            )

    def _times(self) -> tuple[float, ...]:
        """Where steps begin and end: evenly, or in every other call at some of these places."""
        number = len(self.stack)
        every = tuple(place / number for place in range(number + 1))
        if self.options.steps == "fixed" or number == 1 or self._validates:
            return every
        place_of_draws = "cpu" if self.generator is None else self.generator.device  # whatever the model is on
        drawn = torch.rand(number, generator=self.generator, device=place_of_draws).tolist()
        if drawn[0] < 0.5:
            return every
        inner = [place for place, value in zip(every[1:-1], drawn[1:], strict=True) if value < drawn[0] * 2 - 1]
        return (0.0, *inner, 1.0)

    def _roll(self, x: Any, path: Path, times: tuple[float, ...], with_output: bool) -> tuple[Any, Record]:
        """The student's own path, and its output where that is asked for."""
        with ExitStack() as stack:
            stack.enter_context(use_generator(self.rollout, self.generator))
            records = stack.enter_context(recording_steps(self.rollout, times))
            stack.enter_context(drawing(self.rollout))
            stack.enter_context(self._modes())
            if with_output:
                return (self.student(**x) if isinstance(x, Mapping) else self.student(x)), records[0]
            self.rollout.roll(path.states[0], path.masks)
            return None, records[0]

    @contextmanager
    def _modes(self) -> Iterator[None]:
        """What is trained in train mode, unless the loss is a score, and all else in eval mode."""
        with evaluating(self.student):
            if not self._validates:
                self.rollout.kernel.train()
                if self.train_head:
                    self.student.train()
            yield

    def _step_by_step(self, path: Path, times: tuple[float, ...]) -> Record:
        """Each step from the teacher's state."""
        record = Record(padding=path.padding)
        with self._modes():
            for begin, end in pairwise(times):
                x = path.states[_place(begin, path)]
                record.add(x, *self.rollout.step(x, end, path.masks, end - begin))
        return record

    def _compare(self, path: Path, record: Record, times: tuple[float, ...]) -> Tensor:
        """The path's loss of each step, of which there may be fewer than transitions of the teacher.

        A merged transition has the mean of its last one and the sum of the variances: what earlier ones spread is taken
        as it is, without the way through those behind it.
        """
        assert path.means is not None and path.variances is not None
        options, sizes = self.options, self.rollout.increments
        losses = []
        for number, (begin, end) in enumerate(pairwise(times)):
            first, last = _place(begin, path), _place(end, path)
            variance = sum(path.variances[first + 1 : last], path.variances[first])
            size = sizes[first:last].square().sum().sqrt().to(path.states[0].dtype) if options.normalise else 1.0
            values = transition_loss(
                options.path_loss,
                path.states[last],
                (path.means[last - 1], variance),
                (record.means[number], record.variances[number]),
                size,
                options.weight("mean"),
                options.weight("spread"),
            )
            each = values.sum(-1) if options.reduction == "sum" else values.mean(-1)
            losses.append(mean_over_seen(each, path.padding))
        return torch.stack(losses)

    @torch.no_grad()
    def _validated(self, batches: Iterable[Any], device: torch.device | str | None, step: int) -> float:
        """Mean loss on some batches, along all steps and without dropout."""
        total, number = 0.0, 0
        self._validates = True
        try:
            for batch in batches:
                parts = batch_parts(batch if device is None else training.move(batch, device))
                total += float(self.loss(*parts, step=step))
                number += 1
        finally:
            self._validates = False
        if not number:
            raise ValueError("validation: expected batches, got none.")
        return total / number


def _place(time: float, path: Path) -> int:
    return round(time * len(path))
