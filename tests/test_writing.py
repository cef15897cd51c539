"""What a model that writes has read, and whose wishes it follows: encoder-decoders above all."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MBartTokenizer
from typer.testing import CliRunner

from howfine import language, layout
from howfine.base import Base
from howfine.cli import app
from howfine.delta import SUFFIX
from howfine.errors import DeltaError, SettingError, TaskError
from howfine.evaluate import evaluate, logits, predict
from howfine.method import method
from howfine.plan import Plan
from howfine.readout import Readout, Wired, readout
from howfine.recipe import Recipe
from howfine.task import Example, Task
from howfine.tune import tune
from tiny import (
    SPECIAL,
    WHOLE,
    WORDS,
    tiny_language_base,
    tiny_whole,
    tiny_writer,
    written_task,
)

ALL = (*SPECIAL, *WORDS)
EXAMPLES = [
    Example(("w1 w2 w3",), targets=("w4 w5",)),
    Example(("w6",), targets=("w7 w8 w9",)),
    Example(("w11 w12 w13 w14 w15",), targets=("w16",)),
]
every = pytest.mark.parametrize("name", sorted(WHOLE))


def whole(name: str, **changes: Any) -> Base:
    base = tiny_whole(name, **changes)
    base.tokenizer.eos_token = "[SEP]"
    return base


def writer(**settings: Any) -> Readout:
    return readout("language_model", **{"max_length": 32, "max_new_tokens": 6, **settings})


def wired(base: Base, read: Readout) -> Wired:
    return Wired(base, read, read.attach(base, ())).eval()


def written(base: Base, read: Readout, examples: list[Example] = EXAMPLES) -> list[str]:
    found = logits(wired(base, read), base, examples)
    return list(read.predictions(base, found))


def ids(words: str) -> list[int]:
    return [ALL.index(word) for word in words.split()]


def by_hand(base: Base, example: Example, start: list[int], most: int = 6) -> str:
    """Token after token through the whole model, with no cache and no padding."""
    read, row = torch.tensor([ids(example.texts[0])]), list(start)
    for _ in range(most):
        with torch.inference_mode():
            told = base.tower(input_ids=read, decoder_input_ids=torch.tensor([row])).logits
        row.append(int(told[0, -1].argmax()))
        if row[-1] == base.tokenizer.eos_token_id:
            break
    return " ".join(ALL[i] for i in row[len(start) :] if ALL[i] not in SPECIAL)


@every
@pytest.mark.parametrize("forced", [None, 40])
def test_the_decoder_goes_on_from_what_it_learned_to_read(name: str, forced: int | None) -> None:
    base = whole(name)
    base.tower.generation_config.forced_bos_token_id = forced
    start = [base.config.decoder_start_token_id, *([forced] if forced else [])]
    read = writer()
    assert written(base, read) == [by_hand(base, each, start) for each in EXAMPLES]
    found = logits(wired(base, read), base, EXAMPLES, labelled=True)
    for row, example in zip(found, EXAMPLES, strict=True):
        target = ids(f"{example.targets[0]} [SEP]")
        with torch.inference_mode():
            told = base.tower(
                input_ids=torch.tensor([ids(example.texts[0])]),
                decoder_input_ids=torch.tensor([[*start, *target[:-1]]]),
            ).logits[0, len(start) - 1 :]
        expected = -told.log_softmax(-1)[torch.arange(len(target)), target].sum()
        assert row[0] == pytest.approx(float(expected), abs=1e-4)
        assert row[1] == len(target)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_block_on_top_has_its_place_in_both_caches(name: str, beams: int) -> None:
    base, read = whole(name), writer(beams=beams)
    bare, start = written(base, read), [base.config.decoder_start_token_id]
    torch.manual_seed(0)
    with method("deep", std=0.5).attach(base):
        found = written(base, read)
        assert found == [written(base, read, [each])[0] for each in EXAMPLES]
        if beams == 1:
            assert found == [by_hand(base, each, start) for each in EXAMPLES]
    assert found != bare


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bart", "mbart", "t5"])
def test_what_is_learned_by_heart_is_written(name: str, tmp_path: Path) -> None:
    """Perplexity and texts agree: what is learned is what is asked."""
    base = whole(name, decoder_start_token_id=40)
    base.tower.generation_config.forced_bos_token_id = 41
    rows = written_task().splits["train"]
    task = Task("heart", {"train": rows, "dev": rows, "test": rows}, (), "rouge_l", "made")
    recipe = Recipe("heart", method("full"), writer(max_new_tokens=3)).override(
        epochs=120, batch_size=8, learning_rate=3e-3
    )
    score = evaluate(tune(base, task, recipe, out=tmp_path / f"x{SUFFIX}").path, base, task)
    assert score.scores["perplexity"] < 1.2
    assert score.value > 95


@every
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_slots_are_read_by_the_encoder_alone(name: str, beams: int, shared: bool) -> None:
    """Also where beams multiply the decoder's rows, and where both stacks look up in one module."""
    base = whole(name)
    if shared:
        base.tower.set_input_embeddings(base.tower.get_input_embeddings())
        base = Base("shared", base.tower, base.tokenizer, kind="seq2seq_lm")
    read = writer(template="{slot*2} {text}", beams=beams)
    # As many tokens on both sides: shapes alone do not tell them apart.
    rows = [Example(("w1 w2",), targets=("w3 w4 w5 w6",)), EXAMPLES[2]]
    bare = written(base, read, rows), logits(wired(base, read), base, rows, labelled=True)
    vectors = 4 * torch.randn(2, base.hidden_size, generator=torch.Generator().manual_seed(1))
    with method("prompt").unpack(base, {"vectors": vectors}):
        together = written(base, read, rows)
        assert together == [written(base, read, [row])[0] for row in rows]
        found = logits(wired(base, read), base, rows, labelled=True)
        alone = [logits(wired(base, read), base, [row], labelled=True)[0] for row in rows]
    torch.testing.assert_close(found, torch.stack(alone), atol=1e-4, rtol=1e-4)
    assert (found - bare[1]).abs().max() > 1e-3
    assert base.is_untouched()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_give_no_text(number: float, beams: int) -> None:
    base, read = tiny_writer("gpt2"), writer(beams=beams)
    model, spoilt = wired(base, read), base.towers.get_submodule(f"{base.body_path}.wte").weight
    with torch.no_grad():
        spoilt[ids("w6")] = number
    with pytest.raises(DeltaError, match="the delta gives NaN or infinity for . of 3 examples"):
        logits(model, base, EXAMPLES)


def test_the_models_own_wishes_play_no_part() -> None:
    for base in (tiny_writer("gpt2"), whole("bart")):
        for beams in (1, 3):
            read = writer(beams=beams)
            plain = written(base, read)
            own = base.tower.generation_config
            wishes = {
                "repetition_penalty": 3.0,
                "no_repeat_ngram_size": 1,
                "min_length": 6,
                "suppress_tokens": list(range(5, 50)),
                "forced_eos_token_id": 3,
                "num_return_sequences": 2,
                "return_dict_in_generate": True,
                "do_sample": True,
                "max_length": 7,
            }
            for name, value in wishes.items():
                setattr(own, name, value)
            try:
                assert written(base, read) == plain
                assert base.tower.generation_config is own
                assert own.repetition_penalty == 3.0
            finally:
                base.tower.generation_config = type(own)(
                    decoder_start_token_id=own.decoder_start_token_id
                )


def test_targets_are_pieces_of_the_targets_language() -> None:
    """Some tokenizers cut what is to be written in another way than what is read."""
    base = whole("marian")
    plain = base.tokenizer

    class TwoLanguages:
        def __getattr__(self, name: str) -> Any:
            return getattr(plain, name)

        def __call__(self, text: str = "", text_target: str = "", **options: Any) -> Any:
            return plain(text or text_target.replace("w", "w1"), **options)

    base.tokenizer = TwoLanguages()
    batch = writer().collate(base, EXAMPLES[:1])
    assert batch.targets is not None
    assert batch.targets.tolist() == [ids("w14 w15 [SEP]")]
    assert batch.inputs["input_ids"].tolist() == [ids("w1 w2 w3")]


def test_the_sources_language_is_what_the_tokenizer_is_set_to() -> None:
    words = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581a", -1.0)]
    tokenizer = MBartTokenizer(vocab=words, src_lang="en_XX", tgt_lang="ro_RO")
    for language_of in ("en_XX", "de_DE"):
        tokenizer.src_lang = language_of
        before, after = language.around(tokenizer)
        assert [*before, *after] == tokenizer("a").input_ids[1:]


def test_a_decoder_has_room_and_a_start() -> None:
    base = whole("bart")
    with pytest.raises(SettingError, match="the decoder of .* holds 64 tokens"):
        writer(max_new_tokens=65).attach(base, ())
    base.tower.generation_config.forced_bos_token_id = 40
    assert layout.beginning(base) == [3, 40]
    with pytest.raises(SettingError, match="holds 64 tokens"):
        writer(max_new_tokens=64).attach(base, ())
    base.config.decoder_start_token_id = base.tower.generation_config.decoder_start_token_id = None
    with pytest.raises(SettingError, match="with which token its decoder starts"):
        writer().attach(base, ())


def test_types_go_to_models_that_have_some() -> None:
    base = tiny_writer("gpt2")
    base.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" not in writer().collate(base, EXAMPLES).inputs
    assert written(base, writer()) == written(tiny_writer("gpt2"), writer())


def test_an_end_behind_a_source_is_left_out() -> None:
    """Where a tokenizer puts one behind every text, more is to follow in a causal model."""
    base = tiny_language_base("bert")  # for its tokenizer: [CLS] a [SEP]
    causal = tiny_writer("gpt2")
    causal.tokenizer = base.tokenizer
    causal.tokenizer.bos_token, causal.tokenizer.eos_token = "[CLS]", "[SEP]"
    batch = writer().collate(causal, EXAMPLES[:1])
    assert batch.inputs["input_ids"].tolist() == [ids("[CLS] w1 w2 w3 [CLS] w4 w5 [SEP]")]


def test_a_mean_over_tokens_does_not_add_up(tmp_path: Path) -> None:
    base, out = tiny_writer("gpt2"), tmp_path / f"x{SUFFIX}"
    how = {"gradient_accumulation": 2, "batch_size": 4, "max_steps": 1, "learning_rate": 1e-3}
    recipe = Recipe("x", method("full"), writer()).override(**how)
    with pytest.raises(SettingError, match="gradient_accumulation would train something else"):
        tune(base, written_task(), recipe, out=out)
    tune(base, written_task(), recipe.override(reduction="examples"), out=out)


def test_a_window_and_padding_hide_what_stands_in_front() -> None:
    base = tiny_writer("gemma2", sliding_window=8)
    read = writer()
    how = method("prompt", length=3)
    with how.unpack(base, {"vectors": torch.randn(3, base.hidden_size)}):
        with pytest.raises(SettingError, match="look back on 8 tokens"):
            written(base, read)
        for each in EXAMPLES:  # alone there is no padding
            written(base, read, [each])


@pytest.mark.parametrize(("window", "right"), [(12, False), (32, True)])
def test_a_window_is_reached_while_writing(window: int, right: bool) -> None:
    """Inputs of 9 columns, 6 tokens written: in a batch the same as alone, or refused."""
    base = tiny_writer("gemma2", sliding_window=window, tie_word_embeddings=False)
    read, vectors = writer(), torch.randn(3, base.hidden_size)
    with method("prompt", length=3).unpack(base, {"vectors": vectors}):
        alone = [written(base, read, [each])[0] for each in EXAMPLES]
        if right:
            assert written(base, read) == alone
        else:
            with pytest.raises(SettingError, match="look back on 12 tokens"):
                written(base, read)


def test_a_plan_has_one_kind_of_base() -> None:
    with pytest.raises(SettingError, match="name one readout for all"):
        _ = Plan("full", "warp", ("prefix-tuning",)).kind
    named = Plan("full", "warp", ("prefix-tuning",), settings={"readout": "classifier"})
    assert named.kind == "body"


def test_targets_are_a_tuple_of_texts() -> None:
    rows = [replace(row, targets=row.targets[0]) for row in written_task().splits["train"]]
    splits = {"train": rows, "dev": rows, "test": rows}
    with pytest.raises(TaskError, match="expected a tuple of texts"):
        Task("x", splits, (), "bleu", "made")


def test_a_line_stays_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base, out = tiny_writer("gpt2"), tmp_path / f"x{SUFFIX}"
    base.tower.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    base = Base.load(str(tmp_path / "base"), kind="causal_lm")
    recipe = Recipe("x", method("full"), writer()).override(max_steps=1)
    tune(base, written_task(), recipe, out=out)
    module = sys.modules["howfine.writing"]
    monkeypatch.setattr(module, "text", lambda *_: "one\ttab\nand a \\ line")
    told = CliRunner().invoke(app, ["predict", str(out), "w1 w2"])
    assert told.exit_code == 0, told.output
    assert told.stdout == "one\\ttab\\nand a \\\\ line\tw1 w2\n"
    assert predict(out, ["w1"], base) == [{"text": "one\ttab\nand a \\ line"}]
