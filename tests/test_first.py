"""A block for the first position alone: the same numbers, less computed, or all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from howfine.base import Base
from howfine.batch import Batch
from howfine.method import method
from howfine.pooling import pool, reading
from howfine.readout import Wired, readout
from tiny import fit_a_little, logits_of, tiny_base, tiny_towers

# Blocks whose attention sees every position at once, through transformers' interface, and is told
# nothing of places but a mask.
SHORT = ("bert", "roberta", "distilbert", "electra", "vit", "dinov2")
WHOLE = ("mpnet", "deberta-v2", "gpt2", "llama", "t5")


def tower(name: str) -> tuple[Base, dict[str, Tensor]]:
    """An encoder and inputs; of words the second row is padded."""
    generator = torch.Generator().manual_seed(0)
    if name in ("vit", "dinov2"):
        pixels = torch.randn(2, 3, 8, 8, generator=generator)
        return tiny_towers(name).parts["image"], {"pixel_values": pixels}
    ids = torch.randint(5, 30, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return tiny_base(name), {"input_ids": ids, "attention_mask": mask}


def first_states(base: Base, inputs: dict[str, Tensor], pooling: str) -> Tensor:
    with reading(pooling):
        found: Tensor = base.body(**inputs).last_hidden_state
    return found


@pytest.mark.parametrize("name", ["distilbert", "electra", "roberta"])
def test_a_file_gives_what_training_gave_to_the_bit(name: str) -> None:
    """What torch multiplies is laid out alike, whether or not its weights train."""
    base, read = tiny_base(name), readout("classifier", max_length=32, pooling="cls")
    fitted = fit_a_little(base, method("deep"), readout=read)
    trained, delta = fitted.logits(), fitted.delta()
    fitted.change.remove()
    with delta.applied(base) as wired:
        assert torch.equal(logits_of(wired, base), trained)


def test_frozen_blocks_beneath_have_no_dropout() -> None:
    """Nor the one that the new block stands on; what trains has, and it is computed once."""
    base = tiny_base("bert")
    with method("deep").attach(base):
        base.train()
        host = base.towers.get_submodule(f"{base.body_prefix}{base.anatomy.block_path(1)}")
        modes = {name: module.training for name, module in host.named_modules() if name}
        assert {on for name, on in modes.items() if "howfine_on_top" in name} == {True}
        assert {on for name, on in modes.items() if "howfine_on_top" not in name} == {False}
    with method("deep", beside=("norm@1",)).attach(base):
        base.train()
        host = base.towers.get_submodule(f"{base.body_prefix}{base.anatomy.block_path(1)}")
        assert all(module.training for module in host.modules())
        base.towers.eval()


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SHORT + WHOLE)
def test_the_first_position_alone_is_what_it_is_among_all(name: str, kernel: str) -> None:
    base, inputs = tower(name)
    if name not in ("mpnet", "deberta-v2"):  # which have one of their own
        base.tower.set_attn_implementation(kernel)
    torch.manual_seed(0)
    with method("deep", std=0.2).attach(base) as change:
        base.tower.eval()
        both = []
        for pooling in ("mean", "cls"):
            states = first_states(base, inputs, pooling)
            weight = torch.linspace(-1, 1, states.shape[2])
            loss = (pool_first(states) * weight).sum()
            grads = torch.autograd.grad(loss, [*change.trainable.values()], allow_unused=True)
            both.append((states, grads))
    (every, whole), (alone, short) = both
    assert every.shape[1] > 1
    assert alone.shape[1] == (1 if name in SHORT else every.shape[1])
    assert torch.allclose(alone[:, 0], every[:, 0], atol=1e-5)
    for path, one, two in zip(change.trainable, whole, short, strict=True):
        assert (one is None) == (two is None), path
        assert one is None or torch.allclose(one, two, atol=1e-4), path
    assert base.is_untouched()


def pool_first(states: Tensor) -> Tensor:
    class State:
        last_hidden_state = states

    return pool(State(), None, "cls")


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_readout_says_what_it_reads(pooling: str) -> None:
    """Nothing is computed above the attention but what the classifier's pooling reads."""
    base, inputs = tower("distilbert")
    base.pooling = pooling
    read = readout("classifier")
    wired = Wired(base, read, read.attach(base, ("a", "b"))).eval()
    seen: list[int] = []
    with method("deep").attach(base):
        block = base.body.get_submodule(base.anatomy.block_path(base.depth - 1)).howfine_on_top
        block.ffn.register_forward_hook(lambda module, given, made: seen.append(made.shape[1]))
        outputs: Any = wired(**Batch(inputs).as_kwargs())["logits"]
    assert outputs.shape == (2, 2)
    assert seen == [1 if pooling == "cls" else 7]


def test_a_block_that_is_computed_again_in_the_backward_pass_is_computed_whole() -> None:
    base, inputs = tower("bert")
    with method("deep").attach(base):
        base.tower.activation_checkpointing_enable()
        base.tower.train()
        assert first_states(base, inputs, "cls").shape[1] == 7
        base.tower.eval()
        assert first_states(base, inputs, "cls").shape[1] == 1


def test_positions_in_front_are_not_the_first() -> None:
    """Beside a prompt the block computes all positions: some are taken off again after it."""
    base, inputs = tower("bert")
    torch.manual_seed(0)
    with method("prompt", length=2).attach(base), method("deep", std=0.2).attach(base):
        base.tower.eval()
        whole = first_states(base, inputs, "mean")
        alone = first_states(base, inputs, "cls")
    assert torch.equal(whole, alone)
    assert base.is_untouched()
