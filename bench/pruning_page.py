"""The page of `pruning.py`: verdicts, a table a task, domains."""

from __future__ import annotations

from typing import Any

from claims import ROOT

PAGE = ROOT / "docs" / "results" / "pruning.md"
TASKS, SEEDS, KEEPS = ("sst2", "mrpc", "qnli"), (0, 1, 2), (0.7, 0.5, 0.3, 0.1)
Made = tuple[str, dict[str, Any]]
# One file of all sizes: trained for them; or units ranked, and no weight trained.
UNTRAINED = ("gradient, untrained", "magnitude, untrained", "random, untrained", "post-training")
SIZES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "gradient, untrained": {"by": "gradient", "drawn": 0},
    "magnitude, untrained": {"by": "magnitude", "drawn": 0},
    "random, untrained": {"by": "random", "drawn": 0},
}
# Each size by itself: recipe and settings.
TRAINED: dict[str, Made] = {
    "gradient": ("prune", {"by": "gradient"}),
    "gradient, 4 rounds": ("prune", {"by": "gradient", "rounds": 4}),
    "random": ("prune", {"by": "random"}),
    "magnitude": ("prune", {"by": "magnitude"}),
}
FURTHER: dict[str, Made] = {
    "gradient by layer": ("prune", {"by": "gradient", "scope": "layer"}),
    "gradient by layer, 4 rounds": ("prune", {"by": "gradient", "scope": "layer", "rounds": 4}),
    "magnitude, 4 rounds": ("prune", {"by": "magnitude", "rounds": 4}),
    "Fisher": ("prune", {"by": "fisher"}),
}


def name_of(cell: str, keep: float | None) -> str:
    """A cell at a sparsity."""
    return cell if keep is None else f"{cell} s={1 - keep:.1f}"


def page(results):
    pass
