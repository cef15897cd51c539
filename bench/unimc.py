"""UniMC's claims on a small masked language model: trained on multiple choice, asked other things.

    python bench/unimc.py --data DIR --base MASKED_LM [--minutes 90] [--page]

One training on multiple-choice sets for each variant and seed, its model then scored untrained on
tasks it never saw. Runs what bench/ledgers/unimc.jsonl lacks and writes docs/results/unimc.md.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import claims
from claims import ROOT, Bench, Results, Verdict

from howfine.base import Base
from howfine.delta import SUFFIX, Delta
from howfine.evaluate import logits, score
from howfine.ledger import Record
from howfine.readout import Wired
from howfine.recipe import Recipe
from howfine.task import Task
from howfine.tune import tune

LEDGER = ROOT / "bench" / "ledgers" / "unimc.jsonl"
PAGE = ROOT / "docs" / "results" / "unimc.md"
LEARNED = "mc/commonsenseqa+mc/arc_easy+mc/arc_challenge+mc/openbookqa+mc/dream+mc/mctest160"
ROWS, SEEDS = 3000, (0, 1, 2)
COMMON = {"epochs": 2, "batch_size": 16, "max_length": 128}
RATE = 5e-5
VARIANTS: dict[str, dict[str, Any]] = {
    "both losses": {},
    "no block mask": {"apart": False},
    "words alone": {"objective": "words"},
    "choice alone": {"objective": "choice"},
}
UNTRAINED = "untrained"
SENTIMENT = {"options": ("it's terrible", "it's great"), "question": "what is the sentiment?"}
ENTAILED = ("it follows that {pair}", "it does not follow that {pair}")
NLI = ("it is true that {pair}", "it is false that {pair}", "it is unclear whether {pair}")
# The tasks asked: options in the labels' order. `mc` sets have options of their own.
ASKED: dict[str, dict[str, Any]] = {
    "sst2": SENTIMENT,
    "lmbff/mr@13": SENTIMENT,
    "rte": {"options": ENTAILED},
    "fewglue/cb": {"options": NLI},
    "mc/copa": {},
    "mc/mctest500": {},
}
TEST = 1000


def run(bench: Bench) -> None:
    """The untrained base, then each seed's variants: a training, and all tasks with its model."""
    ask_all(bench, UNTRAINED, 0, None)
    for seed in SEEDS:
        for variant, settings in VARIANTS.items():
            keys = [f"{name}/{variant}/s{seed}" for name in ASKED]
            if all(key in bench.ledger.records() for key in keys):
                continue
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"choice{SUFFIX}"
                learn(bench, path, variant, seed, settings)
                if path.exists():  # else its training failed, as the ledger says
                    ask_all(bench, variant, seed, Delta.load(path), settings)


def learn(bench: Bench, path: Path, variant: str, seed: int, settings: dict[str, Any]) -> None:
    """A variant's training, recorded once; again where a stop left tasks unasked."""
    key = f"trained/{variant}/s{seed}"
    known = bench.ledger.records().get(key)
    if known is not None:
        if "error" not in known:
            train(bench, path, seed, settings)
        return
    bench.once(
        key,
        lambda: train(bench, path, seed, settings),
        task="held-out questions",
        cell=variant,
        seed=seed,
    )


def train(bench: Bench, path: Path, seed: int, settings: dict[str, Any]) -> Record:
    """Full training on the multiple-choice sets, scored on their own dev."""
    task = loaded(bench, LEARNED).subset(train=ROWS, dev=TEST // 2)
    precision = bench.options.precision
    recipe = Recipe.load("unimc").override(
        learning_rate=RATE, precision=precision, **COMMON, **settings
    )
    done = tune(bench.base("masked_or_causal_lm"), task, recipe, out=path, seed=seed)
    return {
        "score": done.score.value,
        "train_size": ROWS,
        "trainable": done.trainable,
        "seconds": round(done.seconds, 1),
        "precision": precision,
    }


def ask_all(
    bench: Bench,
    variant: str,
    seed: int,
    delta: Delta | None,
    settings: dict[str, Any] | None = None,
) -> None:
    base = bench.base("masked_or_causal_lm")
    for name in ASKED:
        bench.once(
            f"{name}/{variant}/s{seed}",
            lambda name=name: ask(base, loaded(bench, name), name, delta, settings or {}),
            task=name,
            cell=variant,
            seed=seed,
        )


def ask(base: Base, task: Task, name: str, delta: Delta | None, settings: dict[str, Any]) -> Record:
    """Accuracy of options that no training named, with the model a delta makes of the base."""
    block = {key: value for key, value in settings.items() if key == "apart"}
    read = Recipe.load("unimc").override(max_length=256, **block, **ASKED[name]).readout
    head = read.attach(base, task.labels)
    rows = task.splits["test"]

    def answered() -> Any:
        return logits(Wired(base, read, head).eval(), base, rows, batch_size=32)

    if delta is None:
        outputs = answered()
    else:
        with delta.changed(base):
            outputs = answered()
    plain = replace(task, metric="accuracy")
    found = score(plain, "test", read.predict(outputs).numpy())
    most = max(Counter(row.label for row in rows).values()) / len(rows)
    guess = sum(1 / (len(row.options) or len(task.labels)) for row in rows) / len(rows)
    return {"score": found.value, "n": found.n, "chance": guess, "majority": most}


def loaded(bench: Bench, name: str) -> Task:
    if name not in bench.tasks:
        task = Task.load(name, data=bench.options.data)
        bench.tasks[name] = task if name == LEARNED else task.subset(test=TEST)
    return bench.tasks[name]


def above(points: float) -> Callable[[Results], Verdict]:
    """Whether it is so much above chance, and above the untrained base, on SST-2 and MR."""

    def check(r: Results) -> Verdict:
        tasks = [t for t in ("sst2", "lmbff/mr@13") if r.rows(t, "both losses")]
        if not tasks:
            return "", None
        words, held = [], []
        for task in tasks:
            found, before = r.mean(task, "both losses"), r.mean(task, UNTRAINED)
            chance = 100 * r.rows(task, "both losses")[0]["chance"]
            assert found is not None
            assert before is not None
            words.append(f"{task}: {found:.1f}, untrained {before:.1f}, chance {chance:.1f}")
            held.append(found >= chance + points and found > before)
        return "; ".join(words), all(held)

    return check


def losses(r: Results) -> Verdict:
    return compared(r, "both losses", "words alone", "choice alone")


def block(r: Results) -> Verdict:
    return compared(r, "both losses", "no block mask")


def compared(r: Results, *cells: str) -> Verdict:
    """Whether the first is at least as good as the others, where any is better than one answer.

    Open where it and the best other are within two standard errors of their seeds' differences.
    """
    tasks = r.shared(ASKED, *cells)
    if not tasks:
        return "", None
    found = r.learned(tasks, *cells)
    if not found:
        return f"on none of {len(tasks)} tasks is any above one answer for all", claims.OPEN
    own, *others = runs = r.runs(found, *cells)
    said = ", ".join(f"{cell} {mean(of):.1f}" for cell, of in zip(cells, runs, strict=True))
    left = len(tasks) - len(found)
    said += f" on {', '.join(found)}; {left} others, where none is above one answer for all"
    gaps = claims.gaps(own, max(others, key=mean))
    return said, mean(gaps) >= 0 if claims.decided(gaps) else claims.OPEN


CLAIMS: list[claims.Claim] = [
    ("4", "15 points above chance on tasks never seen, and above the untrained base", above(15)),
    ("5", "both losses at least as good as each alone", losses),
    ("mask", "options that don't see each other do no worse", block),
]


def page(results: Results) -> None:
    chances = {row["task"]: row for row in results.records if "chance" in row}
    said = "; ".join(
        f"{task}: {100 * row['chance']:.1f}, {100 * row['majority']:.1f}"
        for task, row in chances.items()
    )
    sets, seeds = LEARNED.replace("mc/", "").replace("+", ", "), ", ".join(map(str, SEEDS))
    c = COMMON
    about = f"""Written by `python bench/unimc.py --data DIR --base MASKED_LM`. Base: `minilm-mlm`,
MiniLM (6 × 384) with a masked language model's head, continued on 9 M tokens of English: it knows
few facts. Trained whole on {ROWS:,} questions of {sets};
{c["epochs"]} epochs, batch {c["batch_size"]}, rate {RATE:g}, {c["max_length"]} tokens,
{claims.formats(results.records)}, seeds {seeds}. Then asked, untrained, at most {TEST:,} test
rows of each task. Scores of chance and of the most frequent answer: {said or "none"}. Claims 5 and
mask are open where the seeds' mean difference is within two standard errors of 0."""
    names = [UNTRAINED, *VARIANTS]
    parts = ["## Claims", "", *claims.verdicts(results, CLAIMS), "", "## Scores", ""]
    parts += claims.table(results, [*ASKED, "held-out questions"], names)
    claims.write(PAGE, "UniMC: everything as multiple choice", about, results, parts)


if __name__ == "__main__":
    claims.main(__doc__ or "", LEDGER, run, page)
