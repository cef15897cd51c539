"""The answer of a study: the smallest file that still does the task, and how sure that is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from howfine.calibration import pooled
from howfine.errors import SettingError
from howfine.ledger import Record, unpack_predictions
from howfine.metrics import METRICS, bootstrap_interval, paired_bootstrap
from howfine.training import Training


def groups(records: Sequence[Record], targets: np.ndarray, margin: float) -> list[dict[str, Any]]:
    """Runs that differ only by seed, as one row: means, interval over examples and seeds.

    `missing` are seeds of the study that the group has no finished run of. `probability` is the
    paired bootstrap's share of draws (test examples jointly, seeds of each) in which the group's
    test score is within the margin of the ceiling's. `ece` is the mean expected calibration error
    over the seeds, `reliability` their bins as one; None where no run measured them.
    """
    done = [record for record in records if "error" not in record]
    together: dict[str, list[Record]] = {}
    for record in done:
        same = [record["recipe"], record["settings"], record["record"]]
        together.setdefault(json.dumps(same, sort_keys=True), []).append(record)
    ceiling = _ceiling(list(together.values()))
    reference = [unpack_predictions(record["predictions"]) for record in ceiling]
    step = _seconds_an_example(ceiling)
    found = [_group(rows, reference, step, targets, margin) for rows in together.values()]
    seeds = {record["seed"] for record in records}
    for group in found:
        group["missing"] = sorted(seeds - set(group["seeds"]))
        if group["role"] == "ceiling":  # it is itself; drawing its seeds twice would doubt it
            group["probability"] = 1.0
    return found


def _ceiling(together: list[list[Record]]) -> list[Record]:
    for rows in together:
        if rows[0]["role"] == "ceiling":
            return rows
    raise SettingError("the study has no finished ceiling run; run it again, or see its errors")


def _group(
    rows: list[Record], reference: list[np.ndarray], step: float, targets: np.ndarray, margin: float
) -> dict[str, Any]:
    metric = METRICS[rows[0]["metric"]]
    predictions = [unpack_predictions(record["predictions"]) for record in rows]
    low, high = bootstrap_interval(metric, predictions, targets)
    return {
        "recipe": rows[0]["recipe"],
        "role": rows[0]["role"],
        "settings": rows[0]["settings"],
        "seeds": [record["seed"] for record in rows],
        "score": _mean(rows, "score"),
        "interval": [float(low), float(high)],
        "dev_score": _mean(rows, "dev_score"),
        "bytes": round(_mean(rows, "bytes")),
        "trainable": rows[0]["trainable"],
        "seconds": _mean(rows, "seconds"),
        "step_ratio": _seconds_an_example(rows) / step,
        "peak_bytes": max(record["peak_bytes"] for record in rows),
        **_calibration(rows),
        "probability": float(paired_bootstrap(metric, predictions, reference, targets, margin)),
        "keys": [record["key"] for record in rows],
    }


def _calibration(rows: list[Record]) -> dict[str, Any]:
    """Regression has none, and records of earlier versions lack it."""
    known = [record for record in rows if "ece" in record]
    if not known:
        return {"ece": None, "reliability": None}
    tables = [record["reliability"] for record in known]
    return {"ece": _mean(known, "ece"), "reliability": pooled(tables)}


def _seconds_an_example(rows: list[Record]) -> float:
    """Median over seeds: recipes with other batch sizes make steps of other sizes."""
    training = rows[0]["record"].get("training", {})
    per_step = training.get("batch_size", Training.batch_size)
    per_step *= training.get("gradient_accumulation", Training.gradient_accumulation)
    return float(np.median([record["seconds"] / record["steps"] for record in rows])) / per_step


def _mean(rows: list[Record], field: str) -> float:
    return float(np.mean([record[field] for record in rows]))


def recommend(
    found: Sequence[dict[str, Any]], records: Sequence[Record], margin: float
) -> dict[str, Any]:
    """The group of fewest bytes whose mean dev score is within the margin of the ceiling's.

    A group that lacks a seed is left out: a training that diverges on some seeds does not do the
    task, and a mean over those that went well would hide it. The file is the seed with the best
    dev score; test takes no part in the choice.
    """
    ceiling = next(group for group in found if group["role"] == "ceiling")
    least = ceiling["dev_score"] - margin * abs(ceiling["dev_score"])
    whole = [group for group in found if group is ceiling or not group["missing"]]
    fitting = [group for group in whole if group["dev_score"] >= least]
    winner = min(fitting, key=lambda group: (group["bytes"], -group["dev_score"]))
    by_key = {record["key"]: record for record in records}
    best = max((by_key[key] for key in winner["keys"]), key=lambda record: record["dev_score"])
    return {
        "file": best["file"],
        "bytes": best["bytes"],
        "score": best["score"],
        "interval": best["interval"],
        "metric": best["metric"],
        "seed": best["seed"],
        "key": best["key"],
        "recipe": winner["recipe"],
        "settings": winner["settings"],
        "mean_score": winner["score"],
        "mean_interval": winner["interval"],
        "mean_bytes": winner["bytes"],
        "probability": winner["probability"],
        "share_of_full_bytes": winner["bytes"] / ceiling["bytes"],
    }
