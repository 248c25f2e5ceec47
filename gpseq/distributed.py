r"""Several processes that learn as one: sums of natural parameters, in torch's own process groups.

What a chunk adds to a belief is a sum over its observations,

.. math:: \Delta G = \sum_p A_p D_p A_p^\top, \qquad \Delta r = \sum_p A_p D_p (y_p - \mu_p),

so processes that hold its parts need one exchange of :math:`M^2 + M + 2` numbers to sum it. Models agree before it
that no part is refused, and exchange the inputs, by which features move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ProcessError(RuntimeError):
    """Another process did not take part in an exchange: it has died, hangs, or is about something else."""


class ProcessShards:
    r"""The processes of a group, each with a part of what is learnt.

    Handed to ``StreamingGP.update`` in each process, which then all end with the posterior of all parts together: the
    same numbers in all of them, and those of one process with all the data, up to the order of sums. Models and their
    states have to be the same before.

    What one process refuses (values that are not finite, say) is refused by all of them, and no model changes. Where
    a process dies the others get a :class:`ProcessError`, at once or after the timeout of the group, and keep the
    belief that they had.

    Args:
        group: of ``torch.distributed``; ``None`` is the default group.

    Raises:
        RuntimeError: there is no such group; call ``torch.distributed.init_process_group`` first.

    Example:
        >>> # torchrun --nproc-per-node 2 script.py
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo")  # doctest: +SKIP
        >>> shards = ProcessShards()  # doctest: +SKIP
        >>> model.update(x_part, y_part, shards=shards)  # doctest: +SKIP
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("group: expected a process group; call torch.distributed.init_process_group first.")
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def agree(self, problem: Exception | None, signature: tuple[int, ...] = ()) -> None:
        """Raise in all processes if one has a problem, or if their signatures differ.

        Args:
            problem: of this one; it is raised here.
            signature: numbers that have to be the same in all, as many in each.

        Raises:
            ValueError: another process has a problem, or its signature is another.
            ProcessError: a process does not answer.
        """
        mine = torch.tensor([0 if problem is None else 1, *signature], dtype=torch.int64, device=self._device())
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        self._exchange(lambda: dist.all_gather(everyone, mine, group=self.group))
        if problem is not None:
            raise problem
        said = torch.stack(everyone).cpu()
        if failed := said[:, 0].nonzero().flatten().tolist():
            raise ValueError(f"shards: process {failed[0]} of {self.size} has refused its part; nothing was learnt.")
        for rank, numbers in enumerate(said[:, 1:].tolist()):
            if tuple(numbers) != tuple(signature):
                raise ValueError(
                    "shards: expected models and shapes that are the same in all processes, got "
                    f"{tuple(signature)} in process {self.rank} and {tuple(numbers)} in process {rank}."
                )

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all processes, in their order.

        Args:
            x: ``(n, d)``; n may differ.

        Returns:
            ``(N, d)``.

        Raises:
            ProcessError: a process does not answer.
        """
        count = torch.tensor([len(x)], dtype=torch.int64, device=x.device)
        counts = [torch.empty_like(count) for _ in range(self.size)]
        self._exchange(lambda: dist.all_gather(counts, count, group=self.group))
        lengths = torch.cat(counts).tolist()
        padded = x.new_zeros(max(lengths), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        self._exchange(lambda: dist.all_gather(parts, padded, group=self.group))
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def total(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Sums over all processes, in one exchange.

        Args:
            values: of one dtype, and of the same shapes in all processes.

        Raises:
            ProcessError: a process does not answer.
        """
        together = torch.cat([value.reshape(-1) for value in values])
        self._exchange(lambda: dist.all_reduce(together, group=self.group))
        parts = together.split([value.numel() for value in values])
        return tuple(part.reshape(value.shape) for part, value in zip(parts, values, strict=True))

    def largest(self, value: Tensor) -> Tensor:
        """Element by element the largest of all processes.

        Args:
            value: of the same shape in all of them.

        Raises:
            ProcessError: a process does not answer.
        """
        value = value.clone()
        self._exchange(lambda: dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group))
        return value

    def _device(self) -> torch.device:
        return torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")

    def _exchange(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except RuntimeError as error:
            raise ProcessError(
                f"shards: process {self.rank} of {self.size} got no answer from another one, which has died or hangs; "
                f"nothing was learnt. ({str(error).splitlines()[0]})"
            ) from error


def average_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Give replicated parameters the mean of their gradients over all processes, in one exchange a dtype.

    What ``DistributedDataParallel`` does for a whole model, for the parameters that are outside of what is sharded:
    inducing points, kernels, and those with no dimension, which ``FullyShardedDataParallel`` refuses. Where only some
    processes have a gradient, the others count as zero.

    Args:
        parameters: the same ones in the same order in all processes, on one device.
        group: of ``torch.distributed``; ``None`` is the default group.

    Raises:
        RuntimeError: there is no such group.
        ProcessError: a process does not answer.
    """
    shards = ProcessShards(group)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for members in by_dtype.values():
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
        for parameter, total in zip(members, shards.total(*gradients), strict=True):
            parameter.grad = total / shards.size
