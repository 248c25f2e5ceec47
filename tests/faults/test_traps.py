"""Files with a trap: reading what somebody else has written never runs code."""

import ast
import gzip
import io
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gpseq
from gpseq import storage, training
from gpseq.datasets import load_blimp, load_images
from gpseq.propagation.streamlined import Streamlined
from gpseq.storage import StorageError
from gpseq.stream_run import StreamRun
from tests.faults.feeds import FILES, Command


class Trap:
    """What leaves a mark if it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def pickled(trap: Trap) -> bytes:
    return pickle.dumps({"model": trap})


def saved(trap: Trap) -> bytes:
    file = io.BytesIO()
    torch.save({"epochs": trap}, file)
    return file.getvalue()


def saved_as_of_old(trap: Trap) -> bytes:
    file = io.BytesIO()
    torch.save({"epochs": trap}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def of_numpy(trap: Trap) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([trap], dtype=object), allow_pickle=True)
    return file.getvalue()


def archive(trap: Trap) -> bytes:
    file = io.BytesIO()
    array = np.array([trap], dtype=object)
    np.savez(file, x_train=array, y_train=array, x_test=array, y_test=array)
    return file.getvalue()


TRAPS = (pickled, saved, saved_as_of_old, of_numpy, archive)


def read_as_checkpoint(path: Path) -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    training.fit(model, lambda *a: pytest.fail("a step was taken"), [0], optimizer=optimizer, epochs=1, checkpoint=path)


def read_as_images(path: Path) -> None:
    path.rename(path.with_name("mnist.npz"))
    load_images("mnist", full=True)


def read_as_table_of_pairs(path: Path) -> None:
    path.with_name("blimp.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    load_blimp(full=True)


def read_as_lines_of_pairs(path: Path) -> None:
    path.with_name("blimp").mkdir()
    path.rename(path.with_name("blimp") / "pairs.jsonl")
    load_blimp(full=True)


#: Every place that reads a file of the user's.
READERS: dict[str, Callable[[Path], Any]] = {
    "storage.load": storage.load,
    "StreamRun.load": lambda path: StreamRun.load(str(path)),
    "Streamlined.load": lambda path: Streamlined.load(path, nn.Linear(2, 2)),
    "training.fit": read_as_checkpoint,
    "load_images": read_as_images,
    "load_blimp, table": read_as_table_of_pairs,
    "load_blimp, lines": read_as_lines_of_pairs,
}


@pytest.mark.parametrize("trap", TRAPS)
def test_the_traps_would_snap(tmp_path: Path, trap: Callable[[Trap], bytes]) -> None:
    """They are as dangerous as they should be, to a reader that trusts them."""
    data, mark = io.BytesIO(trap(Trap(tmp_path / "mark"))), tmp_path / "mark"
    if trap is pickled:
        pickle.load(data)
    elif trap in (of_numpy, archive):
        found = np.load(data, allow_pickle=True)
        if trap is archive:
            found["x_train"]
    else:
        torch.load(data, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("reader", READERS)
def test_reading_never_runs_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, trap: Callable[[Trap], bytes]
) -> None:
    mark, path = tmp_path / "mark", tmp_path / "given"
    path.write_bytes(trap(Trap(mark)))
    monkeypatch.setenv("GPSEQ_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"given|mnist\.npz|blimp|pairs\.jsonl") as caught:
        READERS[reader](path)
    if not reader.startswith("load_"):
        assert type(caught.value) is StorageError
    assert not mark.exists()


@pytest.mark.parametrize("trap", TRAPS)
def test_the_command_never_runs_code(command: Command, tmp_path: Path, trap: Callable[[Trap], bytes]) -> None:
    mark = tmp_path / "mark"
    Path("state").write_bytes(data := trap(Trap(mark)))
    assert command(*FILES) == 2
    assert command.err.startswith("gpseq: error: state is ") and command.err.count("\n") == 1
    assert Path("state").read_bytes() == data and not Path("out.csv").exists()
    Path("state").unlink()
    Path("table.csv").write_bytes(data)
    assert command(*FILES) == 2
    assert command.err.startswith("gpseq: error: table.csv") and command.err.count("\n") == 1
    assert not mark.exists()


@pytest.mark.slow
def test_transformers_never_run_code(tmp_path: Path) -> None:
    """Of a folder that holds a pickle instead of safetensors."""
    transformers = pytest.importorskip("transformers")
    from gpseq.integrations import huggingface

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.BertConfig(vocab_size=8, max_position_embeddings=8, **sizes)
    model = gpseq.nn.replace_attention(transformers.BertModel(config).eval(), mode="residual", num_inducing=2)
    model.save_pretrained(tmp_path)
    assert isinstance(huggingface.load_pretrained(tmp_path), transformers.BertModel)
    (tmp_path / "model.safetensors").unlink()
    mark = tmp_path / "mark"
    for trap in (pickled, saved, saved_as_of_old):
        (tmp_path / "pytorch_model.bin").write_bytes(trap(Trap(mark)))
        with pytest.raises(Exception, match=r"(?i)weights_only|weights only"):
            huggingface.load_pretrained(tmp_path)
        assert not mark.exists()


def test_nothing_in_the_package_reads_pickles() -> None:
    """Whoever adds a reader has to say weights_only=True, and to add it to the readers above."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
    needs = {"torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False")}
    never = {"eval", "exec", "__import__", "compile", "numpy.load", "torch.hub.load", "torch.jit.load"}
    suspicious = re.compile(  # a quick look first
        r"\bload\(|(?<![\w.])(eval|exec|compile|__import__)\(|PackageImporter|weights_only|trust_remote_code|"
        rf"\b({'|'.join(forbidden)})\b"
    )
    found, root = dict.fromkeys(needs, 0), Path(gpseq.__file__).parent
    for file in sorted(root.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if not suspicious.search(text):
            continue
        for node in ast.walk(ast.parse(text)):
            place = f"{file.relative_to(root)}:{getattr(node, 'lineno', 0)}"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if file.name != "testing.py":  # which asks whether an object survives a pickle of its own
                assert not forbidden & {name.partition(".")[0] for name in names}, place
            if not isinstance(node, ast.Call):
                continue
            options = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
            assert not options.get("trust_remote_code") and options.get("weights_only", True), place
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name not in {called.rpartition(".")[2] for called in never | set(needs)}:
                continue
            called = ast.unparse(node.func)
            assert called not in never, place
            if called in needs:
                option, value = needs[called]
                assert str(options.get(option)) == value, place
                found[called] += 1
    assert all(found.values()), "the search finds what it looks for"
