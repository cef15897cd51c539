"""A study's records and distances that no training made: predictions of a chosen accuracy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from howfine.calibration import calibration
from howfine.distance import Distance
from howfine.ledger import pack_predictions
from howfine.metrics import METRICS, bootstrap_interval
from howfine.task import Example, Task

BASE = {"name": "minilm", "sha256": "53aa51172d142c89" * 4, "parameters": 22_713_216}
LAYERS, PARTS = 6, ("Q", "K", "V", "D", "I", "O")

# recipe, role, what the knob set, method's record, bytes, accuracy
ROWS: list[tuple[str, str, dict[str, Any], dict[str, Any], int, float]] = [
    ("full", "ceiling", {}, {"full": {}}, 90_853_000, 0.820),
    ("head-only", "floor", {}, {"select": {"train": ["none"]}}, 3_612, 0.716),
    ("bitfit", "candidate", {}, {"select": {"train": ["bias"]}}, 68_040, 0.806),
    ("layernorm", "candidate", {}, {"select": {"train": ["norm"]}}, 24_300, 0.792),
    *(
        ("top-layers", "candidate", {"train": [f"all@{layers}"]},
         {"select": {"train": [f"all@{layers}"]}}, size, accuracy)
        for layers, size, accuracy in (
            ("-1", 3_552_000, 0.790), ("-2,-1", 7_101_000, 0.804), ("-3--1", 10_650_000, 0.811)
        )
    ),
    *(
        ("mask", "candidate", {"where": [where], "initial_sparsity": sparsity},
         {"mask": {"where": [where], "initial_sparsity": sparsity}}, size, accuracy)
        for where, sparsity, size, accuracy in (
            ("matrices@-1", 0.02, 11_204, 0.784), ("matrices@-2,-1", 0.02, 30_900, 0.815),
            ("matrices", 0.02, 120_400, 0.818), ("matrices", 0.1, 402_000, 0.809),
        )
    ),
]  # fmt: skip


def synthetic_task(examples: int = 400, name: str = "rotten-tomatoes", **changes: Any) -> Task:
    """A task of two classes, with `examples` in test."""
    labels = np.random.default_rng(0).integers(0, 2, examples)
    test = [Example((f"sentence {i}",), int(label)) for i, label in enumerate(labels)]
    few = [Example(("a",), 0), Example(("b",), 1)]
    settings = {
        "splits": {"train": few, "dev": few, "test": test},
        "labels": ("negative", "positive"),
        "metric": "accuracy",
        "provenance": "drawn at random, seed 0",
    }
    return Task(name, **{**settings, **changes})


def scores_task(examples: int = 400) -> Task:
    """A regression task."""
    numbers = np.random.default_rng(0).normal(size=examples)
    test = [Example((f"sentence {i}",), float(number)) for i, number in enumerate(numbers)]
    few = [Example(("a",), 0.5), Example(("b",), 1.5)]
    splits = {"train": few, "dev": few, "test": test}
    return Task("similarity", splits, (), "pearson_spearman", "drawn at random, seed 0")


def predictions(task: Task, accuracy: float, seed: int) -> np.ndarray:
    """Right on a share of the test split; mostly on the same examples whatever the share."""
    targets = np.array([example.label for example in task.splits["test"]])
    shared = np.random.default_rng(1).random(len(targets))
    own = np.random.default_rng([2, seed, int(1e6 * accuracy)]).random(len(targets))
    luck = np.argsort(np.argsort(0.8 * shared + 0.2 * own)) / len(targets)
    if not task.labels:
        return (targets + (1 - accuracy) * 4 * (own - 0.5)).astype(np.float32)
    return np.where(luck < accuracy, targets, 1 - targets)


def probabilities(predictions: np.ndarray, targets: np.ndarray, seed: int) -> np.ndarray:
    """Of two classes: surer of the right answers, and too sure of the others."""
    rng = np.random.default_rng([3, seed])
    right, wrong = rng.beta(1.6, 0.6, len(targets)), rng.beta(1.1, 0.9, len(targets))
    confidence = (1 + np.where(predictions == targets, right, wrong)) / 2
    rows = np.stack([1 - confidence, confidence], axis=1)
    return np.where(predictions[:, None] == 1, rows, rows[:, ::-1])


def record(
    task: Task,
    row: tuple[str, str, dict[str, Any], dict[str, Any], int, float],
    seed: int,
    **changes: Any,
) -> dict[str, Any]:
    """One finished run."""
    recipe, role, settings, method, size, accuracy = row
    found = predictions(task, accuracy + 0.002 * (seed - 1), seed)
    targets = np.array([example.label for example in task.splits["test"]])
    metric = METRICS[task.metric]
    name = f"{recipe}-{'-'.join(map(str, settings.values()))}-s{seed}"
    key = "".join(letter for letter in name if letter.isalnum() or letter in "-.@")
    # A change of everything trains every parameter and the head.
    share = 1.0 if role == "ceiling" else min(1.0, size / 60_000_000)
    made = {
        "key": key, "recipe": recipe, "role": role, "settings": settings, "seed": seed,
        "record": {"method": method, "readout": {"classifier": {}}, "store": "fp16"},
        "metric": task.metric, "score": float(metric.function(found, targets)),
        "interval": list(bootstrap_interval(metric, [found], targets, draws=200)),
        "dev_score": accuracy + 0.001 * seed, "bytes": size + 7 * seed,
        "seconds": 30 + 60 * share + seed, "steps": 640, "peak_bytes": int(4e8 + 8e8 * share),
        "trainable": int(share * BASE["parameters"]) + 770,
        "file": f"deltas/{key}.delta.safetensors", "predictions": pack_predictions(found),
    }  # fmt: skip
    if task.labels:
        measured = calibration(probabilities(found, targets, seed), targets)
        made |= {name: measured[name] for name in ("ece", "reliability")}
    return {**made, **changes}


def failed(record: dict[str, Any], error: str) -> dict[str, Any]:
    """The same run, had it failed."""
    kept = ("key", "recipe", "role", "settings", "seed", "record")
    return {**{name: record[name] for name in kept}, "error": error}


def records(
    task: Task, seeds: tuple[int, ...] = (0, 1, 2), rows: Any = ROWS
) -> list[dict[str, Any]]:
    """Every run of a study."""
    return [record(task, row, seed) for row in rows for seed in seeds]


def distances(layers: int = LAYERS) -> list[Distance]:
    """Matrices that move more the nearer they are to the output, K and Q least; one not at all."""
    rows = []
    numbers = np.random.default_rng(3)
    for layer in range(layers):
        for index, part in enumerate(PARTS):
            relative = (
                0.004 * math.exp(2 * layer / layers + 0.2 * index) * numbers.uniform(0.8, 1.2)
            )
            relative = 0.0 if (layer, part) == (0, "K") else relative
            rows.append(
                Distance(
                    path=f"encoder.layer.{layer}.{part}", layer=layer, part=part, count=147_456,
                    l1=147_456 * 0.03 * relative, mean_abs=0.03 * relative, relative=relative,
                    angle=relative / 3, changed=float(relative > 0),
                    reference_mean_abs=0.039, reference_angle=0.5,
                    random_mean_abs=0.0226, random_angle=0.5,
                )
            )  # fmt: skip
    norm = Distance("encoder.layer.0.norm", 0, "norm", 384, 1.0, 0.1, 0.1, 0.1, 1.0)
    return [*rows, norm]


def where(layers: int = LAYERS, least: int = 0, share: float = 1e-4) -> list[dict[str, Any]]:
    """Rows of a change that is denser the nearer it is to the output, of none below `least`."""
    rows: list[dict[str, Any]] = []
    sizes = {**dict.fromkeys(PARTS, 147_456), "bias": 3_456, "norm": 1_536}
    places = [(layer, part) for layer in range(layers) for part in sizes]
    outside = {"norm": 768, "embedding": 11_720_448, "other": 197_376}
    for layer, part in [*places, *((None, part) for part in outside)]:
        entries = outside[part] if layer is None else sizes[part]
        changed = 0
        if layer is not None and layer >= least:
            changed = min(entries, round(entries * share * 4**layer))
        row = {"layer": layer, "part": part, "changed": changed, "entries": entries}
        rows.append({**row, "share": changed / entries})
    return rows


def located(result: Any) -> Any:
    """The report as if its files were there: rows for every recipe, and one that merges."""
    for number, group in enumerate(result["groups"]):
        if group["recipe"] not in result["where"]:
            share = 1.0 if group["role"] == "ceiling" else 1e-6 * 4**number
            result["where"][group["recipe"]] = where(share=share, least=number % 3)
            result["where_runs"][group["recipe"]] = group["keys"][0]
    chosen = result["recommended"]
    chosen["merges"] = True
    result["where"][chosen["recipe"]] = where(least=2)
    result["where_runs"][chosen["recipe"]] = chosen["key"]
    return result
