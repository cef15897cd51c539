"""Budgets: what is left is within them, and nothing more would be; times by a test's clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import start_processes

from howfine import fingerprint, timing, units
from howfine.base import Base
from howfine.budgets import Budget
from howfine.cuts import smaller
from howfine.delta import SUFFIX, Delta
from howfine.errors import SettingError
from howfine.method import method
from howfine.recipe import Recipe
from howfine.timing import Timed
from howfine.tune import tune
from tiny import tiny_base, tiny_task, tiny_towers

# The tiny BERT: 2 layers, d = 32, 4 heads of 8, 64 neurons.
WIDE, HEADS, INNER, LAYERS = 32, 4, 64, 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A model takes a millisecond for each thousand of its parameters; tables are the test's."""
    calls: list[int] = []

    def took(base: Base, model: torch.nn.Module, rows: int, tokens: int) -> Timed:
        calls.append(sum(p.numel() for p in model.parameters()))
        return Timed(calls[-1] * rows / 1000, 1.0, calls[-1])

    monkeypatch.setattr(timing, "of_model", took)
    monkeypatch.setattr(fingerprint, "cache_folder", lambda: tmp_path / "cache")
    return calls


def left(base: Base, keep: float | str, **settings: Any) -> tuple[int, int, int]:
    """Heads, neurons and parameters that a pruned base has, cut."""
    with method("prune", keep=keep, by="magnitude", **settings).attach(base) as change:
        kinds = units.by_kind(base, change.parts["kept"])
        heads, neurons = (
            sum(int(on.sum()) for on in kinds.get(kind, {}).values())
            for kind in ("heads", "neurons")
        )
        model = smaller(base, or_same=True)
    return heads, neurons, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (0.5, Budget(0.5)),
        ("0.12345678 macs", Budget(0.12345678, "macs")),
        ("0.9999996 parameters", Budget(0.9999996, "parameters")),
        ("0.5", Budget(0.5)),
        (1, Budget(1.0)),
        ("5e-1 units", Budget(0.5)),
        (" 0.5 encoder ", Budget(0.5, "encoder")),
        ("0.25parameters", Budget(0.25, "parameters")),
        ("0.5 macs", Budget(0.5, "macs", 1, timing.TOKENS)),
        ("0.5 macs@128", Budget(0.5, "macs", 1, 128)),
        ("5 ms", Budget(5.0, "ms", timing.ROWS, timing.TOKENS)),
        ("2.5 ms@16x32", Budget(2.5, "ms", 16, 32)),
        ("2.5 ms@32", Budget(2.5, "ms", 1, 32)),
    ],
)
def test_a_budget_says_what_it_is_of(said: float | str, expected: Budget) -> None:
    assert Budget.parse(said) == expected
    assert Budget.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "said",
    [
        *("", "half", "0", "-1", "1.5", "nan", "inf", "1.2.3", "0.5 heads", "1.5 macs", "0 ms"),
        *("0.5@64", "0.5 parameters@64", "0.5 macs@2x64", "5 ms@0x64", "5 ms@0", "0.5 encoder x"),
    ],
)
def test_what_is_no_budget_is_told(said: str) -> None:
    with pytest.raises(SettingError, match=r"expected a share above 0 and at most 1.*'5 ms@1x64'"):
        method("prune", keep=said)


def test_a_share_of_units_stays_a_number() -> None:
    """As files and plans have had it."""
    assert method("prune", keep="0.5") == method("prune", keep=0.5)
    kept: Any = method("prune", keep="0.50 parameters")
    assert kept.keep == "0.5 parameters"


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("share", [0.6, 0.85])
def test_as_many_parameters_are_left_as_asked(share: float, scope: str) -> None:
    """Counted in the model that is cut: within the budget, and not with one unit more of each."""
    base = tiny_base("bert")
    whole = sum(p.numel() for p in base.tower.parameters())
    matrices = LAYERS * (4 * WIDE * WIDE + 2 * WIDE * INNER + 5 * WIDE + INNER)
    more = LAYERS * (4 * WIDE * 8 + 3 * 8 + 2 * WIDE + 1)  # a head and a neuron of each layer
    for of, total in (("parameters", whole), ("encoder", matrices)):
        keep = share if of == "encoder" else 1 - (1 - share) * matrices / whole
        heads, neurons, count = left(base, f"{keep:.6f} {of}", scope=scope)
        spent = count - (whole - total)
        assert total * keep - more < spent <= total * keep
        assert 0 < heads < LAYERS * HEADS
        assert 0 < neurons < LAYERS * INNER


@pytest.mark.parametrize("tokens", [8, 64])
def test_as_many_operations_are_left_as_asked(tokens: int) -> None:
    """Heads 4·n·d·w + 2·n²·w, neurons 2·n·d each: longer inputs weigh heads more."""
    head = 4 * tokens * WIDE * 8 + 2 * tokens**2 * 8
    neuron = 2 * tokens * WIDE
    whole = LAYERS * (HEADS * head + INNER * neuron)
    heads, neurons, _ = left(tiny_base("bert"), f"0.6 macs@{tokens}")
    spent = heads * head + neurons * neuron
    assert 0.6 * whole - head - neuron < spent <= 0.6 * whole


def test_one_kind_alone_pays_for_all() -> None:
    base = tiny_base("bert")
    _, _, count = left(base, "0.8 encoder", units="neurons")
    matrices = LAYERS * (4 * WIDE * WIDE + 2 * WIDE * INNER + 5 * WIDE + INNER)
    gone = sum(p.numel() for p in base.tower.parameters()) - count
    assert 0.2 * matrices <= gone < 0.2 * matrices + 2 * WIDE + 1


@pytest.mark.parametrize(
    ("name", "of"),
    [("bert", "encoder"), ("gpt2", "parameters"), ("t5", "macs@16"), ("llama", "encoder")],
)
def test_a_budget_too_small_names_the_nearest_which_holds(name: str, of: str) -> None:
    base = tiny_base(name)
    with pytest.raises(SettingError, match="smallest share of heads and neurons") as told:
        left(base, f"0.001 {of}")
    nearest = str(told.value).rpartition("nearest keep is ")[2].strip("'")
    heads, neurons, _ = left(base, nearest)
    layers = len(base.choose(("O",)))
    assert neurons >= layers
    assert heads >= layers
    assert left(base, f"1 {of}")[0] == sum(units.counts(base, "heads").values())


def test_a_time_is_met_by_the_largest_model_that_fits(clock: list[int]) -> None:
    base = tiny_base("bert")
    whole = sum(p.numel() for p in base.tower.parameters())
    even = left(base, 0.5, scope="layer")[2]
    asked = even / 1000
    heads, neurons, count = left(base, f"{asked} ms@1x8", scope="layer")
    assert count <= even
    assert heads == LAYERS * HEADS // 2
    assert LAYERS * INNER // 2 - LAYERS < neurons <= LAYERS * INNER // 2
    assert left(base, f"{whole / 1000} ms@1x8")[2] == whole
    measured = len(clock)
    left(base, f"{asked * 1.1} ms@1x8")  # the table of the first is that of all
    assert len(clock) == measured
    left(base, f"{2 * asked} ms@2x8")
    assert len(clock) > measured


def test_a_time_that_no_size_takes_names_the_nearest(clock: list[int]) -> None:
    base = tiny_base("bert")
    with pytest.raises(SettingError, match=r"with 0\.25 of the units, takes [\d.]+ ms; ask for"):
        left(base, "0.001 ms@1x8")
    fastest = min(clock) / 1000 + 0.01
    assert left(base, f"{fastest} ms@1x8")[0] == LAYERS
    with pytest.raises(SettingError, match=r"64 at most|takes \d+ at most"):
        left(base, "5 ms@1x4096")
    assert base.is_untouched()
    with pytest.raises(SettingError, match="two towers"):
        method("prune", keep="5 ms", by="magnitude").attach(tiny_towers())


def test_the_table_leaves_the_base_as_it_was() -> None:
    """By the real clock; with all units on again afterwards."""
    base = tiny_base("bert")
    counted = units.counts(base)
    share = Budget(1e6, "ms", 1, 4).share(base, counted, dict)
    assert share == 1.0
    assert base.is_untouched()


def test_rounds_end_within_the_budget(tmp_path: Path) -> None:
    base = tiny_base("bert")
    settings = {"keep": "0.5 encoder", "by": "magnitude", "beside": ("all",), "rounds": 2}
    recipe = Recipe.load("prune").override(max_steps=6, batch_size=4, start="none", **settings)
    done = tune(base, tiny_task(), recipe, out=tmp_path / f"x{SUFFIX}", seed=0)
    found: Any = Delta.load(done.path).method
    assert found.keep == "0.5 encoder"
    matrices = LAYERS * (4 * WIDE * WIDE + 2 * WIDE * INNER + 5 * WIDE + INNER)
    with done.delta.changed(base):
        gone = sum(p.numel() for p in base.tower.parameters())
        gone -= sum(p.numel() for p in smaller(base).parameters())
    more = 4 * WIDE * 8 + 3 * 8 + 2 * WIDE + 1
    assert 0.5 * matrices <= gone < 0.5 * matrices + more


def pruned_for_a_time(rank: int, folder: str) -> None:
    """One of two processes: a clock of its own, by which it would prune other units."""
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    try:
        timing.of_model = lambda base, model, rows, tokens: Timed(  # type: ignore[assignment]
            sum(p.numel() for p in model.parameters()) * (1 + rank) / 1000, 1.0, 1
        )
        fingerprint.cache_folder = lambda: Path(folder) / str(rank)  # type: ignore[assignment]
        base = tiny_base("bert")
        with method("prune", keep="18 ms@1x8", by="magnitude").attach(base) as change:
            kept = [int(on.sum()) for on in change.parts["kept"].values()]
        refused = ""
        try:
            method("prune", keep="0.001 ms@1x8", by="magnitude").attach(base)
        except SettingError as error:
            refused = str(error)
        torch.save([kept, refused], Path(folder) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_that_train_together_prune_the_same(tmp_path: Path) -> None:
    """Though each measures other times: the first one's count, and its refusal, too."""
    start_processes(pruned_for_a_time, (str(tmp_path),), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second
    assert min(first[0]) < max(HEADS, INNER)
    assert "the fastest this base gets here" in first[1]
