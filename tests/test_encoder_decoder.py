"""Whole encoder-decoders as bases, and what methods do in both of their stacks (spec 07)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from howfine import attention
from howfine.base import Base
from howfine.batch import Batch, running
from howfine.change import Change
from howfine.errors import BaseNotFound, SettingError
from howfine.method import Method, examples, method
from howfine.pretrained import GENERATOR
from tiny import (
    HEADS,
    HIDDEN,
    TINY,
    WHOLE,
    D,
    E,
    matrices_of,
    tiny_tokenizer,
    tiny_tower,
    tiny_whole,
)

WIDTH = HIDDEN // HEADS
MAIN = ("t5", "bart")
TEXT, FRONT = [9, 10, 11, 12], [6, 7, 8]
ANSWER, BEFORE = [20, 21, 22, 23, 24], [14, 15, 16]
every = pytest.mark.parametrize("name", sorted(WHOLE))
main = pytest.mark.parametrize("name", MAIN)
kernels = pytest.mark.parametrize("kernel", attention.KERNELS)


@torch.no_grad()
def logits(
    base: Base, texts: list[list[int]] | None = None, answers: list[list[int]] | None = None
) -> Tensor:
    """(B, T, V) for texts of one length and the beginnings of their answers."""
    given = {
        "input_ids": torch.tensor(texts or [TEXT]),
        "decoder_input_ids": torch.tensor(answers or [ANSWER]),
    }
    found: Tensor = base.tower(**given, use_cache=False).logits
    return found


def prefix(**settings: Any) -> Method:
    return method("prefix", **{"length": 3, "hidden": 8, **settings})


def train(base: Base, change: Change, steps: int = 3) -> None:
    """A few steps on random texts, so that every entry of the change moves."""
    torch.manual_seed(0)
    optimiser = torch.optim.SGD(change.trainable.values(), 0.05)
    base.train()
    for _ in range(steps):
        ids = torch.randint(5, 90, (4, 6))
        optimiser.zero_grad()
        base.tower(input_ids=ids, labels=ids.flip(1)).loss.backward()
        optimiser.step()
    base.towers.eval()


# --- anatomy -------------------------------------------------------------------------------------


@every
def test_every_matrix_of_both_stacks_has_its_letter(name: str) -> None:
    base = tiny_whole(name)
    places = {path: base.place(path) for path in base.paths()}
    matrices = matrices_of(base)
    letters = ["Q", "K", "V", "D", "I", "O"] + ["G"] * (name == "mt5")
    cross = ["CQ", "CK", "CV", "CD"]
    expected = [(n, part) for n in range(E) for part in letters]
    expected += [(n, part) for n in range(E, E + D) for part in letters + cross]
    assert sorted(places[path] for path in matrices) == sorted(expected)
    assert base.depth == E + D
    assert base.choose(("matrices",)) == matrices
    assert {part for _, part in places.values()} <= {
        *(*letters, *cross, "norm", "bias", "embedding", "other")
    }
    tables = ("relative_attention_bias", "embed_positions")
    others = [path for path, (_, part) in places.items() if part == "other"]
    assert all(path.split(".")[-2] in tables for path in others)


@every
def test_layers_count_on_from_the_encoder_to_the_decoder(name: str) -> None:
    base = tiny_whole(name)
    for selector, stack, block in (("0", "encoder", 0), ("2", "encoder", 2), ("3", "decoder", 0)):
        (path,) = base.choose((f"Q@{selector}",))
        assert f".{stack}." in path
        assert f".{block}." in path
    top = base.choose(("matrices@-1",))
    assert top
    assert all(".decoder." in path for path in top)
    assert {base.place(path)[0] for path in top} == {E + D - 1}
    assert len(base.choose(("CQ",))) == D
    with pytest.raises(SettingError, match=r"selector 'CQ@0-2' names nothing.*\(5 layers\)"):
        base.choose(("CQ@0-2",))
    with pytest.raises(SettingError, match="outside the base's 5 layers"):
        base.choose(("Q@5",))


def test_heads_are_those_of_the_stack() -> None:
    base = tiny_whole("bart", decoder_attention_heads=2)
    assert {base.heads_of(path) for path in base.choose(("Q@0-2", "K@0-2", "V@0-2"))} == {HEADS}
    assert {base.heads_of(path) for path in base.choose(("V@3-4", "CQ", "CK", "CV"))} == {2}
    with pytest.raises(SettingError, match="select Q, K, V, CQ, CK or CV"):
        base.heads_of(base.choose(("CD@-1",))[0])


@every
def test_the_body_and_what_reads_words(name: str) -> None:
    base = tiny_whole(name)
    inner = "" if name.endswith("t5") else ".model"
    assert base.body_path == f"text{inner}"
    assert base.embedding is base.body.encoder.embed_tokens
    assert base.choose(("embedding",)) == [f"text{inner}.shared.weight"]
    # The table has several names, and is found by each, also while a change is on.
    table = base.parameter(f"{base.embedding_path}.weight")
    with method("full").attach(base):
        assert base.parameter(f"{base.embedding_path}.weight") is table
        assert torch.equal(base.original(f"{base.embedding_path}.weight"), table)
    assert (base.hidden_size, base.first_position) == (HIDDEN, 0)
    assert base.room == 64


def test_tables_of_two_languages_are_both_embeddings() -> None:
    """Marian's, where source and target have vocabularies of their own."""
    base = tiny_whole("marian", share_encoder_decoder_embeddings=False, decoder_vocab_size=40)
    sizes = {path: base.parameter(path).shape[0] for path in base.choose(("embedding",))}
    assert sizes == {
        "text.model.encoder.embed_tokens.weight": 95,
        "text.model.decoder.embed_tokens.weight": 40,
    }


@main
def test_what_lies_below_the_lowest_trained_layer_is_in_evaluation_mode(name: str) -> None:
    base = tiny_whole(name)
    blocks = [base.body.get_submodule(base.anatomy.block_path(n)) for n in range(base.depth)]
    for selector, first in (("norm@0", 0), ("I@1", 1), ("Q@3", 3), ("CQ@-1", 4), ("none", 5)):
        with method("select", train=(selector,)).attach(base):
            base.train()
            assert [block.training for block in blocks] == [n >= first for n in range(E + D)]
            assert base.body.encoder.training
            assert base.body.decoder.training
        base.towers.eval()


# --- loading -------------------------------------------------------------------------------------


def folder(path: Path, name: str) -> Path:
    base = tiny_whole(name)
    base.tower.save_pretrained(path)
    base.tokenizer.save_pretrained(path)
    return path


@every
def test_a_folder_gives_the_whole_and_its_encoder(name: str, tmp_path: Path) -> None:
    saved = tiny_whole(name)
    path = str(folder(tmp_path / name, name))
    for kind in ("seq2seq_lm", GENERATOR):
        base = Base.load(path, kind=kind)
        assert base.kind == "seq2seq_lm"
        assert base.fingerprint == saved.fingerprint
        assert torch.equal(logits(base), logits(saved))
        assert base.is_untouched()
    encoder = Base.load(path)
    assert encoder.depth == E
    assert not any("decoder" in each for each in encoder.paths())
    assert not any(encoder.place(each)[1].startswith("C") for each in encoder.paths())
    assert encoder.fingerprint == Base.load(path).fingerprint != saved.fingerprint


def test_what_can_write_is_a_generator(tmp_path: Path) -> None:
    for name in ("gpt2", "bert"):
        tiny_tower(name).save_pretrained(tmp_path / name)
        tiny_tokenizer(name == "bert").save_pretrained(tmp_path / name)
    config = transformers.T5Config(**TINY["t5"][1])
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "half")
    assert Base.load(str(tmp_path / "gpt2"), kind=GENERATOR).kind == "causal_lm"
    for name in ("bert", "half"):
        with pytest.raises(BaseNotFound, match="is an encoder and can't write texts; give a"):
            Base.load(str(tmp_path / name), kind=GENERATOR)
    with pytest.raises(SettingError, match=f"Did you mean '{GENERATOR}'"):
        Base.load(str(tmp_path / "gpt2"), kind=GENERATOR.replace("_", "-"))
    with pytest.raises(BaseNotFound, match="can't be loaded"):
        Base.load(str(tmp_path / "nowhere"), kind=GENERATOR)


@main
def test_a_checkpoint_that_lacks_a_matrix_is_refused(name: str, tmp_path: Path) -> None:
    """And not for want of a head, which T5 has beside its stacks."""
    from safetensors.torch import load_file, save_file

    path = folder(tmp_path / name, name)
    tensors = load_file(path / "model.safetensors")
    gone = next(key for key in tensors if "decoder" in key and ".1." in key)
    del tensors[gone]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseNotFound, match=r"lacks 1 of \d+ parameters of AutoModelForSeq2SeqLM"):
        Base.load(str(path), kind="seq2seq_lm")


# --- changes -------------------------------------------------------------------------------------


CHANGES = {
    "full": method("full"),
    "select": method("select", train=("CK", "norm@-1", "Q@0", "embedding")),
    "mask": method("mask", initial_sparsity=0.2),
    "sparse": method("sparse", by="random", density=0.1),
    "subspace": examples()["subspace"],
    "adapter": method("adapter", reduction=4, beside=("norm",)),
    "prompt": method("prompt", length=3),
    "prefix": prefix(),
    "rows": prefix(hidden=0),
}


@pytest.mark.parametrize("how", CHANGES)
@main
def test_a_change_comes_back_exactly(name: str, how: str) -> None:
    base = tiny_whole(name)
    plain = logits(base)
    change = CHANGES[how].attach(base)
    train(base, change)
    trained = logits(base)
    assert not torch.equal(trained, plain)
    tensors = CHANGES[how].pack(base, change)
    change.remove()
    fresh = tiny_whole(name)
    for other in (base, fresh):
        assert torch.equal(logits(other), plain)
        with CHANGES[how].unpack(other, tensors):
            assert torch.equal(logits(other), trained)
        assert torch.equal(logits(other), plain)
        assert other.is_untouched()
        assert other.reserved == 0
        assert not any("howfine" in path for path, _ in other.towers.named_modules())


@pytest.mark.parametrize("name", ["t5", "pegasus"])
@pytest.mark.parametrize("how", sorted(examples()))
def test_every_method_that_asks_nothing_of_the_data_is_put_on(name: str, how: str) -> None:
    """A new method is tried unasked; those that need gradients or a start say so themselves."""
    base = tiny_whole(name)
    try:
        change = examples()[how].attach(base)
    except SettingError as error:
        pytest.skip(str(error))
    tensors = examples()[how].pack(base, change)
    change.remove()
    assert base.is_untouched()
    with examples()[how].unpack(base, tensors):
        assert torch.isfinite(logits(base)).all()
    assert base.is_untouched()


# --- keys and values in front --------------------------------------------------------------------


def placeless(name: str, kernel: str = "sdpa") -> Base:
    """A base that knows no positions, so that a text means the same wherever it begins."""
    base = tiny_whole(name, kernel)
    with torch.no_grad():
        for path, value in base.towers.named_parameters():
            if "relative_attention_bias" in path or "embed_positions" in path:
                value.zero_()
    return base


def recorded(base: Base, text: list[int], answer: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (heads, S, width) of every attention, in the order of modules."""
    fronts, undo = attention.put_on(base)
    for front in fronts:
        front.seen = []
    logits(base, [text], [answer])
    undo()
    return [(keys[0], values[0]) for front in fronts for keys, values in front.seen or ()]


def packed(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """What a file holds: for each position and attention its key, head by head, then its value."""
    rows = [
        torch.cat([part[:, place].flatten() for pair in pairs for part in pair])
        for place in range(pairs[0][0].shape[1])
    ]
    return {"keys_values": torch.stack(rows)}


def random_prefix(seed: int = 0, length: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"keys_values": torch.randn(length, 2 * (E + 2 * D) * HIDDEN, generator=generator)}


@kernels
@main
def test_what_words_leave_in_all_three_attentions_is_the_words(name: str, kernel: str) -> None:
    """Words before text and answer, as keys and values: in encoder, decoder, and across."""
    base = placeless(name, kernel)
    whole = logits(base, [FRONT + TEXT], [BEFORE + ANSWER])[:, 3:]
    plain = logits(base)
    pairs = recorded(base, FRONT + TEXT, BEFORE + ANSWER)
    assert [len(keys[0]) for keys, _ in pairs] == [7] * E + [8] * D + [7] * D
    first = [(keys[:, :3], values[:, :3]) for keys, values in pairs]
    for shift in (True, False):
        with prefix(shift=shift).unpack(base, packed(first)):
            found = logits(base)
            assert base.reserved == 0
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
    assert (plain - whole).abs().max() > 1e-2
    assert torch.equal(logits(base), plain)
    assert base.body.encoder.config._attn_implementation == kernel
    assert base.body.decoder.config._attn_implementation == kernel
    # Without one of the three sets it would not hold.
    for kind in (range(E), range(E, E + D), range(E + D, E + 2 * D)):
        lost = [(k, v * (n not in kind)) for n, (k, v) in enumerate(first)]
        with prefix().unpack(base, packed(lost)):
            assert (logits(base) - whole).abs().max() > 1e-3


def watched(base: Base) -> Iterator[tuple[int, nn.Module, list[Any]]]:
    """(number, attention module, [inputs, encoder's output or None, output] of its next run)."""
    for number, module in enumerate(attention.modules(base)):
        seen: list[Any] = []

        def keep(_: nn.Module, args: Any, named: Any, output: Any, seen: Any = seen) -> None:
            hidden = args[0] if args else named["hidden_states"]
            seen[:] = [hidden, named.get("key_value_states"), output[0]]

        module.register_forward_hook(keep, with_kwargs=True)
        yield number, module, seen


def by_hand(
    base: Base, number: int, module: Any, seen: list[Any], front: Tensor, mask: Tensor
) -> Tensor:
    """One attention's output, an entry at a time; front (p, 2, heads, width), mask (B, S) of 1."""
    hidden, outside, _ = seen
    source = hidden if outside is None else outside
    t5 = hasattr(module, "q")
    names = ("q", "k", "v", "o") if t5 else ("q_proj", "k_proj", "v_proj", "out_proj")
    ask, key, value, out = (getattr(module, name) for name in names)
    causal = E <= number < E + D
    bias = torch.zeros(HEADS, hidden.shape[1], source.shape[1])
    if t5 and outside is None:
        stack = base.body.decoder if causal else base.body.encoder
        first = stack.block[0].layer[0].SelfAttention
        bias = first.compute_bias(hidden.shape[1], source.shape[1])[0]
    made = torch.zeros(*hidden.shape[:2], HEADS * WIDTH)
    for row in range(len(hidden)):
        queries, keys, values = ask(hidden[row]), key(source[row]), value(source[row])
        for head in range(HEADS):
            own = slice(head * WIDTH, (head + 1) * WIDTH)
            for place in range(hidden.shape[1]):
                query = queries[place, own] * (1.0 if t5 else 1 / math.sqrt(WIDTH))
                scores = [query @ free for free in front[:, 0, head]]
                content = list(front[:, 1, head])
                for other in range(source.shape[1]):
                    if (causal and other > place) or (not causal and not mask[row, other]):
                        continue
                    scores.append(query @ keys[other, own] + bias[head, place, other])
                    content.append(values[other, own])
                shares = torch.stack(scores).softmax(0)
                made[row, place, own] = shares @ torch.stack(content)
    return out(made)


@kernels
@main
@torch.no_grad()
def test_each_attention_is_what_the_equation_says(name: str, kernel: str) -> None:
    base = tiny_whole(name, kernel)
    stored = random_prefix(length=2)
    fronts = stored["keys_values"].view(2, E + 2 * D, 2, HEADS, WIDTH)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    modules = list(watched(base))
    with prefix().unpack(base, stored):
        base.tower(
            input_ids=torch.tensor([TEXT, [*TEXT[:2], 0, 0]]),
            attention_mask=mask,
            decoder_input_ids=torch.tensor([ANSWER[:3], ANSWER[2:]]),
        )
    assert len(modules) == E + 2 * D
    for number, module, seen in modules:
        expected = by_hand(base, number, module, seen, fronts[:, number], mask)
        torch.testing.assert_close(seen[2], expected, atol=1e-5, rtol=0)


@main
def test_numbers_are_the_formula_and_three_nets_train(name: str) -> None:
    """p·2·(E+2D)·d stored; every net is reached by gradients, and no parameter of the base."""
    base = tiny_whole(name)
    change = prefix(length=5).attach(base)
    (stored,) = prefix(length=5).pack(base, change).values()
    assert stored.shape == (5, 2 * (E + 2 * D) * HIDDEN)
    sizes = [2 * layers * HIDDEN for layers in (E, D, D)]
    trained = sum(value.numel() for value in change.trainable.values())
    assert trained == sum(5 * HIDDEN + (HIDDEN + 1) * 8 + 9 * size for size in sizes)
    assert len(change.trainable) == 15
    ids = torch.tensor([TEXT])
    base.tower(input_ids=ids, labels=ids).loss.backward()
    declared = {id(value) for value in change.trainable.values()}
    for path, value in base.towers.named_parameters():
        if id(value) in declared:
            assert value.grad is not None, path
            assert value.grad.abs().max() > 0, path
        else:
            assert value.grad is None, path
    change.remove()
    assert base.is_untouched()


@torch.no_grad()
def greedy(base: Base, text: list[int], steps: int) -> list[int]:
    """The likeliest token each time, through the whole model and no cache."""
    made = [base.config.decoder_start_token_id]
    for _ in range(steps):
        made.append(int(logits(base, [text], [made])[0, -1].argmax()))
    return made


def generated(base: Base, rows: list[list[int]], side: str = "right", **how: Any) -> list[Any]:
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    pairs = list(zip(rows, pads, strict=True))
    ids = [pad + row if side == "left" else row + pad for row, pad in pairs]
    mask = [
        [0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p)
        for r, p in pairs
    ]
    settings = {"max_new_tokens": 6, "do_sample": False, **how}
    made = base.tower.generate(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **settings
    )
    return made.tolist()


@kernels
@main
def test_generation_sees_all_three(name: str, kernel: str) -> None:
    """Where the encoder is called by itself, too, and where a cache holds keys of its output."""
    base = placeless(name, kernel)
    texts = [TEXT, TEXT[:2], TEXT[1:]]
    plain = generated(base, texts)
    stored = random_prefix()
    with prefix().unpack(base, stored):
        expected = [greedy(base, text, 6) for text in texts]
        assert expected != plain
        for side in ("left", "right"):
            for cached in (True, False):
                assert generated(base, texts, side, use_cache=cached) == expected
        beams = generated(base, texts, num_beams=3)
        assert generated(base, texts, "left", num_beams=3, use_cache=False) == beams
        assert [generated(base, [text], num_beams=3)[0] for text in texts] == beams
    assert generated(base, texts) == plain
    # The encoder's part alone is on where nothing but the encoder runs.
    part = 2 * E * HIDDEN
    ids = torch.tensor([TEXT])
    with torch.no_grad():
        alone = base.tower.get_encoder()(ids).last_hidden_state
        stored["keys_values"][:, :part] += 1.0
        with prefix().unpack(base, stored):
            encoded = base.tower.get_encoder()(ids).last_hidden_state
            through = base.tower(input_ids=ids, decoder_input_ids=ids).encoder_last_hidden_state
    assert torch.equal(encoded, through)
    assert (encoded - alone).abs().max() > 1e-2


@main
def test_what_is_learned_is_renewed_before_each_use(name: str) -> None:
    """Also for the encoder alone, right after attaching, and for a decoder of old outputs."""
    base = tiny_whole(name)
    torch.manual_seed(0)
    change = prefix().attach(base)
    first = generated(base, [TEXT])
    with torch.no_grad():
        states = base.tower.get_encoder()(torch.tensor([TEXT]))
        for value in change.trainable.values():
            value.add_(torch.randn_like(value))
        found = base.tower(encoder_outputs=states, decoder_input_ids=torch.tensor([ANSWER])).logits
    moved = generated(base, [TEXT])
    tensors = prefix().pack(base, change)
    change.remove()
    assert moved != first
    with prefix().unpack(base, tensors), torch.no_grad():
        assert generated(base, [TEXT]) == moved
        again = base.tower(encoder_outputs=states, decoder_input_ids=torch.tensor([ANSWER])).logits
    assert torch.equal(found, again)


@main
def test_no_cache_ever_holds_the_prefix(name: str) -> None:
    base = tiny_whole(name)
    with prefix().attach(base), torch.no_grad():
        made = base.tower(
            input_ids=torch.tensor([TEXT]), decoder_input_ids=torch.tensor([ANSWER]), use_cache=True
        ).past_key_values
    for own, across in zip(
        made.self_attention_cache.layers, made.cross_attention_cache.layers, strict=True
    ):
        assert own.keys.shape[2] == own.values.shape[2] == len(ANSWER)
        assert across.keys.shape[2] == across.values.shape[2] == len(TEXT)


@main
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    found, runs = [], []
    for checkpointing in (False, True):
        base = tiny_whole(name)
        if checkpointing:
            base.tower.activation_checkpointing_enable()
        torch.manual_seed(0)
        change = prefix().attach(base)
        base.train()
        counted: list[int] = []
        for module in attention.modules(base):
            module.register_forward_pre_hook(lambda *_, count=counted: count.append(1))
        ids = torch.tensor([TEXT, FRONT + FRONT[:1]])
        base.tower(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({path: value.grad for path, value in change.trainable.items()})
        runs.append(len(counted))
    assert runs == [E + 2 * D, 2 * (E + 2 * D)]
    for path, gradient in found[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradient, found[1][path], atol=1e-7, rtol=1e-5)


def worn(base: Base, row: list[int], ids: Tensor, mask: Tensor, answers: Tensor) -> Tensor:
    """Logits of a batch whose rows wear changes by number."""
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": answers}
    with torch.no_grad(), running(Batch(inputs, rows=torch.tensor(row))):
        found: Tensor = base.tower(**inputs).logits
    return found


@pytest.mark.parametrize("how", ["prefix", "prompt", "adapter"])
@kernels
@main
def test_rows_of_a_batch_wear_their_own(name: str, kernel: str, how: str) -> None:
    """Prefixes of two lengths, and a row without one, in one pass."""
    base = tiny_whole(name, kernel)
    made, tensors = [], []
    for seed, (length, reduction) in enumerate([(2, 4), (4, 8)]):
        settings: dict[str, Any] = {"length": length}
        settings |= {"hidden": 0} if how == "prefix" else {"init": "normal"}
        chosen = method(how, **({"reduction": reduction} if how == "adapter" else settings))
        torch.manual_seed(seed)
        change = chosen.attach(base)
        if how == "adapter":
            train(base, change)
        tensors.append(chosen.pack(base, change))
        made.append(chosen)
        change.remove()
    both = dict(enumerate(zip(made, tensors, strict=True)))
    ids = torch.tensor([TEXT, [*TEXT[:2], 0, 0], TEXT[::-1], TEXT])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    answers = torch.tensor([ANSWER, ANSWER[::-1], ANSWER, ANSWER])
    rows = [1, 0, 2, 0]
    expected = []
    for number, row in enumerate(rows):
        parts = ids[number : number + 1], mask[number : number + 1], answers[number : number + 1]
        if row == 2:
            expected.append(worn(base, [2], *parts))
            continue
        with made[row].unpack(base, tensors[row]):
            expected.append(worn(base, [row], *parts))
    change = type(made[0]).wear(base, both, 2)
    if how == "prompt" and name == "bart":  # a shorter one would leave its text another place
        assert change is None
    else:
        assert change is not None
        with change:
            found = worn(base, rows, ids, mask, answers)
        torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=0)
    assert base.is_untouched()


def test_a_prefix_can_not_begin_as_words() -> None:
    base = tiny_whole("bart")
    with pytest.raises(SettingError, match="tiny-bart-whole is a whole encoder-decoder.*leave ini"):
        method("prefix", length=0, init_text="w1 w2").attach(base)
    assert base.is_untouched()


@main
def test_a_prefix_goes_on_from_another(name: str) -> None:
    base = tiny_whole(name)
    stored = random_prefix()
    probe: Any = SimpleNamespace(begun=stored, slots=())
    with prefix().unpack(base, stored):
        expected = logits(base)
    change = prefix(hidden=0).attach(base, probe)
    assert torch.equal(logits(base), expected)
    train(base, change)
    assert not torch.equal(logits(base), expected)
    change.remove()


# --- vectors in front, and in words' places ------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "bart", "mbart", "pegasus"])
def test_vectors_in_front_are_words_of_the_encoder(name: str) -> None:
    """The decoder sees them; scaled embeddings (Pegasus, mBART) are scaled in front, too."""
    scaled = {} if name == "t5" else {"scale_embedding": True}
    base = tiny_whole(name, **scaled)
    words = method("prompt", length=3, init="text", init_text="w1 w2 w3")
    texts = [TEXT, TEXT[:2]]
    whole = logits(base, [FRONT + TEXT], [ANSWER])
    masked = generated(base, [FRONT + text for text in texts])
    beams = generated(base, [FRONT + text for text in texts], num_beams=3)
    plain = generated(base, texts)
    with words.attach(base):
        assert base.reserved == 3
        torch.testing.assert_close(logits(base), whole, atol=1e-5, rtol=0)
        for cached in (True, False):
            assert generated(base, texts, use_cache=cached) == masked
        assert generated(base, texts, num_beams=3) == beams
    assert (logits(base) - whole).abs().max() > 1e-2
    assert generated(base, texts) == plain
    assert base.is_untouched()


@main
def test_slots_are_the_encoders(name: str) -> None:
    """An answer as long as the text has none, though its shape is that of the slots."""
    base = tiny_whole(name)
    text, answer = [9, 1, 11, 1], ANSWER[:4]
    expected = logits(base, [[9, 7, 11, 8]], [answer])
    table = base.original(f"{base.embedding_path}.weight")
    vectors = {"vectors": table[[7, 8]].clone()}
    inputs = {"input_ids": torch.tensor([text]), "decoder_input_ids": torch.tensor([answer])}
    slots = torch.tensor([[-1, 0, -1, 1]])
    with (
        method("prompt").unpack(base, vectors),
        torch.no_grad(),
        running(Batch(inputs, slots=slots)),
    ):
        found = base.tower(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@every
def test_adapters_stand_after_every_feed_forward_net(name: str) -> None:
    """In both stacks, once each: a module that doubles what it is given doubles that net's part."""
    from howfine import inserted

    base = tiny_whole(name)
    paths = [inserted.points(base, layer, "feed_forward")[0].path for layer in range(base.depth)]
    assert len(set(paths)) == E + D
    for layer, path in enumerate(paths):
        stack = "encoder" if layer < E else "decoder"
        assert f"{stack}." in path
        block = path.rpartition(".layer.")[0] if name.endswith("t5") else path.rpartition(".")[0]
        (last,) = base.choose((f"O@{layer}",))
        assert last.startswith(block)
        weight = base.original(last)
        seen: list[Tensor] = []
        host = base.towers.get_submodule(path)
        handle = host.register_forward_hook(lambda *given, seen=seen: seen.append(given[2]))
        reads: list[Tensor] = []
        inner = base.towers.get_submodule(last.removesuffix(".weight"))
        other = inner.register_forward_pre_hook(lambda *given, r=reads: r.append(given[1][0]))
        logits(base)
        handle.remove()
        other.remove()
        product = reads[0] @ weight.T
        if inner.bias is not None:
            product = product + inner.bias
        torch.testing.assert_close(seen[0], product, atol=1e-5, rtol=0)
