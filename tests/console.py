"""The command line in this process: quick, and nothing of it is lost."""

from __future__ import annotations

import gc
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from howfine.cli import main


@dataclass(frozen=True)
class Said:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as JSON, all of it; NaN and Infinity are not JSON."""
        assert self.code == 0, self.err
        return json.loads(self.out, parse_constant=_refuse)

    @property
    def sentence(self) -> str:
        """The one line on standard error of a command that failed; no progress bar before it."""
        assert self.code != 0
        lines = [line for line in self.err.split("\n") if line.strip() and "\r" not in line]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("howfine: "), self.err
        return lines[0].removeprefix("howfine: ")


def settle() -> None:
    """Take what is imported out of the collector's sight, which each training asks for twice.

    It never dies, and looking through it takes longer than a tiny training.
    """
    gc.collect()
    gc.freeze()


def howfine_here(*arguments: object, stdin: str = "") -> Said:
    """Run a command in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["howfine", *map(str, arguments)]
    with (
        patch.object(sys, "argv", argv),
        patch.object(sys, "stdin", io.StringIO(stdin)),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Said(code, out.getvalue(), err.getvalue())


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
