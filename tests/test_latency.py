"""The size that fits a time: tables, what they hang on, and the nearest where none fits."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from howfine import latency, timing
from howfine.base import Base
from howfine.delta import Delta
from howfine.errors import SettingError
from howfine.evaluate import evaluate
from howfine.method import method
from howfine.report import report
from howfine.slicing import sliced
from howfine.study import study
from howfine.timing import Timed
from tiny import fit_a_little, tiny_base, tiny_task


def made(base: Base, by: str = "magnitude") -> Delta:
    fitted = fit_a_little(base, method("dynamic", smallest=0.25, by=by))
    delta = fitted.delta()
    fitted.change.remove()
    return delta


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A clock by which a model takes a millisecond for each thousand parameters."""
    calls: list[int] = []

    def took(base: Base, model: torch.nn.Module, rows: int, tokens: int) -> Timed:
        count = sum(p.numel() for p in model.parameters())
        calls.append(count)
        return Timed(count * rows * tokens / 64_000, 1.0, count)

    monkeypatch.setattr(timing, "of_model", took)
    return calls


def test_the_largest_size_that_is_as_fast(tmp_path: Path, timed: list[int]) -> None:
    base = tiny_base("bert")
    delta = made(base)
    table = latency.of_sizes(delta, base, cache=tmp_path)
    assert [row.keep for row in table] == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    assert [row.parameters for row in table] == sorted(timed, reverse=True)
    assert table[0].parameters == sum(p.numel() for p in base.tower.parameters())
    for row in table:
        assert latency.largest(delta, base, row.milliseconds, cache=tmp_path) == row
    between = (table[2].milliseconds + table[3].milliseconds) / 2
    assert latency.largest(delta, base, between, cache=tmp_path).keep == 0.7
    with pytest.raises(SettingError, match=r"the fastest, with 0\.3 of the units, takes"):
        latency.largest(delta, base, table[-1].milliseconds / 2, cache=tmp_path)
    for odd in (math.nan, math.inf, 0.0, -1.0):
        with pytest.raises(SettingError, match="expected a number above 0"):
            latency.largest(delta, base, odd, cache=tmp_path / "never")
    assert not (tmp_path / "never").exists()
    assert base.is_untouched()


@pytest.mark.parametrize("exact", [1.2345, 1.2301, 1.23, 0.001])
def test_the_fastest_that_is_named_is_taken(
    exact: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A time that is said rounded down would be refused when it is asked for."""
    base = tiny_base("bert")
    delta = made(base)
    monkeypatch.setattr(timing, "of_model", lambda *_: Timed(exact, 1.0, 1))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SettingError, match="the fastest") as refused:
        latency.largest(delta, base, exact / 2, cache=tmp_path)
    said = re.findall(r"takes ([0-9.e-]+) ms", str(refused.value))[-1]
    assert latency.largest(delta, base, float(said), cache=tmp_path).milliseconds == exact
    with pytest.raises(SettingError, match="the fastest") as refused:
        method("prune", keep=f"{exact / 2!r} ms", by="random").attach(base)
    said = re.findall(r"takes ([0-9.e-]+) ms", str(refused.value))[-1]
    with method("prune", keep=f"{said} ms", by="random").attach(base):
        pass


@pytest.mark.slow
def test_a_table_is_measured_once_for_what_it_hangs_on(tmp_path: Path, timed: list[int]) -> None:
    base = tiny_base("bert")
    delta = made(base)
    first = latency.of_sizes(delta, base, cache=tmp_path)
    count = len(timed)
    assert latency.of_sizes(delta, base, cache=tmp_path) == first
    assert len(timed) == count
    for other in ({"rows": 2}, {"tokens": 8}, {"sizes": (0.5,)}):
        latency.of_sizes(delta, base, cache=tmp_path, **other)
        assert len(timed) > count
        count = len(timed)
    torch.manual_seed(3)
    latency.of_sizes(made(base, "random"), base, cache=tmp_path)
    assert len(timed) > count
    fewer = fit_a_little(base, method("dynamic", smallest=0.6, by="magnitude"))
    narrow = fewer.delta()
    fewer.change.remove()
    sizes = [row.keep for row in latency.of_sizes(narrow, base, cache=tmp_path)]
    assert sizes == [1.0, 0.9, 0.8, 0.7, 0.6]  # of the same ranks, and with no others
    for file in tmp_path.glob("*.json"):
        file.write_text("[torn")
    assert latency.of_sizes(delta, base, cache=tmp_path) == first


def test_a_real_clock_gives_more_than_nothing(tmp_path: Path) -> None:
    base = tiny_base("bert")
    found = latency.of_delta(made(base).resized(0.5), base, rows=2, tokens=8)
    assert found.milliseconds > 0
    assert found.parameters < sum(p.numel() for p in base.tower.parameters())
    assert base.is_untouched()


def test_a_delta_of_one_size_has_no_table(tmp_path: Path) -> None:
    base = tiny_base("bert")
    fitted = fit_a_little(base, method("full"))
    delta = fitted.delta()
    fitted.change.remove()
    with pytest.raises(SettingError, match="of one size"):
        latency.of_sizes(delta, base, cache=tmp_path)
    assert not list(tmp_path.iterdir())
    assert latency.of_delta(delta, base, tokens=8).parameters == sum(
        p.numel() for p in base.tower.parameters()
    )


def test_what_a_base_cannot_take_is_told(tmp_path: Path) -> None:
    base = tiny_base("bert", max_position_embeddings=40)
    delta = made(base)
    for rows, tokens, said in ((0, 8, "1 or more"), (1, 0, "1 or more"), (1, 41, "40 at most")):
        with pytest.raises(SettingError, match=said):
            latency.of_sizes(delta, base, rows, tokens, cache=tmp_path)
        with pytest.raises(SettingError, match=said):
            latency.of_delta(delta, base, rows, tokens)


def test_a_cache_that_cannot_be_written_costs_no_table(tmp_path: Path, timed: list[int]) -> None:
    base = tiny_base("bert")
    (tmp_path / "file").write_text("no folder")
    assert latency.of_sizes(made(base), base, cache=tmp_path / "file" / "inside")
    delta = made(base)
    table = latency.of_sizes(delta, base, cache=tmp_path / "kept")
    for text in ("[]", "{}", '[{"keep": 1}]', "\xff"):
        for file in (tmp_path / "kept").iterdir():
            file.write_text(text)
        assert latency.of_sizes(delta, base, cache=tmp_path / "kept") == table


def test_the_mode_of_the_base_is_its_own() -> None:
    base = tiny_base("bert")
    base.tower.train()
    latency.of_base(base, 1, 8)
    assert base.tower.training


def test_the_whole_is_a_size_too(tmp_path: Path) -> None:
    base = tiny_base("bert")
    done = sliced(made(base), tmp_path / "whole", base, keep=1.0)
    assert done.parameters == done.before


@pytest.mark.slow
def test_a_report_outlives_files_and_bases_that_are_odd(tmp_path: Path) -> None:
    """Few positions, a ceiling that is pruned, a file of another base, a torn cache."""
    plan = {
        "ceiling": "prune",
        "floor": "head-only",
        "recipes": ["prune", "dynamic"],
        "seeds": [0],
        "margin": 0.9,
        "settings": {"max_steps": 2, "batch_size": 8, "max_length": 32},
        "knobs": {"prune": {"keep": [0.25]}, "dynamic": {"smallest": [0.6]}},
    }
    path, folder = tmp_path / "plan.yaml", tmp_path / "study"
    path.write_text(yaml.safe_dump(plan))
    base, task = tiny_base("bert", max_position_embeddings=40), tiny_task()
    study(base, task, path, out=folder)
    found = report(folder, base=base, task=task)["latency"]
    assert found is not None
    assert found["tokens"] == 40
    shown = [(row["recipe"], row["keep"]) for row in found["rows"]]
    assert sorted(shown, key=str) == sorted(
        [("prune", None), ("prune", None), ("dynamic", 1.0), ("dynamic", 0.7)], key=str
    )
    assert "one input of 40 tokens" in (folder / "report.html").read_text()
    for text in ("{", "[]", '{"a": {}}'):
        (folder / "latency.json").write_text(text)
        again = report(folder, base=base, task=task)["latency"]
        assert again is not None
        assert [row["score"] for row in again["rows"]] == [row["score"] for row in found["rows"]]
    for file in folder.rglob("dynamic*.safetensors"):
        replace(Delta.load(file), base_fingerprint="0" * 64).save(file)
    (folder / "latency.json").unlink()
    left = report(folder, base=base, task=task)["latency"]
    assert left is not None
    assert left["missing"] == ["dynamic"]
    assert {row["recipe"] for row in left["rows"]} == {"prune"}
    assert "can't be put on: dynamic" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_the_report_shows_scores_against_latency(tmp_path: Path, timed: list[int]) -> None:
    """Of the whole model, of pruned files, and of one file at every size it has."""
    common = {"max_steps": 3, "batch_size": 8, "max_length": 32}
    plan = {
        "ceiling": "full",
        "floor": "head-only",
        "recipes": ["prune", "dynamic", "bitfit"],
        "seeds": [0],
        "margin": 0.9,
        "settings": common,
        "knobs": {"prune": {"keep": [0.5, 0.25]}, "dynamic": {"smallest": [0.25]}},
    }
    path, folder = tmp_path / "plan.yaml", tmp_path / "study"
    path.write_text(yaml.safe_dump(plan))
    base, task = tiny_base("bert"), tiny_task()
    study(base, task, path, out=folder)
    found = report(folder, base=base, task=task)
    assert found["latency"] is not None
    assert (found["latency"]["tokens"], found["latency"]["missing"]) == (64, [])
    rows = found["latency"]["rows"]
    shown = [(row["recipe"], row["keep"]) for row in rows]
    assert shown == [
        *[("full", None), ("prune", None), ("prune", None)],
        *[("dynamic", keep) for keep in (1.0, 0.7, 0.5, 0.3)],
    ]
    assert rows[0]["parameters"] == sum(p.numel() for p in base.tower.parameters())
    assert [row["parameters"] for row in rows[3:]] == sorted(
        {row["parameters"] for row in rows[3:]}, reverse=True
    )
    (run,) = [row for row in found["runs"] if row["recipe"] == "dynamic"]
    assert rows[3]["score"] == run["score"]
    delta = Delta.load(folder / run["file"])
    expected = evaluate(delta.resized(0.3), base, task, split="test")
    assert (rows[-1]["score"], rows[-1]["interval"]) == (expected.value, list(expected.interval))
    page = (folder / "report.html").read_text()
    assert "Score against latency" in page
    assert "30 % of the units" in page
    counted = len(timed)
    assert report(folder, base=base, task=task)["latency"] == found["latency"]
    assert len(timed) == counted  # nothing is measured twice
    assert base.is_untouched()
