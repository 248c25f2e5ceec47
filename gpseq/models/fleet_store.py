"""More streams than one process should hold: fleets in files, mapped into memory, a shard at a time."""

from __future__ import annotations

import copy
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from gpytorch.distributions import MultivariateNormal
from linear_operator import to_linear_operator
from torch import Tensor

from gpseq.checks import check_count
from gpseq.models.fleet import StreamingFleet
from gpseq.models.fleet_inputs import arranged, check_places, check_streams
from gpseq.models.observations import is_gaussian
from gpseq.models.streaming_gp import StreamingGP
from gpseq.storage import Replacement, StorageError, load, locked, save

_KIND, _SHARD = "fleet 1", "shard of a fleet 1"
_INDEX, _LOCK = "fleet.safetensors", ".lock"
_COUNT = "variational_strategy.belief.count"


class FleetStore:
    r"""S independent streams in a folder: shards of :class:`StreamingFleet`, each in a safetensors file of its own.

    Memory holds one shard at a time, however many streams there are. Files are mapped rather than read; an update
    writes those shards whose streams have news, beside the old files, and puts them in their places when all are on
    the disk. Stream s is stream s mod P of shard s // P, where P is the number of streams of the prototype; a shard
    that has seen nothing has no file.

    **Exactly once.** Give each chunk of a feed its ``position``, a number that rises. A shard keeps the position of
    the last chunk that it took in, and passes over chunks up to it. So after a crash, of which it is not known how far
    it got, the same chunks are simply brought again: what has been learnt is not learnt twice. All rows of a chunk that
    belong to one shard come in one call, because the rest of them would be passed over.

    **Several processes** share a folder by its shards, see :meth:`part`; nothing has to be exchanged between them. Who
    comes to a shard at which another process is writing waits, so that the retry of a chunk by a second process finds
    it learnt. Threads may share a store; they take turns.

    Args:
        directory: the folder; it is made if there is none.
        prototype: a fleet of P streams that has seen nothing, with features, kernel, mean, likelihood and options of
            all shards. Of a folder that exists it needs the same kinds of modules and dtypes; the values of
            hyperparameters are those of the folder, the options (such as ``learn``) those of the prototype.
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
        self.directory = Path(directory).absolute()
        self.shard_size = prototype.num_streams
        with torch.inference_mode(False):
            self._fleet = copy.deepcopy(prototype).eval()  # holds one shard after the other
        self._turn = threading.RLock()
        self._verified: dict[Path, tuple[int, ...]] = {}
        self._index = self.directory / _INDEX
        if num_streams is None and not self._index.exists():
            raise FileNotFoundError(f"{self._index}: there is no fleet yet; num_streams makes one.")
        if num_streams is not None:
            self._begin(num_streams)
        _, about = self._load(self._index)
        if about.get("kind") != _KIND:
            raise StorageError(f"{self._index} is not the index of a fleet.")
        if about["shard_size"] != self.shard_size:
            raise ValueError(
                f"prototype: expected {about['shard_size']} streams, as in {self._index}, got {self.shard_size}."
            )
        for expected, found in zip_longest(about["structure"], _structure(self._fleet), fillvalue="nothing more"):
            if found != expected:
                raise ValueError(f"prototype: expected {expected!r}, as in {self._index}, got {found!r}.")
        if num_streams not in (None, about["num_streams"]):
            raise ValueError(f"num_streams: expected {about['num_streams']}, as in {self._index}, got {num_streams}.")
        self.num_streams: int = about["num_streams"]
        # Of what all shards begin with: files of other fleets do not have it.
        self._fleet_id = hashlib.sha256(self._index.read_bytes()).hexdigest()[:16]
        self._own = range(self.num_shards)

    def _begin(self, num_streams: int) -> None:
        """Write the index, unless there is one: sizes, and what each shard begins with."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with locked(self.directory / _LOCK, [0]):
            if self._index.exists():
                return
            if any(self.directory.glob("shard-*.safetensors")):
                raise StorageError(f"{self._index} is gone, but there are shards of a fleet beside it.")
            about = {"num_streams": num_streams, "shard_size": self.shard_size, "structure": _structure(self._fleet)}
            save(self._index, self._fleet.state_dict(), {"kind": _KIND, **about})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_turn": None, "_verified": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._turn = threading.RLock()

    def __len__(self) -> int:
        return self.num_streams

    def __repr__(self) -> str:
        sizes = f"{self.num_streams} streams in {self.num_shards} shards"
        part = "" if len(self._own) == self.num_shards else f", of which {len(self._own)} are learnt here"
        return f"{type(self).__name__}({os.fspath(self.directory)!r}, {sizes}{part})"

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
            A store that predicts for all streams, and learns for its own. A part can be divided again.

        Raises:
            ValueError: a rank that does not exist.
        """
        check_count("size", size)
        check_count("rank", rank, least=0)
        if rank >= size:
            raise ValueError(f"rank: expected a number from 0 to {size - 1}, got {rank}.")
        with torch.inference_mode(False):
            new = copy.deepcopy(self)
        new._own = self._own[rank::size]
        return new

    @property
    def positions(self) -> Tensor:
        """Positions of the last chunks that the shards took in, ``(num_shards,)``, int64; -1 where there is none.

        Shards without news stay behind, so that the least of them says nothing of the feed.
        """
        return torch.tensor([self._read(shard)[1]["position"] for shard in range(self.num_shards)])

    def counts(self, streams: Tensor | Sequence[int] | None = None) -> Tensor:
        """Observations absorbed by streams.

        Args:
            streams: indices ``(k,)``; ``None`` means all.

        Returns:
            ``(k,)`` or ``(S,)``, int64.
        """
        index = self._checked(streams)
        found = torch.zeros(self.num_streams if index is None else len(index), dtype=torch.int64)
        for shard, rows, local in self._split(index, range(self.num_shards)):
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
        no stream named) are not touched. An update that raises changes no file, unless it is a rename that fails, or
        Ctrl-C between two of them. That, and a kill there, leaves some shards with the chunk and some without it; the
        same ``position`` brought again completes it.

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
            if position >= 2**63:
                raise ValueError(f"position: expected a number below 2**63, got {position}.")
        index = self._checked(streams)
        num = self.num_streams if index is None else len(index)
        x, y = arranged(x, y, num, self._num_dims, missing, integers=not is_gaussian(self._fleet.likelihood))
        by_row = _has_rows(noise, y)
        news = [
            (shard, rows, local)
            for shard, rows, local in self._split(index, self._own)
            if y[rows].numel() and not (missing == "skip" and bool(y[rows].isnan().all()))
        ]
        with locked(self.directory / _LOCK, [shard for shard, *_ in news]), self._turn, Replacement() as files:
            for shard, rows, local in news:
                known, about = self._read(shard)
                last = about["position"]
                if position is not None and last >= position:
                    continue
                self._fill(known)
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
        """Posterior of f of some streams, without gradients.

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
        index = self._checked(streams)
        if index is None or not len(index):
            raise ValueError("streams: expected at least one stream, got none.")
        x = check_places(x, self._num_dims, (len(index),))
        if x.dim() > 2 and x.shape[:-2] != (len(index),):
            own = f"({len(index)}, n, {self._num_dims})"
            raise ValueError(f"x: expected inputs (n, {self._num_dims}) or {own}, got shape {tuple(x.shape)}.")
        means, covariances, order = [], [], []
        with torch.no_grad():
            for shard, rows, local in self._split(index, range(self.num_shards)):
                with self._turn:
                    self._fill(self._read(shard)[0])
                    found = self._fleet.predict(x[rows] if x.dim() > 2 else x, local)
                    means.append(found.mean)
                    covariances.append(found.covariance_matrix)
                order.append(rows)
            place = torch.cat(order).argsort()
            covariance = to_linear_operator(torch.cat(covariances)[place])  # a tensor would be factorised at once
            return MultivariateNormal(torch.cat(means)[place], covariance)

    def shard(self, number: SupportsIndex) -> StreamingFleet:
        """The streams of one shard as a fleet of their own: a copy, in eval mode, which goes its own way.

        Args:
            number: of the shard. The last one may hold streams beyond S, which have seen nothing.

        Returns:
            A fleet of P streams.
        """
        number = _index(number, self.num_shards, "number", "a shard")
        with self._turn, torch.inference_mode(False):
            self._fill(self._read(number)[0])
            return copy.deepcopy(self._fleet)

    def __getitem__(self, stream: SupportsIndex) -> StreamingGP:
        """One stream as a model of its own: a copy.

        Args:
            stream: its number.
        """
        stream = _index(stream, self.num_streams, "stream", "a stream")
        one = self.shard(stream // self.shard_size)[stream % self.shard_size]
        assert isinstance(one, StreamingGP)
        return one

    @property
    def _num_dims(self) -> int:
        return self._fleet.features.num_dims

    def _checked(self, streams: Tensor | Sequence[int] | None) -> Tensor | None:
        return None if streams is None else check_streams(streams, self.num_streams, torch.device("cpu"))

    def _split(self, index: Tensor | None, shards: range) -> Iterator[tuple[int, Any, Tensor]]:
        """Shards in ascending order, which rows of a chunk are theirs, and numbers of their streams in the shard."""
        if index is None:
            for shard in shards:
                first = shard * self.shard_size
                rows = slice(first, min(first + self.shard_size, self.num_streams))
                yield shard, rows, torch.arange(rows.stop - rows.start)
            return
        order = index.argsort()
        numbers, sizes = (index[order] // self.shard_size).unique_consecutive(return_counts=True)
        for number, chosen in zip(numbers.tolist(), order.split(sizes.tolist()), strict=True):
            if number in shards:
                yield number, chosen, index[chosen] % self.shard_size

    def _file(self, shard: int) -> Path:
        return self.directory / f"shard-{shard:06d}.safetensors"

    def _about(self, shard: int, position: int) -> dict[str, Any]:
        return {"kind": _SHARD, "fleet": self._fleet_id, "shard": shard, "position": position}

    def _read(self, shard: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a shard knows, mapped, and what its file says of itself."""
        file = self._file(shard)
        try:
            known, about = self._load(file)
        except FileNotFoundError:
            return self._load(self._index)[0], self._about(shard, -1)
        if about != self._about(shard, about.get("position", -1)):
            raise StorageError(f"{file} is not shard {shard} of the fleet that begins in {self._index}.")
        return known, about

    def _load(self, file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A file, mapped; what is found once to be as it was written is not read again as a whole."""
        status = file.stat()
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
        found = load(file, mapped=True, verify=self._verified.get(file) != version)
        self._verified[file] = version
        return found

    def _fill(self, known: dict[str, Tensor]) -> None:
        """Let the one fleet that is in memory be this shard."""
        with torch.inference_mode(False), torch.no_grad():
            self._fleet.load_state_dict(known)


def _structure(fleet: StreamingFleet) -> list[str]:
    """Kinds of modules and dtypes of tensors, by name."""
    modules = [f"{name}: {type(module).__name__}" for name, module in fleet.named_modules()]
    return modules + [
        f"{name}: {str(value.dtype).removeprefix('torch.')}" for name, value in fleet.state_dict().items()
    ]


def _has_rows(noise: Tensor | None, y: Tensor) -> bool:
    """Whether noise variances have a row for each stream; those that do not fit are refused."""
    if not isinstance(noise, Tensor):
        return False
    try:
        fits = torch.broadcast_shapes(noise.shape, y.shape) == y.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"noise: expected a scalar or variances for y of shape {tuple(y.shape)}, got shape {tuple(noise.shape)}."
        )
    return noise.dim() == 2 and len(noise) == len(y)


def _index(number: SupportsIndex, end: int, name: str, what: str) -> int:
    """A number from 0 to ``end``."""
    try:
        found = -1 if isinstance(number, bool) else number.__index__()
    except AttributeError:
        found = -1
    if not 0 <= found < end:
        raise IndexError(f"{name}: expected {what} from 0 to {end - 1}, got {number!r}.")
    return found
