"""The skill-grafting bench: what its cells are made of, and what its verdicts count."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from howfine.delta import Delta
from howfine.entries import flat_entries
from howfine.evaluate import evaluate
from howfine.start import weight_at
from tiny import tiny_base, tiny_task

BENCH = Path(__file__).parent.parent / "bench"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench() -> Any:
    """The bench's modules, which import PEFT by the frontier's."""
    pytest.importorskip("peft")
    before = list(sys.path)
    sys.path.insert(0, str(BENCH))
    try:
        import skill_grafting
        import skill_grafting_cells
        import skill_grafting_found
        import skill_grafting_optimisers
        import skill_grafting_page
        import skill_grafting_several
        import skill_grafting_verdicts
    finally:
        sys.path[:] = before
    return SimpleNamespace(
        main=skill_grafting,
        cells=skill_grafting_cells,
        found=skill_grafting_found,
        optimisers=skill_grafting_optimisers,
        page=skill_grafting_page,
        several=skill_grafting_several,
        verdicts=skill_grafting_verdicts,
    )


@pytest.fixture(scope="module")
def made(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Cells of a tiny task on a tiny base."""
    base, folder = tiny_base("bert"), tmp_path_factory.mktemp("cells")
    return bench.cells.Cells(base, folder, None, True, {"sst2": replace(tiny_task(), name="sst2")})


def weights(base: Any, delta: Delta, paths: list[str]) -> dict[str, torch.Tensor]:
    with delta.changed(base):
        return {path: weight_at(base, path).clone() for path in paths}


@pytest.mark.parametrize("cell", ["learned@0.05", "movement@0.05", "random@0.05"])
def test_a_graft_has_the_fine_tuned_values_and_its_head(made: Any, cell: str, bench: Any) -> None:
    paths = made.base.choose(bench.cells.BLOCKS)
    tuned = Delta.load(made.get("sst2", "ft", 0))
    graft = Delta.load(made.get("sst2", cell, 0))
    new, old = weights(made.base, tuned, paths), made.base
    count = 0
    for path, tensor in graft.tensors(made.base)[0].items():
        index, values = flat_entries(tensor)
        assert torch.allclose(values, new[path].flatten()[index], rtol=1e-6, atol=1e-8)
        count += len(index)
    total = sum(old.parameter(path).numel() for path in paths)
    assert abs(count - 0.05 * total) <= 0.001 * total
    assert bench.cells.entries_changed(graft, made.base) == count
    theirs = graft.tensors(made.base)[1]
    assert all(torch.equal(value, theirs[k]) for k, value in tuned.tensors(made.base)[1].items())


def test_zero_elsewhere_and_nothing_at_all(made: Any, bench: Any) -> None:
    paths = made.base.choose(bench.cells.BLOCKS)
    graft = Delta.load(made.get("sst2", "movement@0.05", 0))
    zeroed = weights(made.base, Delta.load(made.get("sst2", "zero-movement@0.05", 0)), paths)
    inside = graft.tensors(made.base)[0]
    assert sum(int(value.count_nonzero()) for value in zeroed.values()) == sum(
        int(flat_entries(tensor)[1].count_nonzero()) for tensor in inside.values()
    )
    for path, tensor in inside.items():
        index, values = flat_entries(tensor)
        assert torch.equal(zeroed[path].flatten()[index], values)
    bare = Delta.load(made.get("sst2", "pre", 0))
    assert bench.cells.entries_changed(bare, made.base) == 0
    assert evaluate(bare, made.base, made.task("sst2"), split="test").n > 0


def test_retraining_begins_at_the_base_with_the_places(made: Any, bench: Any) -> None:
    graft = Delta.load(made.get("sst2", "learned@0.05", 0))
    begun = Delta.load(made.begun_again("sst2", "learned@0.05", 0))
    for path, tensor in graft.tensors(made.base)[0].items():
        index, values = flat_entries(tensor)
        places, almost = flat_entries(begun.tensors(made.base)[0][path])
        original = made.base.original(path).flatten()[index]
        assert torch.equal(index, places)
        moved = (almost - original).abs()
        assert bool((moved <= 2e-3 * (values - original).abs() + 1e-7).all())


def test_tasks_become_one_with_all_labels(bench: Any) -> None:
    one, two = tiny_task(), replace(tiny_task(pair=True), name="pairs")
    together = bench.several.mixture([one, two], [0, len(one.labels)], range(2))
    assert len(together.labels) == len(one.labels) + len(two.labels)
    assert {len(example.texts) for example in together.splits["train"]} == {2}
    later = together.splits["test"][len(one.splits["test"]) :]
    expected = [example.label + len(one.labels) for example in two.splits["test"]]
    assert [example.label for example in later] == expected


def test_sizes_are_read_off_a_curve(bench: Any) -> None:
    curve = [(0.001, 0.5), (0.01, 0.7), (1.0, 0.9)]
    assert bench.found.needed(curve, 0.4) == 0.001
    assert math.isclose(bench.found.needed(curve, 0.6), 10**-2.5)
    assert math.isclose(bench.found.needed(curve, 0.8), 0.1)
    assert bench.found.needed(curve, 0.95) == 1.0


def test_forgetting_is_counted_from_right_after_a_task(bench: Any) -> None:
    assert math.isclose(
        bench.verdicts.forgotten([[0.9], [0.8, 0.7], [0.6, 0.65, 0.5]]), (0.3 + 0.05) / 2
    )


def ledger(bench: Any, scores: dict[str, float]) -> dict[str, Any]:
    """Two tasks and seeds with the same scores, as the bench records them."""
    rest = {"ece": 0.06, "tempered": 0.01, "majority": 0.5, "entries": 1, "density": 0.1, "n": 9}
    rest |= {"bytes": 1, "dev": 0.5, "train_score": 1.0, "date": "2026-01-01", "machine": "none"}
    found = {}
    for task in ("sst2", "mrpc"):
        for cell, score in scores.items():
            for seed in (0, 1):
                run = bench.main.Run(task, cell, seed)
                name = {"key": run.key, "task": task, "cell": cell, "seed": seed, "score": score}
                found[run.key] = {**rest, **name}
    return found


def test_verdicts_follow_the_figures(bench: Any, tmp_path: Path) -> None:
    scores = {"ft": 0.9, "head": 0.7, "pre": 0.6, "wise@0.5": 0.88}
    for kind, at in {
        "learned": (0.8, 0.895),
        "movement": (0.7, 0.8),
        "random": (0.6, 0.61),
    }.items():
        scores |= {f"{kind}@0.001": at[0], f"{kind}@0.01": at[1]}
    scores |= {"zero-learned@0.01": 0.5, "zero-movement@0.01": 0.51}
    said = dict(bench.verdicts.verdicts(bench.found.Found(ledger(bench, scores))))
    by_letter = {name.split(":")[0]: text for name, text in said.items()}
    assert by_letter["G4"].startswith("Holds.")
    assert by_letter["G5"].startswith("Holds.")
    assert by_letter["G6"].startswith("Holds.")
    assert by_letter["G7"].startswith("Does not hold.")  # the same calibration error
    for letter in ("G8", "G9", "G10", "G11"):
        assert by_letter[letter].startswith("Not run")
    worse = {**scores, "movement@0.001": 0.85, "zero-learned@0.01": 0.6}
    said = dict(bench.verdicts.verdicts(bench.found.Found(ledger(bench, worse))))
    verdicts = [text for name, text in said.items() if name[:2] in ("G4", "G6")]
    assert all(text.startswith("Does not hold.") for text in verdicts)
    bench.page.write(tmp_path / "page.md", ledger(bench, scores), bench.cells.SIZES, 9)
    assert "| learned 1 % | 2 | 89.5 | 0.0 |" in (tmp_path / "page.md").read_text()


def test_one_model_of_all_tasks_is_judged_by_means_over_seeds(bench: Any) -> None:
    names = {"about": "multi", "tasks": ["a", "b"], "before": [0.5, 0.5]}
    first = {**names, "seed": 0, "tuned": [0.5, 0.7], "grafted": [[0.5, 0.4], [0.5, 0.7]]}
    second = {**names, "seed": 1, "tuned": [0.7, 0.9], "grafted": [[0.7, 0.6], [0.5, 0.9]]}
    record = bench.found.Found({"0": first, "1": second}).together()
    assert record["seeds"] == [0, 1]
    assert record["tuned"] == pytest.approx([0.6, 0.8])
    expected = [[1.0, 0.0], [0.0, 1.0]]  # though the first seed's task "a" gained nothing
    for row, wanted in zip(record["effect"], expected, strict=True):
        assert row == pytest.approx(wanted)
    said = dict(bench.verdicts.verdicts(bench.found.Found({"0": first, "1": second})))
    text = next(text for name, text in said.items() if name.startswith("G10"))
    assert text.startswith("Holds.")
    assert "Means over 2 seeds" in text


def test_skill_of_the_two_optimisers_is_compared_over_the_seeds_of_both(bench: Any) -> None:
    scores = {"ft": 0.9, "head": 0.7, "learned@0.01": 0.8, "learned@0.1": 0.85}
    scores |= {"sgd-0.1": 0.9, "sgd-0.3": 0.5}
    scores |= {"sgd:learned@0.01": 0.88, "sgd:learned@0.1": 0.9}
    records = ledger(bench, scores)
    for key in list(records):  # the other rate was tried with the first seed alone
        if "sgd-0.3" in key and key.endswith("s1"):
            del records[key]
    for key, record in records.items():
        record["dev"] = 0.4 if "sgd-0.3" in key else 0.5
    said = dict(bench.verdicts.verdicts(bench.found.Found(records)))
    text = next(text for name, text in said.items() if name.startswith("G8"))
    assert text.startswith("Holds.")
    assert "2 seeds" in text
    assert "rate 0.1" in text


def test_the_chosen_rate_of_sgd_is_run_with_the_other_seeds(bench: Any, tmp_path: Path) -> None:
    runs = [run for run in bench.main.plan(["sst2"]) if run.cell == "sgd"]
    assert [run.seed for run in runs] == [1, 2]
    several = SimpleNamespace(stands_for=lambda kind: f"{kind}-0.1")
    settled = bench.main.Bench.settled(several, runs[0])
    assert settled.key == "sst2/sgd-0.1/s1"


def test_the_largest_penalty_that_costs_nothing_stands_for_all(bench: Any) -> None:
    scores = {"ft": 0.9, "head": 0.7, "learned@0.01": 0.75, "learned@0.1": 0.85}
    scores |= {"sgd-0.1": 0.9, "sgd:learned@0.01": 0.88, "sgd:learned@0.1": 0.9}
    scores |= {"l1-1e-5": 0.9, "l1-1e-4": 0.89, "l1-1e-3": 0.6}
    scores |= {"l1:learned@0.01": 0.88, "l1:learned@0.1": 0.89}
    records = ledger(bench, scores)
    for record in records.values():
        record["dev"] = record["score"]
    first = [r for r in records.values() if r["cell"].startswith("l1-") and r["seed"] == 0]
    assert bench.optimisers.chosen(first, "l1") == "l1-1e-4"
    said = dict(bench.verdicts.verdicts(bench.found.Found(records)))
    text = next(text for name, text in said.items() if name.startswith("G8"))
    assert "with the penalty 89.0 (λ 1e-4)" in text
    assert text.endswith("95% of each one's gain: 1.12% against 63.10%.")
    runs = [run.cell for run in bench.main.plan(["sst2"]) if run.cell.startswith("l1")]
    assert runs[:4] == ["l1-1e-5", "l1-1e-4", "l1-1e-3", "l1:learned@0.01"]
    assert runs.count("l1") == 2


def test_the_plan_has_every_run_once_and_only_from_known_tasks(bench: Any) -> None:
    runs = bench.main.plan(list(bench.main.TASKS))
    assert len({run.key for run in runs}) == len(runs)
    assert {run.task for run in runs if not run.of} <= set(bench.cells.SIZES)
    assert all(run.task == "sst2" for run in bench.main.plan(["sst2"]) if "@0.0001" in run.cell)
