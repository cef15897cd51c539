"""What the frontier bench compares: howfine's recipes and PEFT's methods, one line each."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from howfine.readout import readout
from howfine.recipe import Recipe
from howfine.training import Training

sys.path.insert(0, str(Path(__file__).parent / "plugins" / "methods"))
from peft_peer import PeftPeer

# Three rates are tried for each entry. The head's own rate is the same for all but where a recipe
# names another.
HEAD_RATE = 1e-2
# Epochs of the entries that say "long".
LONG = 10
RATES = {
    "full": (5e-5, 1e-4, 3e-4),
    "head": (3e-3, 1e-2, 3e-2),
    "layers": (1e-4, 3e-4, 1e-3),
    "vectors": (1e-3, 4e-3, 1e-2),  # biases and norms, trained in place or beside
    "mask": (0.03, 0.1, 0.2),  # a score moves by at most the rate a step
    "low rank": (1e-3, 3e-3, 1e-2),
    "scales": (3e-3, 1e-2, 3e-2),
    "prompt": (1e-2, 3e-2, 1e-1),
    "entries": (1e-3, 3e-3, 1e-2),  # some entries of a weight
    "random map": (2e-4, 7e-4, 2e-3),
    "cores": (6e-3, 2e-2, 6e-2),
    "shared cores": (2e-3, 6e-3, 2e-2),
}


@dataclass(frozen=True)
class Entry:
    """One row of the tables: what is trained, with which settings, at which rates."""

    name: str
    # A recipe's name or YAML file; for a peer PEFT's name of the method.
    what: str
    # A key of RATES.
    rates: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    side: str = "howfine"  # or "peft"
    # Epochs where they are not those that all entries share: few numbers take more steps.
    epochs: int = 0
    # Which setting of the recipe its rates are of.
    tuned: str = "learning_rate"

    def recipe(self, rate: float, **common: Any) -> Recipe:
        """The recipe at a learning rate, with settings that all entries share; its own win."""
        if self.side == "peft":
            training = Training(readout_learning_rate=HEAD_RATE)
            peer = PeftPeer(self.what, **self.settings)
            found, own = Recipe(self.name, peer, readout("classifier"), training), {}
        else:
            found, own = Recipe.load(self.what), dict(self.settings)
        if self.epochs:
            own["epochs"] = self.epochs
        if found.start is not None and "precision" in common:
            own["start_precision"] = common["precision"]
        return found.override(**{**common, self.tuned: rate, **own})


# In four bits, and a head without the row of its first label.
SHORT = {"store": "int4", "reference": True}
OURS = [
    Entry("full", "full", "full"),
    Entry("head-only", "head-only", "head"),
    Entry("head-only-int8", "head-only", "head", {"store": "int8"}),
    Entry("bitfit", "bitfit", "vectors"),
    Entry("layernorm", "layernorm", "vectors"),
    Entry("layernorm-top", "layernorm", "vectors", {"train": ("norm@-1",)}),
    Entry("top-layers", "top-layers", "layers"),
    Entry("mask", "mask", "mask"),
    Entry("mask-top", "mask", "mask", {"where": ("matrices@-1",)}),
    Entry("sparse", "sparse", "entries"),
    Entry("sparse-tiny", "sparse-tiny", "vectors"),
    Entry("sparse-tiny-2x", "sparse-tiny", "vectors", {"density": 0.024}),
    Entry("sparse-tiny-4x", "sparse-tiny", "vectors", {"density": 0.05}),
    Entry("sparse-tiny-8x", "sparse-tiny", "vectors", {"density": 0.1}),
    Entry("sparse-tiny-16x", "sparse-tiny", "vectors", {"density": 0.2}),
    Entry(
        "sparse-tiny-4x-long",
        "sparse-tiny",
        "vectors",
        {"density": 0.05},
        epochs=LONG,
    ),
    Entry("bias-norm", "bias-norm", "vectors"),
    Entry("lora-xs-int4", "lora-xs", "cores", SHORT),
    Entry("lora-xs-int4-long", "lora-xs", "cores", SHORT, epochs=LONG),
    Entry("lora-xs-8-int4", "lora-xs", "cores", {**SHORT, "rank": 8}),
    Entry("lora-xs-8-int4-long", "lora-xs", "cores", {**SHORT, "rank": 8}, epochs=LONG),
    Entry("lora-xs-16-int4", "lora-xs", "cores", {**SHORT, "rank": 16}),
    Entry("head-only-int4", "head-only", "head", SHORT),
    Entry("diff-pruning", "diff-pruning", "entries"),
    Entry("graft", "graft", "full", {"store": "int4"}, tuned="start_learning_rate"),
    Entry(
        "graft-small",
        "graft",
        "full",
        {"store": "int4", "density": 0.001},
        tuned="start_learning_rate",
    ),
    *(
        Entry(
            f"graft-{times}x",
            "graft",
            "full",
            {"store": "int4", "density": times / 100},
            tuned="start_learning_rate",
        )
        for times in (3, 10)
    ),
    Entry("sensitive", "sensitive", "layers"),
    Entry("intrinsic", "intrinsic", "random map"),
    Entry("lora-xs", "lora-xs", "cores"),
    Entry("tiny-lora", "tiny-lora", "shared cores"),
]


def _peer(name: str, kind: str, rates: str, targets: tuple[str, ...] = (), **options: Any) -> Entry:
    """No targets: PEFT's own choice for the architecture."""
    return Entry(name, kind, rates, {"targets": targets, "options": options}, side="peft")


ATTENTION, BLOCKS = ("Q", "V"), ("matrices",)
# The fewest numbers that a method can train: on one matrix.
ONE = ("V@-1",)
_LORA = [
    _peer(f"lora-r{rank}-{name}", "LORA", "low rank", targets, r=rank, lora_alpha=2 * rank)
    for name, targets in (("qv", ATTENTION), ("all", BLOCKS))
    for rank in (1, 2, 4, 8)
]
_FEATURES = {"task_type": "FEATURE_EXTRACTION", "prompt_tuning_init": "SAMPLE_VOCAB"}
_TINY = {"r": 1, "u": 1, "weight_tying": 1.0, "save_projection": False}
_SUPER = {"sparsity": 0.999, "save_precomputed_indices": False}
# By kind: PEFT's defaults, then smaller, then the smallest.
PEERS = [
    *_LORA,
    _peer("lora-min", "LORA", "low rank", ONE, r=1, lora_alpha=2),
    _peer("ia3", "IA3", "scales"),
    _peer("ia3-small", "IA3", "scales", ("V",), feedforward_modules=[]),
    _peer("ia3-min", "IA3", "scales", ONE, feedforward_modules=[]),
    _peer("vera", "VERA", "prompt"),
    _peer("vera-small", "VERA", "prompt", ATTENTION, r=16, save_projection=False),
    _peer("vera-min", "VERA", "prompt", ONE, r=1, save_projection=False),
    _peer("ln-default", "LN_TUNING", "vectors"),  # PEFT has no choice of its own for BERT
    _peer("ln", "LN_TUNING", "vectors", ("norm",)),
    _peer("ln-min", "LN_TUNING", "vectors", ("norm@-1",)),
    _peer("beft", "BEFT", "vectors"),
    _peer("beft-min", "BEFT", "vectors", ONE),
    _peer("shira", "SHIRA", "entries"),
    _peer("shira-small", "SHIRA", "entries", ATTENTION, r=1),
    _peer("shira-min", "SHIRA", "entries", ONE, r=1),
    _peer("super", "SUPERTUNING", "entries"),
    _peer("super-small", "SUPERTUNING", "entries", ATTENTION, **_SUPER),
    _peer("super-min", "SUPERTUNING", "entries", ONE, **_SUPER),
    _peer("prompt-20", "PROMPT_TUNING", "prompt", num_virtual_tokens=20, **_FEATURES),
    _peer("prompt-1", "PROMPT_TUNING", "prompt", num_virtual_tokens=1, **_FEATURES),
    _peer("fourierft", "FOURIERFT", "prompt"),
    _peer("fourierft-small", "FOURIERFT", "prompt", ATTENTION, n_frequency=16),
    _peer("fourierft-min", "FOURIERFT", "prompt", ONE, n_frequency=1),
    _peer("unilora", "UNILORA", "low rank"),
    _peer("unilora-small", "UNILORA", "low rank", ATTENTION, theta_d_length=16),
    _peer("unilora-min", "UNILORA", "low rank", ONE, theta_d_length=1),
    _peer("tinylora", "TINYLORA", "prompt"),
    _peer("tinylora-small", "TINYLORA", "prompt", ATTENTION, **_TINY),
    _peer("tinylora-min", "TINYLORA", "prompt", ONE, **_TINY),
]
# The peers that are small and near: the same number of epochs as the long ones of ours.
PEERS += [
    replace(entry, name=f"{entry.name}-long", epochs=LONG)
    for entry in PEERS
    if entry.name
    in ("lora-min", "lora-r1-qv", "ia3-small", "ia3-min", "beft-min", "ln-min", "beft")
]
ENTRIES = {entry.name: entry for entry in [*OURS, *PEERS]}
# Entries of one kind, each with more numbers than the one before it. Where one keeps the score,
# those after it can't be the smallest; where one is far below, those before it won't keep it.
LADDERS = [
    tuple(names.split())
    for names in (
        "head-only-int4 head-only-int8 head-only",
        "sparse-tiny sparse-tiny-2x sparse-tiny-4x sparse-tiny-8x sparse-tiny-16x bias-norm",
        "layernorm-top layernorm bitfit",
        "graft-small graft graft-3x graft-10x",
        "mask-top mask",
        "lora-xs-int4 lora-xs-8-int4 lora-xs-16-int4",
        "lora-min lora-r1-qv lora-r2-qv lora-r4-qv lora-r8-qv",
        "lora-r1-all lora-r2-all lora-r4-all lora-r8-all",
        "ia3-min ia3-small ia3",
        "vera-min vera-small vera",
        "ln-min ln",
        "beft-min beft",
        "shira-min shira-small shira",
        "super-min super-small super",
        "prompt-1 prompt-20",
        "fourierft-min fourierft-small fourierft",
        "unilora-min unilora-small unilora",
        "tinylora-min tinylora-small tinylora",
    )
]
