"""docs/results/skill-grafting.md, from the ledger's records."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping
from pathlib import Path

from skill_grafting_found import Found
from skill_grafting_verdicts import overlaps, verdicts

from howfine.container import write_atomically
from howfine.ledger import Record

NAMES = {
    "ft": "full fine-tuning of the blocks (θ_ft)",
    "head": "frozen base, a head of its own",
    "pre": "frozen base, θ_ft's head (k = 0)",
    "bitfit": "BitFit: biases trained",
}
OF = {"sgd": "of SGD's", "l1": "of the penalised"}
KINDS = {"same": "the same task", "like": "like tasks", "unlike": "unlike tasks"}
KINDS |= {f"{kind}, one seed": f"{text}, one seed" for kind, text in KINDS.items()}


def write(
    path: Path, records: Mapping[str, Record], sizes: Mapping[str, tuple[int, int]], test: int
) -> None:
    """Write the page."""
    found = Found(records)
    lines = [_intro(found, sizes, test), "## Verdicts", ""]
    lines += [f"- **{name}.** {text}" for name, text in verdicts(found)]
    lines += ["", "## Scores", ""]
    for task in found.tasks:
        lines += [f"### {task}", "", *_scores(found, task), ""]
    lines += [*_overlaps(found), *_effects(found), *_sequences(found)]
    write_atomically(path, ("\n".join(lines).rstrip() + "\n").encode())


def _intro(found: Found, sizes: Mapping[str, tuple[int, int]], test: int) -> str:
    dates = sorted({record["date"] for record in found.records}) or ["no day yet"]
    machines = "; ".join(sorted({r["machine"] for r in found.records})) or "no machine yet"
    trained = ", ".join(
        f"{n} {rows:,} rows, {length} tokens" for n, (rows, length) in sizes.items()
    )
    tested = {r["task"]: r["n"] for r in found.cells.values()}
    tests = ", ".join(f"{task} {n:,}" for task, n in tested.items()) or "none yet"
    seeds = ", ".join(map(str, sorted({seed for _, _, seed in found.cells}))) or "none yet"
    paragraphs = [
        f"Written by `python bench/skill_grafting.py` from {len(found.records)} records of "
        f"{dates[0]} to {dates[-1]} on {machines}. Base MiniLM (6 × 384, the embedded base). "
        f"Training: {trained}; 3 epochs of AdamW (SGD 4, the head alone 5), batches of 16, "
        f"bf16. Seeds {seeds}; the column *seeds* says how many a row has. Test rows (official dev "
        "or test sets, cut to "
        f"{test:,} by a fixed sample): {tests}. Accuracy throughout, for MRPC and QQP too. Figures "
        "are of files, loaded again, but for one body tuned on task after task, which is scored "
        "in memory.",
        "The letters are those of claims taken from Panigrahi, Saunshi, Zhao & Arora 2023 (arXiv "
        "2302.06600), on RoBERTa-base with prompts. What is checked is whether they carry over to "
        "a small base, a linear head and a thousand rows; no figure here is the paper's.",
        "θ_ft moves all of the blocks; embeddings stay the base's. Shares are of the blocks' "
        "entries. Every graft has θ_ft's head. *learned* is the mask's training (20 steps of 128 "
        "examples), *movement* the entries that moved most, *random* as many at random: values "
        "are θ_ft's and nothing else is trained. *zero* is θ_ft in the region and 0 elsewhere. "
        "*wise* is θ + α Δ. *retrain* trains a learned region's entries from the base on, with "
        "θ_ft's head to begin with. ECE has 15 bins; *with T* is after a temperature fitted on "
        "held-out rows. Both in percent.",
    ]
    return "\n\n".join(["# Skill grafting", *(textwrap.fill(p, 100) for p in paragraphs)]) + "\n"


def _scores(found: Found, task: str) -> list[str]:
    head = "| change | seeds | accuracy | ± | entries changed | ECE | with T | bytes |"
    lines = [head, "|" + " --- |" * 8]
    for cell in dict.fromkeys(c for t, c, _ in found.cells if t == task):
        rows = found.rows(task, cell)
        values = [100 * row["score"] for row in rows]
        spread = f"{statistics.stdev(values):.1f}" if len(values) > 1 else ""

        def mean(of: str, rows: list[Record] = rows) -> float:
            return statistics.fmean(float(row[of]) for row in rows)

        tempered = f"{100 * mean('tempered'):.1f}" if "tempered" in rows[0] else ""
        lines.append(
            f"| {_name(cell)} | {len(rows)} | {statistics.fmean(values):.1f} | {spread} "
            f"| {mean('entries'):,.0f} ({mean('density'):.2%}) | {100 * mean('ece'):.1f} "
            f"| {tempered} | {mean('bytes'):,.0f} |"
        )
    tuned = found.rows(task, "ft")
    if not tuned:
        return lines
    fitted = statistics.fmean(row["train_score"] for row in tuned)
    largest = f"{100 * tuned[0]['majority']:.1f}"
    said = f"θ_ft is right on {100 * fitted:.1f} % of its training rows; the largest class is"
    return [*lines, "", f"{said} {largest} % of the test rows."]


def _name(cell: str) -> str:
    source, _, what = cell.rpartition(":")
    kind, _, number = what.partition("@")
    if kind.startswith("sgd-"):
        return f"the same by SGD, rate {kind.removeprefix('sgd-')}"
    if kind.startswith("l1-"):
        return f"the same with an ℓ1 penalty of {kind.removeprefix('l1-')}"
    if number and kind != "wise":
        number = f"{100 * float(number):g} %"
    text = NAMES.get(kind, f"{kind.replace('-', ', ')} {number}")
    return f"{OF[source]}: {text}" if source else text


def _overlaps(found: Found) -> list[str]:
    groups = overlaps(found)
    if not groups:
        return []
    lines = [
        "## Overlap of regions",
        "",
        "Learned regions of 1 %: how much of one lies in another.",
    ]
    lines += [
        "Scores of one seed begin at the same random numbers, which alone makes regions alike:"
    ]
    lines += ["pairs of one seed are kept apart.", ""]
    lines += ["| pair | kind | pairs of regions | overlap | chance |", "|" + " --- |" * 5]
    pairs: dict[tuple[str, str], list[Record]] = {}
    for kind, rows in groups.items():
        for row in rows:
            both = " and ".join(sorted((row["by"], row["of"])))
            pairs.setdefault((both, KINDS[kind]), []).append(row)
    for (both, kind), rows in pairs.items():
        share, chance = (statistics.fmean(r[of] for r in rows) for of in ("overlap", "chance"))
        lines.append(f"| {both} | {kind} | {len(rows)} | {share:.1%} | {chance:.1%} |")
    return [*lines, ""]


def _effects(found: Found) -> list[str]:
    record = found.together()
    if record is None:
        return []
    seeds = ", ".join(map(str, record["seeds"]))
    lines = ["## One model of all tasks", "", f"Means over seeds: {seeds}. A head of all labels,"]
    lines += ["each task answered among its own; the row's region was found on its task's rows."]
    lines += ["Accuracy, and the share of the mean gain over the base with that head.", ""]
    lines += ["| region of | " + " | ".join(record["tasks"]) + " |"]
    lines += ["|" + " --- |" * (1 + len(record["tasks"]))]
    for name, row in (("none", record["before"]), ("all of it", record["tuned"])):
        lines.append(f"| {name} | " + " | ".join(f"{100 * v:.1f}" for v in row) + " |")
    for task, row, shares in zip(record["tasks"], record["grafted"], record["effect"], strict=True):
        cells = [f"{100 * v:.1f} ({s:.2f})" for v, s in zip(row, shares, strict=True)]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _sequences(found: Found) -> list[str]:
    records = found.about("continual")
    if not records:
        return []
    order = records[0]["order"]
    lines = [
        "## One task after another",
        "",
        "Accuracy, mean over seeds. Each task keeps its head.",
    ]
    lines += [
        "Grafts are of 1 %, each of a fine-tuning of the bare base, and kept out of the earlier",
        "ones' regions. The paper goes on instead from the base with the earlier grafts on, and",
        "trains with their entries frozen ([how](../methods/graft.md#tasks-one-after-another)). So",
        "these rows test regions that are kept apart, not the paper's procedure.",
    ]
    lines += ["", f"| | {' | '.join(order)} |"]
    lines += ["|" + " --- |" * (1 + len(order))]

    def row(name: str, each: list[list[float]]) -> str:
        means = [statistics.fmean(column) for column in zip(*each, strict=True)]
        blank = [""] * (len(order) - len(means))
        return f"| {name} | " + " | ".join([*(f"{100 * m:.1f}" for m in means), *blank]) + " |"

    for number, task in enumerate(order):
        lines.append(row(f"one body, after {task}", [r["sequential"][number] for r in records]))
    lines.append(row("fine-tuned alone", [r["tuned"] for r in records]))
    lines.append(row("its graft alone", [r["own"] for r in records]))
    lines.append(row("the union of the grafts", [r["union"] for r in records]))
    return [*lines, "", f"Seeds {', '.join(str(r['seed']) for r in records)}.", ""]
