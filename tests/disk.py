"""Tiny bases and tasks on disk, for what runs in another process."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tiny import tiny_task, tiny_tokenizer, tiny_tower

PLAN: dict[str, Any] = {
    "ceiling": "full",
    "floor": "head-only",
    "recipes": ["bitfit", "mask"],
    "seeds": [0, 1],
    "margin": 0.05,
    "settings": {"max_steps": 4, "batch_size": 8},
    "knobs": {"mask": {"initial_sparsity": [0.1]}},
}


def base_folder(folder: Path, name: str = "bert") -> Path:
    """A tiny model with its tokenizer, as a Hugging Face folder."""
    path = folder / name
    tiny_tower(name).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def task_folder(folder: Path) -> Path:
    """The tiny task as train.csv, dev.csv and test.csv."""
    path = folder / "task"
    path.mkdir(parents=True)
    task = tiny_task()
    for split, examples in task.splits.items():
        with (path / f"{split}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["text", "label"])
            writer.writerows([e.texts[0], task.labels[int(e.label)]] for e in examples)
    return path


def plan_file(folder: Path, **changes: Any) -> Path:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**PLAN, **changes}))
    return path


def howfine(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a fresh process."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=_environment(**environment)
    )


def howfine_started(*arguments: object, **environment: str) -> subprocess.Popen[bytes]:
    """Start the command line and leave it running."""
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=_environment(**environment),
    )


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "howfine.cli", *map(str, arguments)]


def _environment(**environment: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}


def runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Records of a study's ledger by key."""
    lines = (folder / "runs.jsonl").read_text().splitlines()
    return {record["key"]: record for record in map(json.loads, lines)}


def outcome(folder: Path) -> dict[str, tuple[Any, ...]]:
    """What must be the same whenever a study is run again: scores and bytes, by key."""
    return {
        key: (record["score"], record["bytes"], (folder / record["file"]).read_bytes())
        for key, record in runs(folder).items()
    }
