"""PERFECT's claims on a small masked language model: 16 examples of each class, many splits.

    python bench/perfect.py --data DIR --base MASKED_LM [--minutes 90] [--page]

LM-BFF's 16-shot splits, five of each task, with two training seeds each. Runs what
bench/ledgers/perfect.jsonl lacks and writes docs/results/perfect.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import mean, stdev

import claims
from claims import ROOT, Bench, Cell, Results, Verdict

from howfine.method import method
from howfine.readout import readout
from howfine.recipe import Recipe
from howfine.task import Task
from howfine.training import Training

LEDGER = ROOT / "bench" / "ledgers" / "perfect.jsonl"
PAGE = ROOT / "docs" / "results" / "perfect.md"
TASKS = ("sst-2", "mr", "sst-5", "mrpc", "rte", "qnli")
PAIRS = ("mrpc", "rte", "qnli")
SPLITS, SEEDS = (13, 21, 42, 87, 100), (0, 1)
# Rows of a test at most: a sample with each class's share.
TEST = 250
COMMON = {"max_steps": 60, "evaluations": 2, "batch_size": 4, "max_length": 96}
MASKS = (1, 2, 5, 10)


def built(name: str, kind: str, **settings: object) -> Recipe:
    """Another method under PERFECT's readout and training."""
    training = Training(
        learning_rate=1e-3, readout_learning_rate=1e-1, weight_decay=0.0, warmup=0.0
    )
    return Recipe(name, method(kind, **settings), readout("label_embedding"), training)


def layout(masks: int, extra: str = "") -> str:
    return f"{extra}{{text}} {{mask*{masks}}} {{pair}}"


PERFECT = Cell("perfect", "perfect")
CELLS = [
    PERFECT,
    Cell("fine-tuning", "full", {"learning_rate": 1e-4, "pooling": "cls"}),
    Cell("bitfit + labels", built("bitfit", "select", train=("bias",))),
    Cell(
        "prompt + labels",
        built("prompt", "prompt", init="table"),
        {"template": layout(1, "{slot*20} "), "learning_rate": 1e-2},
    ),
    Cell("cross-entropy", "perfect", {"objective": "cross_entropy"}),
    Cell("scores", "perfect", {"inference": "scores"}),
    *(Cell(f"{count} masks", "perfect", {"template": layout(count)}) for count in MASKS[1:]),
    Cell("mask at the end", "perfect", {"template": "{text} {pair} {mask}"}),
]
# The last ones with one training seed.
FULL_RUNS = 5


def run(bench: Bench) -> None:
    """Split by split, so that a stop leaves whole rounds; second seeds come last."""
    for seed in SEEDS:
        for split in SPLITS:
            for cell in CELLS if seed == SEEDS[0] else CELLS[:FULL_RUNS]:
                for name in PAIRS if cell.name == "mask at the end" else TASKS:
                    fit(bench, name, split, cell, seed)


def fit(bench: Bench, name: str, split: int, cell: Cell, seed: int) -> None:
    task = loaded(bench, f"lmbff/{name}@{split}")
    bench.once(
        f"{name}@{split}/{cell.name}/s{seed}",
        lambda: bench.fit(cell, task, seed, **COMMON),
        task=name,
        cell=cell.name,
        split=split,
        seed=seed,
    )


def loaded(bench: Bench, name: str) -> Task:
    if name not in bench.tasks:
        task = Task.load(name, data=bench.options.data)
        bench.tasks[name] = replace(task.subset(test=TEST), name=name)
    return bench.tasks[name]


def better(one: str, other: str, by: float, least: int = 1) -> Callable[[Results], Verdict]:
    """Whether a cell's mean over tasks is that many points above another's (below: a margin)."""

    def check(r: Results) -> Verdict:
        pairs = {task: r.common(task, one, other) for task in TASKS}
        pairs = {task: found for task, found in pairs.items() if found}
        if len(pairs) < least:
            return "", None
        first, second = (mean(mean(found[side]) for found in pairs.values()) for side in (0, 1))
        runs = sum(len(found[0]) for found in pairs.values())
        said = f"{one} {first:.1f}, {other} {second:.1f} over {len(pairs)} tasks, {runs} runs each"
        return said, first - second >= by

    return check


def steadier(r: Results) -> Verdict:
    tasks = r.both(TASKS, "perfect", "fine-tuning")
    if len(tasks) < 3 or min(len(r.rows(task, "perfect")) for task in tasks) < 2:
        return "", None
    found = {c: (r.over(tasks, c), r.over(tasks, c, stdev)) for c in ("perfect", "fine-tuning")}
    (score, spread), (other, wider) = found.values()
    said = f"perfect {score:.1f} ± {spread:.1f}, fine-tuning {other:.1f} ± {wider:.1f}"
    return f"{said} over {len(tasks)} tasks", score > other and spread < wider


def biases(r: Results) -> Verdict:
    """Near on all tasks together, and not ahead on those of pairs."""
    apart = {}
    for name, tasks in (("all", TASKS), ("pairs", PAIRS)):
        found = [r.common(task, "perfect", "bitfit + labels") for task in tasks]
        if not all(found):
            return "", None
        apart[name] = mean(mean(own[1]) - mean(own[0]) for own in found)
    said = ", ".join(f"{name}: {gap:+.1f}" for name, gap in apart.items())
    return f"biases less perfect, {said}", abs(apart["all"]) <= 2 and apart["pairs"] <= 0


def worst(r: Results) -> Verdict:
    tasks = r.both(TASKS, "perfect", "cross-entropy")
    if not tasks:
        return "", None
    one, other = (r.over(tasks, cell, min) for cell in ("perfect", "cross-entropy"))
    near = abs(r.over(tasks, "perfect") - r.over(tasks, "cross-entropy")) <= 1
    return f"worst: hinge {one:.1f}, cross-entropy {other:.1f}", one >= other and near


def flat(r: Results) -> Verdict:
    cells = ["perfect", *(f"{count} masks" for count in MASKS[1:])]
    found = [r.common(task, *cells) for task in TASKS]
    found = [scores for scores in found if scores]
    if not found:
        return "", None
    means = [mean(mean(scores[at]) for scores in found) for at in range(len(cells))]
    said = ", ".join(f"{m}: {s:.1f}" for m, s in zip(MASKS, means, strict=True))
    said += f" over {len(found)} tasks, {sum(len(scores[0]) for scores in found)} runs each"
    return f"masks {said}", max(means[:2]) == max(means) and means[-1] < max(means)


CLAIMS: list[claims.Claim] = [
    ("2", "above [CLS] fine-tuning, with less spread", steadier),
    (
        "3 prompt",
        "5 points above prompts with label vectors",
        better("perfect", "prompt + labels", 5),
    ),
    (
        "3 biases",
        "biases with label vectors within 2 points, and not ahead on pairs",
        biases,
    ),
    ("4", "the worst run is no worse than with cross-entropy, means within a point", worst),
    ("5", "prototypes at least scores less half a point", better("perfect", "scores", -0.5)),
    ("6", "one or two masks best, ten lower", flat),
    (
        "7",
        "a mask between the texts at least as good as behind",
        better("perfect", "mask at the end", 0),
    ),
]


def page(results: Results) -> None:
    c, splits = COMMON, ", ".join(map(str, SPLITS))
    steps, states = c["max_steps"], c["evaluations"]
    about = f"""Written by `python bench/perfect.py --data DIR --base MASKED_LM`. Base:
`minilm-mlm`, MiniLM (6 × 384) with a masked language model's head (the head is not used).
LM-BFF's 16-shot splits {splits}, up to {len(SEEDS)} training seeds (the table says how many runs;
scores, the numbers of masks and their place have one);
{steps} steps of batch {c["batch_size"]} (the paper: 6,000 of 32), texts of at most
{c["max_length"]} tokens, the best of {states} states on dev, in
{claims.formats(results.records)}. Tests: at most {TEST:,} rows
of the official validation sets or LM-BFF's own. Accuracy everywhere."""
    parts = ["## Claims", "", *claims.verdicts(results, CLAIMS), "", "## Scores", ""]
    parts += claims.table(results, TASKS, [cell.name for cell in CELLS])
    claims.write(PAGE, "PERFECT: few examples without words", about, results, parts)


if __name__ == "__main__":
    claims.main(__doc__ or "", LEDGER, run, page)
