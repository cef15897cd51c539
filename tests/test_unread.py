"""Vectors in front cost no feed-forward net in the top block, and change no number there."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from howfine.base import Base
from howfine.batch import Batch, running
from howfine.method import method
from howfine.unread import Top
from howfine.worn import prepend
from tiny import tiny_base, tiny_whole

ONE_ROW = ("bert", "roberta", "distilbert", "electra", "deberta-v2", "mpnet", "gpt2", "llama", "t5")
FRONT, TEXT = 3, 7


def inputs() -> dict[str, Tensor]:
    """Two texts, the second one padded."""
    ids = torch.randint(5, 30, (2, TEXT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def lengths(base: Base) -> list[int]:
    """Positions that the top block's feed-forward net is computed for, pass by pass."""
    seen: list[int] = []
    for module, last in Top(base).nets:
        if last:
            module.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    return seen


def states_and_gradient(base: Base) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    with method("prompt", length=FRONT, init="normal").attach(base) as change:
        states: Tensor = base.body(**inputs()).last_hidden_state
        weight = torch.linspace(-1, 1, states.shape[2])
        (gradient,) = torch.autograd.grad((states * weight).sum(), [*change.trainable.values()])
    assert base.is_untouched()
    return states, gradient


@pytest.mark.parametrize("name", ONE_ROW)
def test_the_same_numbers_for_less(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base(name)
    base.towers.eval()
    seen = lengths(base)
    short = states_and_gradient(base)
    monkeypatch.setattr(Top, "__init__", _nothing(Top.__init__))
    whole = states_and_gradient(base)
    assert seen == [TEXT, FRONT + TEXT]
    assert torch.allclose(short[0], whole[0], atol=1e-5)
    assert torch.allclose(short[1], whole[1], atol=1e-4)
    assert short[1].abs().min() > 0


def _nothing(init: Any) -> Any:
    """The same block, all of which is computed."""

    def made(self: Top, base: Base) -> None:
        init(self, base)
        self.plain = False

    return made


def test_changes_that_compute_a_matrix_their_own_way() -> None:
    """In either order, and with only one of the net's matrices changed."""
    base = tiny_base("bert")
    base.towers.eval()
    seen, found = lengths(base), []
    for order in (0, 1):
        torch.manual_seed(0)
        prompt = method("prompt", length=FRONT, init="normal")
        sparse = method("sparse", density=0.1, by="random", where=("I",))
        one, other = (prompt, sparse) if order == 0 else (sparse, prompt)
        with one.attach(base), other.attach(base), torch.no_grad():
            found.append(base.body(**inputs()).last_hidden_state.shape)
    assert found == [(2, TEXT, base.hidden_size)] * 2
    assert seen == [TEXT] * 2


@pytest.mark.parametrize("why", ["again", "chunks", "on top", "shared", "encoder-decoder"])
def test_all_of_it_where_it_is_read_or_laid_out_otherwise(why: str) -> None:
    base = {"shared": tiny_base("albert"), "encoder-decoder": tiny_whole("t5")}.get(why)
    base = base or tiny_base("bert", **({"chunk_size_feed_forward": 1} if why == "chunks" else {}))
    given = inputs()
    if why == "encoder-decoder":
        given["decoder_input_ids"] = given["input_ids"][:, :2]
    if why == "again":
        base.tower.activation_checkpointing_enable()
    base.towers.train(why == "again")
    with method("prompt", length=FRONT, init="normal").attach(base) as change:
        above = method("deep", std=0.2).attach(base) if why == "on top" else nullcontext()
        with above:
            seen = lengths(base)
            states = base.body(**given)[0]
        states.square().sum().backward()
        assert all(value.grad.abs().sum() > 0 for value in change.trainable.values())
    if why == "encoder-decoder":  # which has two blocks on top
        assert not Top(base).plain
    else:
        assert set(seen) == {1 if why == "chunks" else FRONT + TEXT}
    assert base.is_untouched()


def test_rows_with_fronts_of_their_own() -> None:
    """Rows with more, fewer and no vectors in front are computed for their texts alone."""
    base = tiny_base("bert")
    base.towers.eval()
    fronts = {0: torch.randn(FRONT, base.hidden_size), 1: torch.randn(1, base.hidden_size)}
    seen = lengths(base)
    undo = prepend(base, fronts, 2)
    batch = Batch(inputs(), rows=torch.tensor([0, 1]))
    with torch.no_grad(), running(batch):
        assert base.body(**batch.inputs).last_hidden_state.shape[1] == TEXT
    undo()
    assert seen == [TEXT]
