"""A base of two towers: every method's laws on it, recipes from end to end, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from howfine import features
from howfine.base import Base, TwoTowers
from howfine.compose import compose
from howfine.delta import SUFFIX, Delta
from howfine.errors import DamagedDelta, DeltaError, SettingError, TaskError, WrongBase
from howfine.evaluate import evaluate, predict
from howfine.extract import extract
from howfine.images import Picture
from howfine.knowledge import drift, linear_probe, states
from howfine.ledger import Ledger, unpack_predictions
from howfine.method import Method, examples, fitting, method
from howfine.probe import GradientProbe
from howfine.readout import Wired, readout
from howfine.recipe import Recipe
from howfine.report import Report, report
from howfine.start import weight_at
from howfine.study import study
from howfine.task import Example, Task
from howfine.training import Training
from howfine.tune import tune
from tiny import captioned_task, logits_of, png, tiny_base, tiny_towers, tuned_weights

READ = readout("contrastive", width=16, size=8, max_length=16)
ONE_TOWER = sorted(name for name, each in examples().items() if not each.for_towers)
TOWERS: dict[str, Method] = {
    "locked": method("towers"),
    "lit": method("towers", text={"full": {}}),
    "two": method(
        "towers",
        image={"adapter": {"placement": "layerwise", "width": 3}},
        text={"mask": {"initial_sparsity": 0.1}},
    ),
    "deep": method("towers", image={"deep": {"beside": ["norm"]}}, text={"sparse": {}}),
}
# What stands in front of words is for the text tower.
WORDS = ("prefix", "prompt")
EVERY = {name: examples()[name] for name in ONE_TOWER if name not in WORDS} | TOWERS
EVERY |= {name: method("towers", text={name: {"length": 3}}) for name in WORDS}
# Its probe of two whole towers takes long.
MOST = [pytest.param(name, marks=[pytest.mark.slow] * (name == "graft")) for name in EVERY]


class Put:
    """A method and the readout on a base of two towers, trained a little."""

    def __init__(self, base: TwoTowers, chosen: Method, steps: int = 3) -> None:
        torch.manual_seed(0)
        self.base, self.method = base, fitting(chosen, base)
        self.head = READ.attach(base, ())
        self.wired = Wired(base, READ, self.head)
        rows = captioned_task().splits["train"]
        start = tuned_weights(base) if self.method.start == "needed" else {}
        probe = GradientProbe(self.wired, base, rows, 8, start)
        self.change = self.method.attach(base, probe)
        groups = [g for g in self.method.groups(self.change) if g["params"]]
        groups = [{"params": group["params"], "lr": 0.05} for group in groups]
        optimiser = torch.optim.AdamW([*groups, {"params": list(self.head.parameters())}], lr=0.05)
        self.wired.train()
        for step in range(steps):
            batch = READ.collate(base, rows[8 * step : 8 * step + 8])
            loss = self.wired(**batch.as_kwargs())["loss"] + self.method.penalty(self.change, 0.5)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        self.wired.eval()

    def outputs(self) -> Tensor:
        return outputs(self.wired, self.base)

    def delta(self, store: str = "fp32") -> Delta:
        return Delta.pack(self.base, self.method, self.change, READ, self.head, (), store)


@torch.no_grad()
def outputs(wired: Wired, base: Base) -> Tensor:
    batch = wired.readout.collate(base, captioned_task().splits["dev"], labelled=False)
    found: Tensor = wired(**batch.as_kwargs())["logits"]
    return found


# --- laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOST)
def test_a_change_of_two_towers_is_exact_and_comes_off(name: str, tmp_path: Path) -> None:
    """exact, moves, untouched: from its file the same bits, and the base is what it was."""
    base = tiny_towers()
    objects = {path: id(value) for path, value in base.towers.named_parameters()}
    made = Put(base, EVERY[name])
    trained = made.outputs()
    delta = made.delta()
    made.change.remove()
    assert base.is_untouched()
    assert {path: id(value) for path, value in base.towers.named_parameters()} == objects
    assert not any(value.requires_grad for value in base.towers.parameters())
    plain = outputs(Wired(base, READ, made.head).eval(), base)
    assert torch.equal(plain, trained) == (name == "locked" or not delta_has_method(delta))
    path = tmp_path / f"x{SUFFIX}"
    delta.save(path)
    for fresh in (base, tiny_towers()):
        with Delta.load(path).applied(fresh) as wired:
            assert torch.equal(outputs(wired, fresh), trained)
        assert fresh.is_untouched()


@pytest.mark.parametrize("name", ["full", "sparse"])
@pytest.mark.parametrize("asked", [{"density": 0.01}, {"store": "fp16"}, {"bytes": 3000}])
def test_what_is_extracted_of_two_towers_can_be_put_on(
    name: str, asked: dict[str, Any], tmp_path: Path
) -> None:
    base = tiny_towers()
    made = Put(base, EVERY[name])
    made.outputs()
    made.delta().save(tmp_path / f"x{SUFFIX}")
    made.change.remove()
    found = extract(base, tmp_path / f"x{SUFFIX}", tmp_path / f"y{SUFFIX}", **asked)
    with Delta.load(found.path).changed(base):
        moved = sum(int((weight_at(base, p) != base.original(p)).sum()) for p in base.paths())
    assert 0 < moved <= found.kept
    assert base.is_untouched()


@pytest.mark.parametrize("name", ["full", "sparse"])
def test_a_composed_change_of_two_towers_without_a_head_is_a_start(
    name: str, tmp_path: Path
) -> None:
    base = tiny_towers()
    made = Put(base, EVERY[name])
    made.outputs()
    delta = made.delta()
    made.change.remove()
    compose("union", [delta], base, head="none").save(tmp_path / f"x{SUFFIX}")
    found = Delta.load(tmp_path / f"x{SUFFIX}")
    with delta.changed(base):
        wanted = {path: weight_at(base, path).clone() for path in base.paths()}
    with found.changed(base) as head:
        assert head is None
        assert all(torch.equal(weight_at(base, path), wanted[path]) for path in base.paths())
    with pytest.raises(DeltaError, match="has no head, so it gives no answers"):
        found.check_head(base)


def delta_has_method(delta: Delta) -> bool:
    return any(stream.name.startswith("method/") for stream in delta.streams)


@pytest.mark.parametrize("name", ["full", "sparse", "adapter", "deep", "mask", "subspace"])
@pytest.mark.parametrize("store", ["fp16", "int8", "int4"])
def test_a_file_gives_what_the_last_steps_of_training_computed_with(name: str, store: str) -> None:
    """`stored` of both towers says what will be read back."""
    made = Put(tiny_towers(), EVERY[name])
    stored = made.method.stored(made.change, store)
    assert stored.keys() <= made.change.trainable.keys()
    for path, value in stored.items():
        made.change.trainable[path].data = value
    # Values on the grid of a file stay where they are, to the scales' own rounding.
    again = made.method.stored(made.change, store)
    for path, value in stored.items():
        assert torch.allclose(again[path], value, atol=2e-2 * float(value.abs().max() + 1e-6))


@pytest.mark.parametrize("name", MOST)
def test_gradients_reach_only_what_was_declared(name: str) -> None:
    base = tiny_towers()
    made = Put(base, EVERY[name], steps=0)
    declared = {id(p) for g in made.method.groups(made.change) for p in g["params"]}
    declared |= {id(p) for p in made.head.parameters()}
    made.wired.train()
    batch = READ.collate(base, captioned_task().splits["train"][:8])
    made.wired(**batch.as_kwargs())["loss"].backward()
    moved = {id(p) for p in made.wired.parameters() if p.grad is not None and p.grad.any()}
    assert moved <= declared


@pytest.mark.parametrize("image", ["vit", "dinov2"])
@pytest.mark.parametrize("text", ["bert", "roberta", "gpt2", "llama", "distilbert", "t5"])
@pytest.mark.parametrize("name", ["layerwise", "deep"])
def test_pairs_alone_give_what_a_batch_gives(image: str, text: str, name: str) -> None:
    """alone: padding and other pictures play no part, whatever the architectures."""
    base = tiny_towers(image, text)
    both = {
        "layerwise": {"adapter": {"placement": "layerwise", "width": 3, "std": 0.3}},
        "deep": {"deep": {"std": 0.2}},
    }[name]
    torch.manual_seed(0)
    wired = Wired(base, READ, READ.attach(base, ())).eval()
    plain = outputs(wired, base)
    with method("towers", image=both, text=both).attach(base):
        wired.eval()
        together = outputs(wired, base)
        rows = captioned_task().splits["dev"]
        with torch.no_grad():
            alone = [
                wired(**READ.collate(base, [row], labelled=False).as_kwargs())["logits"]
                for row in rows
            ]
    assert torch.allclose(torch.cat(alone), together, atol=1e-5)
    assert (together - plain).abs().max() > 1e-3
    assert base.is_untouched()


@pytest.mark.parametrize("text", ["gpt2", "t5", "bert"])
def test_a_blank_caption_has_a_direction(text: str) -> None:
    base = tiny_towers("vit", text)
    wired = Wired(base, READ, READ.attach(base, ())).eval()
    rows = [Example((words,), picture=Picture(words, png(1))) for words in (" ", "w1 w2")]
    alone, together = (logits_of(wired, base, each) for each in (rows[:1], rows))
    assert torch.isfinite(together).all()
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)


def test_pictures_have_a_patch_and_captions_a_token() -> None:
    base = tiny_towers()
    with pytest.raises(SettingError, match=r"found 3 pixels, and a patch of .* has 4 on a side"):
        readout("contrastive", size=3).attach(base, ())
    assert readout("contrastive", size=4).attach(base, ())
    with pytest.raises(SettingError, match="special tokens take 2 of 2 tokens"):
        readout("contrastive", max_length=2).collate(base, [Example(("w1",))], labelled=False)


def test_a_budget_is_each_towers_own() -> None:
    """Masks and sparse changes go with two towers, too."""
    base = tiny_towers()
    sparse = Put(base, method("sparse", density=0.01))
    tensors = sparse.method.pack(base, sparse.change)
    sparse.change.remove()
    for tower in ("image", "text"):
        kept = sum(v._nnz() for path, v in tensors.items() if path.startswith(f"{tower}."))
        part = base.parts[tower]
        whole = sum(part.parameter(path).numel() for path in part.choose(("matrices",)))
        assert 0 < kept <= 0.011 * sum(p.numel() for p in part.towers.parameters())
        assert kept >= 0.009 * whole


def test_a_method_has_the_rate_of_its_tower() -> None:
    base = tiny_towers()
    chosen = method("towers", image={"mask": {}}, text={"adapter": {}})
    with chosen.attach(base) as change:
        rate = chosen.learning_rate(1000)
        scales = {
            path.partition(".")[0]: rate * group["lr_scale"]
            for group in chosen.groups(change)
            for path, value in change.trainable.items()
            if any(value is p for p in group["params"])
        }
    own = {
        "image": method("mask").learning_rate(1000),
        "text": method("adapter").learning_rate(1000),
    }
    assert scales == pytest.approx(own)


# --- from end to end -----------------------------------------------------------------------------


def fit(base: Base, task: Task, folder: Path, chosen: Method, **training: Any) -> tuple[Any, bytes]:
    settings = {"max_steps": 4, "batch_size": 8, "learning_rate": 0.01, **training}
    made = Recipe("own", chosen, READ, Training(**settings))
    done = tune(base, task, made, out=folder / f"x{SUFFIX}", seed=1)
    return done, done.path.read_bytes()


@pytest.mark.parametrize("name", ["lilt", "lilt-deep", "lilt-bitfit", "lit", "align-full"])
def test_recipes_train_and_their_files_are_scored(name: str, tmp_path: Path) -> None:
    base, task = tiny_towers(), captioned_task()
    chosen = Recipe.load(name).override(
        width=16, size=8, max_length=16, batch_size=8, max_steps=4, learning_rate=0.01
    )
    done = tune(base, task, chosen, out=tmp_path / f"x{SUFFIX}")
    assert base.is_untouched()
    assert evaluate(done.path, base, task, split="dev").scores == done.score.scores
    assert done.score.metric == "mean_recall"
    assert len(done.score.scores) == 7
    low, high = done.score.interval
    assert 0 <= low <= done.score.value <= high <= 1


@pytest.mark.slow
def test_two_towers_learn_what_belongs_together(tmp_path: Path) -> None:
    """Twelve pictures of noise and their captions, learned by heart."""
    base, task = tiny_towers(hidden_dropout_prob=0.0), captioned_task()
    training = {"max_steps": 150, "batch_size": 24, "learning_rate": 3e-3}
    done, _ = fit(base, task, tmp_path, method("full"), **training)
    assert done.score.value > 0.95
    before, _ = fit(base, task, tmp_path, method("full"), max_steps=1, learning_rate=0.0)
    assert before.score.value < 0.75  # twelve pictures: chance is 0.08, 0.42 and 0.83


@pytest.mark.slow
def test_a_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    made = [fit(tiny_towers(), captioned_task(), tmp_path, TOWERS["two"])[1] for _ in range(2)]
    assert made[0] == made[1]


@pytest.mark.slow
def test_a_delta_goes_on_from_another_one(tmp_path: Path) -> None:
    base, task = tiny_towers(), captioned_task()
    done, _ = fit(base, task, tmp_path, TOWERS["lit"])
    recipe = Recipe("on", TOWERS["lit"], READ, Training(max_steps=1, learning_rate=0.0))
    second = tune(base, task, recipe, out=tmp_path / f"y{SUFFIX}")
    assert second.score.value != done.score.value  # it begins at the base: full asks for no start
    adapters = method("towers", text={"adapter": {"placement": "layerwise", "width": 3}})
    first, _ = fit(base, task, tmp_path, adapters)
    on = Recipe(
        "on", adapters, READ, Training(max_steps=1, learning_rate=0.0), start=str(first.path)
    )
    again = tune(base, task, on, out=tmp_path / f"z{SUFFIX}")
    assert again.score.scores == first.score.scores


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["locked", "deep-alone"])
@pytest.mark.parametrize("image", ["vit", "dinov2"])
def test_reusing_frozen_blocks_changes_nothing(
    chosen: str, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is frozen runs once for each example."""
    block = {"deep": {}}
    both = TOWERS["locked"] if chosen == "locked" else method("towers", image=block, text=block)
    kept: list[tuple[int, int | None]] = []
    remove = features._Kept.remove

    def looked_at(self: Any) -> None:
        kept.append((len(self.held), self.under))
        remove(self)

    monkeypatch.setattr(features._Kept, "remove", looked_at)
    settings = {"max_steps": 12, "group_by_length": False, "warmup": 0.0}
    task = captioned_task(captions=1)
    made = [
        fit(tiny_towers(image), task, tmp_path, both, reuse_frozen=reuse, **settings)[0]
        for reuse in (False, True)
    ]
    base = tiny_towers(image)
    one, two = ({**d.delta.tensors(base)[0], **d.delta.tensors(base)[1]} for d in made)
    assert one.keys() == two.keys()
    for name, value in one.items():
        # Softmax takes no notice of a key's bias: its gradient is rounding, which Adam scales up.
        loose = "k_proj.bias" in name or "key.bias" in name
        assert torch.allclose(value, two[name], atol=1e-2 if loose else 2e-5), name
    assert kept == [(12, 2), (12, 2)]  # all blocks, those that new ones stand on among them


def test_nothing_is_reused_above_what_trains(tmp_path: Path) -> None:
    """A change in the lowest block, or dropout at work, leaves nothing to keep."""
    base = tiny_towers()
    read = Put(base, method("select", train=("norm",)), steps=0)
    reuse = features.Reuse(base)
    reuse.start()
    read.wired.train()
    batch = READ.collate(base, captioned_task().splits["train"][:8])
    for _ in range(2):
        read.wired(**batch.as_kwargs())["loss"].backward()
    assert [each.under for each in reuse.kept] == [0, 0]
    assert not any(each.held for each in reuse.kept)
    reuse.remove()
    read.change.remove()
    assert base.is_untouched()


def test_what_is_kept_of_a_towers_knowledge(tmp_path: Path) -> None:
    base, task = tiny_towers(), captioned_task()
    done, _ = fit(base, task, tmp_path, TOWERS["lit"], learning_rate=0.05)
    rows = task.splits["test"]
    pictures = [row.picture for row in rows if row.picture]
    texts = [row.texts[0] for row in rows]
    found = drift(done.delta, base, pictures=pictures, texts=texts)
    assert found["image"] == pytest.approx(1.0, abs=1e-6)
    assert found["text"] < 0.999
    classes = [n // 2 for n in range(len(pictures))]
    assert linear_probe(None, base, (pictures, classes), (pictures, classes)) == 1.0
    assert linear_probe(done.delta, base, (texts, classes), (texts, classes)) == 1.0
    with pytest.raises(SettingError, match="24 items and 1 classes"):
        linear_probe(None, base, (pictures, classes), (pictures, [1]))


def test_before_and_after_take_the_same_pictures_and_texts(tmp_path: Path) -> None:
    """A tower that does not change keeps its states, whatever its readout makes of the inputs."""
    base, task = tiny_towers(), captioned_task()
    rows = task.splits["test"]
    pictures = [row.picture for row in rows if row.picture]
    texts = [row.texts[0] for row in rows]
    for settings in ({"size": 16}, {"max_length": 4}):
        read = readout("contrastive", **{"width": 16, "size": 8, "max_length": 16, **settings})
        made = Recipe("own", TOWERS["locked"], read, Training(max_steps=1, batch_size=8))
        done = tune(base, task, made, out=tmp_path / f"{min(settings)}{SUFFIX}")
        found = drift(done.path, base, pictures=pictures, texts=texts)
        assert found == pytest.approx({"image": 1.0, "text": 1.0}, abs=1e-6), settings
        items: list[Any] = pictures if "size" in settings else texts
        own, other = states(None, base, items, like=done.path), states(None, base, items)
        assert not np.allclose(own, other)
        assert np.allclose(own, states(done.path, base, items), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["gpt2", "t5", "deberta-v2", "llama"])
def test_reuse_is_right_whatever_the_text_tower(text: str, tmp_path: Path) -> None:
    """Dropout ahead of the blocks is off where nothing trains; blocks that say more are left."""
    settings = {"max_steps": 9, "batch_size": 12, "group_by_length": False, "warmup": 0.0}
    task, made = captioned_task(captions=1), []
    for reuse in (False, True):
        base = tiny_towers("vit", text)
        done, _ = fit(base, task, tmp_path, TOWERS["locked"], reuse_frozen=reuse, **settings)
        made.append(done.delta.tensors(base)[1])
    for name, value in made[0].items():
        assert torch.allclose(value, made[1][name], atol=2e-5), name


@pytest.mark.slow
def test_reuse_takes_half_precision_and_a_full_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_towers()
    base.towers.to(torch.bfloat16)
    monkeypatch.setattr(features, "KEPT_BYTES", 20_000)
    settings = {"max_steps": 6, "group_by_length": False}
    done, _ = fit(base, captioned_task(), tmp_path, TOWERS["locked"], reuse_frozen=True, **settings)
    assert done.score.value > 0
    both = {"gradient_checkpointing": True, "reuse_frozen": True}
    raising(
        SettingError,
        "what reuse_frozen keeps",
        lambda: fit(base, captioned_task(), tmp_path, TOWERS["locked"], **both),
    )


@pytest.mark.parametrize("case", ["left", "hole", "four", "embeds", "positions"])
def test_inputs_that_have_no_key_are_computed_each_time(case: str) -> None:
    """Left padding, masks of another form, and inputs that say more than tokens."""
    base = tiny_base("bert")
    tokens = torch.randint(5, 60, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    given: dict[str, Tensor] = {"input_ids": tokens, "attention_mask": mask}
    if case in ("left", "hole"):
        mask[0, 0 if case == "left" else 2] = 0
    elif case == "four":
        given["attention_mask"] = mask[:, None, None, :].expand(3, 1, 6, 6).float() * 0
    elif case == "embeds":
        given = {"inputs_embeds": torch.randn(3, 6, 32), "attention_mask": mask}
    else:
        given["position_ids"] = torch.arange(6).expand(3, -1).flip(1)
    expected = base.tower(**given).last_hidden_state
    reuse = features.Reuse(base)
    reuse.start()
    for _ in range(3):
        assert torch.equal(base.tower(**given).last_hidden_state, expected)
    assert reuse.kept[0].under == base.depth
    assert not reuse.kept[0].held
    plain = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    for _ in range(2):
        base.tower(**plain)
    assert len(reuse.kept[0].held) == 3
    reuse.remove()


def test_parameters_of_one_name_are_two(tmp_path: Path) -> None:
    """Both towers' numbers are rounded in the last steps, and each has its own rate."""
    made = Put(tiny_towers(), method("sparse", density=0.01), steps=0)
    assert {name.partition(":")[0] for name in made.change.trainable} == {"image", "text"}
    assert made.method.stored(made.change, "int8").keys() == made.change.trainable.keys()
    rates = [
        part.rate_for(made.change.parts[tower], 50) for tower, part in made.method.parts().items()
    ]
    assert made.method.rate_for(made.change, 50) == max(rates)


@pytest.mark.slow
def test_a_study_of_two_towers(tmp_path: Path) -> None:
    plan = {
        "ceiling": "align-full",
        "floor": "lilt-projections",
        "recipes": ["lit"],
        "seeds": [0],
        "margin": 0.5,
        "settings": {"max_steps": 3, "batch_size": 8, "width": 8, "max_length": 16},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    base, task = tiny_towers(), captioned_task()
    study(base, task, path, out=tmp_path / "study")
    found = report(tmp_path / "study", base=base, task=task)
    assert {row["recipe"] for row in found["runs"]} == {"align-full", "lilt-projections", "lit"}
    assert not any(row.get("error") for row in found["runs"])
    assert found["distance"] is None
    page = (tmp_path / "study" / "report.html").read_text()
    assert "lilt-projections" in page
    assert "no longer in the study's folder" not in page
    check_pictures(found, task, tmp_path / "study", page)
    assert "predict" not in page[page.index("Use it") : page.index("How it was measured")]


def check_pictures(found: Report, task: Task, folder: Path, page: str) -> None:
    """The grid shows what the recommended run was scored by, the missed pictures too."""
    path = found["recommended"]["key"]
    records = Ledger(folder / "runs.jsonl").records()
    rows, examples = found["pictures"], task.splits["test"]
    assert rows is not None
    assert len(rows) == 8
    predictions = np.stack(list(unpack_predictions(records[path]["predictions"])))
    images, texts = np.split(predictions.astype(np.float64), 2, axis=1)
    images, texts = (each / np.linalg.norm(each, axis=1)[:, None] for each in (images, texts))
    different = images[::2]  # two captions each
    for row in rows:
        number = next(n for n, each in enumerate(examples) if each.texts[0] == row["caption"])
        cosines = different @ texts[number]
        order = np.argsort(-cosines)
        assert row["own"] == f"noise {number // 2}"
        assert row["rank"] == 1 + order.tolist().index(number // 2)
        assert [hit["picture"] for hit in row["hits"]] == [f"noise {n}" for n in order[:5]]
        assert [hit["similarity"] for hit in row["hits"]] == pytest.approx(
            cosines[order[:5]], abs=1e-4
        )
        assert any(hit["own"] for hit in row["hits"]) == (row["rank"] <= 5)
        for name in (row["own"], *(hit["picture"] for hit in row["hits"])):
            assert f'title="{name}" src="data:image/jpeg;base64,' in page


def test_equal_pictures_have_equal_states() -> None:
    base = tiny_towers()
    pictures = [Picture("x", png(0)), Picture("y", png(0)), Picture("z", png(1))]
    found = states(None, base, pictures)
    assert (found[0] == found[1]).all()
    assert (found[0] != found[2]).any()


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORDS)
def test_words_are_not_put_in_front_of_pictures(name: str) -> None:
    raising(SettingError, "reads no tokens", lambda: examples()[name].attach(tiny_base("vit")))


def raising(kind: type[Exception], message: str, run: Callable[[], object]) -> None:
    with pytest.raises(kind, match=message):
        run()


def test_towers_of_the_wrong_kind_or_number_are_refused(tmp_path: Path) -> None:
    one, two, task = tiny_base("bert"), tiny_towers(), captioned_task()
    raising(SettingError, "an encoder of texts", lambda: TwoTowers(one, tiny_base("vit")))
    for name, count in (("minilm", 1), ("a+b+c", 3), ("minilm+", 2)):
        told = f"found {count} names"
        raising(SettingError, told, lambda name=name: Base.load(name, kind="two_towers"))
    raising(SettingError, "has one", lambda: READ.attach(one, ()))
    raising(SettingError, "has one", lambda: fitting(TOWERS["lit"], one))
    raising(SettingError, "this needs one", lambda: readout("classifier").attach(two, ("a", "b")))
    read = readout("classifier")
    raising(TaskError, "to be aligned", lambda: fit_with(two, task, tmp_path, read))
    assert not list(tmp_path.iterdir())


def fit_with(base: Base, task: Task, folder: Path, read: Any) -> None:
    tune(base, task, Recipe("own", method("full"), read), out=folder / f"x{SUFFIX}")


def test_settings_of_towers_are_checked() -> None:
    two = {"full": {}, "mask": {}}
    raising(SettingError, "full and mask, expected one", lambda: method("towers", image=two))
    raising(
        SettingError, "text tower's method 'fulll'", lambda: method("towers", text={"fulll": {}})
    )
    inner = {"towers": {}}
    raising(SettingError, "is for two towers", lambda: method("towers", text=inner))
    raising(
        SettingError,
        "Did you mean 'width'",
        lambda: method("towers", text={"adapter": {"widt": 3}}),
    )
    raising(
        SettingError, "expected at least 1, 0, 1 and 0", lambda: readout("contrastive", width=0)
    )
    many = Training(gradient_accumulation=2)
    chosen = Recipe("own", method("full"), READ, many)
    task, base = captioned_task(), tiny_towers()
    raising(
        SettingError,
        "gradient_accumulation",
        lambda: tune(base, task, chosen, out="x.delta.safetensors"),
    )


def test_a_delta_of_two_towers_meets_other_bases(tmp_path: Path) -> None:
    done, _ = fit(tiny_towers(), captioned_task(), tmp_path, TOWERS["lit"])
    other = TwoTowers(tiny_base("vit", seed=1), tiny_base("bert"))
    raising(WrongBase, "was made on", lambda: evaluate(done.delta, other, captioned_task()))
    raising(
        SettingError,
        "aligns pictures with texts",
        lambda: predict(done.delta, ["w1"], tiny_towers()),
    )
    tensors = {"image:adapter.0.0.up.bias": torch.zeros(3)}
    raising(DamagedDelta, "of image", lambda: TOWERS["lit"].unpack(tiny_towers(), tensors))
