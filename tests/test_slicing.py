"""Sliced models compute what the masked ones do, load again, and say what is left of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from console import howfine_here
from howfine.base import Base
from howfine.compose import stored
from howfine.cuts import trial
from howfine.delta import SUFFIX, Delta
from howfine.errors import BaseNotFound, SettingError, StorageError
from howfine.evaluate import evaluate, predict
from howfine.merge import merge
from howfine.method import method
from howfine.readout import readout
from howfine.slicing import Sliced, sliced
from howfine.widths import KEY
from tiny import (
    LABELS,
    READOUT,
    fit_a_little,
    tiny_base,
    tiny_language_base,
    tiny_task,
    tiny_towers,
    tiny_whole,
)

# Architectures whose heads can go, and those of which neurons alone are cut.
HEADED = (
    *("bert", "roberta", "distilbert", "electra", "albert", "gpt2", "vit", "dinov2"),
    *("dinov2-gated", "bart"),
)
NEURONS = ("llama", "qwen3", "mpnet", "deberta-v2", "t5-whole")


def base_of(name: str) -> Base:
    if name == "dinov2-gated":
        return tiny_base("dinov2", use_swiglu_ffn=True, mlp_ratio=3)  # 64 neurons
    if name in ("vit", "dinov2"):
        return tiny_towers(name).parts["image"]
    if name in ("bart", "t5-whole"):
        return tiny_whole(name.removesuffix("-whole"))
    return tiny_base(name)


def delta_of(base: Base, head: bool = True, **settings: Any) -> Delta:
    """A change that switches units off, as it would be without training."""
    torch.manual_seed(0)
    chosen = method("prune", **{"by": "random", "keep": 0.5, **settings})
    read = READOUT if head else readout("classifier")
    with chosen.attach(base) as change:
        return Delta.pack(base, chosen, change, read, read.attach(base, LABELS), LABELS)


@torch.no_grad()
def outputs(base: Base) -> Tensor:
    base.tower.eval()
    found: Tensor = base.tower(**trial(base, 2, min(8, base.room)))[0]
    return found


def made(base: Base, folder: Path, **settings: Any) -> tuple[Sliced, Tensor]:
    """The smaller model, and what the larger one gives with its units off."""
    if base.kind == "body" and base.tokenizer is not None:
        base.tower.save_pretrained(folder / "whole")
    delta = delta_of(base, **settings)
    with delta.changed(base):
        expected = outputs(base)
    done = sliced(delta, folder / "small", base)
    assert base.is_untouched()
    return done, expected


@pytest.mark.parametrize(
    ("name", "scope"),
    [(name, "global") for name in HEADED + NEURONS]
    + [(name, "layer") for name in ("bert", "bart")],
)
def test_a_sliced_model_gives_what_the_masked_one_gives(
    name: str, scope: str, tmp_path: Path
) -> None:
    """To 1e-5 in float32, loaded from its folder, of all that can be cut."""
    base = base_of(name)
    done, expected = made(base, tmp_path, scope=scope)
    small = Base.load(str(done.folder), kind=base.kind)
    assert torch.allclose(outputs(small), expected, atol=1e-5)
    whole = 4 * len(done.heads)
    assert sum(done.heads) == (whole // 2 if name in HEADED else whole)
    assert sum(done.neurons) == pytest.approx(len(done.heads) * 32, abs=1)
    assert sum(p.numel() for p in small.tower.parameters()) == done.parameters < done.before


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "bart"])
def test_even_widths_are_the_architectures_own(name: str, tmp_path: Path) -> None:
    """Neurons alone, as many in each layer: any transformers loads it, without howfine."""
    base = base_of(name)
    done, expected = made(base, tmp_path, units="neurons", scope="layer")
    assert done.plain
    assert KEY not in json.loads((done.folder / "config.json").read_text())
    if base.kind == "body":
        model = AutoModel.from_pretrained(done.folder).eval()
        with torch.no_grad():
            assert torch.allclose(model(**trial(base, 2, 8))[0], expected, atol=1e-5)


def test_even_heads_are_where_a_config_can_say_so(tmp_path: Path) -> None:
    done, expected = made(base_of("vit"), tmp_path, scope="layer")
    assert done.plain
    model = AutoModel.from_pretrained(done.folder).eval()
    with torch.no_grad():
        assert torch.allclose(model(**trial(base_of("vit"), 2, 8))[0], expected, atol=1e-5)
    assert not made(tiny_base("bert"), tmp_path / "b", scope="layer")[0].plain


def test_heads_of_a_stated_width_keep_it(tmp_path: Path) -> None:
    """Where it is not the hidden size over their number: Qwen3's, and after a slicing before."""
    wide = tiny_base("qwen3", num_key_value_heads=4, head_dim=16)
    done, expected = made(wide, tmp_path / "wide", scope="layer")
    assert done.plain
    assert torch.allclose(outputs(Base.load(str(done.folder))), expected, atol=1e-5)
    once, _ = made(tiny_base("llama", num_key_value_heads=4), tmp_path / "once", scope="layer")
    twice, expected = made(Base.load(str(once.folder)), tmp_path / "twice", scope="layer")
    assert twice.plain
    assert twice.heads == (1, 1)
    assert torch.allclose(outputs(Base.load(str(twice.folder))), expected, atol=1e-5)


def test_language_models_are_sliced_with_their_heads(tmp_path: Path) -> None:
    base = tiny_language_base("bert")
    done, expected = made(base, tmp_path)
    small = Base.load(str(done.folder), kind="masked_lm")
    assert torch.allclose(outputs(small), expected, atol=1e-5)


def test_answers_stay_the_same(tmp_path: Path) -> None:
    """The readout's own delta on the smaller model predicts what the pruned one predicts."""
    base, task = tiny_base("bert"), tiny_task()
    delta = delta_of(base)
    done = sliced(delta, tmp_path / "small", base)
    texts = [row.texts[0] for row in task.splits["dev"]]
    before = predict(delta, texts, base)
    after = predict(done.readout, texts)  # its base is the folder that it names
    for one, two in zip(before, after, strict=True):
        assert one["label"] == two["label"]
        assert one["probability"] == pytest.approx(two["probability"], abs=1e-5)
    assert evaluate(done.readout, None, task, split="dev").scores == (
        evaluate(delta, base, task, split="dev").scores
    )


def test_a_sliced_model_is_a_base_like_any_other(tmp_path: Path) -> None:
    """It can be pruned and sliced again, and another change fits no model but this one."""
    base = tiny_base("bert")
    first = sliced(delta_of(base, keep=0.75, scope="layer"), tmp_path / "a", base)
    small = Base.load(str(first.folder))
    again = sliced(delta_of(small, keep=0.5), tmp_path / "b", small)
    assert sum(again.heads) == 3 < sum(first.heads) == 6
    assert sum(again.neurons) == 48 < sum(first.neurons) == 96
    smaller = Base.load(str(again.folder))
    assert outputs(smaller).shape == outputs(base).shape
    assert small.fingerprint != base.fingerprint != smaller.fingerprint


def test_a_sliced_bases_heads_are_its_own(tmp_path: Path) -> None:
    base = tiny_base("bert")
    done = sliced(delta_of(base, scope="layer"), tmp_path / "a", base)
    small = Base.load(str(done.folder))
    for path in small.choose(("Q", "K", "V")):
        assert small.heads_of(path) == 2
        assert base.heads_of(path) == 4


def test_a_sliced_image_tower_is_fed_as_before(tmp_path: Path) -> None:
    base = base_of("vit")
    base.preprocessing = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.2, 0.2, 0.2]}
    done = sliced(delta_of(base), tmp_path / "small", base)
    assert Base.load(str(done.folder)).preprocessing == base.preprocessing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_sliced(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny_base("bert")
    base.towers.to(dtype)
    done = sliced(delta_of(base, head=False), tmp_path / "small", base)
    assert sum(done.heads) == 4


def test_what_is_written_in_half_precision_is_the_sum_rounded_once(tmp_path: Path) -> None:
    """Of a change too small to be seen beside the base, what base and change round to together."""
    base, path = tiny_base("bert"), f"{tmp_path}/x{SUFFIX}"
    base.tower.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    fitted = fit_a_little(Base.load(str(tmp_path / "base")), method("full"), rate=3e-5)
    # Of a file of differences: whole values would overwrite a base that was rounded before.
    delta = stored(fitted.delta(), base, "int8")[0]
    fitted.change.remove()
    delta.save(path)
    place = "encoder.layer.0.intermediate.dense.weight"
    with delta.changed(base):
        wanted = base.tower.get_parameter(place).detach().to(torch.bfloat16)
    with delta.changed(rounded := Base.load(str(tmp_path / "base"), dtype="bfloat16")):
        assert not torch.equal(wanted, rounded.tower.get_parameter(place))
    own = base.tower.get_parameter(place)
    assert not torch.equal(wanted, (wanted.float() - own + own.bfloat16()).bfloat16())
    merge(delta, tmp_path / "merged", base, dtype=torch.bfloat16)
    sliced(delta, tmp_path / "sliced", base, texts=["w1 w2"], dtype="bfloat16")
    assert own.dtype == torch.float32
    assert base.is_untouched()
    told = howfine_here("merge", path, tmp_path / "told", "--dtype", "bfloat16", "--json")
    assert told.json["bytes"] == (tmp_path / "merged/model.safetensors").stat().st_size
    words = ["--vocabulary", tmp_path / "words.txt"]
    words[1].write_text("w1 w2\n")
    for folder in ("merged", "sliced", "told", "cut"):
        if folder == "cut":
            howfine_here("slice", path, tmp_path / folder, *words, "--dtype", "bfloat16")
        assert torch.equal(load_file(tmp_path / folder / "model.safetensors")[place], wanted)
        assert json.loads((tmp_path / folder / "config.json").read_text())["dtype"] == "bfloat16"
    for other in ("half", torch.float64):
        with pytest.raises(SettingError, match="dtype '(half|float64)' is unknown"):
            merge(delta, tmp_path / "none", base, dtype=other)


@pytest.mark.parametrize("verb", [merge, sliced])
def test_a_weight_beyond_half_precision_is_named(verb: Any, tmp_path: Path) -> None:
    base = tiny_base("bert")
    place = base.choose(("D",))[0]
    with torch.no_grad():
        base.parameter(place)[0, 0] = 1e5
    delta = delta_of(base)
    kept = base.parameter(place).detach().clone()
    with pytest.raises(SettingError, match=r"holds 100000, beyond the 65504 that float16 holds"):
        verb(delta, tmp_path / "small", base, dtype="float16")
    assert torch.equal(base.parameter(place), kept)
    assert not any(tmp_path.iterdir())
    verb(delta, tmp_path / "small", base, dtype="bfloat16")


def test_whatever_switched_units_off(tmp_path: Path) -> None:
    """Rows of zeros are enough: a mask over columns of the output matrices."""
    base = tiny_base("bert")
    torch.manual_seed(0)
    chosen = method("mask", where=("O",), granularity="column", initial_sparsity=0.5)
    with chosen.attach(base) as change:
        delta = Delta.pack(base, chosen, change, READOUT, READOUT.attach(base, LABELS), LABELS)
    done = sliced(delta, tmp_path / "small", base)
    assert done.neurons == (32, 32)
    assert done.heads == (4, 4)


def test_the_command_line(tmp_path: Path) -> None:
    base = tiny_base("bert")
    base.tower.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    loaded = Base.load(str(tmp_path / "base"))
    delta_of(loaded).save(tmp_path / f"x{SUFFIX}")
    told = howfine_here("slice", tmp_path / f"x{SUFFIX}", tmp_path / "small", "--json")
    assert told.code == 0, told.err
    said = told.json
    assert (sum(said["heads"]), sum(said["neurons"])) == (4, 64)
    assert said["parameters"] < said["before"]
    own = sum(path.stat().st_size for path in (tmp_path / "small").glob("model*.safetensors"))
    assert said["bytes"] == own
    halved = tmp_path / "halved"
    told = howfine_here("slice", tmp_path / f"x{SUFFIX}", halved, "--dtype", "bfloat16", "--json")
    assert told.json["dtype"] == "bfloat16"
    assert told.json["bytes"] < 0.55 * own
    held = load_file(halved / "model.safetensors")
    assert {value.dtype for value in held.values()} == {torch.bfloat16}
    answers = howfine_here("predict", said["readout"], "w1 w2", "--json").json
    assert [answer["label"] in LABELS for answer in answers] == [True]


# --- bad input -----------------------------------------------------------------------------------


def test_nothing_to_cut_is_one_sentence(tmp_path: Path) -> None:
    base = tiny_base("bert")
    whole = fit_a_little(base, method("full")).delta()
    heads = tiny_base("mpnet")
    for target, delta in ((base, whole), (heads, delta_of(heads, units="heads", keep=0.5))):
        with pytest.raises(SettingError, match="nothing can be cut"):
            sliced(delta, tmp_path / "small", target)
    assert not (tmp_path / "small").exists()


def test_what_keeps_all_units_is_written_whole(tmp_path: Path) -> None:
    base = tiny_base("bert")
    done = sliced(delta_of(base, keep=1.0), tmp_path / "small", base)
    assert done.parameters == done.before
    assert Base.load(str(done.folder)).depth == base.depth


def test_a_delta_of_all_sizes_asks_for_one(tmp_path: Path) -> None:
    base = tiny_base("bert")
    fitted = fit_a_little(base, method("dynamic", smallest=0.25, by="magnitude"))
    delta = fitted.delta()
    fitted.change.remove()
    with pytest.raises(SettingError, match="all sizes.*--keep 0.5, or --latency-ms"):
        sliced(delta, tmp_path / "small", base)
    for keep in (1.5, 0.0, math.nan):
        with pytest.raises(SettingError, match=rf"^keep {keep}: expected a share of the units"):
            sliced(delta, tmp_path / "small", base, keep=keep)
    assert not (tmp_path / "small").exists()
    whole = sliced(delta, tmp_path / "small", base, keep=1.0)
    assert whole.parameters == whole.before


def test_changes_beside_the_weights_are_refused(tmp_path: Path) -> None:
    base, chosen = tiny_base("bert"), method("adapter")
    with chosen.attach(base) as change:
        delta = Delta.pack(base, chosen, change, READOUT, READOUT.attach(base, LABELS), LABELS)
    with pytest.raises(SettingError, match="parameters of its own"):
        sliced(delta, tmp_path / "small", base)


def test_parts_of_larger_models_are_refused(tmp_path: Path) -> None:
    base = tiny_base("t5")
    with pytest.raises(SettingError, match="encoder of an encoder-decoder"):
        sliced(delta_of(base), tmp_path / "small", base)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    base = tiny_base("bert")
    (tmp_path / "small").mkdir()
    with pytest.raises(StorageError, match="exists already"):
        sliced(delta_of(base), tmp_path / "small", base)
    assert not list((tmp_path / "small").iterdir())


@pytest.mark.parametrize(
    "stated",
    [
        ["encoder.layer.0.attention.self.query"],
        "abc",
        5,
        {"encoder.layer.0.attention.self.query": [True, True]},
        {"embeddings.word_embeddings": [8, 8]},
        {"encoder.layer.0.nothing": [32, 16]},
        {"encoder.layer.0.attention.self.query": [32, 0]},
        {"encoder.layer.0.attention.self.query": [32]},
        {"encoder.layer.0.attention.self.query": "32"},
        {"encoder.layer.0.attention.self.query": [32, 33]},
        {"encoder.layer.0.attention.self.query": [2**20, 2**20]},
        {"encoder.layer.0.attention.output.LayerNorm": [32, 32]},
        {"encoder.layer.0.attention.self.query": [32, 8]},
    ],
)
def test_a_damaged_config_is_one_sentence(stated: Any, tmp_path: Path) -> None:
    base = tiny_base("bert")
    done = sliced(delta_of(base), tmp_path / "small", base)
    path = done.folder / "config.json"
    config = json.loads(path.read_text())
    config[KEY] = config[KEY] | stated if isinstance(stated, dict) else stated
    path.write_text(json.dumps(config))
    with pytest.raises(BaseNotFound, match=r"can't be loaded|of shape"):
        Base.load(str(done.folder))


def test_weights_of_other_widths_are_refused(tmp_path: Path) -> None:
    base = tiny_base("bert")
    done = sliced(delta_of(base), tmp_path / "small", base)
    held = load_file(done.folder / "model.safetensors")
    name = "encoder.layer.0.intermediate.dense.weight"
    held[name] = held[name][:-1].contiguous()
    save_file(held, done.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseNotFound, match="belong together"):
        Base.load(str(done.folder))


@pytest.mark.parametrize(
    ("name", "changes"),
    [("vit", {"num_channels": 1}), ("bert", {"max_position_embeddings": 6}),
     ("roberta", {"max_position_embeddings": 8})],
)  # fmt: skip
def test_pictures_of_one_colour_and_short_inputs_are_sliced(
    name: str, changes: dict[str, int], tmp_path: Path
) -> None:
    base = tiny_base(name, **changes)
    done, expected = made(base, tmp_path, scope="layer")
    assert done.parameters < done.before
    small = Base.load(str(done.folder))
    with torch.no_grad():
        found = small.tower.eval()(**trial(small, 2, min(8, small.room)))[0]
    assert torch.allclose(found, expected, atol=1e-5)
