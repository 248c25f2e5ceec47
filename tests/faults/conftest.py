"""The command on a table, in a folder of its own."""

from pathlib import Path

import pytest

from tests.faults.feeds import HEADER, Command, begin_quickly, rows


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    begin_quickly(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text(HEADER + "".join(rows()))
    return Command(monkeypatch, capsys)
