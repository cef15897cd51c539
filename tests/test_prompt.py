"""Templates, slots and class vectors: exact against the frozen language model (spec 04, WARP)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from howfine import template
from howfine.attach import attach
from howfine.base import Base
from howfine.batch import current
from howfine.delta import SUFFIX, Delta
from howfine.errors import DamagedDelta, DeltaError, SettingError, TaskError
from howfine.method import method
from howfine.readout import Readout, Wired, readout
from howfine.task import Example
from tiny import (
    LABELS,
    SPECIAL,
    WORDS,
    Fitted,
    logits_of,
    tiny_base,
    tiny_language_base,
    tiny_task,
    wire,
)

MASKED = ("bert", "roberta", "albert", "distilbert", "electra", "mpnet", "deberta-v2")
CAUSAL = ("gpt2", "llama", "qwen3", "gemma2")
LAYOUT = "{slot=w1} {text} {slot=w2} {mask} w9 {slot=w3} {pair} {slot=w1}"
TEXTS = [
    Example(("w4 w5 w6",), 0),
    Example(("w7",), 1),
    Example(("w8 w9 w10 w11 w12",), 0),
]
PAIRS = [Example(("w4 w5", "w6"), 0), Example(("w7", "w8 w9 w10"), 1)]


def ids(words: str) -> list[int]:
    vocabulary = (*SPECIAL, *WORDS)
    return [vocabulary.index(word) for word in words.split()]


def warp(layout: str = LAYOUT, **settings: Any) -> Readout:
    return readout("verbalizer", template=layout, max_length=32, **settings)


def on(base: Base, read: Readout, **settings: Any) -> Fitted:
    return wire(base, method("prompt", **settings), read)


def literal(base: Base, words: str, at: int) -> Tensor:
    """The frozen model's logits at a position, for an input that is written out."""
    with torch.no_grad():
        return base.tower(input_ids=torch.tensor([ids(words)])).logits[0, at]


@pytest.mark.parametrize("name", MASKED)
def test_words_in_slots_and_class_vectors_are_the_frozen_model(name: str) -> None:
    """Untrained, the scores are the masked language model's own logits of the classes' words."""
    base = tiny_language_base(name)
    fitted = on(base, warp(words=("w20", "w31")))
    fitted.wired.eval()
    found = logits_of(fitted.wired, base, TEXTS)
    fitted.change.remove()
    for example, row in zip(TEXTS, found, strict=True):
        before = f"[CLS] w1 {example.texts[0]} w2"
        whole = f"{before} [MASK] w9 w3 w1 [SEP]"
        expected = literal(base, whole, len(before.split()))[ids("w20 w31")]
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_model_is_read_at_its_last_position(name: str) -> None:
    base = tiny_language_base(name)
    fitted = on(base, warp("{slot=w1} {text} w9 {slot=w3}", words=("w20", "w31")))
    fitted.wired.eval()
    found = logits_of(fitted.wired, base, TEXTS)
    fitted.change.remove()
    for example, row in zip(TEXTS, found, strict=True):
        whole = f"w1 {example.texts[0]} w9 w3"
        expected = literal(base, whole, -1)[ids("w20 w31")]
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)


def test_pairs_stand_in_one_segment() -> None:
    base = tiny_language_base("bert")
    fitted = on(base, warp(words=("w20", "w31")))
    fitted.wired.eval()
    found = logits_of(fitted.wired, base, PAIRS)
    fitted.change.remove()
    whole = "[CLS] w1 w7 w2 [MASK] w9 w3 w8 w9 w10 w1 [SEP]"
    torch.testing.assert_close(found[1], literal(base, whole, 4)[ids("w20 w31")])


@pytest.mark.parametrize("name", [*MASKED, *CAUSAL])
def test_vectors_in_front_are_the_words_they_begin_as(name: str) -> None:
    """Without a template, on a body: the outputs are those of the text after the same words."""
    base = tiny_language_base(name)
    plain = readout("verbalizer", template="{mask} {text}" if name in MASKED else "{text} w9")
    fitted = on(base, plain, length=3, init="text", init_text="w1 w2")
    fitted.wired.eval()
    with torch.no_grad():
        state = base.body(input_ids=torch.tensor([ids("w4 w5 w6")]))
    assert state.last_hidden_state.shape[1] == 3
    fitted.change.remove()
    with torch.no_grad():
        expected = base.body(input_ids=torch.tensor([ids("w1 w2 w1 w4 w5 w6")]))
    torch.testing.assert_close(
        state.last_hidden_state, expected.last_hidden_state[:, 3:], atol=1e-5, rtol=0
    )
    assert base.reserved == 0


@pytest.mark.parametrize("name", MASKED)
def test_numbers_and_bytes_are_the_formula(name: str, tmp_path: Path) -> None:
    """n·H + K·H' + K numbers (spec 04, d), and nothing else in the file but its header."""
    base = tiny_language_base(name)
    fitted = on(base, warp())
    width = base.tower.get_input_embeddings().weight.shape[1]
    decoder = base.tower.get_output_embeddings().weight.shape[1]
    numbers = 4 * width + 2 * decoder + 2
    assert sum(p.numel() for p in fitted.wired.parameters() if p.requires_grad) == numbers
    file = tmp_path / f"x{SUFFIX}"
    size = fitted.delta().save(file)
    # An fp32 stream may be coded in less.
    assert 3 * numbers < size <= 4 * numbers + 700
    loaded = Delta.load(file)
    trained = logits_of(fitted.wired.eval(), base, TEXTS)
    fitted.change.remove()
    with loaded.applied(tiny_language_base(name)) as wired:
        assert torch.equal(logits_of(wired, wired._base, TEXTS), trained)


def test_a_step_moves_slots_and_class_vectors_alone() -> None:
    base = tiny_language_base("albert")
    fitted = on(base, warp())
    fitted.wired.train()
    batch = fitted.wired.readout.collate(base, TEXTS)
    fitted.wired(**batch.as_kwargs())["loss"].backward()
    reached = {name for name, p in fitted.wired.named_parameters() if p.grad is not None}
    assert len(reached) == 3
    gradient = fitted.change.trainable["vectors"].grad
    assert gradient is not None
    assert (gradient.abs().sum(1) > 0).all()
    fitted.change.remove()
    assert base.is_untouched()


def test_the_running_batch_is_seen_in_its_forward_alone() -> None:
    base = tiny_language_base("bert")
    fitted = on(base, warp())
    assert current() is None
    logits_of(fitted.wired.eval(), base, TEXTS)
    assert current() is None
    # The tower called alone has no slots: its outputs are the frozen model's.
    alone = literal(base, "[CLS] w1 w2 [SEP]", 1)
    fitted.change.remove()
    assert torch.equal(alone, literal(base, "[CLS] w1 w2 [SEP]", 1))


def test_what_vectors_begin_as() -> None:
    base = tiny_language_base("bert")
    table = base.embedding.weight
    plain = warp("{slot} {text} {slot=w3} {mask}")

    def begun(**settings: Any) -> Tensor:
        fitted = on(base, plain, **settings)
        found = fitted.change.trainable["vectors"].detach().clone()
        fitted.change.remove()
        return found

    mask, word, pad = table[ids("[MASK] w3 [PAD]")]
    assert torch.equal(begun(), torch.stack([mask, word]))
    assert torch.equal(begun(init="pad_token", length=1), torch.stack([pad, word, pad]))
    table_like, normal = begun(init="table", length=50), begun(init="normal", length=50)
    assert abs(table_like[2:].std() - table.std()) < 0.1 * table.std()
    assert abs(normal[2:].std() - 1) < 0.05


def test_read_hidden_and_fixed_class_vectors() -> None:
    """The linear probe of the paper's code, and class vectors that stay the words'."""
    base = tiny_language_base("bert")
    wired = Wired(base, warp(read="hidden"), warp(read="hidden").attach(base, LABELS))
    assert wired.head.classes.weight.shape == (2, 32)
    fixed = warp(words=("w20", "w31"), train_vectors=False).attach(base, LABELS)
    assert [p.requires_grad for p in fixed.parameters()] == [False, True]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{mask} only", "has no {text}"),
        ("{text} {text} {mask}", "may stand there once"),
        ("{text*2} {mask}", "may stand there once"),
        ("{text} {mask=w1}", "only a slot"),
        ("{text} {maske}", "not understood"),
        ("{text} {mask*2}", "2 masks, expected one"),
    ],
)
def test_templates_that_are_wrong(written: str, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        readout("verbalizer", template=written)


def test_bad_input_is_named() -> None:
    base = tiny_language_base("bert")

    def fill(layout: str, *texts: str, limit: int = 32) -> None:
        template.parse(layout).fill(base, [Example(texts, 0)], limit)

    with pytest.raises(TaskError, match=r"holds the mask token \[MASK\]"):
        fill(LAYOUT, "w1 [MASK] w2")
    with pytest.raises(TaskError, match="an example has 2 texts"):
        fill("{text} {mask}", "w1", "w2")
    with pytest.raises(SettingError, match=r"words .w1 \[MASK\]. hold the mask token; write"):
        fill("{text} w1 [MASK] {mask}", "w1")
    with pytest.raises(SettingError, match=r"takes 27 of 20 tokens"):
        fill("{slot*20} {text} {mask} w1 w2 w3 w4", "w1", limit=20)
    with pytest.raises(SettingError, match="expected 2: one for each"):
        warp(words=("w1",)).attach(base, LABELS)
    with pytest.raises(SettingError, match="'w1 w2' is 2 tokens"):
        warp(words=("w1 w2", "w3")).attach(base, LABELS)
    with pytest.raises(SettingError, match="expected one that it knows"):
        warp(words=("hello", "w3")).attach(base, LABELS)
    with pytest.raises(SettingError, match="was loaded with no language model's head"):
        warp().attach(tiny_base("bert"), LABELS)
    with pytest.raises(SettingError, match=r"has no \{mask\}"):
        warp("{text}").attach(base, LABELS)
    with pytest.raises(SettingError, match="answers at the last position"):
        warp("{text} {mask}").attach(tiny_language_base("gpt2"), LABELS)
    with pytest.raises(SettingError, match="no free slots and length is 0"):
        on(base, warp("{text} {mask}"))
    with pytest.raises(SettingError, match="70 vectors in front leave no room"):
        on(base, warp(), length=70)
    on(base, warp())
    with pytest.raises(SettingError, match="another change of this kind"):
        on(base, warp())


def test_texts_are_cut_and_nothing_else() -> None:
    """The longest text first, from its end; with vectors in front there is as much less room."""
    base = tiny_language_base("bert")
    layout = template.parse("{slot} {text} {mask} {pair} w9")
    long, short = " ".join(["w1"] * 40), "w2 w3 w4"
    batch = layout.fill(base, [Example((long, short), 0)], 20)
    assert batch.inputs["input_ids"].tolist() == [
        ids("[CLS] [MASK] " + "w1 " * 12 + "[MASK] w2 w3 w4 w9 [SEP]")
    ]
    assert batch.reads is not None
    assert batch.slots is not None
    assert batch.reads.tolist() == [[14]]
    assert batch.slots[0].tolist() == [-1, 0] + [-1] * 18
    fitted = on(base, warp("{text} {mask}"), length=60)
    cut = fitted.wired.readout.collate(base, [Example((long,), 0)])
    assert cut.inputs["input_ids"].shape == (1, 4)
    assert torch.isfinite(logits_of(fitted.wired.eval(), base, [Example((long,), 0)])).all()


@pytest.mark.parametrize("name", [*MASKED, *CAUSAL])
def test_alone(name: str) -> None:
    """A padded batch equals each row alone, with slots and vectors in front."""
    base = tiny_language_base(name)
    layout = LAYOUT if name in MASKED else LAYOUT.replace("{mask}", "")
    fitted = on(base, warp(layout), length=2)
    fitted.wired.eval()
    texts = tiny_task().splits["test"]
    together = logits_of(fitted.wired, base, texts)
    alone = torch.cat([logits_of(fitted.wired, base, [text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", CAUSAL)
def test_generation_goes_on_as_after_the_words(name: str, beams: int) -> None:
    """The vectors are in front once, not at each step; with padding on the left."""
    base = tiny_language_base(name)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}

    def generated(rows: list[list[int]], front: list[int]) -> list[list[int]]:
        width = max(map(len, rows))
        row = [[0] * (width - len(r)) + front + r for r in rows]
        mask = [[0] * (width - len(r)) + [1] * (len(front) + len(r)) for r in rows]
        made = base.tower.generate(
            input_ids=torch.tensor(row), attention_mask=torch.tensor(mask), **options
        )
        return made[:, width + len(front) :].tolist()

    texts = [ids("w4 w5 w6 w7")] if name == "gpt2" else [ids("w4 w5 w6 w7"), ids("w8 w9")]
    expected = generated(texts, ids("w1 w2 w3"))
    with method("prompt", length=3, init="text", init_text="w1 w2 w3").attach(base):
        assert generated(texts, []) == expected
    assert generated(texts, []) != expected


@pytest.mark.parametrize("name", ["bert", "albert", "mpnet"])
def test_a_pooler_reads_the_texts_first_token(name: str) -> None:
    base = tiny_base(name)
    words = torch.tensor([ids("[CLS] w4 w5 [SEP]")])
    with torch.no_grad(), method("prompt", length=2, init="normal").attach(base):
        state = base.tower(input_ids=words)
        first = state.last_hidden_state[:, 0]
        if name == "albert":
            expected = base.tower.pooler_activation(base.tower.pooler(first))
        else:
            expected = torch.tanh(base.tower.pooler.dense(first))
        assert base.tower(input_ids=words, return_dict=False)[0].shape == (1, 4, 32)
    torch.testing.assert_close(state.pooler_output, expected)


def test_slots_of_scaled_embeddings() -> None:
    """Gemma multiplies what it looks up: a vector that begins as a word is that word."""
    base = tiny_base("gemma2", attn_implementation="eager")
    text = torch.tensor([ids("w4 w5")])
    with torch.no_grad():
        whole = base.tower(input_ids=torch.tensor([ids("w1 w2 w4 w5")])).last_hidden_state[:, 2:]
        with method("prompt", length=2, init="text", init_text="w1 w2").attach(base):
            found = base.tower(input_ids=text).last_hidden_state
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)


def test_a_number_in_a_template_asks_for_no_memory() -> None:
    with pytest.raises(SettingError, match="more than 4096 parts"):
        template.parse("{slot*30000000} {text} {mask}")


def test_vectors_that_do_not_fit_are_refused() -> None:
    base = tiny_language_base("bert")
    read = warp("{slot*3} {text} {mask}")
    for wrong in (torch.zeros(3, 5), torch.ones(3, 32, dtype=torch.bool), torch.zeros(0, 32)):
        with pytest.raises(DamagedDelta, match="expected vectors of 32 numbers"):
            method("prompt").unpack(base, {"vectors": wrong})
    head = read.attach(base, LABELS)
    with method("prompt").unpack(base, {"vectors": torch.zeros(2, 32)}):
        wired = Wired(base, read, head).eval()
        with pytest.raises(DeltaError, match="3 slots and the change holds 2 vectors"):
            logits_of(wired, base, TEXTS)


def test_a_static_caches_masks_are_refused() -> None:
    """Of a model with two kinds of layers they come by name."""
    base = tiny_language_base("gemma2")
    fixed = {"cache_implementation": "static", "disable_compile": True, "max_new_tokens": 2}
    with (
        attach(base.tower, "prompt", tokenizer=base.tokenizer, length=2),
        pytest.raises(SettingError, match="a dynamic cache in generation"),
    ):
        base.tower.generate(torch.tensor([[20, 21, 22]]), **fixed)


def test_attach_says_what_it_lacks() -> None:
    tower = tiny_base("gpt2").tower
    with pytest.raises(SettingError, match="no such token"):
        attach(tower, "prompt", length=2)
    with pytest.raises(SettingError, match="without a tokenizer"):
        attach(tower, "prefix", length=0, init_text="w1")
    with attach(tower, "prefix", tokenizer=tiny_base("gpt2").tokenizer, length=0, init_text="w1"):
        pass


def test_room_is_shared_by_all_who_attach() -> None:
    tower = tiny_base("gpt2").tower
    with attach(tower, "prefix", length=3), attach(tower, "prompt", length=2, init="table"):
        assert Base("again", tower, tiny_base("gpt2").tokenizer).reserved == 5
    assert Base("again", tower).reserved == 0
