"""The page of `pruning.py`: verdicts, a table a task, domains."""

from __future__ import annotations

from typing import Any

from claims import ROOT

PAGE = ROOT / "docs" / "results" / "pruning.md"
TASKS, SEEDS, KEEPS = ("sst2", "mrpc", "qnli"), (0, 1, 2), (0.7, 0.5, 0.3, 0.1)
# Cell -> recipe and settings. What goes off, with no weight trained …
MASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "gradient, untrained": ("prune", {"by": "gradient"}),
    "magnitude, untrained": ("prune", {"by": "magnitude"}),
    "random, untrained": ("prune", {"by": "random"}),
    "gradient by layer, untrained": ("prune", {"by": "gradient", "scope": "layer"}),
    "heads alone, untrained": ("prune", {"by": "gradient", "units": "heads"}),
}
# … and with the others trained on.
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "gradient": ("prune", {"by": "gradient"}),
    "gradient, 4 rounds": ("prune", {"by": "gradient", "rounds": 4}),
    "random": ("prune", {"by": "random"}),
    "magnitude": ("prune", {"by": "magnitude"}),
    "gradient by layer": ("prune", {"by": "gradient", "scope": "layer"}),
    "gradient by layer, 4 rounds": ("prune", {"by": "gradient", "scope": "layer", "rounds": 4}),
    "magnitude, 4 rounds": ("prune", {"by": "magnitude", "rounds": 4}),
}


def name_of(cell: str, keep: float | None) -> str:
    """A cell at a sparsity."""
    return cell if keep is None else f"{cell} s={1 - keep:.1f}"


def page(results):
    pass
