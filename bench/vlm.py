"""The versatile language model's claims on a small causal model: five tasks that write.

    python bench/vlm.py --data DIR --base CAUSAL_LM [--minutes 90] [--page]

Sentences from slots (E2E) and from triples (DART), translation both ways (Multi30k), and a
dialogue's next turn (DREAM). Each kind of change tries three learning rates on E2E with one seed,
judged by the likelihood of dev. Runs what bench/ledgers/vlm.jsonl lacks and writes
docs/results/vlm.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean

import claims
import torch
from claims import ROOT, Bench, Cell, Results, Verdict

from howfine.base import Base
from howfine.delta import SUFFIX
from howfine.distill import distilled
from howfine.ledger import Record
from howfine.method import method
from howfine.readout import readout
from howfine.recipe import Recipe
from howfine.task import Task
from howfine.training import Training
from howfine.tune import tune

LEDGER = ROOT / "bench" / "ledgers" / "vlm.jsonl"
PAGE = ROOT / "docs" / "results" / "vlm.md"
TASKS = {
    "e2e": "gen/e2e",
    "dart": "gen/dart",
    "en-de": "gen/multi30k-en-de",
    "de-en": "gen/multi30k-de-en",
    "dream": "gen/dream",
}
TRANSLATIONS = ("en-de", "de-en")
SEEDS = (0, 1)
TRAIN, DEV, TEST = 1500, 60, 100
STEPS, RATE_STEPS, BATCH = 200, 80, 8
COMMON = {"precision": "fp32", "batch_size": BATCH, "max_steps": STEPS}
WRITES = {"max_length": 160, "max_new_tokens": 48}
WIDTHS = (10, 50, 100, 200, 300)
WIDTH = 100
METRICS = ("perplexity", "bleu", "chrf", "rouge_l")
RANDOM = "random start"


def built(kind: str, typed: bool = True, **settings: object) -> Recipe:
    training = Training(weight_decay=0.0, warmup=0.0)
    reads = readout("typed_segments", typed=typed, **WRITES)
    return Recipe(kind, method(kind, **settings), reads, training)


def vlm(width: int = WIDTH, typed: bool = True, std: float = 0.0) -> Recipe:
    placed = {"placement": "block", "activation": "relu", "width": width, "std": std}
    return built("adapter", typed, **placed)


FULL = built("full")
RATES = {
    "vlm": (vlm(), (1e-3, 3e-3, 1e-2)),
    "full": (FULL, (1e-4, 3e-4, 1e-3)),
    "words": (built("select", train=("embedding",)), (1e-3, 3e-3, 1e-2)),
    "vectors": (built("select", train=("none",)), (1e-2, 3e-2, 1e-1)),
}
# Cell -> its kind of rate, its recipe, and the tasks it is run on.
CELLS: dict[str, tuple[str, Recipe, Sequence[str]]] = {
    "vlm": ("vlm", vlm(), tuple(TASKS)),
    "full": ("full", FULL, tuple(TASKS)),
    "head and words": ("words", RATES["words"][0], tuple(TASKS)),
    "vectors alone": ("vectors", RATES["vectors"][0], tuple(TASKS)),
    RANDOM: ("full", FULL, ("e2e", "en-de", "dream")),
    **{f"vlm, width {w}": ("vlm", vlm(w), ("e2e", "en-de")) for w in WIDTHS if w != WIDTH},
    "vlm, markers alone": ("vlm", vlm(typed=False), ("e2e", "dream")),
    "vlm, original start": ("vlm", vlm(std=0.02), ("e2e",)),
}
# Learned from what the fully tuned model of the same seed writes.
TAUGHT = {"vlm, taught": "vlm", "full, taught": "full"}


def run(bench: Bench) -> None:
    """Rates first; then seed by seed, so that a stop leaves whole rounds."""
    for kind, (recipe, rates) in RATES.items():
        for rate in rates:
            more = {"learning_rate": rate, "max_steps": RATE_STEPS}
            one(bench, "rate", f"{kind} {rate:g}", recipe, "e2e", 0, rate, **more)
    for seed in SEEDS:
        for name, (kind, recipe, tasks) in CELLS.items():
            for task in tasks:
                one(bench, task, name, recipe, task, seed, best(bench, kind))
        for task in TRANSLATIONS:
            taught(bench, task, seed)


def one(
    bench: Bench,
    group: str,
    name: str,
    recipe: Recipe,
    task: str,
    seed: int,
    rate: float,
    learned: Task | None = None,
    **more: object,
) -> None:
    cell = Cell(name, recipe, {"learning_rate": rate, **more})
    which = "random" if name == RANDOM else "causal_lm"
    with_base = based(bench, which, seed)
    bench.once(
        f"{group}/{name}/s{seed}",
        lambda: with_base.fit(cell, learned or loaded(bench, task), seed, **COMMON),
        task=group,
        cell=name,
        seed=seed,
        rate=rate,
    )


def based(bench: Bench, which: str, seed: int) -> Bench:
    """The bench with the pretrained base, or with one of its shape drawn at random."""
    if which == "causal_lm":
        bench.base(which)
        return bench
    found = argparse.Namespace(**vars(bench.options))
    other = Bench(bench.ledger.path, found)
    pretrained = bench.base("causal_lm")
    torch.manual_seed(seed)
    tower = type(pretrained.tower)(pretrained.config).eval()
    other.bases["causal_lm"] = Base("random", tower, pretrained.tokenizer, kind="causal_lm")
    return other


def taught(bench: Bench, task: str, seed: int) -> None:
    """Students of the fully tuned model, which is trained once more: a ledger holds no files."""
    keys = [f"{task}/{name}/s{seed}" for name in TAUGHT]
    if all(key in bench.ledger.records() for key in keys):
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"teacher{SUFFIX}"
        recipe = FULL.override(learning_rate=best(bench, "full"), **COMMON)
        base, gold = bench.base("causal_lm"), loaded(bench, task)
        tune(base, gold, recipe, out=path, seed=seed)
        made = distilled(gold, path, base, cache=folder)
        for name, kind in TAUGHT.items():
            one(bench, task, name, RATES[kind][0], task, seed, best(bench, kind), made)


def loaded(bench: Bench, name: str) -> Task:
    if name not in bench.tasks:
        whole = Task.load(TASKS[name], data=bench.options.data)
        bench.tasks[name] = whole.subset(train=TRAIN, dev=DEV, test=TEST)
    return bench.tasks[name]


def best(bench: Bench, kind: str) -> float:
    """The rate with the lowest perplexity on dev."""
    found = Results(bench.ledger.records())
    rows = [r for r in found.records if r["task"] == "rate" and r["cell"].split()[0] == kind]
    return float(min(rows, key=lambda row: row["dev_scores"]["perplexity"])["rate"])


def of(r: Results, metric: str, task: str, *cells: str) -> list[float] | None:
    """Means of a metric over the seeds that all the cells have; None without any."""
    rows = [{row["seed"]: row["scores"][metric] for row in r.rows(task, c)} for c in cells]
    seeds = set.intersection(*map(set, rows)) if rows else set()
    return [mean(row[seed] for seed in seeds) for row in rows] if seeds else None


def near_full(r: Results) -> Verdict:
    table, talk = (
        of(r, "bleu", "e2e", "vlm, width 10", "full"),
        of(r, "perplexity", "dream", "vlm", "full"),
    )
    if table is None or talk is None:
        return "", None
    said = f"E2E, width 10: {table[0]:.1f} of {table[1]:.1f} BLEU; "
    said += f"DREAM: perplexity {talk[0]:.1f}, full {talk[1]:.1f}"
    return said, table[0] >= 0.95 * table[1] and talk[0] <= 1.05 * talk[1]


def gaps(r: Results) -> Verdict:
    found = {task: of(r, "perplexity", task, "vlm", "full") for task in TASKS}
    if None in found.values():
        return "", None
    ratios = {task: pair[0] / pair[1] for task, pair in found.items() if pair}
    said = ", ".join(f"{task} {ratio:.2f}" for task, ratio in ratios.items())
    largest = sorted(ratios, key=ratios.__getitem__)[-2:]
    return f"perplexity, VLM's by full's: {said}", set(largest) == set(TRANSLATIONS)


def wider(r: Results) -> Verdict:
    said, held = [], []
    for task in ("e2e", "en-de"):
        cells = ["vlm" if w == WIDTH else f"vlm, width {w}" for w in WIDTHS]
        found = of(r, "perplexity", task, *cells)
        if found is None:
            return "", None
        said.append(
            f"{task}: " + ", ".join(f"{w}: {p:.1f}" for w, p in zip(WIDTHS, found, strict=True))
        )
        held.append(all(b <= 1.02 * a for a, b in pairwise(found)))
        held.append(found[0] - found[2] >= found[2] - found[4])
    return "; ".join(said), all(held)


def teaching(r: Results) -> Verdict:
    said, held = [], []
    for task in TRANSLATIONS:
        found = of(r, "bleu", task, "vlm", "vlm, taught", "full", "full, taught")
        if found is None:
            return "", None
        said.append(
            f"{task}: VLM {found[0]:.1f} to {found[1]:.1f}, full {found[2]:.1f} to {found[3]:.1f}"
        )
        held.append(found[1] > found[0])
    return "BLEU, " + "; ".join(said), all(held)


def order(r: Results) -> Verdict:
    cells = (RANDOM, "vectors alone", "head and words", "vlm", "full")
    said, held = [], []
    for task in ("e2e", "en-de", "dream"):
        found = of(r, "perplexity", task, *cells)
        if found is None:
            return "", None
        said.append(f"{task}: " + " > ".join(f"{value:.1f}" for value in found))
        held.append(all(a > b for a, b in pairwise(found[:4])))
        held.append(found[3] >= 0.95 * found[4])
    return "perplexity, " + "; ".join(said), all(held)


def types(r: Results) -> Verdict:
    found = {t: of(r, "perplexity", t, "vlm", "vlm, markers alone") for t in ("e2e", "dream")}
    if None in found.values():
        return "", None
    lost = {task: pair[1] / pair[0] - 1 for task, pair in found.items() if pair}
    said = ", ".join(f"{task} {100 * share:+.1f} %" for task, share in lost.items())
    return f"perplexity without types: {said}", lost["dream"] > max(0.0, lost["e2e"])


CLAIMS: list[claims.Claim] = [
    ("6", "0.95 of full's BLEU on E2E by width 10, a dialogue's perplexity within 5 %", near_full),
    ("7 gap", "translation has the largest gap to full", gaps),
    ("7 teacher", "a teacher's texts narrow it", teaching),
    ("8", "random start, vectors, words, VLM: each better; VLM at most as good as full", order),
    ("9", "types help a dialogue, and more than a table", types),
    ("10", "wider is better, and less so each time", wider),
]


def figures(r: Results) -> list[str]:
    """A row a task and cell: means over the seeds."""
    lines = ["| task, change | seeds | rate | " + " | ".join(METRICS) + " | trained | bytes |"]
    lines += ["|" + " --- |" * (len(METRICS) + 5)]
    for task in TASKS:
        for cell in [*CELLS, *TAUGHT]:
            if rows := r.rows(task, cell):
                lines.append(_line(f"{task}, {cell}", rows))
    return lines


def _line(label: str, rows: Sequence[Record]) -> str:
    said = [f"{mean(row['scores'][metric] for row in rows):.2f}" for metric in METRICS]
    numbers = f"{rows[0]['trainable']:,} | {round(mean(row['bytes'] for row in rows)):,}"
    return f"| {label} | {len(rows)} | {rows[0]['rate']:g} | {' | '.join(said)} | {numbers} |"


def page(results: Results) -> None:
    about = f"""Written by `python bench/vlm.py --data DIR --base CAUSAL_LM`. Base: `stories15M`, a
LLaMA (6 × 288, 15.2 M parameters) trained on English children's stories: it knows no German. Tasks:
E2E and DART (data into sentences), Multi30k both ways between English and German, and DREAM's
dialogues, of which each next turn is written. {TRAIN:,} train rows and {TEST} test sources of each,
{DEV} of dev for the rate; {STEPS} steps of batch {BATCH}, {COMMON["precision"]}; greedy;
width {WIDTH} unless another is named. *words*: the table of words, input and output, and the
task's vectors; *vectors alone*: nothing else; *random start*: full training of random weights;
*taught*: on what the fully tuned model writes for train. Rates are the best of three for each kind
of change on E2E, by the likelihood of dev after {RATE_STEPS} steps with one seed. The paper's
claims are of GPT-2 and whole data sets; what is checked is whether its orderings carry over.
How fast: [bench](bench.md)."""
    parts = ["## Claims", "", *claims.verdicts(results, CLAIMS), "", "## Scores", ""]
    parts += figures(results)
    claims.write(PAGE, "VLM: one frozen model, tasks that write", about, results, parts)


if __name__ == "__main__":
    claims.main(__doc__ or "", LEDGER, run, page)
