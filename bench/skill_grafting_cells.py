"""The changes that the skill-grafting bench scores, each a file that is made once.

A cell's name says what it is: `ft`, `head`, `bitfit`, `sgd-0.1`, `l1-1e-5` are trainings; `pre`,
`wise@0.5` are made of `ft` without training; `learned@0.01`, `movement@0.01`, `random@0.01` are
grafts of that share of the entries, `zero-learned@0.01` is θ_ft on the same entries and 0
elsewhere, and `retrain@0.01` trains them from the base. `sgd:` or `l1:` in front means grafted from
SGD's fine-tuning, or from the penalised one.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from frontier import Size, sized

from howfine import compose, streams
from howfine.base import Base
from howfine.delta import SUFFIX, Delta
from howfine.entries import flat_entries
from howfine.methods.full import Full
from howfine.methods.select import Select
from howfine.recipe import Recipe
from howfine.task import Task
from howfine.tune import tune

# Training rows and tokens kept of an example: sized for two cores. Test sets are cut to TEST rows;
# HELDOUT others choose SGD's rate and fit temperatures.
SIZES = {
    "sst2": (1000, 64),
    "mrpc": (1000, 64),
    "qnli": (1000, 64),
    "rte": (1000, 128),
    "qqp": (1000, 64),
    "rotten-tomatoes": (1000, 64),
}
TEST, HELDOUT = 800, 300
# To see that every cell runs.
SMOKE_ROWS, SMOKE_LENGTH = 32, 16
# The blocks: embeddings stay the base's, as in the authors' code.
BLOCKS = ("all@0--1",)
COMMON = {"epochs": 3, "batch_size": 16, "precision": "bf16", "readout_learning_rate": 2e-3}
FULL_RATE, BIAS_RATE, HEAD_RATE, REGION_RATE = 1e-4, 4e-3, 1e-2, 1e-3
SGD_EPOCHS, SGD_HEAD_RATE = 4, 0.1
LONGEST, FEW = 128, 16
STEPS, MICRO, MICROS = 20, 32, 4  # mask steps, and batches of so many examples in one of them
SETTINGS = hashlib.sha256(repr((SIZES, TEST, COMMON, STEPS, MICRO, MICROS)).encode()).hexdigest()[
    :8
]
# A change is scaled by this to begin again at the base with its places kept.
ALMOST_NOTHING = 1e-3


def fine_tuning() -> dict[str, Any]:
    """θ_ft: AdamW on the blocks, fixed settings."""
    return {"method": {"select": {"train": list(BLOCKS)}}, "training": trained(FULL_RATE)}


def trained(rate: float, **more: Any) -> dict[str, Any]:
    return {**COMMON, "learning_rate": rate, **more}


def learned(start: str, density: float, outside: tuple[str, ...] = ()) -> dict[str, Any]:
    """A region of exactly that share of the blocks' entries, found by training its mask."""
    training = {"max_steps": STEPS, "batch_size": MICRO, "gradient_accumulation": MICROS}
    training |= {"optimizer": "sgd", "eval_mode": True, "precision": "bf16", "evaluations": 0}
    training |= {"readout_learning_rate": 0.0, "weight_decay": 0.0, "warmup": 0.0}
    training |= {"schedule": "constant", "max_grad_norm": 0.0}
    method = {"graft": {"where": list(BLOCKS), "density": density}}
    raw = {"start": start, "method": method, "training": training}
    return {**raw, "outside": list(outside)} if outside else raw


def copied(start: str, by: str, density: float) -> dict[str, Any]:
    """θ_ft's values at entries chosen without the mask's training; nothing is trained."""
    still = {"learning_rate": 0.0, "readout_learning_rate": 0.0, "max_steps": 1, "warmup": 0.0}
    method = {"sparse": {"where": list(BLOCKS), "by": by, "density": density}}
    return {"start": start, "method": method, "training": still}


def retrained(start: str) -> dict[str, Any]:
    method = {"sparse": {"where": list(BLOCKS), "by": "start"}}
    return {"start": start, "method": method, "training": trained(REGION_RATE)}


def selected(what: str, rate: float, **more: Any) -> dict[str, Any]:
    return {"method": {"select": {"train": [what]}}, "training": trained(rate, **more)}


@dataclass
class Cells:
    """Files of cells in a folder, made where they are not there yet."""

    base: Base
    folder: Path
    data: str | None
    smoke: bool = False
    tasks: dict[str, Task] = field(default_factory=dict)
    # The fine-tunings that stand for `sgd` and `l1`, once they are chosen.
    chosen: dict[str, str] = field(default_factory=dict)

    def task(self, name: str) -> Task:
        """A task at the bench's size."""
        if name not in self.tasks:
            rows, heldout, test = SIZES[name][0], HELDOUT, TEST
            if self.smoke:
                rows = heldout = test = SMOKE_ROWS
            found = sized(Task.load(name, data=self.data), Size(rows, heldout=heldout))
            self.tasks[name] = found.subset(test=test)
        return self.tasks[name]

    def get(self, name: str, cell: str, seed: int) -> Path:
        """The file of a cell of a task."""
        path = self.path(f"{name}-{cell}", seed)
        if not path.exists():
            self.make(self.task(name), cell, seed, path)
        return path

    def path(self, name: str, seed: int) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name.replace(':', '-')}-s{seed}{SUFFIX}"

    def make(self, task: Task, cell: str, seed: int, path: Path) -> None:
        """Train or compute a cell."""
        source, _, what = cell.rpartition(":")
        kind, _, number = what.partition("@")
        begun = self.chosen[source] if source else "ft"
        if kind == "pre":
            untouched(Delta.load(self.get(task.name, begun, seed))).save(path)
        elif kind == "wise":
            start = self.get(task.name, begun, seed)
            compose.scale([start], self.base, by=float(number)).save(path)
        elif kind.startswith("zero-"):
            graft = Delta.load(self.get(task.name, cell.replace("zero-", ""), seed))
            zeroed(graft, self.base).save(path)
        else:
            self.fit(task, self.recipe(task.name, cell, begun, seed), seed, path)

    def recipe(self, name: str, cell: str, begun: str, seed: int) -> dict[str, Any]:
        kind, _, number = cell.rpartition(":")[2].partition("@")
        if kind in ("learned", "movement", "random"):
            start, density = str(self.get(name, begun, seed)), float(number)
            return learned(start, density) if kind == "learned" else copied(start, kind, density)
        if kind == "retrain":
            return retrained(str(self.begun_again(name, f"learned@{number}", seed)))
        if kind.startswith("sgd-"):
            rates = {"optimizer": "sgd", "readout_learning_rate": SGD_HEAD_RATE}
            rates["epochs"] = SGD_EPOCHS
            return selected(BLOCKS[0], float(kind.removeprefix("sgd-")), **rates)
        if kind.startswith("l1-"):
            select = {"train": list(BLOCKS), "l1": float(kind.removeprefix("l1-"))}
            return {"method": {"select": select}, "training": trained(FULL_RATE)}
        if kind == "bitfit":
            return selected("bias", BIAS_RATE)
        if kind == "head":
            head = {"epochs": 5, "weight_decay": 0.0, "readout_learning_rate": HEAD_RATE}
            return selected("none", HEAD_RATE, **head)
        assert kind == "ft", cell
        return fine_tuning()

    def begun_again(self, name: str, cell: str, seed: int) -> Path:
        """A graft with next to nothing of its change left: the places, and the base's values."""
        path = self.path(f"{name}-{cell}-begun", seed)
        if not path.exists():
            graft = self.get(name, cell, seed)
            compose.scale([graft], self.base, by=ALMOST_NOTHING).save(path)
        return path

    def fit(
        self, task: Task, raw: Mapping[str, Any], seed: int, path: Path, base: Base | None = None
    ) -> Path:
        """Tune and store, unless the file is there."""
        if path.exists():
            return path
        length = LONGEST if task.name not in SIZES else SIZES[task.name][1]
        length = SMOKE_LENGTH if self.smoke else length
        recipe = Recipe.parse(path.stem, {**raw, "readout": {"classifier": {"max_length": length}}})
        if self.smoke:
            small = {"max_steps": 2, "batch_size": 8, "gradient_accumulation": 1}
            recipe = recipe.override(**small)
        judged = "optimizer" in raw["training"] or "l1" in raw["method"].get("select", {})
        if not judged or raw.get("start"):
            task = task.subset(dev=FEW)  # its score on dev is not looked at
        unfinished = path.with_name(f".{path.name}")
        tune(base or self.base, task, recipe, out=unfinished, seed=seed)
        shutil.move(unfinished, path)
        return path


def untouched(tuned: Delta) -> Delta:
    """The base with this delta's head: k = 0."""
    head = tuple(stream for stream in tuned.streams if stream.name.startswith("readout/"))
    return replace(tuned, method=Select(train=("none",)), streams=head, score={})


def zeroed(graft: Delta, base: Base) -> Delta:
    """θ_ft ⊙ γ: the graft's values in its region, 0 at all other entries of the blocks."""
    inside, head = graft.tensors(base)
    whole = {}
    for path in base.choose(BLOCKS):
        shape = base.original(path).shape
        whole[path] = base.original(path).new_zeros(shape)
        if path in inside:
            index, values = flat_entries(inside[path])
            whole[path].view(-1)[index] = values
    made = (
        *streams.encode("method", whole, "fp32", base),
        *streams.encode("readout", head, "fp32", base),
    )
    return replace(graft, method=Full(), streams=made, score={})


def entries_changed(delta: Delta, base: Base) -> int:
    """How many values of the base differ with the delta on."""
    total = 0
    for path, tensor in delta.tensors(base)[0].items():
        original = base.original(path)
        if tensor.is_sparse:
            index, values = flat_entries(tensor)
            total += int((original.flatten()[index] != values).sum())
        else:
            total += int((tensor != original).sum())
    return total
