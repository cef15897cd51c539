"""Rounding-aware training: what the last steps compute with is what the file holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from howfine.codec import PRECISIONS
from howfine.delta import SUFFIX, Delta
from howfine.method import method
from howfine.recipe import Recipe
from howfine.rounding import FINE, Rounding
from howfine.tune import tune
from tiny import LABELS, Fitted, fit_a_little, logits_of, tiny_base, tiny_task

COARSE = tuple(p for p in PRECISIONS if p not in FINE)
METHODS = {
    "full": {},
    "select": {"train": ("bias",)},
    "sparse": {"density": 0.05, "by": "random"},
    "subspace": {"map": "lora-xs", "rank": 2},
    "l0": {"keep": 0.4, "beside": ("all",)},
    "prune": {"by": "magnitude", "beside": ("all",)},
}


def rounding_of(fitted: Fitted, store: str) -> Rounding:
    return Rounding(fitted.method, fitted.change, fitted.head, store, 0.5)


@pytest.mark.parametrize("store", COARSE)
@pytest.mark.parametrize("name", METHODS)
def test_training_sees_what_the_file_holds(name: str, store: str, tmp_path: Path) -> None:
    base = tiny_base("bert")
    fitted = fit_a_little(base, method(name, **METHODS[name]))
    before = {n: p.detach().clone() for n, p in fitted.wired.named_parameters() if p.requires_grad}
    unrounded = fitted.logits()
    with rounding_of(fitted, store).stored():
        seen = fitted.logits()
    after = dict(fitted.wired.named_parameters())
    assert all(torch.equal(after[n], value) for n, value in before.items())  # back to the last bit
    fitted.delta(store).save(tmp_path / f"a{SUFFIX}")
    fitted.change.remove()
    with Delta.load(tmp_path / f"a{SUFFIX}").applied(base) as wired:
        held = logits_of(wired, base)
    torch.testing.assert_close(seen, held, rtol=1e-4, atol=1e-4)
    if store in ("int2", "sign"):  # else the two could agree by being the same
        assert (seen - unrounded).abs().max() > 1e-2


def test_only_the_last_steps_of_a_coarse_training_are_rounded() -> None:
    fitted = fit_a_little(tiny_base("bert"), method("full"))
    due = [rounding_of(fitted, store).due(0.5) for store in PRECISIONS]
    assert due == [store not in FINE for store in PRECISIONS]
    assert not rounding_of(fitted, "int4").due(0.49)


def test_rounding_changes_the_training(tmp_path: Path) -> None:
    """The same seed with and without: other values, the same size of file."""
    base, task = tiny_base("bert"), tiny_task()
    recipe = Recipe.parse(
        "coarse",
        {
            "method": {"sparse": {"density": 0.05, "by": "random"}},
            "readout": {"classifier": {"max_length": 32}},
            "training": {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-2},
            "store": "sign",
        },
    )
    found: list[dict[str, Tensor]] = []
    for share in (0.0, 0.5):
        tuned = tune(base, task, recipe, out=tmp_path / f"{share}{SUFFIX}", rounding=share)
        assert tuned.delta.labels == LABELS
        found.append(tuned.delta.tensors(base)[1])
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])
