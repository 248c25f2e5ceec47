"""More streams than one process should hold: fleets in files, mapped into memory, a shard at a time."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpytorch.distributions import MultivariateNormal
from linear_operator import to_linear_operator
from torch import Tensor

from gpseq.checks import check_count
from gpseq.models.fleet import StreamingFleet
from gpseq.models.fleet_inputs import arranged, check_places, check_streams
from gpseq.models.observations import is_gaussian
from gpseq.models.streaming_gp import StreamingGP
from gpseq.storage import Replacement, StorageError, load, save

_KIND, _SHARD = "fleet 1", "shard of a fleet 1"
_INDEX = "fleet.safetensors"
_COUNT = "variational_strategy.belief.count"


class FleetStore:
    r"""S independent streams in a folder: shards of :class:`StreamingFleet`, each in a safetensors file of its own.

    Memory holds one shard at a time, however many streams there are. Files are mapped rather than read; an update
    writes those shards whose streams have news, beside the old files, and puts them in their places when all are on
    the disk. An update that raises leaves every file as it was. Stream s is stream s mod P of shard s // P, where P is
    the number of streams of the prototype; a shard that has seen nothing has no file.

    **Exactly once.** Give each chunk of a feed its ``position``, a number that rises. A shard keeps the position of
    the last chunk that it took in, and passes over chunks up to it. So after a crash, of which it is not known how far
    it got, the same chunks are simply brought again: what has been learnt is not learnt twice. A retry that another
    process makes of the same chunk writes the same bytes.

    **Several processes** share a folder by its shards, see :meth:`part`; nothing has to be exchanged between them. Each
    shard has one writer at a time.

    Args:
        directory: the folder; it is made if there is none.
        prototype: a fleet of P streams that has seen nothing, with features, kernel, mean, likelihood and options of
            all shards. Of a folder that exists its hyperparameters are those of the folder.
        num_streams: S; ``None`` for a folder that exists.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a prototype that has begun or does not fit the folder, or another number of streams.
        FileNotFoundError: no number of streams was given, and there is no fleet in the folder.
        gpseq.storage.StorageError: a file is damaged, or of something else.

    Example:
        >>> import gpseq, gpytorch, tempfile
        >>> prototype = StreamingFleet(
        ...     100,
        ...     gpseq.features.HippoFeatures(num_features=16, horizon=5.0),
        ...     gpytorch.kernels.RBFKernel(),
        ...     gpytorch.likelihoods.GaussianLikelihood(),
        ... )
        >>> folder = tempfile.mkdtemp()
        >>> store = FleetStore(folder, prototype, num_streams=1000)
        >>> t, y = torch.tensor([1.0, 2.0]), torch.randn(3, 2)
        >>> store = store.update(t, y, streams=[5, 17, 801], position=1)
        >>> store = store.update(t, y, streams=[5, 17, 801], position=1)  # brought once more: nothing happens
        >>> again = FleetStore(folder, prototype)
        >>> again.num_shards, again.counts([17, 18]).tolist(), again.predict(t, [801]).mean.shape
        (10, [2, 0], torch.Size([1, 2]))
    """

    def __init__(
        self, directory: str | os.PathLike[str], prototype: StreamingFleet, num_streams: int | None = None
    ) -> None:
        if not isinstance(prototype, StreamingFleet):
            raise TypeError(f"prototype: expected a StreamingFleet, got {type(prototype).__name__}.")
        if prototype._now.r.dim() != 2 or bool(prototype.counts.any()):
            raise ValueError("prototype: expected a fleet that has seen nothing.")
        if num_streams is not None:
            check_count("num_streams", num_streams)
        self.directory = Path(directory)
        self._fleet = copy.deepcopy(prototype).eval()  # holds one shard after the other
        self.shard_size = prototype.num_streams
        index = self.directory / _INDEX
        if not index.exists():
            if num_streams is None:
                raise FileNotFoundError(f"{index}: there is no fleet yet; num_streams makes one.")
            self.directory.mkdir(parents=True, exist_ok=True)
            sizes = {"num_streams": num_streams, "shard_size": self.shard_size}
            save(index, self._fleet.state_dict(), {"kind": _KIND, **sizes})
        self._blank, about = load(index)
        if about.get("kind") != _KIND:
            raise StorageError(f"{index} is not the index of a fleet.")
        if about["shard_size"] != self.shard_size:
            raise ValueError(
                f"prototype: expected {about['shard_size']} streams, as in {index}, got {self.shard_size}."
            )
        if num_streams not in (None, about["num_streams"]):
            raise ValueError(f"num_streams: expected {about['num_streams']}, as in {index}, got {num_streams}.")
        self.num_streams: int = about["num_streams"]
        self._fill(self._blank, index)
        self._own: range = range(self.num_shards)
        self._verified: dict[int, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return self.num_streams

    def __repr__(self) -> str:
        sizes = f"{self.num_streams} streams in {self.num_shards} shards"
        return f"{type(self).__name__}({os.fspath(self.directory)!r}, {sizes})"

    @property
    def num_shards(self) -> int:
        """Number of shards, ceil(S / P)."""
        return -(-self.num_streams // self.shard_size)

    def part(self, rank: int, size: int) -> FleetStore:
        """This folder for one of several processes: its updates take in the streams of its own shards, and no others.

        Shard i belongs to process i mod ``size``. Each may be brought the whole chunk, or only its own streams.

        Args:
            rank: of the process, from 0; such as ``torch.distributed.get_rank()``.
            size: how many processes there are.

        Returns:
            A store that predicts for all streams, and learns for its own.

        Raises:
            ValueError: a rank that does not exist.
        """
        check_count("size", size)
        check_count("rank", rank, least=0)
        if rank >= size:
            raise ValueError(f"rank: expected a number from 0 to {size - 1}, got {rank}.")
        new = copy.copy(self)
        new._fleet, new._verified = copy.deepcopy(self._fleet), {}
        new._own = range(rank, self.num_shards, size)
        return new

    @property
    def positions(self) -> Tensor:
        """Positions of the last chunks that the shards took in, ``(num_shards,)``, int64; -1 where there is none."""
        return torch.tensor([self._position(shard) for shard in range(self.num_shards)])

    def counts(self, streams: Tensor | Sequence[int] | None = None) -> Tensor:
        """Observations absorbed by streams.

        Args:
            streams: indices ``(k,)``; ``None`` means all.

        Returns:
            ``(k,)`` or ``(S,)``, int64.
        """
        num = self.num_streams if streams is None else len(streams)
        found = torch.zeros(num, dtype=torch.int64)
        for shard, rows, local in self._split(streams, range(self.num_shards)):
            found[rows] = self._read(shard)[0][_COUNT][local]
        return found

    def update(
        self,
        x: Tensor,
        y: Tensor,
        noise: Tensor | None = None,
        missing: str = "skip",
        steps: int | None = None,
        step_size: float | None = None,
        streams: Tensor | Sequence[int] | None = None,
        *,
        position: int | None = None,
    ) -> FleetStore:
        """Absorb new observations of all streams, or of some, and write them down before this returns.

        Costs O(P) for every shard with news, because its file is written anew. Shards without any (all targets NaN, or
        no stream named) are not touched. An update that raises changes nothing. One that is killed leaves some shards
        with the chunk and some without it, if it comes to the renaming of files at all; the same ``position`` brought
        again completes it.

        Args:
            x: as in :meth:`StreamingFleet.update`.
            y: targets ``(S, n)``, or ``(k, n)`` with ``streams``; NaN where there is none.
            noise: as in :meth:`StreamingFleet.update`.
            missing: likewise.
            steps: likewise.
            step_size: likewise.
            streams: indices ``(k,)`` of different streams, in the order of the rows of ``y``.
            position: of the chunk in the feed, a number from 0 that rises from chunk to chunk. Shards that have taken
                in this position, or a later one, pass over it. ``None``: no such book is kept, and what is brought
                twice is learnt twice.

        Returns:
            The store itself.

        Raises:
            TypeError: as :meth:`StreamingFleet.update`.
            ValueError: likewise, or a position that is no number from 0.
            gpseq.storage.StorageError: a file is damaged.
            OSError: a file cannot be read or written.
        """
        if position is not None:
            check_count("position", position, least=0)
        num = self.num_streams if streams is None else len(streams)
        x, y = arranged(x, y, num, self._num_dims, missing, integers=not is_gaussian(self._fleet.likelihood))
        by_row = isinstance(noise, Tensor) and noise.dim() == 2 and len(noise) == num
        with Replacement() as files:
            for shard, rows, local in self._split(streams, self._own):
                if missing == "skip" and bool(y[rows].isnan().all()):
                    continue
                known, about = self._read(shard)
                last = about["position"]
                if position is not None and last >= position:
                    continue
                self._fill(known, self._file(shard))
                self._fleet.update(
                    x[rows] if x.dim() > 2 else x,
                    y[rows],
                    noise[rows] if by_row and noise is not None else noise,
                    missing,
                    steps,
                    step_size,
                    streams=local,
                )
                about = self._about(shard, last if position is None else position)
                files.save(self._file(shard), self._fleet.state_dict(), about)
        return self

    def predict(self, x: Tensor, streams: Tensor | Sequence[int]) -> MultivariateNormal:
        """Posterior of f of some streams.

        Args:
            x: inputs ``(n,)`` or ``(n, d)`` that all share, or own ones, ``(k, n, d)``.
            streams: indices ``(k,)``, each at most once.

        Returns:
            Distribution over ``(k, n)`` values, without correlations between streams. Its covariance is dense: for many
            places and streams, ask for some at a time.

        Raises:
            TypeError: ``x`` is not a floating-point tensor, or ``streams`` are not integers.
            ValueError: shapes that do not fit, no stream, or streams that do not exist or are named twice.
        """
        index = check_streams(streams, self.num_streams, torch.device("cpu"))
        if not len(index):
            raise ValueError("streams: expected at least one stream, got none.")
        x = check_places(x, self._num_dims, (len(index),))
        means, covariances, order = [], [], []
        with torch.no_grad():
            for shard, rows, local in self._split(index, range(self.num_shards)):
                self._fill(self._read(shard)[0], self._file(shard))
                found = self._fleet.predict(x[rows] if x.dim() > 2 else x, local)
                means.append(found.mean)
                covariances.append(found.covariance_matrix)
                order.append(rows)
            place = torch.cat(order).argsort()
            covariance = to_linear_operator(torch.cat(covariances)[place])  # a tensor would be factorised at once
            return MultivariateNormal(torch.cat(means)[place], covariance)

    def shard(self, number: int) -> StreamingFleet:
        """The streams of one shard as a fleet of their own: a copy, which goes its own way.

        Args:
            number: of the shard. The last one may hold streams beyond S, which have seen nothing.

        Returns:
            A fleet of P streams.
        """
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < self.num_shards:
            raise IndexError(f"number: expected a shard from 0 to {self.num_shards - 1}, got {number!r}.")
        self._fill(self._read(number)[0], self._file(number))
        return copy.deepcopy(self._fleet)

    def __getitem__(self, stream: int) -> StreamingGP:
        """One stream as a model of its own: a copy.

        Args:
            stream: its number.
        """
        if isinstance(stream, bool) or not isinstance(stream, int) or not 0 <= stream < self.num_streams:
            raise IndexError(f"stream: expected a stream from 0 to {self.num_streams - 1}, got {stream!r}.")
        one = self.shard(stream // self.shard_size)[stream % self.shard_size]
        assert isinstance(one, StreamingGP)
        return one

    @property
    def _num_dims(self) -> int:
        return self._fleet.features.num_dims

    def _split(self, streams: Tensor | Sequence[int] | None, shards: range) -> Iterator[tuple[int, Any, Tensor]]:
        """Shards, which rows of a chunk are theirs, and numbers of their streams in the shard."""
        if streams is None:
            for shard in shards:
                first = shard * self.shard_size
                rows = slice(first, min(first + self.shard_size, self.num_streams))
                yield shard, rows, torch.arange(rows.stop - rows.start)
            return
        index = check_streams(streams, self.num_streams, torch.device("cpu"))
        order = index.argsort()
        numbers, sizes = (index[order] // self.shard_size).unique_consecutive(return_counts=True)
        for number, rows in zip(numbers.tolist(), order.split(sizes.tolist()), strict=True):
            if number in shards:
                yield number, rows, index[rows] % self.shard_size

    def _file(self, shard: int) -> Path:
        return self.directory / f"shard-{shard:06d}.safetensors"

    def _about(self, shard: int, position: int) -> dict[str, Any]:
        return {"kind": _SHARD, "num_streams": self.num_streams, "shard": shard, "position": position}

    def _position(self, shard: int) -> int:
        file = self._file(shard)
        return load(file, mapped=True, verify=False)[1]["position"] if file.exists() else -1

    def _read(self, shard: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a shard knows, mapped, and what its file says of itself; it is verified once."""
        file = self._file(shard)
        try:
            status = file.stat()
        except FileNotFoundError:
            return self._blank, self._about(shard, -1)
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
        known, about = load(file, mapped=True, verify=self._verified.get(shard) != version)
        if about != self._about(shard, about.get("position", -1)):
            raise StorageError(f"{file} is not shard {shard} of a fleet of {self.num_streams} streams.")
        self._verified[shard] = version
        return known, about

    def _fill(self, known: dict[str, Tensor], file: Path) -> None:
        """Let the one fleet that is in memory be this shard."""
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._fleet.load_state_dict(known)
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"prototype: it does not fit {file}: {error}") from error
