"""What `howfine extract` makes of two checkpoints: speed and memory, and bytes against score.

    python bench/extract.py                       # a pair of 2 GB, generated: MB/s and peak memory
    python bench/extract.py --score               # bytes against score, on a full fine-tuning
    python bench/extract.py --score --tuned FILE  # of a delta file that is there already

Prints a line of JSON a row, keeps the rows in bench/ledgers/extract.jsonl and writes
docs/results/extract.md from them. The exit status is 1 when the peak of memory is over its limit,
three times the largest tensor plus 300 MB.

Scores are taken on the test split, of files loaded again; the loss target and the scale of ComPEFT
are chosen on dev, the gain of howfine's on texts of train.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
LEDGER = ROOT / "bench" / "ledgers" / "extract.jsonl"
PAGE = ROOT / "docs" / "results" / "extract.md"
HIDDEN, VOCABULARY = 1024, 62_500  # a word embedding of 256 MB
CHUNK = 4_000_000  # entries written at a time
SLACK = 300_000_000  # bytes the limit allows on top of three times the largest tensor
TARGETS: dict[str, dict[str, Any]] = {
    "1 % of the entries": {"density": 0.01},
    "10 % of the entries": {"density": 0.1},
    "signs of 5 %": {"density": 0.05, "store": "sign"},
}
BUDGETS = (2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 128_000, 512_000, 2_000_000)
FISHER = (8_000, 32_000, 128_000)
LIGHT = 100
DENSITIES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.2)
ALPHAS = (0.5, 1, 2, 3, 4, 5, 6, 8, 10)  # of ComPEFT's scale, in standard deviations
Row = dict[str, Any]


# Speed and memory.


def generated(folder: Path, size: int) -> tuple[Path, Path, int]:
    """(base, tuned, bytes of the largest tensor): BERTs of about `size` bytes each, as folders."""
    import torch
    from transformers import AutoModel, BertConfig

    layers = max(1, round((size / 4 - VOCABULARY * HIDDEN) / (12 * HIDDEN**2)))
    settings = {"num_hidden_layers": layers, "hidden_size": HIDDEN, "vocab_size": VOCABULARY}
    config = BertConfig(**settings, num_attention_heads=16, intermediate_size=4 * HIDDEN)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    for side, step in (("before", 0.0), ("after", 1e-4)):
        (folder / side).mkdir()
        config.save_pretrained(folder / side)
        write(folder / side / "model.safetensors", shapes, step)
    largest = 4 * max(int(np.prod(shape)) for shape in shapes.values())
    return folder / "before", folder / "after", largest


def write(path: Path, shapes: dict[str, tuple[int, ...]], step: float) -> None:
    """N(0, 0.02) plus `step` times Student's t with 3 degrees of freedom, chunk by chunk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    base, noise = np.random.default_rng(0), np.random.default_rng(1)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for left in range(end // 4, 0, -CHUNK):
            entries = min(CHUNK, left)
            chunk = base.standard_normal(entries, dtype=np.float32) * np.float32(0.02)
            if step:
                moved = noise.standard_normal(entries, dtype=np.float32)
                moved /= np.sqrt(noise.standard_gamma(1.5, entries, dtype=np.float32) / 1.5)
                chunk += moved * np.float32(step)
            file.write(chunk.data)


def measured(before: str, after: str, asked: str) -> None:
    """The fresh process: extracts, then prints its own peak, time and a few of its figures."""
    from howfine.extract import extract

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        found = extract(before, after, Path(folder) / "x.delta.safetensors", **json.loads(asked))
        seconds = time.perf_counter() - start
    # VmHWM is this program's own peak; getrusage would count what its parent held before exec.
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    figures = {"peak_rss_bytes": 1024 * int(peak.split()[1]), "seconds": round(seconds, 1)}
    print(json.dumps({**figures, "bytes": found.bytes, "passes": found.passes}))


def speed(gigabytes: float) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        size = int(gigabytes * 1e9)
        if shutil.disk_usage(scratch).free < 2.5 * size:
            sys.exit(f"{scratch} has too little room for two checkpoints of {gigabytes} GB")
        before, after, largest = generated(Path(scratch), size)
        read = sum((folder / "model.safetensors").stat().st_size for folder in (before, after))
        limit = 3 * largest + SLACK
        cache = {**os.environ, "XDG_CACHE_HOME": scratch}  # the fingerprint is then taken, once
        for name, asked in TARGETS.items():
            command = [sys.executable, __file__, "--measure", str(before), str(after)]
            done = subprocess.run(
                [*command, json.dumps(asked)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=cache,
            )
            figures = json.loads(done.stdout.splitlines()[-1])
            figures["mb_s"] = round(read / figures["seconds"] / 1e6)
            sizes = {"read_bytes": read, "largest_tensor_bytes": largest, "limit_bytes": limit}
            rows.append({"bench": "extract-speed", "what": name, **sizes, **figures})
            print(json.dumps(rows[-1]), flush=True)
    return rows


# Bytes against score.


def scores(tuned: Path | None, train: int, steps: int, test: int | None) -> list[Row]:
    """One row a way of storing the change; `tuned` is made where it is not given."""
    import howfine

    base, task = howfine.Base.load(), howfine.Task.load("rotten-tomatoes")
    task = task.subset(train=train, **({"test": test, "dev": test} if test else {}))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if tuned is None:
            tuned = folder / "full.delta.safetensors"
            settings = {"max_steps": steps} if steps else {}
            howfine.tune(base, task, "full", out=tuned, seed=0, **settings)
        return _scores(base, task, tuned, folder / "x.delta.safetensors")


def _scores(base: Any, task: Any, tuned: Path, out: Path) -> list[Row]:
    from howfine.evaluate import evaluate
    from howfine.extract import extract

    rows: list[Row] = []
    deviation = _deviation(base, tuned)

    def add(name: str, setting: str, chosen_on: Any = None, **asked: Any) -> None:
        start = time.perf_counter()
        extras = {"task": chosen_on} if chosen_on is not None else {}
        found = extract(base, tuned, out, **asked, **extras)
        seconds = time.perf_counter() - start
        delta = found.delta
        if name == "ComPEFT":
            delta = _rescaled(delta, base, task, deviation)
            delta.save(out)
        score = evaluate(out, base, task)
        figures = {"bytes": out.stat().st_size, "kept": found.kept, "error": round(found.error, 4)}
        figures["gain"] = round(found.gain, 2)
        value = {"score": round(score.value, 4), "interval": [round(v, 4) for v in score.interval]}
        rows.append(
            {"bench": "extract-score", "what": name, "setting": setting, **figures, **value}
        )
        rows[-1]["seconds"] = round(seconds, 1)
        print(json.dumps(rows[-1]), flush=True)

    add("float32, all of it", "", store="fp32")
    add("halves", "", store="fp16")
    add("BitDelta", "", store="bitdelta")
    for density in DENSITIES:
        add("ComPEFT", f"{density:.1%}", density=density, store="sign")
    light = task.subset(dev=LIGHT)  # a gain is not chosen on dev
    for budget in BUDGETS:
        add("howfine, least error", f"{budget:,} bytes", bytes=budget)
        for name, more in {"gain": {}, "gain, signs": {"store": "sign"}}.items():
            asked = {"bytes": budget, "chosen_on": light, **more}
            add(f"howfine, {name}", f"{budget:,} bytes", **asked)
    for budget in FISHER:
        asked = {"bytes": budget, "weigh": "fisher", "chosen_on": light}
        add("howfine, gain, Fisher", f"{budget:,} bytes", **asked)
    for loss in (0.01, 0.05):
        add("howfine, gain", f"loss {loss:.0%} on dev", loss=loss, chosen_on=task)
    return rows


def _deviation(base: Any, tuned: Path) -> float:
    """Standard deviation of all differences."""
    from howfine import pair

    both = pair.opened(base, tuned, loaded=True)
    chunks = (chunks for path in base.paths() for chunks in both.chunks(path))
    return float(np.std(np.concatenate([after - before for before, after in chunks])))


def _rescaled(delta: Any, base: Any, task: Any, deviation: float) -> Any:
    """With the multiple of the standard deviation as scale that does best on dev (ComPEFT)."""
    from howfine.evaluate import evaluate

    def at(alpha: float) -> Any:
        scale = float(np.float32(alpha * deviation))
        changed = [
            dataclasses.replace(s, values=dataclasses.replace(s.values, params=(scale,)))
            if s.values
            else s
            for s in delta.streams
        ]
        return dataclasses.replace(delta, streams=tuple(changed))

    tried = [at(alpha) for alpha in ALPHAS]
    return max(tried, key=lambda one: evaluate(one, base, task, split="dev").value)


# The page.


def page(rows: list[Row]) -> str:
    from run import table

    speeds = [dict(row) for row in rows if row["bench"] == "extract-speed"]
    for row in speeds:
        row["holds"] = row["peak_rss_bytes"] <= row["limit_bytes"]
    dates = sorted({row["date"] for row in rows})
    machines = "; ".join(sorted({row["machine"] for row in rows}))
    found = sorted((r for r in rows if r["bench"] == "extract-score"), key=lambda r: -r["bytes"])
    return f"""# Extraction

Written by `python bench/extract.py` and `python bench/extract.py --score` from runs of
{" to ".join(dict.fromkeys([dates[0], dates[-1]]))} on {machines}.

## Bytes against score

A full fine-tuning of MiniLM on Rotten Tomatoes (recipe `full`, seed 0, by default on 2,000 training
sentences), and what is left of it in fewer bytes. Scores are
on the whole test split, with 95 % intervals. `error` is the squared difference that a file lacks,
over all of it,
before the `gain`, the factor by which answers to 256 texts of train come closest to the tuned
model's; *least error* has none, *Fisher* has steps by the gradients' size too.
ComPEFT (Yadav et al. 2023): the largest magnitudes as signs with one scale, the best on dev.
BitDelta (Liu et al. 2024): signs of the blocks' matrices with a scale each, halves for all else;
its scales are not trained here. Every file holds the head.

{
        table(
            found,
            {
                "way": "what",
                "setting": "setting",
                "bytes": "bytes",
                "entries": "kept",
                "error": "error",
                "gain": "gain",
                "score": "score",
                "interval": "interval",
                "seconds": "seconds",
            },
        )
    }

## Speed and memory

Two generated checkpoints, read from disk; memory of the whole process at its highest, at most three
times the largest tensor plus 300 MB. MB/s are of both checkpoints, once, over all passes; the first
row takes the base's fingerprint too, which is then remembered.

{
        table(
            speeds,
            {
                "kept": "what",
                "bytes read": "read_bytes",
                "largest tensor": "largest_tensor_bytes",
                "passes": "passes",
                "seconds": "seconds",
                "MB/s": "mb_s",
                "file": "bytes",
                "peak RSS": "peak_rss_bytes",
                "at most": "limit_bytes",
                "": "holds",
            },
        )
    }
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of each checkpoint")
    parser.add_argument("--score", action="store_true", help="bytes against score instead")
    parser.add_argument(
        "--tuned", type=Path, help="a delta of a full fine-tuning, not to repeat it"
    )
    parser.add_argument("--train", type=int, default=2000, help="training sentences")
    parser.add_argument(
        "--steps", type=int, default=0, help="of the fine-tuning; 0 for the recipe's"
    )
    parser.add_argument("--test", type=int, help="so many sentences of dev and test")
    parser.add_argument("--dry", action="store_true", help="write neither ledger nor page")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measured(*options.measure)
        return 0
    if options.score:
        made = scores(options.tuned, options.train, options.steps, options.test)
    else:
        made = speed(options.gigabytes)
    if not options.dry:
        from howfine.container import write_atomically

        old = (
            [json.loads(line) for line in LEDGER.read_text().splitlines()]
            if LEDGER.exists()
            else []
        )
        where = f"{os.cpu_count()} CPU cores ({platform.machine()})"
        stamp = {"date": datetime.date.today().isoformat(), "machine": where}
        made = [{**row, **stamp} for row in made]
        rows = [row for row in old if row["bench"] != made[0]["bench"]] + made
        write_atomically(LEDGER, "".join(json.dumps(row) + "\n" for row in rows).encode())
        write_atomically(PAGE, page(rows).encode())
    return int(
        any(row["peak_rss_bytes"] > row["limit_bytes"] for row in made if "limit_bytes" in row)
    )


if __name__ == "__main__":
    sys.exit(main())
