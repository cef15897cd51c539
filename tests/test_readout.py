"""The classifier readout: pooling against loops, losses against their formulas, batches."""

import math
from types import SimpleNamespace

import pytest
import torch

from howfine.errors import SettingError
from howfine.pooling import pool
from howfine.readout import readout, readouts
from howfine.task import Example
from tiny import (
    LABELS,
    tiny_base,
    tiny_language_base,
    tiny_task,
    tiny_towers,
    tiny_writer,
)


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(
        last_hidden_state=torch.randn(3, 5, 4, generator=generator),
        pooler_output=torch.randn(3, 4, generator=generator),
    )


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])  # right, none, left


def test_pooling_reads_what_its_name_says(state):
    hidden = state.last_hidden_state
    for row in range(3):
        kept = [hidden[row, i] for i in range(5) if MASK[row, i]]
        assert torch.allclose(pool(state, MASK, "mean")[row], sum(kept) / len(kept), atol=1e-6)
        assert torch.equal(pool(state, MASK, "last")[row], kept[-1])
        assert torch.equal(pool(state, MASK, "cls")[row], hidden[row, 0])
    assert torch.equal(pool(state, MASK, "pooler"), state.pooler_output)


def test_without_a_mask_every_position_counts(state):
    hidden = state.last_hidden_state
    assert torch.allclose(pool(state, None, "mean"), hidden.mean(1))
    assert torch.equal(pool(state, None, "last"), hidden[:, -1])


def test_losses_are_their_formulas():
    read = readout("classifier")
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
    targets = torch.tensor([2, 0])
    expected = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        expected -= math.log(math.exp(row[target]) / sum(map(math.exp, row))) / 2
    assert math.isclose(float(read.loss(logits, targets)), expected, rel_tol=1e-6)
    scores, wanted = torch.tensor([[1.0], [3.0]]), torch.tensor([2.0, 2.5])
    assert math.isclose(float(read.loss(scores, wanted)), (1 + 0.25) / 2)


def test_predictions_are_classes_or_scores():
    read = readout("classifier")
    assert read.predict(torch.tensor([[0.1, 0.9], [2.0, 1.0]])).tolist() == [1, 0]
    assert read.predict(torch.tensor([[0.5], [-1.0]])).tolist() == [0.5, -1.0]


def test_a_batch_holds_both_texts_cut_to_length():
    base = tiny_base("bert")
    read = readout("classifier", max_length=8)
    long = Example((" ".join(["w1"] * 50), "w2 w3"), 1)
    batch = read.collate(base, [long, Example(("w4", "w5"), 0)])
    assert batch.inputs["input_ids"].shape == (2, 8)
    assert batch.targets.tolist() == [1, 0]
    assert read.collate(base, [long], labelled=False).targets is None


@pytest.mark.parametrize("texts", [("w1 w2",), ("w1", "w2")])
def test_special_tokens_leave_room_for_a_text(texts):
    """A tokenizer that has less cuts nothing at all."""
    base, taken = tiny_base("bert"), 1 + len(texts)
    for length in (1, taken):
        with pytest.raises(SettingError, match=f"take {taken} of {length} tokens.*found {length}"):
            readout("classifier", max_length=length).collate(base, [Example(texts)])
    batch = readout("classifier", max_length=taken + 1).collate(base, [Example(texts)])
    assert batch.inputs["input_ids"].shape[1] == taken + 1
    base.reserved = base.room - taken
    with pytest.raises(SettingError, match=f"tiny-bert holds {taken} beside"):
        readout("classifier").collate(base, [Example(texts)])


def test_bounds_of_logits_are_none_of_a_score():
    """Gemma 2 keeps its logits within ±30; a regression's scores may be larger."""
    base = tiny_language_base("gemma2")
    most, read = base.config.final_logit_softcapping, readout("verbalizer", template="{text}")
    batch = read.collate(base, [Example(("w1",))], labelled=False)
    for labels, expected in (((), 80.0), (LABELS, most * math.tanh(80 / most))):
        head = read.attach(base, labels)
        with torch.no_grad():
            head.classes.weight.zero_()
            head.classes.bias.fill_(80)
            assert float(head(base.towers, batch)[0, 0]) == pytest.approx(expected)


def test_regression_targets_are_floats_and_the_head_has_one_output():
    base = tiny_base("bert")
    read = readout("classifier")
    batch = read.collate(base, [Example(("w1",), 2.5), Example(("w2",), 1.0)])
    assert batch.targets.dtype == torch.float32
    assert read.attach(base, ()).linear.out_features == 1
    assert read.attach(base, LABELS).linear.out_features == 2


def test_an_image_base_is_refused_with_a_sentence():
    with pytest.raises(SettingError, match="reads texts.*no tokenizer"):
        readout("classifier").collate(tiny_base("vit"), tiny_task().splits["train"][:2])


@pytest.mark.parametrize("labels", [("no", "yes"), ("a", "b", "c")])
def test_a_reference_class_is_a_row_less(labels):
    """Outputs whose first one is 0, and as good a head: only their differences count."""
    base, task = tiny_base("bert"), tiny_task()
    plain, short = readout("classifier"), readout("classifier", reference=True)
    whole, head = plain.attach(base, labels), short.attach(base, labels)
    assert head.linear.weight.shape == (len(labels) - 1, base.hidden_size)
    with torch.no_grad():
        head.linear.weight.copy_(whole.linear.weight[1:] - whole.linear.weight[:1])
        head.linear.bias.copy_(whole.linear.bias[1:] - whole.linear.bias[:1])
    batch = plain.collate(base, task.splits["train"][:5], labelled=False)
    with torch.no_grad():
        long, found = whole.eval()(base.towers, batch), head.eval()(base.towers, batch)
    assert (found[:, 0] == 0).all()
    torch.testing.assert_close(found.log_softmax(-1), long.log_softmax(-1), rtol=1e-4, atol=1e-5)


def test_a_regression_has_no_reference_class():
    with pytest.raises(SettingError, match="a regression has no classes"):
        readout("classifier", reference=True).attach(tiny_base("bert"), ())


HEADS = {
    "classifier": (tiny_base, "bert", {"reference": True}),
    "label_embedding": (tiny_base, "bert", {"words": ("w1", "w2")}),
    "verbalizer": (tiny_language_base, "bert", {"words": ("w1", "w2")}),
    "multiple_choice": (tiny_language_base, "bert", {"answers": ("w1", "w2")}),
    "language_model": (tiny_writer, "gpt2", {"max_new_tokens": 8}),
    "typed_segments": (tiny_writer, "gpt2", {"max_new_tokens": 8}),
    "contrastive": (tiny_towers, "vit", {"width": 8}),
}


@pytest.mark.parametrize("name", readouts())
def test_the_shapes_of_a_head_are_known_without_memory_for_it(name, monkeypatch):
    make, family, settings = HEADS[name]
    base, read = make(family), readout(name, **settings)
    labels = () if read.writes or read.aligns else LABELS
    packed = read.pack(read.attach(base, labels))
    devices = []
    pack = type(read).pack

    def watched(self, head):
        devices.extend(value.device.type for value in head.state_dict().values())
        return pack(self, head)

    monkeypatch.setattr(type(read), "pack", watched)
    before = torch.get_rng_state()
    shapes = read.packed_shapes(base, labels)
    assert shapes == {key: tuple(value.shape) for key, value in packed.items()}
    assert set(devices) <= {"meta"}
    assert torch.equal(torch.get_rng_state(), before)
