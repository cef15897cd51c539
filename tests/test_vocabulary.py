"""Fewer tokens: the same cuts and outputs for the texts that they were chosen by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaModel,
    XLMRobertaTokenizer,
)

from console import howfine_here
from howfine import subwords, vocabulary
from howfine.base import Base
from howfine.delta import SUFFIX, Delta
from howfine.errors import SettingError
from howfine.evaluate import predict
from howfine.method import method
from howfine.readout import readout
from howfine.slicing import sliced
from howfine.task import Example, Task
from test_slicing import delta_of
from tiny import (
    LABELS,
    READOUT,
    WORDS,
    tiny_base,
    tiny_language_base,
    tiny_task,
    tiny_towers,
    tiny_whole,
)

# Words of four scripts, with letters, marks and numbers that few of them share.
LANGUAGES = [
    "the old bridge was closed at night, and the river rose over it by 12 metres",
    "die alte Brücke war nachts geschlossen, und der Fluss stieg um 12 Meter über sie",
    "старый мост был закрыт ночью, и река поднялась над ним на 12 метров",
    "古い橋は夜に閉鎖され、川は12メートル上昇した",
    "le vieux pont était fermé la nuit, et la rivière est montée de 12 mètres",
    "nobody told us that the older bridges were closing nightly; the rivers closed them",
]
KNOWN, OTHER = LANGUAGES[::2], LANGUAGES[1::2]
STRANGE = "ein ﷽ 12-metre 🜚 bridging, unbridged"
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def unigram() -> Tokenizer:
    """Trained on all of them, as XLM-R's: its own numbers first, the mask last."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=180, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(LANGUAGES, trainer)
    return made


def xlmr(kind: type = XLMRobertaModel) -> Base:
    """XLM-R's shape and tokenizer, tiny."""
    entries = [tuple(entry) for entry in json.loads(unigram().to_str())["model"]["vocab"]]
    tokenizer = XLMRobertaTokenizer(vocab=[*entries, ("<mask>", 0.0)])
    tokenizer.model_max_length = 64
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=66,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    name = "masked_lm" if kind is XLMRobertaForMaskedLM else "body"
    return Base("tiny-xlmr", kind(config), tokenizer, kind=name)


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(LANGUAGES * 2, trainer)
    return made


def byte_fallback(**changes: Any) -> Tokenizer:
    """Llama's: characters and their merges, or else bytes."""
    trained = Tokenizer(models.BPE())
    normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trained.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    trained.train_from_iterator(LANGUAGES, trainer)
    spec = json.loads(trained.to_str())
    spec["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True, **changes}
    spec["added_tokens"] = spec["added_tokens"][:3]
    made = Tokenizer.from_str(json.dumps(spec))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return made


def wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=240, special_tokens=special, show_progress=False)
    made.train_from_iterator(LANGUAGES, trainer)
    made.post_processor = processors.BertProcessing(("[SEP]", 4), ("[CLS]", 3))
    return made


def with_suffixes() -> Tokenizer:
    """CLIP's: the last piece of a word ends in a mark."""
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    made.train_from_iterator(LANGUAGES, trainer)
    return made


def with_prefixes() -> Tokenizer:
    """BPE whose pieces that go on with a word begin with a mark."""
    made = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=260,
        special_tokens=["<unk>"],
        continuing_subword_prefix="##",
        show_progress=False,
    )
    made.train_from_iterator(LANGUAGES, trainer)
    return made


TOKENIZERS = {
    "unigram": unigram,
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
    "whole-words": lambda: byte_fallback(ignore_merges=True),
    "wordpiece": wordpiece,
    "suffixes": with_suffixes,
    "prefixes": with_prefixes,
}


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    return [number for each in tokenizer.encode_batch(texts) for number in each.ids]


def cut_to(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[int], Tokenizer]:
    spec = json.loads(tokenizer.to_str())
    kept = sorted(subwords.needed(spec, ids_of(tokenizer, texts)))
    return kept, Tokenizer.from_str(json.dumps(subwords.of_some(spec, kept)))


# --- tokenizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_are_cut_as_before(name: str) -> None:
    """Tokens and offsets of each text; the number of each token is its place among those kept."""
    whole = TOKENIZERS[name]()
    kept, small = cut_to(whole, KNOWN)
    assert len(kept) == small.get_vocab_size() < whole.get_vocab_size()
    pairs = [*KNOWN, *((one, two) for one in KNOWN for two in KNOWN)]
    for text in pairs:
        one = whole.encode(*text) if isinstance(text, tuple) else whole.encode(text)
        two = small.encode(*text) if isinstance(text, tuple) else small.encode(text)
        assert one.tokens == two.tokens
        assert one.offsets == two.offsets
        assert one.type_ids == two.type_ids
        assert one.ids == [kept[number] for number in two.ids]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_other_texts_have_numbers_too(name: str) -> None:
    """And where there are bytes, no text is lost."""
    whole = TOKENIZERS[name]()
    _, small = cut_to(whole, KNOWN)
    for text in [*OTHER, STRANGE]:
        found = small.encode(text)
        assert found.ids
        assert max(found.ids) < small.get_vocab_size()
        if name == "byte-level":
            assert small.decode(found.ids) == text
        if name == "byte-fallback":
            assert "<unk>" not in found.tokens


@pytest.mark.parametrize("name", TOKENIZERS)
def test_all_tokens_are_the_same_tokenizer(name: str) -> None:
    whole = TOKENIZERS[name]()
    spec = json.loads(whole.to_str())
    kept = sorted(subwords.numbers(spec).values())
    assert subwords.needed(spec, []) < set(kept) == subwords.needed(spec, kept)
    same = Tokenizer.from_str(json.dumps(subwords.of_some(spec, kept)))
    for text in [*LANGUAGES, STRANGE]:
        assert whole.encode(text).ids == same.encode(text).ids


def test_an_unknown_character_is_no_likelier_than_before() -> None:
    """Without the least likely token it would be, and cuts would change."""
    scores = {"<unk>": 0.0, "ab": -10.0, "cd": -10.0, "ef": -10.0, "abcde": -1.0, "zz": -30.0}
    whole = Tokenizer(models.Unigram([*scores.items()], unk_id=0))
    assert whole.encode("abcdef").tokens == ["ab", "cd", "ef"]
    kept, small = cut_to(whole, ["abcdef", "abcde"])
    assert (kept, small.encode("abcdef").tokens) == ([0, 1, 2, 3, 4, 5], ["ab", "cd", "ef"])
    spec = subwords.of_some(json.loads(whole.to_str()), [0, 1, 2, 3, 4])
    without = Tokenizer.from_str(json.dumps(spec))
    assert without.encode("abcdef").tokens == ["abcde", "f"]


def test_unknown_kinds_of_tokenizers_are_refused() -> None:
    with pytest.raises(SettingError, match="of kind 'Other'"):
        subwords.numbers({"model": {"type": "Other", "vocab": {}}, "added_tokens": []})


# --- models --------------------------------------------------------------------------------------


# Every second stretch of words, so that hardly a number stays what it was.
SOME = [" ".join(WORDS[at : at + 4]) for at in range(3, 86, 8)]
AUTO = {"masked_lm": AutoModelForMaskedLM, "causal_lm": AutoModelForCausalLM, "body": AutoModel}


@torch.no_grad()
def outputs(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """(texts, tokens, …), one text at a time would be the same: padding counts for nothing."""
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True))
    found: Tensor = model.eval()(**batch)[0]
    return found[batch["attention_mask"].bool()]


def agree(base: Base, folder: Path, texts: list[str]) -> None:
    """What transformers loads from a folder gives what the base gives, for tokens that it has."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AUTO[base.kind].from_pretrained(folder)
    kept = vocabulary.used(base, texts).kept
    assert len(kept) == model.get_input_embeddings().num_embeddings == model.config.vocab_size
    for text in texts:
        one, two = base.tokenizer(text), tokenizer(text)
        assert one["input_ids"] == [kept[number] for number in two["input_ids"]]
        assert one["attention_mask"] == two["attention_mask"]
    whole = outputs(base.tower, base.tokenizer, texts)
    if base.kind != "body":
        whole = whole[:, torch.tensor(kept)]
    small = outputs(model, tokenizer, texts)
    assert torch.allclose(whole, small, atol=1e-6, rtol=1e-6)
    for name in ("pad", "unk", "cls", "sep", "mask", "bos", "eos"):
        token = getattr(base.tokenizer, f"{name}_token")
        assert getattr(tokenizer, f"{name}_token") == token
        if token is not None:
            number = getattr(tokenizer, f"{name}_token_id")
            assert kept[number] == getattr(base.tokenizer, f"{name}_token_id")


BODIES = ("bert", "roberta", "mpnet", "albert", "electra", "distilbert", "deberta-v2", "gpt2")
HEADED = (*BODIES, "llama", "qwen3", "gemma2")


@pytest.mark.parametrize("name", BODIES)
def test_bodies_give_the_same(name: str, tmp_path: Path) -> None:
    base = tiny_base(name)
    done = sliced(None, tmp_path / "small", base, texts=SOME)
    assert base.is_untouched()
    agree(base, done.folder, SOME)
    again = Base.load(str(done.folder))
    assert (again.first_position, done.plain) == (base.first_position, True)
    assert done.tokens == again.embedding.num_embeddings < base.embedding.num_embeddings
    assert done.parameters == sum(p.numel() for p in again.tower.parameters()) < done.before


@pytest.mark.parametrize(
    ("name", "tied"),
    [*((name, True) for name in HEADED), *((name, False) for name in ("bert", "mpnet", "llama"))],
)
def test_language_models_score_the_tokens_kept_as_before(
    name: str, tied: bool, tmp_path: Path
) -> None:
    base = tiny_language_base(name, tie_word_embeddings=tied)
    done = sliced(None, tmp_path / "small", base, texts=SOME)
    agree(base, done.folder, SOME)


@pytest.mark.parametrize("name", ["t5", "bart", "mbart", "marian"])
def test_whole_encoder_decoders_score_as_before(name: str, tmp_path: Path) -> None:
    base = tiny_whole(name)
    if name == "bart":  # pretraining gave it a bias of scores
        base.tower.final_logits_bias.normal_()
    done = sliced(None, tmp_path / "small", base, texts=SOME)
    small, kept = Base.load(str(done.folder), kind="seq2seq_lm"), vocabulary.used(base, SOME).kept
    ids = torch.arange(len(kept)).unflatten(0, (1, -1))[:, :32]
    old = torch.tensor(kept)[ids]
    with torch.no_grad():
        whole = base.tower(input_ids=old, decoder_input_ids=old)[0][..., torch.tensor(kept)]
        found = small.tower(input_ids=ids, decoder_input_ids=ids)[0]
    assert torch.allclose(whole, found, atol=1e-6)


@pytest.mark.parametrize("kind", [XLMRobertaModel, XLMRobertaForMaskedLM])
def test_an_xlmr_keeps_its_positions_and_its_first_numbers(kind: type, tmp_path: Path) -> None:
    base = xlmr(kind)
    done = sliced(None, tmp_path / "small", base, texts=KNOWN)
    agree(base, done.folder, KNOWN)
    small = AutoTokenizer.from_pretrained(done.folder)
    assert type(small) is XLMRobertaTokenizer
    assert small.convert_tokens_to_ids(SPECIAL) == [0, 1, 2, 3]
    assert small.mask_token_id == done.tokens - 1
    assert Base.load(str(done.folder), kind=base.kind).first_position == 2
    assert "<unk>" in small.convert_ids_to_tokens(small(STRANGE)["input_ids"])


def test_a_roberta_tokenizer_is_loaded_with_its_merges(tmp_path: Path) -> None:
    spec = json.loads(byte_level().to_str())["model"]
    names = dict.fromkeys([*SPECIAL, *spec["vocab"], "<mask>"])
    vocab = {token: number for number, token in enumerate(names)}
    merges = [tuple(merge) for merge in spec["merges"]]
    tokenizer = RobertaTokenizer(vocab=vocab, merges=merges)
    base = tiny_base("roberta", vocab_size=len(tokenizer), pad_token_id=1)
    base = Base("tiny-roberta", base.tower, tokenizer)
    done = sliced(None, tmp_path / "small", base, texts=KNOWN)
    agree(base, done.folder, KNOWN)
    small = AutoTokenizer.from_pretrained(done.folder)
    assert small.decode(small(STRANGE)["input_ids"], skip_special_tokens=True) == STRANGE


@pytest.mark.slow
def test_the_embedded_base(tmp_path: Path) -> None:
    """MiniLM with the tokens of a task: every number bit for bit."""
    base, task = Base.load(), Task.load("rotten-tomatoes").subset(train=100, dev=20, test=20)
    texts = list(vocabulary.texts_of(task))
    done = sliced(None, tmp_path / "small", base, texts=texts)
    small = Base.load(str(done.folder))
    assert small.pooling == base.pooling
    assert small.room == base.room
    assert (done.tokens or 0) < 2500
    assert done.parameters < 0.6 * done.before
    some = texts[2:20]
    for one, two in zip(
        base.tokenizer(some).encodings, small.tokenizer(some).encodings, strict=True
    ):
        assert (one.tokens, one.offsets) == (two.tokens, two.offsets)
    whole = outputs(base.tower, base.tokenizer, some)
    assert torch.equal(whole, outputs(small.tower, small.tokenizer, some))


def test_with_heads_and_neurons_that_are_off(tmp_path: Path) -> None:
    """Both at once; the answers' delta has its place on the smaller model."""
    base = tiny_base("bert")
    delta = delta_of(base)
    done = sliced(delta, tmp_path / "small", base, texts=SOME)
    assert (sum(done.heads), sum(done.neurons)) == (4, 64)
    assert done.tokens == vocabulary.used(base, SOME).tokenizer.vocab_size
    before, after = predict(delta, SOME, base), predict(done.readout, SOME)
    for one, two in zip(before, after, strict=True):
        assert one["label"] == two["label"]
        assert one["probability"] == pytest.approx(two["probability"], abs=1e-5)


def test_a_changed_table_is_what_is_cut(tmp_path: Path) -> None:
    base, chosen = tiny_base("bert"), method("full")
    with chosen.attach(base) as change:
        for value in change.trainable.values():
            value.data.add_(0.1 * torch.randn_like(value))
        delta = Delta.pack(base, chosen, change, READOUT, READOUT.attach(base, LABELS), LABELS)
    done = sliced(delta, tmp_path / "small", base, texts=SOME)
    with delta.changed(base):
        whole = outputs(base.tower, base.tokenizer, SOME)
    small = Base.load(str(done.folder))
    assert torch.allclose(whole, outputs(small.tower, small.tokenizer, SOME), atol=1e-6)


def test_a_verbalizers_words_stay(tmp_path: Path) -> None:
    """No text has them, and the readout finds them on the smaller model."""
    base = tiny_language_base("bert")
    read = readout("verbalizer", template="{text} w87 {mask}", words=("w88", "w89"))
    chosen = method("full")
    with chosen.attach(base) as change:
        delta = Delta.pack(base, chosen, change, read, read.attach(base, LABELS), LABELS)
    done = sliced(delta, tmp_path / "small", base, texts=SOME)
    before, after = predict(delta, SOME, base), predict(done.readout, SOME)
    for one, two in zip(before, after, strict=True):
        assert one["probability"] == pytest.approx(two["probability"], abs=1e-5)


def test_rare_tokens_go_where_they_may() -> None:
    base = tiny_base("bert")
    texts = ["w1 w2 w2", "w2 w3", "w3"]
    sizes = [len(vocabulary.used(base, texts, least).kept) for least in (1, 2, 3)]
    assert sizes == [5 + 3, 5 + 2, 5 + 1]
    assert len(vocabulary.used(base, texts, 3, words=["w1 w7"]).kept) == 5 + 3


def test_configs_name_tokens_by_their_new_numbers(tmp_path: Path) -> None:
    base = tiny_language_base("gpt2", pad_token_id=94, eos_token_id=93)
    base.tower.generation_config.suppress_tokens = [6, 60, 93]
    base.tower.generation_config.bad_words_ids = [[7, 8], [7, 60]]
    base.tower.generation_config.eos_token_id = [93, 50]
    done = sliced(None, tmp_path / "small", base, texts=["w1 w2 w3"])
    config = json.loads((done.folder / "config.json").read_text())
    stated = json.loads((done.folder / "generation_config.json").read_text())
    assert (config["pad_token_id"], config["eos_token_id"], config["vocab_size"]) == (10, 9, 11)
    assert stated["suppress_tokens"] == [5, 9]
    assert stated["bad_words_ids"] == [[6, 7]]
    assert stated["eos_token_id"] == [9, 8]


# --- the command line ----------------------------------------------------------------------------


def test_the_command_line(tmp_path: Path) -> None:
    base = tiny_base("bert")
    base.tower.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    loaded = Base.load(str(tmp_path / "base"))
    path = tmp_path / f"x{SUFFIX}"
    delta_of(loaded, keep=1.0).save(path)
    (tmp_path / "texts.txt").write_text("w1 w2\nw2 w3\n")
    told = howfine_here(
        "slice", path, tmp_path / "a", "--vocabulary", tmp_path / "texts.txt", "--json"
    ).json
    assert (told["tokens"], told["heads"]) == (8, [4, 4])
    told = howfine_here(
        *("slice", path, tmp_path / "b", "--vocabulary", tmp_path / "texts.txt"),
        *("--least", 2, "--json"),
    ).json
    assert told["tokens"] == 6
    rows = "".join(f'{{"text": "w{n % 7} w{n}", "label": {n % 2}}}\n' for n in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    said = howfine_here("slice", path, tmp_path / "c", "--vocabulary", tmp_path / "rows.jsonl")
    assert "; 45 tokens. AutoModel" in said.out
    lost = howfine_here("slice", path, tmp_path / "d", "--vocabulary", tmp_path / "lost.txt")
    assert "lost.txt can't be read" in lost.sentence


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "least", "said"),
    [
        ([], 1, "no token is 1 times"),
        (["", "  "], 1, "no token is 1 times"),
        (["w1 w2"], 2, "which have 2 tokens"),
        (["w1"], 0, "least 0"),
        ("w1 w2", 1, "texts of type str"),
        ([" ".join(WORDS)], 1, "use all 95 tokens"),
    ],
)
def test_texts_that_are_none(texts: Any, least: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=said):
        sliced(None, tmp_path / "small", tiny_base("bert"), texts=texts, least=least)
    assert not list(tmp_path.iterdir())


def test_bases_that_have_no_vocabulary() -> None:
    towers = tiny_towers()
    base = tiny_base("bert")
    slow = type("SlowTokenizer", (), {})()
    for other, said in (
        (towers, "is two towers"),
        (towers.parts["image"], "a tower of images"),
        (Base("b", base.tower), "has none"),
        (Base("b", base.tower, slow), "a SlowTokenizer"),
        (tiny_base("bert", vocab_size=90), "numbers up to 94"),
    ):
        with pytest.raises(SettingError, match=said):
            vocabulary.used(other, SOME)


def test_nothing_to_do_without_a_delta(tmp_path: Path) -> None:
    base = tiny_base("bert")
    for settings in ({}, {"texts": SOME, "keep": 0.5}):
        with pytest.raises(SettingError, match="without a delta"):
            sliced(None, tmp_path / "small", base, **settings)
    with pytest.raises(SettingError, match="without a delta"):
        sliced(None, tmp_path / "small", texts=SOME)
    with pytest.raises(SettingError, match="encoder of an encoder-decoder"):
        sliced(None, tmp_path / "small", tiny_base("t5"), texts=SOME)


def test_a_tower_that_keeps_tokens_elsewhere_is_told_of(tmp_path: Path) -> None:
    """What does not shrink with its table gives other outputs, and no folder is written."""
    base = tiny_base("bert")
    table, inner = base.tower.get_input_embeddings(), torch.randn(95, 32)
    run = table.forward
    table.forward = lambda ids: run(ids) + inner[ids]
    with pytest.raises(SettingError, match="without these tokens gives other outputs"):
        sliced(None, tmp_path / "small", base, texts=SOME)
    assert not (tmp_path / "small").exists()


def test_tasks_say_all_they_may_ask_for() -> None:
    task = tiny_task()
    found = set(vocabulary.texts_of(task))
    assert set(LABELS) < found
    assert {text for rows in task.splits.values() for row in rows for text in row.texts} < found


def test_a_tokenizer_of_no_class_of_its_own(tmp_path: Path) -> None:
    """One that transformers knows as a fast tokenizer alone, with a token that was added later."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=wordpiece(), unk_token="[UNK]")
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["[NEW]"]})
    made = tiny_base("bert", vocab_size=len(tokenizer) + 3)
    base = Base("b", made.tower, tokenizer)
    done = sliced(None, tmp_path / "small", base, texts=KNOWN)
    agree(base, done.folder, KNOWN)
    small = AutoTokenizer.from_pretrained(done.folder)
    assert small.convert_tokens_to_ids("[NEW]") == (done.tokens or 0) - 1


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_what_a_readout_makes_of_the_texts_is_cut_as_before(name: str, tmp_path: Path) -> None:
    """Templates, second texts and what is written stand behind a space: other tokens."""
    base, task = spaced_base(name), spaced_task(name)
    if name == "roberta":
        template = "{text} It was {mask}. {pair}"
        words = ("bad", "great")
        read = readout("verbalizer", template=template, words=words, read="head")
    else:
        read = readout("language_model", max_length=32, max_new_tokens=8)
    head = read.attach(base, task.labels)
    chosen = method("select", train=("none",))
    with chosen.attach(base) as change:
        delta = Delta.pack(base, chosen, change, read, head, task.labels)
    used = vocabulary.used(base, vocabulary.texts_of(task), words=vocabulary.words_of(delta))
    rows = task.splits["train"]
    before = read.collate(base, rows).inputs["input_ids"]
    assert set(before.flatten().tolist()) <= set(used.kept)
    done = sliced(delta, tmp_path / "small", base, texts=vocabulary.texts_of(task))
    small = Base.load(str(done.folder), kind=base.kind)
    after = read.collate(small, rows).inputs["input_ids"]
    kept = torch.tensor(used.kept)
    assert torch.equal(kept[after], before)


def spaced_base(name: str) -> Base:
    """With byte-level BPE that tells words by the space before them."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = "great bad film plot boring It was so . a dull"
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words, *(f" {word}" for word in words.split())] * 9, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        mask_token="<mask>",
        unk_token="<unk>",
        model_max_length=64,
    )
    changes = {"vocab_size": len(fast), "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    base = tiny_language_base(name, **changes)
    return Base(base.name, base.tower, fast, kind=base.kind)


def spaced_task(name: str) -> Task:
    if name == "roberta":
        rows = [Example(("great film", "bad plot"), 1), Example(("boring", "dull film"), 0)] * 4
        return Task("pairs", dict.fromkeys(("train", "dev", "test"), rows), LABELS, "accuracy", "")
    rows = [Example(("a plot",), targets=(f"{word} film",)) for word in ("great", "boring")] * 4
    return Task("written", dict.fromkeys(("train", "dev", "test"), rows), (), "rouge_l", "")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--least", "2"], "are for --vocabulary"),
        (["--rows", "2"], "are for --latency-ms"),
        (["--keep", "0.5", "--latency-ms", "3"], "give one of them"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    flags: list[str], said: str, tmp_path: Path
) -> None:
    assert said in howfine_here("slice", tmp_path / "x", tmp_path / "out", *flags).sentence
    assert not (tmp_path / "out").exists()
