"""FleetStore: a fleet in files is the fleet, whatever the shards, the processes, and the accidents."""

import copy
import math
import os
import pickle
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gpytorch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpseq import storage
from gpseq.features import HippoFeatures, SelectedPoints
from gpseq.models import FleetStore, StreamingFleet, StreamingGP
from gpseq.storage import StorageError
from tests.oracles_streaming import F64, assert_close

# Small memories on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")

NAN = math.nan
STREAMS, SHARD = 7, 3
AT = torch.linspace(0.5, 5.5, 4, dtype=F64)


def make_fleet(
    num: int = SHARD,
    dtype: torch.dtype = F64,
    features: Any = None,
    kernel: Any = gpytorch.kernels.RBFKernel,
    likelihood: Any = gpytorch.likelihoods.GaussianLikelihood,
    **options: Any,
) -> StreamingFleet:
    kernel, likelihood = gpytorch.kernels.ScaleKernel(kernel()).to(dtype), likelihood().to(dtype)
    likelihood.noise = 0.1
    return StreamingFleet(num, features or HippoFeatures(10, 6.0), kernel, likelihood, **options)


def draw(n: int = 3, num: int = STREAMS, seed: int = 0, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 6.0 * torch.rand(num, n, 1, generator=generator, dtype=dtype)
    return x, torch.randn(num, n, generator=generator, dtype=dtype)


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the lock, which is empty."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def failing(function: Any, after: int) -> Any:
    """A function that fails from some call on, as on a full disk."""
    calls = []

    def call(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        return function(*args)

    return call


@settings(deadline=None, max_examples=20)
@given(
    chunks=st.lists(
        st.tuples(
            st.integers(0, 2**20),
            st.one_of(st.none(), st.permutations(range(STREAMS)).flatmap(lambda p: st.sampled_from([p[:1], p[:4], p]))),
            st.sampled_from(["shared", "own"]),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    ),
    size=st.integers(1, STREAMS + 1),
    reopen=st.booleans(),
)
def test_it_is_the_fleet(tmp_path_factory: pytest.TempPathFactory, chunks: Any, size: int, reopen: bool) -> None:
    folder = tmp_path_factory.mktemp("store")
    store, whole = FleetStore(folder, make_fleet(size), STREAMS), make_fleet(STREAMS)
    for seed, streams, inputs, gaps in chunks:
        if reopen:
            store = FleetStore(folder, make_fleet(size))
        x, y = draw(num=STREAMS if streams is None else len(streams), seed=seed)
        x = x[0] if inputs == "shared" else x
        if gaps:
            y[::2, 1] = NAN
            y[-1] = NAN
        store.update(x, y, streams=streams)
        whole.update(x, y, streams=streams)
    everyone = torch.randperm(STREAMS)
    assert torch.equal(store.counts(), whole.counts)
    assert torch.equal(store.counts(everyone), whole.counts[everyone])
    found, expected = store.predict(AT, everyone), whole.predict(AT, everyone)
    assert_close(found.mean, expected.mean, 1e-10)
    assert_close(found.covariance_matrix, expected.covariance_matrix, 1e-10)
    assert_close(store[STREAMS - 1](AT).mean, whole[STREAMS - 1](AT).mean, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shard_is_a_fleet_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    store, fleets = FleetStore(tmp_path, make_fleet(dtype=dtype), STREAMS), [make_fleet(dtype=dtype) for _ in range(3)]
    for seed in range(3):
        x, y = draw(seed=seed, dtype=dtype)
        FleetStore(tmp_path, make_fleet(dtype=dtype)).update(x + 3.0 * seed, y)  # horizons move, each by itself
        for shard, fleet in enumerate(fleets):
            mine = slice(3 * shard, min(3 * shard + 3, STREAMS))
            fleet.update(x[mine] + 3.0 * seed, y[mine], streams=torch.arange(len(y[mine])))
    for shard, fleet in enumerate(fleets):
        for name, value in fleet.state_dict().items():
            assert torch.equal(store.shard(shard).state_dict()[name], value), name
    assert store.predict(AT.to(dtype), [0]).mean.dtype == fleets[0](AT.to(dtype)).mean.dtype


def test_what_is_brought_twice_is_learnt_once(tmp_path: Path) -> None:
    store = FleetStore(tmp_path, make_fleet(), STREAMS)
    (x, y), later = draw(), draw(seed=1)
    store.update(x, y, position=4)
    before = contents(tmp_path)
    store.update(x, y, position=4)
    store.update(*later, position=3)
    assert contents(tmp_path) == before
    assert store.positions.tolist() == [4, 4, 4]
    store.update(later[0][:1], later[1][:1], streams=[2], position=9)
    assert store.positions.tolist() == [9, 4, 4]
    store.update(*later, position=9)  # the rest of the chunk whose first part has come already
    assert store.positions.tolist() == [9, 9, 9]
    assert store.counts().tolist() == [3, 3, 6, 6, 6, 6, 6]
    store.update(*later)  # no position: learnt again, and the book stays as it is
    assert store.positions.tolist() == [9, 9, 9]
    assert store.counts().tolist() == [6, 6, 9, 9, 9, 9, 9]


def test_shards_without_news_are_not_written(tmp_path: Path) -> None:
    store = FleetStore(tmp_path, make_fleet(), STREAMS)
    assert sorted(contents(tmp_path)) == ["fleet.safetensors"]
    x, y = draw()
    y[3:] = NAN
    store.update(x, y, position=0)
    assert sorted(contents(tmp_path)) == ["fleet.safetensors", "shard-000000.safetensors"]
    assert store.positions.tolist() == [0, -1, -1]
    store.update(x[:0], y[:0], streams=[], position=1)
    store.update(x[:, :0], y[:, :0], position=1)
    assert store.positions.tolist() == [0, -1, -1]
    assert store.counts([6]).tolist() == [0]
    assert torch.equal(store.predict(AT, [6]).mean, torch.zeros(1, 4, dtype=F64))  # the prior


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("whole", [True, False], ids=["all rows", "own rows"])
def test_parts_of_several_processes_are_the_whole(tmp_path: Path, size: int, whole: bool) -> None:
    x, y = draw()
    single = FleetStore(tmp_path / "one", make_fleet(), STREAMS).update(x, y, position=0)
    store = FleetStore(tmp_path / "several", make_fleet(), STREAMS)
    for rank in range(size):
        part = store.part(rank, size)
        own = [s for s in range(STREAMS) if (s // SHARD) % size == rank]
        if whole:
            part.update(x, y, position=0)
        elif own:
            part.update(x[own], y[own], streams=own, position=0)
    assert contents(tmp_path / "one") == contents(tmp_path / "several")
    assert torch.equal(part.predict(AT, [6, 0]).mean, single.predict(AT, [6, 0]).mean)


def test_an_update_that_raises_changes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FleetStore(tmp_path, make_fleet(), STREAMS)
    x, y = draw()
    store.update(x, y, position=0)
    before = contents(tmp_path)

    bad = y.clone()
    bad[-1, 0] = math.inf  # in the last shard, when the others have been computed
    with pytest.raises(ValueError, match=r"^y: expected finite"):
        store.update(x, bad, position=1)
    assert contents(tmp_path) == before

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync, after=2))
        with pytest.raises(OSError, match="No space left on device"):
            store.update(x, y, position=1)
    assert contents(tmp_path) == before
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(os.replace, after=0))
        with pytest.raises(OSError, match="No space left on device"):
            store.update(x, y, position=1)
    assert contents(tmp_path) == before

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "encode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.update(x, y, position=1)
    assert contents(tmp_path) == before

    store.update(x, y, position=1)
    assert store.counts().tolist() == [6] * STREAMS


def test_a_crash_between_renames_is_completed_by_the_same_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = FleetStore(tmp_path / "whole", make_fleet(), STREAMS)
    store = FleetStore(tmp_path / "killed", make_fleet(), STREAMS)
    x, y = draw()
    reference.update(x, y, position=0)
    rename, renamed = os.replace, []

    def die(*args: Any) -> None:
        if len(renamed) == 2:
            raise KeyboardInterrupt
        renamed.append(args)
        rename(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            store.update(x, y, position=0)
    assert store.positions.tolist() == [0, 0, -1]
    FleetStore(tmp_path / "killed", make_fleet()).update(x, y, position=0)
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_noise_and_other_likelihoods(tmp_path: Path) -> None:
    x, y = draw()
    noise = 0.1 + torch.rand(STREAMS, 3, dtype=F64)
    store = FleetStore(tmp_path / "noise", make_fleet(), STREAMS).update(x, y, noise)
    whole = make_fleet(STREAMS).update(x, y, noise)
    assert_close(store.predict(AT, range(STREAMS)).mean, whole(AT).mean, 1e-10)
    store.update(x, y, torch.tensor(0.3, dtype=F64))
    whole.update(x, y, torch.tensor(0.3, dtype=F64))
    assert_close(store.predict(AT, range(STREAMS)).mean, whole(AT).mean, 1e-10)

    def counting(num: int) -> StreamingFleet:
        kernel = gpytorch.kernels.RBFKernel().double()
        return StreamingFleet(num, HippoFeatures(10, 6.0), kernel, gpytorch.likelihoods.PoissonLikelihood())

    counts = y.abs().mul(3).round().long()
    store = FleetStore(tmp_path / "counts", counting(SHARD), STREAMS).update(x, counts)
    assert_close(store.predict(AT, [5]).mean, counting(STREAMS).update(x, counts)(AT).mean[[5]], 1e-5)


@pytest.mark.slow
def test_each_shard_learns_its_own_hyperparameters(tmp_path: Path) -> None:
    x, y = draw()
    store = FleetStore(tmp_path / "learnt", make_fleet(learn="warmup"), 6).update(x[:6], y[:6])
    scales = [store.shard(i).covar_module.base_kernel.lengthscale.item() for i in range(2)]
    assert scales[0] != scales[1]
    fleet = make_fleet(learn="warmup").update(x[3:6], y[3:6])
    assert scales[1] == pytest.approx(fleet.covar_module.base_kernel.lengthscale.item(), rel=1e-6)


def test_features_that_choose_their_places(tmp_path: Path) -> None:
    x, y = draw()
    store = FleetStore(tmp_path, make_fleet(features=SelectedPoints(6)), STREAMS)
    fleet = make_fleet(features=SelectedPoints(6))
    for seed in range(2):
        x, y = draw(seed=seed)
        store.update(x + seed, y)
        fleet.update(x[:3] + seed, y[:3])
    assert_close(store.predict(AT, [0, 1, 2]).mean, fleet(AT).mean, 1e-10)


def test_hyperparameters_are_those_of_the_folder(tmp_path: Path) -> None:
    first = make_fleet()
    first.covar_module.base_kernel.lengthscale = 2.0
    FleetStore(tmp_path, first, STREAMS)
    store = FleetStore(tmp_path, make_fleet())
    assert store.shard(1).covar_module.base_kernel.lengthscale.item() == pytest.approx(2.0)
    assert len(store) == STREAMS
    assert store.num_shards == 3
    assert "7 streams in 3 shards" in repr(store)


def test_the_prototype_and_copies_go_their_own_way(tmp_path: Path) -> None:
    prototype = make_fleet()
    before = copy.deepcopy(prototype.state_dict())
    store = FleetStore(tmp_path, prototype, STREAMS)
    x, y = draw()
    store.update(x, y)
    assert all(torch.equal(value, before[name]) for name, value in prototype.state_dict().items())
    fleet, one = store.shard(0), store[4]
    assert type(one) is StreamingGP
    kept = contents(tmp_path)
    fleet.update(x[:3], y[:3])
    one.update(x[0], y[0])
    assert contents(tmp_path) == kept
    assert store.counts([0, 4]).tolist() == [3, 3]


def test_a_folder_that_is_moved_or_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x, y = draw()
    store = FleetStore("fleet of streams", make_fleet(), STREAMS).update(x, y)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert store.update(x, y).counts().tolist() == [6] * STREAMS
    assert not list((tmp_path / "elsewhere").iterdir())
    (tmp_path / "fleet of streams" / "fleet.safetensors").unlink()
    with pytest.raises(StorageError, match="is gone, but there are shards"):
        FleetStore(tmp_path / "fleet of streams", make_fleet(2), STREAMS)
    shutil.rmtree(tmp_path / "fleet of streams")
    for call in (lambda: store.update(x, y), lambda: store.predict(AT, [0]), store.counts):
        with pytest.raises(FileNotFoundError, match="fleet of streams"):
            call()


def test_copies_and_pickles_are_the_same_store(tmp_path: Path) -> None:
    x, y = draw()
    store = FleetStore(tmp_path, make_fleet(), STREAMS)
    for other in (copy.deepcopy(store), pickle.loads(pickle.dumps(store)), store.part(0, 1)):
        other.update(x, y)
    assert store.counts().tolist() == [9] * STREAMS
    assert len(pickle.dumps(store)) < 2 * (tmp_path / "fleet.safetensors").stat().st_size
    part = store.part(1, 2).part(0, 1)
    assert "of which 1 are learnt here" in repr(part)
    part.update(x, y)
    assert store.counts().tolist() == [9] * 3 + [12] * 3 + [9]


def test_in_inference_mode(tmp_path: Path) -> None:
    x, y = draw()
    with torch.inference_mode():
        store = FleetStore(tmp_path, make_fleet(), STREAMS).part(0, 1).update(x, y)
        mean = store.predict(AT, [1]).mean
        fleet = store.shard(0)
    fleet.fit_hyperparameters(x[:3], y[:3], steps=1)
    assert torch.equal(store.predict(AT, [1]).mean, mean)


def test_threads_take_turns(tmp_path: Path) -> None:
    x, y = draw()
    store, alone = (
        FleetStore(tmp_path / "threads", make_fleet(), STREAMS),
        FleetStore(tmp_path / "one", make_fleet(), STREAMS),
    )
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            chosen = [[0, 1, 2], [3, 4, 5], [6]]
            list(pool.map(lambda rows: store.update(x[rows], y[rows], streams=rows), chosen))
            alone.update(x, y)
        expected = [alone.predict(AT, [s]).mean for s in range(STREAMS)]
        for _ in range(3):
            found = list(pool.map(lambda s: store.predict(AT, [s]).mean, range(STREAMS)))
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert contents(tmp_path / "threads") == contents(tmp_path / "one")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_that_bring_the_same_chunk(tmp_path: Path) -> None:
    """As when the scheduler of a cluster believes a worker dead that is not."""
    store, x, y = FleetStore(tmp_path, make_fleet(), STREAMS), *draw()
    for position in range(4):
        children = []
        for _ in range(2):
            with warnings.catch_warnings():  # of threads, which the children do not need
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if not child:
                try:
                    store.update(x, y, position=position)
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert store.counts().tolist() == [12] * STREAMS


def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Position and belief are of one file, always."""
    x, y = draw()
    store = FleetStore(tmp_path, make_fleet(), STREAMS).update(x, y, position=0)
    other, verified, calls = FleetStore(tmp_path, make_fleet()), storage._verified, []

    def meanwhile(path: Any, *args: Any) -> Any:
        found = verified(path, *args)
        if "shard-000001" in str(path) and not calls:
            calls.append(path)
            other.update(x[3:6], y[3:6], streams=[3, 4, 5], position=1)
        return found

    monkeypatch.setattr(storage, "_verified", meanwhile)
    known, about = store._read(1)
    assert calls
    assert (about["position"], known["variational_strategy.belief.count"].tolist()) == (1, [6, 6, 6])


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    folder, other = tmp_path / "mine", tmp_path / "other"
    x, y = draw()
    store = FleetStore(folder, make_fleet(), STREAMS).update(x, y)
    FleetStore(other, make_fleet(), 6).update(x[:6], y[:6])
    intact, second = (folder / "shard-000001.safetensors").read_bytes(), folder / "shard-000001.safetensors"

    for data in (intact[:-1], intact[:50], b"", intact[:-9] + bytes([intact[-9] ^ 1]) + intact[-8:]):
        second.write_bytes(data)
        kept = contents(folder)
        for call in (lambda: store.update(x, y), lambda: store.predict(AT, [4]), lambda: store[4], store.counts):
            with pytest.raises(StorageError, match="shard-000001"):
                call()
        assert contents(folder) == kept
        store.predict(AT, [0])  # others are as they were

    for foreign in (
        other / "shard-000001.safetensors",
        folder / "shard-000002.safetensors",
        folder / "fleet.safetensors",
    ):
        shutil.copy(foreign, second)
        with pytest.raises(StorageError, match="is not shard 1 of the fleet"):
            store.update(x, y)
    second.write_bytes(intact)
    assert store.counts().tolist() == [3] * STREAMS
    shutil.copy(second, folder / "fleet.safetensors")
    with pytest.raises(StorageError, match="is not the index of a fleet"):
        FleetStore(folder, make_fleet())


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="num_streams"):
        FleetStore(tmp_path / "nowhere", make_fleet())
    assert not (tmp_path / "nowhere").exists()
    store = FleetStore(tmp_path, make_fleet(), STREAMS)
    x, y = draw()
    with pytest.raises(TypeError, match=r"^prototype: expected a StreamingFleet"):
        FleetStore(tmp_path, torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^prototype: expected a fleet that has seen nothing"):
        FleetStore(tmp_path, make_fleet().update(x[:3], y[:3]))
    with pytest.raises(ValueError, match=r"^prototype: expected 3 streams"):
        FleetStore(tmp_path, make_fleet(4))
    with pytest.raises(ValueError, match=r"^num_streams: expected 7"):
        FleetStore(tmp_path, make_fleet(), 8)
    for other, message in (
        (make_fleet(dtype=torch.float32), "float64"),
        (make_fleet(features=SelectedPoints(10)), "HippoFeatures"),
        (make_fleet(kernel=gpytorch.kernels.MaternKernel), "RBFKernel"),
        (make_fleet(likelihood=gpytorch.likelihoods.LaplaceLikelihood), "GaussianLikelihood"),
    ):
        with pytest.raises(ValueError, match=rf"^prototype: expected '.*{message}', as in .*fleet\.safetensors, got"):
            FleetStore(tmp_path, other)
    for bad in (0, -1, 2.5, True):
        with pytest.raises((TypeError, ValueError), match=r"^num_streams"):
            FleetStore(tmp_path / "new", make_fleet(), bad)  # type: ignore[arg-type]
    for position in (-1, 1.0, True):
        with pytest.raises((TypeError, ValueError), match=r"^position"):
            store.update(x, y, position=position)  # type: ignore[arg-type]
    for rank, size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=r"^rank|^size"):
            store.part(rank, size)
    with pytest.raises(ValueError, match=r"^y: expected targets of shape"):
        store.update(x, y[:3])
    with pytest.raises(ValueError, match=r"^y: expected finite"):
        store.update(x, torch.full_like(y, NAN), missing="error")
    with pytest.raises(ValueError, match=r"^streams: expected each stream once"):
        store.update(x[:2], y[:2], streams=[1, 1])
    with pytest.raises(ValueError, match=r"^streams: expected indices from 0 to 6"):
        store.predict(AT, [7])
    with pytest.raises(ValueError, match=r"^streams: expected at least one"):
        store.predict(AT, [])
    for wrong in (x[:3], x[:1], x[None, :2]):
        with pytest.raises(ValueError, match=r"^x: expected inputs"):
            store.predict(wrong, [0, 1])
    for shape in ((3, 3), (7, 2), (1, 7, 3), (2,)):
        with pytest.raises(ValueError, match=r"^noise: expected a scalar or variances for y of shape \(7, 3\)"):
            store.update(x, y, torch.ones(shape, dtype=F64))
    for streams in (5, torch.tensor(3), [0.5], "0"):
        for call in (lambda: store.counts(streams), lambda: store.update(x[:1], y[:1], streams=streams)):  # noqa: B023
            with pytest.raises((TypeError, ValueError), match=r"^streams: expected"):
                call()
    with pytest.raises(ValueError, match=r"^position: expected a number below"):
        store.update(x, y, position=2**63)
    for wrong in (-1, 7, True, 1.0):
        with pytest.raises(IndexError, match=r"^stream: expected"):
            store[wrong]  # type: ignore[index]
        with pytest.raises(IndexError, match=r"^number: expected"):
            store.shard(wrong)  # type: ignore[arg-type]
    assert sorted(contents(tmp_path)) == ["fleet.safetensors"]
