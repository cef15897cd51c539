"""The tutorial is a program: it is run as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from console import howfine_here

PAGE = Path(__file__).parent.parent / "docs" / "many-tasks.md"


@pytest.mark.slow
def test_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    said = []
    for kind, code in re.findall(r"```(python|console)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        if kind == "python":
            exec(compile(code, PAGE.name, "exec"), names)
            said.append(capsys.readouterr().out)
            continue
        for line in code.splitlines():
            told = howfine_here(*shlex.split(line)[2:])
            assert told.code == 0, told.err
    written, pieces = [text for text in said if text]
    assert written.splitlines() == [
        "table: Zizzi serves Indian food near the harbour.",
        "german: der Vogel singt wieder",
        "asked: At ten.",
        "german: der Hund schläft hier",
    ]
    for number, line in enumerate(written.splitlines()):
        own = [part.partition(" ")[2] for part in pieces.splitlines() if part[0] == str(number)]
        assert line.partition(": ")[2] == "".join(own)
