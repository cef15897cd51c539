"""PERFECT's claims on a small masked language model: 16 examples of each class, many splits.

    python bench/perfect.py --data DIR --base MASKED_LM [--minutes 90] [--page]

LM-BFF's 16-shot splits, five of each task, with two training seeds each. Runs what
bench/ledgers/perfect.jsonl lacks and writes docs/results/perfect.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean, stdev

import claims
from claims import OPEN, ROOT, UNLEARNED, Bench, Cell, Results, Verdict

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


def paired(r: Results, tasks: Sequence[str], *cells: str) -> tuple[list[str], list[list[float]]]:
    """Tasks that any of the cells has learned, and each cell's means over them, one a run.

    A run is a split with a training seed that all cells have on all those tasks.
    """
    learned = r.learned(r.shared(tasks, *cells), *cells)
    return learned, r.runs(learned, *cells)


def better(
    one: str, other: str, by: float, tasks: Sequence[str] = TASKS
) -> Callable[[Results], Verdict]:
    """Whether a cell's mean over tasks is that many points above another's (below: a margin).

    Open where the mean difference is within two standard errors of that many points.
    """

    def check(r: Results) -> Verdict:
        if not r.shared(tasks, one, other):
            return "", None
        learned, runs = paired(r, tasks, one, other)
        if not learned:
            return UNLEARNED, OPEN
        first, second = map(mean, runs)
        said = f"{one} {first:.1f}, {other} {second:.1f}{over(learned, runs)}"
        return said, first - second >= by if claims.decided(claims.gaps(*runs, by=by)) else OPEN

    return check


def over(tasks: Sequence[str], runs: Sequence[Sequence[float]]) -> str:
    return f" over {', '.join(tasks)}, {len(runs[0])} runs each"


def steadier(r: Results) -> Verdict:
    cells = ("perfect", "fine-tuning")
    tasks = r.learned(r.both(TASKS, *cells), *cells)
    if not tasks or min(len(r.rows(task, "perfect")) for task in tasks) < 2:
        return "", None
    (score, spread), (other, wider) = ((r.over(tasks, c), r.over(tasks, c, stdev)) for c in cells)
    said = f"perfect {score:.1f} ± {spread:.1f}, fine-tuning {other:.1f} ± {wider:.1f}"
    runs = r.runs(tasks, *cells)
    told = claims.decided(claims.gaps(*runs))
    return said + over(tasks, runs), score > other and spread < wider if told else OPEN


def biases(r: Results) -> Verdict:
    """Near on all tasks together, and not ahead on those of pairs.

    Open where pairs are not learned, or the two are within two standard errors there.
    """
    cells = ("perfect", "bitfit + labels")
    if not r.shared(TASKS, *cells):
        return "", None
    said: list[str] = []
    held: list[bool | None] = []
    for name, tasks, most in (("all", TASKS, 2.0), ("pairs", PAIRS, 0.0)):
        learned, runs = paired(r, tasks, *cells)
        if not learned:
            said.append(f"{name}: {UNLEARNED}")
            held.append(None)
            continue
        gaps = claims.gaps(runs[1], runs[0])
        said.append(f"{name}: {mean(gaps):+.1f}{over(learned, runs)}")
        near = abs(mean(gaps)) <= most if most else mean(gaps) < 0
        held.append(near if most or claims.decided(gaps) else None)
    verdict = False if False in held else OPEN if None in held else True
    return f"biases less perfect, {'; '.join(said)}", verdict


def worst(r: Results) -> Verdict:
    cells = ("perfect", "cross-entropy")
    if not r.shared(TASKS, *cells):
        return "", None
    learned, runs = paired(r, TASKS, *cells)
    if not learned:
        return UNLEARNED, OPEN
    low = [r.over(learned, cell, min) for cell in cells]
    apart = mean(runs[0]) - mean(runs[1])
    said = f"worst: hinge {low[0]:.1f}, cross-entropy {low[1]:.1f}; means {apart:+.1f} apart"
    return said + over(learned, runs), low[0] >= low[1] and abs(apart) <= 1


def flat(r: Results) -> Verdict:
    """Open where ten masks and the better of one and two are within two standard errors."""
    cells = ["perfect", *(f"{count} masks" for count in MASKS[1:])]
    if not r.shared(TASKS, *cells):
        return "", None
    learned, runs = paired(r, TASKS, *cells)
    if not learned:
        return UNLEARNED, OPEN
    means = [mean(scores) for scores in runs]
    said = ", ".join(f"{m}: {s:.1f}" for m, s in zip(MASKS, means, strict=True))
    few = max(runs[:2], key=mean)
    if not claims.decided(claims.gaps(few, runs[-1])):
        return f"masks {said}{over(learned, runs)}", OPEN
    return f"masks {said}{over(learned, runs)}", max(means[:2]) == max(means) > means[-1]


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
        better("perfect", "mask at the end", 0, PAIRS),
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
of the official validation sets or LM-BFF's own. Accuracy everywhere. Claims leave out tasks on
which none of the cells compared is above one answer for all; 2, 3, 5, 6 and 7 are open where
the runs' mean difference is within two standard errors of what is claimed. Rates (of the recipe
1e-3 and for label vectors 0.1, of fine-tuning 1e-4, of prompts 1e-2) were not searched."""
    parts = ["## Claims", "", *claims.verdicts(results, CLAIMS), "", "## Scores", ""]
    parts += claims.table(results, TASKS, [cell.name for cell in CELLS])
    claims.write(PAGE, "PERFECT: few examples without words", about, results, parts)


if __name__ == "__main__":
    claims.main(__doc__ or "", LEDGER, run, page)
