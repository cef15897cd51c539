"""Prefix-tuning's claims on a small causal language model: data into sentences (E2E).

    python bench/prefix_tuning.py --data DIR --base CAUSAL_LM [--minutes 90] [--page]

Each kind of change tries three learning rates with one seed, judged by the likelihood of dev; the
best one is that of all its cells. Runs what bench/ledgers/prefix-tuning.jsonl lacks and writes
docs/results/prefix-tuning.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

import claims
from claims import ROOT, Bench, Cell, Results, Verdict

from howfine.ledger import Record
from howfine.method import method
from howfine.readout import readout
from howfine.recipe import Recipe
from howfine.task import Task
from howfine.training import Training

LEDGER = ROOT / "bench" / "ledgers" / "prefix-tuning.jsonl"
PAGE = ROOT / "docs" / "results" / "prefix-tuning.md"
NAME = "gen/e2e"
SEEDS = (0, 1, 2)
TRAIN, DEV, TEST = 1000, 60, 150
STEPS, RATE_STEPS, LOW_STEPS, BATCH = 190, 60, 90, 16
LOW = (50, 100, 200, 500)
COMMON = {"batch_size": BATCH, "max_steps": STEPS}
WRITES = {"max_length": 160, "max_new_tokens": 56}
# What the words of the low-data start say.
WORDS = "name food area :"
METRICS = ("bleu", "nist", "meteor", "rouge_l", "cider", "perplexity")


def built(name: str, kind: str, template: str = "", **settings: object) -> Recipe:
    training = Training(weight_decay=0.0, warmup=0.0, eval_mode=True)
    reads = readout("language_model", template=template, **WRITES)
    return Recipe(name, method(kind, **settings), reads, training)


def prefix(length: int, **settings: object) -> Recipe:
    return built("prefix", "prefix", **{"length": length, **settings})


RATES = {
    "prefix": (1e-3, 3e-3, 1e-2, 3e-4),
    "adapter": (1e-3, 3e-3, 1e-2, 3e-2),
    "rows": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),  # keys and values themselves
    "infix": (1e-3, 3e-3, 1e-2, 3e-4),
    "vectors": (1e-2, 3e-2, 1e-1, 3e-3),
    "full": (1e-4, 3e-4, 1e-3, 3e-5),
}
# A rate whose neighbour's perplexity is this many times its own is no flat best.
STEEP = 1.02
FIGURES = (
    "means over the seeds, of BLEU ± deviation too; perplexity is of the references, per token"
)
# Cell -> its kind of rate and its recipe.
CELLS: dict[str, tuple[str, Recipe]] = {
    "prefix-10": ("prefix", prefix(10)),
    "full": ("full", built("full", "full")),
    "words-10": ("vectors", built("words", "prompt", length=10, init="table")),
    "infix-10": ("infix", built("infix", "prefix", "{text} {bos} {slot*10}", place="slots")),
    "adapter": ("adapter", built("adapter", "adapter", reduction=16)),
    "rows-10": ("rows", prefix(10, hidden=0)),
    "prefix-1": ("prefix", prefix(1)),
    "prefix-5": ("prefix", prefix(5)),
    "prefix-20": ("prefix", prefix(20)),
    "words-1": ("vectors", built("words", "prompt", length=1, init="table")),
    "prefix from words": ("prefix", prefix(0, init_text=WORDS)),
}
# Of a few rows: random start, words, everything.
FEW = {
    "prefix": ("prefix", prefix(4)),
    "from words": ("prefix", prefix(0, init_text=WORDS)),
    "full": ("full", CELLS["full"][1]),
}


def run(bench: Bench) -> None:
    """Rates first; then seed by seed, so that a stop leaves whole rounds."""
    task = Task.load(NAME, data=bench.options.data).subset(train=TRAIN, dev=DEV, test=TEST)
    for kind, rates in RATES.items():
        recipe = next(recipe for k, recipe in CELLS.values() if k == kind)
        for rate in rates:
            one(bench, f"rate {kind}", f"{rate:g}", recipe, task, 0, rate, RATE_STEPS)
    for seed in SEEDS:
        for name, (kind, recipe) in CELLS.items():
            one(bench, "e2e", name, recipe, task, seed, best(bench, kind), STEPS)
    whole = Task.load(NAME, data=bench.options.data)
    for seed in SEEDS:
        for size in LOW:
            few = whole.subset(train=size, dev=DEV, test=TEST, seed=seed)
            for name, (kind, recipe) in FEW.items():
                one(bench, f"e2e, {size}", name, recipe, few, seed, best(bench, kind), LOW_STEPS)


def one(
    bench: Bench,
    group: str,
    name: str,
    recipe: Recipe,
    task: Task,
    seed: int,
    rate: float,
    steps: int,
) -> None:
    cell = Cell(name, recipe, {"learning_rate": rate})
    bench.once(
        f"{group}/{name}/s{seed}",
        lambda: bench.fit(cell, task, seed, **{**COMMON, "max_steps": steps}),
        task=group,
        cell=name,
        seed=seed,
        rate=rate,
    )


def best(bench: Bench, kind: str) -> float:
    """The rate with the lowest perplexity on dev."""
    found = _best(Results(bench.ledger.records()), kind)
    assert found is not None  # rates come first
    return found


def _best(r: Results, kind: str) -> float | None:
    rows = [row for row in r.records if row["task"] == f"rate {kind}"]
    if not rows:
        return None
    return float(min(rows, key=lambda row: row["dev_scores"]["perplexity"])["rate"])


def stale(r: Results) -> list[str]:
    """Cells that were made before a better rate was tried: they are to be made again."""
    rates = {name: _best(r, kind) for name, (kind, _) in CELLS.items()}
    made = {name: {row["rate"] for row in r.rows("e2e", name)} for name in rates}
    return [name for name, rate in rates.items() if rate is not None and made[name] - {rate}]


def edges(r: Results) -> dict[str, str]:
    """Kinds whose best rate is the lowest or highest tried, and clearly better than the next one.

    A rate beyond it may then be better still.
    """
    found = {}
    for kind in RATES:
        rows = [row for row in r.records if row["task"] == f"rate {kind}"]
        rows = sorted(rows, key=lambda row: float(row["rate"]))
        tried = [row["dev_scores"]["perplexity"] for row in rows]
        for name, own in (("lowest", tried), ("highest", tried[::-1])):
            if len(own) > 1 and own[0] == min(own) and own[1] > STEEP * own[0]:
                found[kind] = name
    return found


def decided(
    r: Results, held: bool, gaps: Sequence[float], one: Sequence[str], other: Sequence[str]
) -> bool | str:
    """The verdict that some kinds are above others.

    Open where the losers' rates are at an edge, or the seeds' mean gap is within two standard
    errors of 0.
    """
    losers = other if held else one
    return claims.OPEN if set(losers) & set(edges(r)) or not claims.decided(gaps) else held


def _seeds(found: Sequence[Sequence[float]]) -> str:
    """How many seeds the means are of; few ones say little."""
    return f" ({len(found[0])} of {len(SEEDS)} seeds)"


def ordered(r: Results) -> Verdict:
    found = r.common("e2e", "prefix-5", "words-10", "words-1")
    if not found:
        return "", None
    first, second, third = map(mean, found)
    closest = min(claims.gaps(*found[:2], by=2), claims.gaps(*found[1:], by=2), key=mean)
    said = f"prefix-5 {first:.1f}, words-10 {second:.1f}, words-1 {third:.1f}{_seeds(found)}"
    held = first >= second + 2 and second >= third + 2
    return said, decided(r, held, closest, ["prefix"], ["vectors"])


def above(label: str, one_cell: str, other: str, by: float = 0.0) -> claims.Claim:
    def check(r: Results) -> Verdict:
        found = r.common("e2e", one_cell, other)
        if not found:
            return "", None
        first, second = map(mean, found)
        said = f"{one_cell} {first:.1f}, {other} {second:.1f}{_seeds(found)}"
        kinds = ([CELLS[cell][0]] for cell in (one_cell, other))
        return said, decided(r, first - second >= by, claims.gaps(*found, by=by), *kinds)

    more = "at least" if by >= 0 else f"at least, less {-by:g},"
    return label, f"{one_cell} {more} {other}", check


def few_words(r: Results) -> Verdict:
    found = r.common("e2e, 100", "from words", "prefix")
    whole = r.common("e2e", "prefix from words", "prefix-5")
    if not found or not whole or len(found[0]) < 2:
        return "", None
    (a, b), (x, y) = found, whole
    said = f"100 rows: {mean(a):.1f} ± {stdev(a):.1f} against {mean(b):.1f} ± {stdev(b):.1f}"
    said += f"; {TRAIN:,} rows: {mean(x):.1f} against {mean(y):.1f}"
    held = mean(a) > mean(b) and stdev(a) < stdev(b) and abs(mean(x) - mean(y)) <= 2
    return said, held if claims.decided(claims.gaps(a, b)) else claims.OPEN


def few_rows(r: Results) -> Verdict:
    found = [r.common(f"e2e, {size}", "from words", "full") for size in LOW]
    if not all(found):
        return "", None
    apart = [claims.gaps(*each) for each in found]
    gaps, every = [mean(each) for each in apart], [gap for each in apart for gap in each]
    said = ", ".join(f"{size}: {gap:+.1f}" for size, gap in zip(LOW, gaps, strict=True))
    held = mean(gaps) >= 0 and gaps[0] > gaps[-1]
    return f"prefix less full, {said}", decided(r, held, every, ["prefix"], ["full"])


def lengths(r: Results) -> Verdict:
    cells = [f"prefix-{p}" for p in (1, 5, 10, 20)]
    found = r.common("e2e", *cells)
    if not found:
        return "", None
    means = list(map(mean, found))
    said = ", ".join(f"{c} {m:.1f}" for c, m in zip(cells, means, strict=True))
    more = claims.gaps(max(found[1:], key=mean), found[0])
    return said + _seeds(found), mean(more) > 0 if claims.decided(more) else claims.OPEN


CLAIMS: list[claims.Claim] = [
    ("3", "prefix-5 well above ten words, ten above one (2 BLEU each)", ordered),
    above("3 infix", "prefix-10", "infix-10"),
    above("4", "prefix-10", "rows-10"),
    (
        "5",
        "few rows: words start better, steadier; many: within 2 BLEU of 5 random positions",
        few_words,
    ),
    ("6", "few rows: above full fine-tuning on average, less so with more rows", few_rows),
    ("7", "more than one position is better", lengths),
    above("T1", "prefix-10", "full", -1.0),
    above("T1 adapter", "prefix-10", "adapter", -1.0),
]


def figures(r: Results, groups: Sequence[str]) -> list[str]:
    """A row a cell: the means of all metrics over the seeds."""
    lines = ["| rows, change | seeds | rate | " + " | ".join(METRICS) + " | trained | bytes |"]
    lines += ["|" + " --- |" * (len(METRICS) + 5)]
    for group in groups:
        cells = list(dict.fromkeys(row["cell"] for row in r.records if row["task"] == group))
        for cell in cells:
            lines.append(_line(group, cell, r.rows(group, cell)))
    return lines


def _line(group: str, cell: str, rows: Sequence[Record]) -> str:
    where = group.partition(", ")[2]
    said = [f"{mean(row['scores'][metric] for row in rows):.2f}" for metric in METRICS]
    spread = f" ± {stdev(row['score'] for row in rows):.2f}" if len(rows) > 1 else ""
    said[0] += spread
    size = round(mean(row["bytes"] for row in rows))
    label = f"{where} rows, {cell}" if where else cell
    head = f"| {label} | {len(rows)} | {rows[0]['rate']:g} | {' | '.join(said)}"
    return f"{head} | {rows[0]['trainable']:,} | {size:,} |"


def page(results: Results) -> None:
    open_ends = "Every best rate has worse ones on both sides."
    if at_edges := ", ".join(f"{kind} ({name})" for kind, name in edges(results).items()):
        open_ends = f"The best is the last tried for {at_edges}: claims that may turn are open."
    if others := ", ".join(stale(results)):
        open_ends += f" Cells made before a better rate was tried: {others}."
    about = f"""Written by `python bench/prefix_tuning.py --data DIR --base CAUSAL_LM`. Base:
`stories15M`, a LLaMA (6 × 288, 15.2 M parameters) trained on English children's stories. Task: E2E,
slots of a restaurant into a sentence; {TRAIN:,} of 42,061 train rows, {TEST} of 630 test sources
with all their references, {DEV} of dev for the rate. {STEPS} steps of batch {BATCH} (few rows:
{LOW_STEPS}), {claims.formats(results.records)}, mean over target tokens, greedy. *words-p*: p free
input vectors in front (embedding-only); *infix-p*: keys and values of p positions between source
and target; *rows-p*: keys and values that train themselves, without the net; *from words*: the keys
and values of "{WORDS}". The paper's figures are of GPT-2 with whole E2E; what is checked is whether
its orderings carry over. Rates are the best of four or five for each kind of change, by the
likelihood of dev after {RATE_STEPS} steps with one seed.
{open_ends}
A claim's figures are of the seeds that all its cells have, and it is open where their mean
difference is within two standard errors of what is claimed."""
    groups = ["e2e", *(f"e2e, {size}" for size in LOW)]
    parts = ["## Claims", "", *claims.verdicts(results, CLAIMS), "", "## Scores", ""]
    parts += figures(results, groups)
    claims.write(PAGE, "Prefix-tuning: a sentence from data", about, results, parts, FIGURES)


if __name__ == "__main__":
    claims.main(__doc__ or "", LEDGER, run, page)
