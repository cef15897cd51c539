"""Latency against size: what cutting units does, and what cutting the vocabulary does.

    python bench/latency.py [--rounds 9] [--threads 2]

XLM-R base's shape with random weights (V = 250,002, d = 768, 12 layers of 12 heads and 3,072
neurons), fp32, on the CPU. Of it: half, and two thirds, of the heads and neurons of every layer,
chosen by magnitude; a vocabulary of 23,936 tokens; half of the units and that vocabulary. Every
model runs in every round, in turn, and its time is held against the whole one's of that round.
`lines` gives the table of the ledger, bench/ledgers/latency.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

from howfine import vocabulary
from howfine.base import Base
from howfine.container import write_atomically
from howfine.cuts import smaller
from howfine.method import method

LEDGER = Path(__file__).parent / "ledgers" / "latency.jsonl"
SHAPE = {
    "vocab_size": 250_002,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
}
TOKENS = 23_936
# Rows and tokens of a batch.
BATCHES = ((1, 32), (8, 128))
WHOLE, HALF, THIRD = "whole", "half of the units", "two thirds of the units"
FEWER, BOTH = "fewer tokens", "half of the units, fewer tokens"
KEPT = {HALF: 1 / 2, THIRD: 2 / 3}
# Half of the units: least speed-up on the larger batch, and least share of the size. Fewer tokens:
# largest share of the size, and how far the times may be apart.
SPEED, SIZE, FEWER_SIZE, APART = 1.6, 0.8, 0.45, 0.05


def whole_base() -> Base:
    """XLM-R base's shape, with a tokenizer of as many words."""
    torch.manual_seed(0)
    words = ["<s>", "<pad>", "</s>", "<unk>"]
    words += [f"w{number}" for number in range(len(words), SHAPE["vocab_size"])]
    known = {word: number for number, word in enumerate(words)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(known, unk_token="<unk>")),
        **dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), words, strict=False)),
    )
    tower = XLMRobertaModel(XLMRobertaConfig(**SHAPE), add_pooling_layer=False)
    return Base("xlm-roberta-base-shape", tower, tokenizer)


@contextmanager
def units_off(base: Base, keep: float) -> Iterator[None]:
    chosen = method("prune", keep=keep, by="magnitude", scope="layer")
    with chosen.attach(base):
        yield


def built(base: Base) -> dict[str, Any]:
    """Each model; the whole one is the base's own."""
    found = {WHOLE: base.tower}
    for name, keep in KEPT.items():
        with units_off(base, keep):
            found[name] = smaller(base)
    # Drawn from all, as a corpus in some languages draws them; the four special ones stay.
    drawn = torch.randperm(SHAPE["vocab_size"] - 4)[: TOKENS - 4] + 4
    fewer = vocabulary.used(base, (f"w{number}" for number in drawn.tolist()))
    assert len(fewer.kept) == TOKENS
    for name, of in ((FEWER, WHOLE), (BOTH, HALF)):
        found[name] = copy.deepcopy(found[of])
        vocabulary.cut(base, found[name], fewer)
    return {name: model.eval() for name, model in found.items()}


def inputs(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Numbers that all of the models know."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, TOKENS, (rows, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.inference_mode()
def timed(towers: Mapping[str, Any], rounds: int) -> dict[str, dict[str, Any]]:
    """Medians in ms, and of the times as fast as the whole one of the same round, by model."""
    found: dict[str, dict[str, Any]] = {name: {} for name in towers}
    for rows, tokens in BATCHES:
        given, spent = inputs(rows, tokens), dict[str, list[float]]()
        for number in range(rounds + 1):  # the first one warms up
            names = list(towers)
            # Each in every place, so that none has always the same one before it.
            for name in names[number % len(names) :] + names[: number % len(names)]:
                start = time.perf_counter()
                towers[name](**given)
                spent.setdefault(name, []).append(time.perf_counter() - start)
        for name, each in spent.items():
            ratios = [one / two for one, two in zip(spent[WHOLE], each, strict=True)][1:]
            found[name] |= {
                f"ms_{rows}x{tokens}": round(1000 * statistics.median(each[1:]), 2),
                f"speed_{rows}x{tokens}": round(statistics.median(ratios), 3),
                f"quartiles_{rows}x{tokens}": [
                    round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]
                ],
            }
    return found


def sizes(tower: Any) -> dict[str, Any]:
    """Parameters in all and of the blocks, and their bytes in fp32 in MB."""
    parameters = sum(value.numel() for value in tower.parameters())
    encoder = sum(value.numel() for value in tower.encoder.parameters())
    mb = {"mb": round(4 * parameters / 1e6, 1), "encoder_mb": round(4 * encoder / 1e6, 1)}
    return {"parameters": parameters, "encoder_parameters": encoder, **mb}


def machine() -> str:
    """The kind of machine, as far as it says."""
    info = Path("/proc/cpuinfo")
    told = info.read_text().splitlines() if info.exists() else []
    kind = next((line.partition(":")[2].strip() for line in told if "model name" in line), "")
    return kind or platform.machine()


def rows(threads: int, rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    towers = built(whole_base())
    spent = timed(towers, rounds)
    facts = {
        "machine": machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "rounds": rounds,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        # More than the threads of this run is others' work, which blurs the times.
        "load": round(os.getloadavg()[0], 1),
    }
    return [{"key": name, **sizes(towers[name]), **spent[name], **facts} for name in towers]


def verdicts(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, bool]]:
    """What is claimed, with its figures, and whether it holds."""
    larger = "speed_{}x{}".format(*BATCHES[-1])
    share = {name: row["mb"] / found[WHOLE]["mb"] for name, row in found.items()}
    fast = found[HALF][larger]
    every = [found[FEWER]["speed_{}x{}".format(*batch)] for batch in BATCHES]
    apart = max(abs(1 / speed - 1) for speed in every)
    return [
        (
            f"A fast model need not be a small one: with half of the units {fast:.2f} times as "
            f"fast (at least {SPEED}) at {share[HALF]:.1%} of the size (at least {SIZE:.0%})",
            fast >= SPEED and share[HALF] >= SIZE,
        ),
        (
            f"A small model need not be a fast one: with {TOKENS:,} tokens {share[FEWER]:.1%} of "
            f"the size (at most {FEWER_SIZE:.0%}), times within {apart:.1%} (at most {APART:.0%})",
            share[FEWER] <= FEWER_SIZE and apart <= APART,
        ),
    ]


def lines(path: Path = LEDGER) -> list[str]:
    """The table of a ledger in Markdown, and what holds of it."""
    read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = {row["key"]: row for row in read}
    first = found[WHOLE]
    heads = [f"ms, {rows} × {tokens} | times as fast" for rows, tokens in BATCHES]
    said = [
        "XLM-R base's shape (12 layers of 768, 250,002 tokens) with random weights; "
        f"{first['machine']}, {first['cores']} cores, {first['threads']} threads, torch "
        f"{first['torch']}, {first['date']}, load {first['load']}; medians of {first['rounds']} "
        "rounds, fp32.",
        "",
        f"| model | parameters | MB | of the whole | encoder MB | {' | '.join(heads)} |",
        "|---|" + "---:|" * (4 + 2 * len(heads)),
    ]
    for name, row in found.items():
        cells = [name, f"{row['parameters']:,}", f"{row['mb']:.0f}"]
        cells += [f"{row['mb'] / first['mb']:.1%}", f"{row['encoder_mb']:.0f}"]
        for batch in BATCHES:
            what = "{}x{}".format(*batch)
            low, high = row[f"quartiles_{what}"]
            cells += [f"{row[f'ms_{what}']:.1f}"]
            cells += [f"{row[f'speed_{what}']:.2f} ({low:.2f}–{high:.2f})"]
        said.append(f"| {' | '.join(cells)} |")
    kept = [
        f"- {what}: {'holds' if holds else 'does not hold'}." for what, holds in verdicts(found)
    ]
    return [*said, "", *kept]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    found = rows(options.threads, options.rounds)
    text = "".join(json.dumps(row) + "\n" for row in found)
    write_atomically(LEDGER, text.encode())
    print("\n".join(lines()))


if __name__ == "__main__":
    main()
