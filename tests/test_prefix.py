"""Keys and values in front, against the words they could be of (spec 07)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from howfine import attention
from howfine.base import Base
from howfine.batch import running
from howfine.delta import SUFFIX, Delta
from howfine.errors import DamagedDelta, DeltaError, SettingError
from howfine.method import method
from howfine.readout import readout
from howfine.recipe import Recipe
from howfine.task import Example
from howfine.training import Training
from howfine.tune import tune
from tiny import (
    HIDDEN,
    LAYERS,
    fit_a_little,
    logits_of,
    probe_for,
    tiny_base,
    tiny_language_base,
    tiny_task,
    tiny_whole,
    written_task,
)

CAUSAL = ("gpt2", "llama", "qwen3")
FRONT = "w1 w2 w3"
FRONT_IDS, TEXT_IDS = [6, 7, 8], [9, 10, 11, 12]


def words(**settings: Any) -> Any:
    return method("prefix", length=0, hidden=0, init_text=FRONT, **settings)


def outputs(base: Base, ids: list[int], **more: Any) -> Tensor:
    with torch.no_grad():
        return base.tower(input_ids=torch.tensor([ids]), **more).logits[0]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CAUSAL)
def test_the_cache_of_words_is_the_words(name: str, kernel: str) -> None:
    """A prefix that is some words' keys and values gives what the text after them gives."""
    base = tiny_language_base(name)
    base.tower.set_attn_implementation(kernel)
    whole = outputs(base, FRONT_IDS + TEXT_IDS)[3:]
    plain = outputs(base, TEXT_IDS)
    with words().attach(base):
        found = outputs(base, TEXT_IDS)
        masked = outputs(base, TEXT_IDS, attention_mask=torch.ones(1, 4, dtype=torch.long))
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(masked, whole, atol=1e-5, rtol=0)
    assert (plain - whole).abs().max() > 1e-2
    assert torch.equal(outputs(base, TEXT_IDS), plain)
    assert base.tower.config._attn_implementation == kernel


@pytest.mark.parametrize("name", CAUSAL)
def test_positions_may_start_at_zero(name: str) -> None:
    """Without the shift the text's positions are those it would have alone."""
    base = tiny_language_base(name)
    with words(shift=False).attach(base):
        unshifted = outputs(base, TEXT_IDS)
    with words().attach(base):
        places = torch.arange(4)[None] - 3  # the shift adds 3
        same = outputs(base, TEXT_IDS, position_ids=places)
    torch.testing.assert_close(unshifted, same, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CAUSAL)
def test_keys_and_values_at_slots_can_be_words(name: str) -> None:
    """What words' keys and values are more than the slots' own makes slots those words."""
    base = tiny_language_base(name)
    base.tokenizer.bos_token = "[CLS]"
    read = readout("verbalizer", template="{text} {slot*2} {bos}", max_length=32)
    batch = read.collate(base, [Example(("w1 w2 w3",), 0)], labelled=False)
    slots = batch.slots[0] >= 0
    ids = batch.inputs["input_ids"][0].clone()
    plain = outputs(base, ids.tolist())
    ids[slots] = torch.tensor(FRONT_IDS[:2])
    whole = outputs(base, ids.tolist())
    wanted = [[part[:, slots] for part in pair] for pair in attention.recorded(base, ids)]
    rows = torch.zeros(2, 2 * len(wanted), *wanted[0][0].shape[::2])
    how = method("prefix", hidden=0, place="slots")
    # A layer's own keys depend on what is added in those below.
    for layer, words_own in enumerate(wanted):
        with how.unpack(base, {"keys_values": rows.flatten(1)}), running(batch):
            front = getattr(attention.modules(base)[layer], attention._HELD)
            front.seen = []
            base.tower(**batch.inputs)
            (own,) = front.seen
        for part in (0, 1):
            added = words_own[part] - own[part][0][:, slots]
            rows[:, 2 * layer + part] = added.transpose(0, 1)
    with how.unpack(base, {"keys_values": rows.flatten(1)}), running(batch), torch.no_grad():
        found = base.tower(**batch.inputs).logits[0]
    torch.testing.assert_close(found[~slots], whole[~slots], atol=1e-5, rtol=0)
    assert (plain - whole)[~slots].abs().max() > 1e-2


def test_slots_must_be_there() -> None:
    base = tiny_language_base("gpt2")
    how = method("prefix", place="slots")
    with pytest.raises(SettingError, match="no free slots"):
        how.attach(base)
    with pytest.raises(SettingError, match="words stand in front"):
        method("prefix", place="slots", init_text="w1")
    tensors = {"keys_values": torch.zeros(1, 2 * LAYERS * HIDDEN)}
    read = readout("verbalizer", template="{text} {slot*2}", max_length=32)
    batch = read.collate(base, [Example(("w1 w2 w3",), 0)], labelled=False)
    with how.unpack(base, tensors):
        with (
            running(batch),
            pytest.raises(
                DeltaError, match="have 2 slots and the change holds keys and values for 1"
            ),
        ):
            base.tower(**batch.inputs)
        with pytest.raises(RuntimeError, match="run it through howfine's readout"):
            base.tower(**batch.inputs)
    for name in ("gemma2", "t5"):
        other = tiny_language_base(name) if name == "gemma2" else tiny_whole(name)
        with pytest.raises(SettingError, match="whose layers see everything"):
            how.attach(other, probe_for(how, read, other))
    probe = probe_for(how, read, base)
    probe.begun = tensors
    with pytest.raises(SettingError, match="has 1 positions, and this template 2 slots"):
        method("prefix", place="slots", hidden=0).attach(base, probe)


def test_slots_under_gradient_checkpointing(tmp_path: Path) -> None:
    """Layers that are computed again in the backward pass find the slots once more."""
    files = []
    for checkpointing in (False, True):
        base = tiny_language_base("gpt2")
        base.tokenizer.eos_token = base.tokenizer.bos_token = "[SEP]"
        read = readout(
            "language_model", template="{text} {slot*2} {bos}", max_length=32, max_new_tokens=4
        )
        training = Training(
            max_steps=3, learning_rate=1e-2, gradient_checkpointing=checkpointing, warmup=0.0
        )
        recipe = Recipe("infix", method("prefix", hidden=0, place="slots"), read, training)
        base.tower.config.use_cache = False
        out = tmp_path / f"{checkpointing}{SUFFIX}"
        tune(base, written_task(), recipe, out=out)
        files.append(Delta.load(out).tensors(base)[0]["keys_values"])
    torch.testing.assert_close(*files, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CAUSAL)
def test_padding_on_either_side(name: str, side: str) -> None:
    base = tiny_language_base(name)
    whole = outputs(base, FRONT_IDS + TEXT_IDS)[3:]
    pads, real = [0, 0], [1] * 4
    ids = pads + TEXT_IDS if side == "left" else TEXT_IDS + pads
    mask = torch.tensor([pads + real if side == "left" else real + pads])
    with words().attach(base):
        found = outputs(base, ids, attention_mask=mask)
    kept = found[2:] if side == "left" else found[:4]
    torch.testing.assert_close(kept, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", CAUSAL)
def test_generation_goes_on_as_after_the_words(name: str, beams: int) -> None:
    """Greedy and with beams, through caches, with padding on the left."""
    base = tiny_language_base(name)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}

    def generated(rows: list[list[int]]) -> list[list[int]]:
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        made = base.tower.generate(input_ids=ids, attention_mask=mask, **options)
        return made[:, width:].tolist()

    texts = [TEXT_IDS, TEXT_IDS[:2]]
    expected = generated([FRONT_IDS + row for row in texts])
    plain = generated(texts)
    with words().attach(base):
        found = generated(texts)
    assert found == expected
    assert plain != expected


@torch.no_grad()
@pytest.mark.parametrize("name", CAUSAL)
def test_a_cache_of_a_fixed_size_gives_what_a_growing_one_gives(name: str) -> None:
    """And a text in two parts what it gives at once: there are then more keys than queries."""
    base = tiny_language_base(name)
    tower, ids = base.tower.eval(), torch.tensor([TEXT_IDS])
    with words().attach(base):
        whole = outputs(base, TEXT_IDS)
        fixed = StaticCache(config=tower.config, max_cache_len=12)
        found = outputs(base, TEXT_IDS, past_key_values=fixed)
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
        for cache in (StaticCache(config=tower.config, max_cache_len=12), DynamicCache()):
            parts = [tower(input_ids=p, past_key_values=cache).logits[0] for p in ids.split(2, 1)]
            torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("hidden", [0, 8])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_numbers_are_the_formula(name: str, hidden: int, tmp_path: Path) -> None:
    """p·2·n·d stored, whatever trains; with fewer key heads than heads, their width."""
    base = tiny_base(name)
    fitted = fit_a_little(base, method("prefix", length=5, hidden=hidden))
    width = HIDDEN // 2 if name == "llama" else HIDDEN
    (stored,) = fitted.method.pack(base, fitted.change).values()
    assert stored.shape == (5, 2 * LAYERS * width)
    trained = sum(value.numel() for value in fitted.change.trainable.values())
    net = 5 * HIDDEN + (HIDDEN + 1) * 8 + 9 * stored.shape[1]
    assert trained == (net if hidden else stored.numel())
    size = fitted.delta().save(tmp_path / f"x{SUFFIX}")
    assert size <= 4 * (stored.numel() + 2 * HIDDEN + 2) + 700


def test_folding_the_net_changes_no_output() -> None:
    base = tiny_base("gpt2")
    fitted = fit_a_little(base, method("prefix", length=4, hidden=8))
    trained = fitted.logits()
    tensors = fitted.method.pack(base, fitted.change)
    fitted.change.remove()
    with fitted.method.unpack(base, tensors) as folded:
        assert not folded.trainable or not any(
            value.requires_grad for value in folded.trainable.values()
        )
        assert torch.equal(fitted.logits(), trained)


def test_a_net_is_fitted_to_the_words() -> None:
    """Its keys and values come near those of the words; the rows it starts from stay."""
    base = tiny_language_base("gpt2")
    target = method("prefix", length=0, hidden=0, init_text=FRONT).attach(base)
    wanted = target.parts["net"]().detach().clone()
    target.remove()
    torch.manual_seed(0)
    begun = method("prefix", length=3, hidden=64).attach(base)
    rows, far = begun.parts["net"].rows.detach().clone(), begun.parts["net"]() - wanted
    begun.remove()
    torch.manual_seed(0)
    fitted = method("prefix", length=0, hidden=64, init_text=FRONT).attach(base)
    near = fitted.parts["net"]() - wanted
    fitted.remove()
    assert torch.equal(fitted.parts["net"].rows, rows)
    assert near.square().mean() < 0.6 * far.square().mean()


def test_gradient_checkpointing_gives_the_same_training(tmp_path: Path) -> None:
    files = []
    for checkpointing in (False, True):
        recipe = Recipe(
            "prefix",
            method("prefix", length=3, hidden=8),
            readout("classifier", max_length=32),
            Training(epochs=1, batch_size=8, gradient_checkpointing=checkpointing),
        )
        path = tmp_path / f"{checkpointing}{SUFFIX}"
        base = tiny_base("llama")  # which has no dropout
        recomputed = _counted(base)
        tune(base, tiny_task(), recipe, out=path)
        assert (len(recomputed) > 2 * LAYERS + 2) == checkpointing
        files.append(path.read_bytes())
        assert base.is_untouched()
    assert files[0] == files[1]
    training = Training(gradient_checkpointing=True, eval_mode=True, max_steps=1)
    with pytest.raises(SettingError, match="has no effect with eval_mode"):
        tune(
            base,
            tiny_task(),
            replace(recipe, training=training),
            out=tmp_path / "x.delta.safetensors",
        )


def _counted(base: Base) -> list[int]:
    """Grows by one with each run of a layer in training."""
    runs: list[int] = []
    for layer in base.tower.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, _: runs.append(1) if torch.is_grad_enabled() else None
        )
    return runs


def test_training_goes_on_from_what_is_not_folded(tmp_path: Path) -> None:
    """A stopped training and its continuation end as one in a piece: checkpoints hold the net."""
    base, task, files = tiny_base("gpt2"), tiny_task(), []
    read = readout("classifier", max_length=32, dropout=0.0)
    for epochs, resume in ((2, False), (2, True)):
        training = Training(epochs=epochs, batch_size=8, evaluations=2, eval_mode=True, warmup=0.0)
        recipe = Recipe("prefix", method("prefix", length=3, hidden=8), read, training)
        path = tmp_path / f"{resume}{SUFFIX}"
        tune(base, task, recipe, out=path, work=tmp_path / "work", resume=resume)
        files.append(path.read_bytes())
    assert files[0] == files[1]
    (newest, *_) = sorted((tmp_path / "work").glob("checkpoint-*"))
    held = {name for file in newest.glob("*.safetensors") for name in _names(file)}
    assert any("inner.weight" in name for name in held)


def _names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


@pytest.mark.parametrize("name", ["deberta-v2", "mpnet"])
def test_an_architecture_with_its_own_attention_is_refused(name: str) -> None:
    base = tiny_base(name)
    with pytest.raises(SettingError, match="attention interface"):
        method("prefix", length=3).attach(base)
    assert base.is_untouched()
    assert not any(hasattr(m, "howfine_front") for m in base.towers.modules())


def test_bad_settings_are_named() -> None:
    base = tiny_language_base("gpt2")
    with pytest.raises(SettingError, match="length 0"):
        method("prefix", length=0)
    with pytest.raises(SettingError, match="has 3 tokens, and length is 9"):
        method("prefix", length=9, init_text=FRONT).attach(base)
    with pytest.raises(SettingError, match=r"first 90 tokens leave no room .*holds 64\)"):
        method("prefix", length=0, init_text="w1 " * 90).attach(base)
    with pytest.raises(SettingError, match="64 vectors in front leave no room"):
        method("prefix", length=64).attach(base)
    with pytest.raises(DamagedDelta, match="expected keys_values of rows of 128 numbers"):
        method("prefix").unpack(base, {"keys_values": torch.zeros(3, 5)})
    with words().attach(base), pytest.raises(SettingError, match="another change of this kind"):
        words().attach(base)
    assert base.is_untouched()
    assert base.reserved == 0


def test_a_shared_block_can_not_begin_as_words() -> None:
    """ALBERT's layers share one prefix, and each layer's keys of a word differ."""
    base = tiny_base("albert")
    with pytest.raises(SettingError, match="share one block"):
        words().attach(base)
    assert base.is_untouched()
    bart = tiny_base("bart")
    with pytest.raises(SettingError, match="set shift=False"):
        method("prefix", length=2).attach(bart)
    with method("prefix", length=2, shift=False).attach(bart):
        assert bart.reserved == 0


def test_other_kernels_are_refused() -> None:
    base = tiny_base("gpt2")
    base.tower.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(SettingError, match="attention is computed by 'flex_attention'"):
        method("prefix", length=2).attach(base)


def test_recording_leaves_nothing(tmp_path: Path) -> None:
    base = tiny_language_base("gpt2")
    before = base.tower.config._attn_implementation
    found = attention.recorded(base, torch.tensor(FRONT_IDS))
    assert [tuple(keys.shape) for keys, _ in found] == [(4, 3, 8)] * LAYERS
    assert base.tower.config._attn_implementation == before
    assert torch.isfinite(logits_of(_wired(base), base)).all()


def _wired(base: Base) -> Any:
    from howfine.readout import Wired
    from tiny import LABELS

    read = readout("verbalizer", template="{text} w9")
    return Wired(base, read, read.attach(base, LABELS)).eval()


@pytest.mark.parametrize("name", ["bert", "gpt2", "distilbert"])
def test_dropout_takes_the_same_shares_without_a_look_for_queries_that_see_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU torch looks in each row of scores; here what stands in front is always seen."""
    base, found = tiny_base(name), []
    ids = torch.randint(5, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    own = attention._in_steps
    asked: list[bool] = []
    for short in (True, False):

        def chosen(*args: Any, short: bool = short) -> bool:
            asked.append(own(*args))
            return asked[-1] and short

        monkeypatch.setattr(attention, "_in_steps", chosen)
        torch.manual_seed(0)
        with method("prefix", length=3, hidden=0).attach(base) as change:
            base.train()
            torch.manual_seed(1)
            states = base.body(input_ids=ids, attention_mask=mask).last_hidden_state
            loss = (states * torch.linspace(-1, 1, states.shape[2])).sum()
            grads = torch.autograd.grad(loss, [*change.trainable.values()])
            found.append((states, *grads))
        base.towers.eval()
    assert asked
    assert all(asked)
    for one, two in zip(*found, strict=True):
        assert torch.allclose(one, two, atol=1e-5)
    assert base.is_untouched()
