"""Heads and neurons off: importance as its equation says, budgets exact, files that say it all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from console import howfine_here
from howfine import units as units_of_base
from howfine.base import Base
from howfine.batch import to_device
from howfine.delta import SUFFIX, Delta
from howfine.errors import DamagedDelta, SettingError
from howfine.evaluate import evaluate
from howfine.merge import merge
from howfine.method import Method, examples, method
from howfine.probe import GradientProbe
from howfine.readout import Wired, readout
from howfine.recipe import Recipe
from howfine.task import Task
from howfine.training import Training
from howfine.tune import tune
from tiny import (
    LABELS,
    READOUT,
    fit_a_little,
    probe_for,
    tiny_base,
    tiny_task,
    tiny_whole,
    tiny_writer,
    weight_at,
    wire,
    written_task,
)

# Paths of what heads lead into, and neurons, in BERT's first block.
D = "text.encoder.layer.{}.attention.output.dense.weight"
O = "text.encoder.layer.{}.output.dense.weight"  # noqa: E741
HEADS, INNER, LAYERS = 4, 64, 2


def probed(base: Base, rows: int = 6, batch: int = 3) -> tuple[GradientProbe, Wired]:
    torch.manual_seed(0)
    wired = Wired(base, READOUT, READOUT.attach(base, LABELS))
    return GradientProbe(wired, base, tiny_task().splits["train"][:rows], batch), wired


def units(base: Base, change: Any) -> dict[str, list[bool]]:
    return {path: on.tolist() for path, on in change.parts["kept"].items()}


def counts(base: Base) -> dict[str, int]:
    found = {}
    for path in base.choose(("matrices",)):
        _, part = base.place(path)
        if part in ("D", "CD"):
            found[path] = HEADS
        if part == "O":
            found[path] = base.parameter(path).shape[base.anatomy.linear_axes.index("in")]
    return found


def importance(probe: GradientProbe, base: Base) -> dict[str, Tensor]:
    return units_of_base.importance(probe.sensitivities(base, counts(base)), "rows")


# --- importance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "distilbert", "albert", "mpnet"])
def test_importance_is_what_a_factor_on_a_unit_would_do(name: str) -> None:
    """E_x |∂L/∂ξ|: against finite differences of the loss, one example and one unit at a time."""
    base = tiny_base(name)
    probe, wired = probed(base, rows=3)
    found = importance(probe, base)
    wired.eval().double()
    examples = probe.examples
    for path, scores in found.items():
        weight = base.parameter(path)
        axis = base.anatomy.linear_axes.index("in")
        original = weight.detach().clone()
        for unit in {0, len(scores) - 1, int(scores.argmax())}:
            width = weight.shape[axis] // len(scores)
            slopes = []
            for example in examples:
                batch = READOUT.collate(base, [example])
                losses = []
                for step in (3e-3, -3e-3):
                    moved = original.clone()
                    moved.narrow(axis, unit * width, width).mul_(1 + step)
                    with torch.no_grad():
                        weight.copy_(moved)
                        losses.append(float(wired(**batch.as_kwargs())["loss"]))
                slopes.append(abs(losses[0] - losses[1]) / 6e-3)
            with torch.no_grad():
                weight.copy_(original)
            expected = sum(slopes) / len(slopes)
            assert float(scores[unit]) == pytest.approx(expected, rel=1e-2, abs=2e-5), path
    assert not any(module._forward_pre_hooks for module in wired.modules())


def test_a_units_gradient_is_its_weights_times_theirs() -> None:
    """Σ W ∂L/∂W over a head's columns of W_O is ∂L/∂ξ; the mean over a batch of one example."""
    base = tiny_base("bert")
    probe, _ = probed(base, rows=1, batch=1)
    path = D.format(0)
    (gradient,) = probe.gradients(base, [path], "mean").values()
    by_weight = (gradient * base.parameter(path)).unflatten(1, (HEADS, -1)).sum((0, 2)).abs()
    found = probe.sensitivities(base, {path: HEADS})[path].abs().mean(0)
    assert torch.allclose(found, by_weight, atol=1e-6)


def test_importance_leaves_no_trace() -> None:
    base = tiny_base("bert")
    probe, wired = probed(base)
    wired.train()
    start = {D.format(0): base.original(D.format(0)) * 1.5}
    before = probe.sensitivities(base, counts(base))
    moved = probe.sensitivities(base, counts(base), at=start)
    assert not torch.equal(before[D.format(1)], moved[D.format(1)])
    again = probe.sensitivities(base, counts(base))
    assert all(torch.equal(before[path], again[path]) for path in before)
    assert wired.training
    assert all(p.grad is None for p in wired.parameters())
    assert base.is_untouched()


def test_importance_of_a_batch_is_that_of_its_rows() -> None:
    base = tiny_base("bert")
    alone = importance(probed(base, rows=4, batch=1)[0], base)
    together = importance(probed(base, rows=4, batch=4)[0], base)
    for path in alone:
        assert torch.allclose(alone[path], together[path], atol=1e-5, rtol=1e-4)


def test_a_mean_over_tokens_is_asked_row_by_row() -> None:
    """Otherwise a row would weigh as many tokens as it has, and as those beside it leave it."""
    base, task = tiny_writer("gpt2"), written_task()
    read = readout("language_model", max_length=16, max_new_tokens=8)
    wired = Wired(base, read, read.attach(base, ()))
    units_of = dict.fromkeys(base.choose(("D",)), HEADS)
    rows = task.splits["train"][:4]
    one, four = (
        GradientProbe(wired, base, rows, size).sensitivities(base, units_of) for size in (1, 4)
    )
    for path, scores in one.items():
        assert torch.allclose(scores, four[path], atol=1e-6)
        assert scores.any()


# --- budgets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("by", ["gradient", "magnitude", "random"])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.75, 1.0])
def test_as_many_units_stay_on_as_asked(keep: float, by: Any, scope: Any) -> None:
    base = tiny_base("bert")
    chosen = method("prune", keep=keep, by=by, scope=scope)
    torch.manual_seed(0)
    with chosen.attach(base, probed(base)[0]) as change:
        kept = change.parts["kept"]
        for own in ([D.format(n) for n in range(2)], [O.format(n) for n in range(2)]):
            each = [int(kept[path].sum()) for path in own]
            total = sum(len(kept[path]) for path in own)
            assert min(each) >= 1
            assert abs(sum(each) - keep * total) <= (1 if scope == "global" else 2)
            if scope == "layer":
                assert len(set(each)) == 1
    assert base.is_untouched()


def test_smaller_budgets_are_nested() -> None:
    base = tiny_base("bert")
    probe, _ = probed(base)
    last: dict[str, Tensor] = {}
    for keep in (0.9, 0.6, 0.4, 0.25):
        with method("prune", keep=keep).attach(base, probe) as change:
            kept = change.parts["kept"]
        for path, on in kept.items():
            assert not (on & ~last.get(path, torch.ones_like(on))).any()
        last = kept


def test_the_least_important_go_off() -> None:
    base = tiny_base("bert")
    probe, _ = probed(base)
    scores = importance(probe, base)
    with method("prune", keep=0.5, scope="raw").attach(base, probe) as change:
        kept = change.parts["kept"]
    for own in ([D.format(n) for n in range(2)], [O.format(n) for n in range(2)]):
        on = torch.cat([scores[path][kept[path]] for path in own])
        off = torch.cat([scores[path][~kept[path]] for path in own])
        firm = {float(scores[path].max()) for path in own}  # one of each layer stays anyway
        assert all(float(value) >= off.max() or float(value) in firm for value in on)


def test_only_one_kind_goes_off_where_so_asked() -> None:
    base = tiny_base("bert")
    for kind, part in (("heads", "D"), ("neurons", "O")):
        with method("prune", units=kind, by="magnitude").attach(base) as change:
            assert {base.place(path)[1] for path in change.parts["kept"]} == {part}


def test_all_units_on_is_the_base() -> None:
    """Read where the forward pass reads, frozen or training."""
    base = tiny_base("bert")
    for keep, same in ((1.0, True), (0.5, False)):
        chosen = method("prune", keep=keep, by="magnitude", beside=("all@-1",))
        with chosen.attach(base):
            read = [torch.equal(weight_at(base, p), base.original(p)) for p in counts(base)]
        assert all(read) is same
        assert any(read) is same


# --- rounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["gradient", "position", "batch", "fisher", "magnitude", "random"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_units_go_off_in_equal_parts_and_stay_off(by: Any, scope: Any) -> None:
    """1 - (1 - keep)·r/R stay on after round r of R, the last of which comes at 60 % at latest."""
    base = tiny_base("bert")
    fitted = wire(base, method("prune", keep=0.4, by=by, scope=scope, rounds=3, beside=("all",)))
    seen, last = [], dict[str, Tensor]()
    for step in range(20):
        (share,) = fitted.method.passes(fitted.change, step / 20)
        assert share == 0
        path = O.format(0)
        kept = fitted.method.pack(base, fitted.change) if step > 12 else None
        on = {
            path: gate.on.flatten().clone() for path, gate in fitted.change.parts["gated"].items()
        }
        assert all(not (own & ~last.get(p, own)).any() for p, own in on.items())
        last = on
        own = [on[O.format(n)] for n in range(LAYERS)]
        seen.append(sum(int(each.sum()) for each in own) / (LAYERS * INNER))
        if kept is not None:
            assert torch.equal(kept[f"units:{path}"], on[path])
        assert fitted.method.finished(fitted.change) is (step >= 8)
    expected = [0.8] * 4 + [0.6] * 4 + [0.4] * 12
    assert seen == pytest.approx(expected, abs=0.01)


def test_the_last_round_is_what_was_asked_to_the_unit() -> None:
    """Where a share of all units is a half, its sum over rounds may be rounded another way."""
    base = tiny_base("bert", num_hidden_layers=5, num_attention_heads=12, hidden_size=48)
    chosen = method("prune", keep=0.175, rounds=2, beside=("all",), by="magnitude")
    with chosen.attach(base) as change:
        for progress in (0.0, 0.4, 0.7, 1.0):
            list(chosen.passes(change, progress))
        assert chosen.finished(change)


def test_each_round_ranks_by_what_is_left() -> None:
    """By the gradient of the pruned, trained model; not by that of the first."""
    base = tiny_base("bert")
    chosen = method("prune", keep=0.4, rounds=2, beside=("all",), scope="raw")
    fitted = wire(base, chosen)
    with torch.no_grad():
        for value in fitted.change.trainable.values():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(7)))
    before = {p: on.clone() for p, on in _on(fitted.change).items()}
    probe = fitted.change.parts["probe"]
    scores = units_of_base.importance(probe.sensitivities(base, counts(base)), "rows")
    list(chosen.passes(fitted.change, 0.5))
    after = _on(fitted.change)
    for kind in units_of_base.by_kind(base, scores).values():
        on = torch.cat([scores[path][after[path]] for path in kind])
        gone = torch.cat([scores[path][before[path] & ~after[path]] for path in kind])
        firm = {float(scores[path][before[path]].max()) for path in kind}
        assert all(float(value) >= gone.max() or float(value) in firm for value in on)
        assert all(float(scores[path][~before[path]].sum()) == 0 for path in kind)


def _on(change: Any) -> dict[str, Tensor]:
    gated = change.parts["gated"]
    return {path: gated[path].on.flatten() for path in change.parts["kept"]}


def test_a_state_in_between_is_never_the_best(tmp_path: Path) -> None:
    """Whatever it scores: it is larger than asked for."""
    base, task = tiny_base("bert"), tiny_task()
    chosen = method("prune", keep=0.3, rounds=4, by="magnitude", beside=("all@-1",))
    done = fit(base, task, tmp_path, chosen, "x", max_steps=10, evaluations=10, learning_rate=0.5)
    held = done.delta.tensors(base)[0].values()
    on = [int(value.sum()) for value in held if value.dtype == torch.bool]
    whole = [value.numel() for value in held if value.dtype == torch.bool]
    assert sum(on) == pytest.approx(0.3 * sum(whole), abs=1)


@pytest.mark.slow
def test_patience_begins_when_the_rounds_are_done(tmp_path: Path) -> None:
    base, task = tiny_base("bert"), tiny_task()
    chosen = method("prune", keep=0.4, rounds=4, by="random", beside=("all",))
    settings = {"max_steps": 40, "evaluations": 20, "patience": 2}
    done = fit(base, task, tmp_path, chosen, "x", **settings)
    assert 18 < done.steps < 40


def test_a_training_too_short_for_its_rounds_is_told(tmp_path: Path) -> None:
    base, task = tiny_base("bert"), tiny_task()
    chosen = method("prune", keep=0.3, rounds=4, by="random", beside=("all",))
    with pytest.raises(SettingError, match="ended before all of the 4 rounds"):
        fit(base, task, tmp_path, chosen, "x", max_steps=1)
    assert not (tmp_path / f"x{SUFFIX}").exists()
    with pytest.raises(SettingError, match="something beside that trains"):
        method("prune", rounds=3)


# --- importances of other implementations --------------------------------------------------------


def test_importances_are_what_they_are_called() -> None:
    """Of rows, of batches of 32, their squares; and of positions, against the sum over them."""
    base = tiny_base("bert")
    task = tiny_task()
    rows = [row for split in ("train", "dev", "test") for row in task.splits[split]] * 2
    wired = Wired(base, READOUT, READOUT.attach(base, LABELS))
    probe = GradientProbe(wired, base, rows, 8)
    found = probe.sensitivities(base, counts(base))
    for path, own in found.items():
        assert own.shape == (64, counts(base)[path])
        two = torch.stack([own[:32].mean(0), own[32:].mean(0)])
        expected = {
            "rows": own.abs().mean(0),
            "batches": two.abs().mean(0),
            "squares": two.square().mean(0),
        }
        for name, value in expected.items():
            assert torch.allclose(units_of_base.importance({path: own}, name)[path], value)
    apart = probe.sensitivities(base, counts(base), positions=True)
    for path, own in apart.items():
        assert (own >= found[path].abs() - 1e-6).all()
        above = (own > found[path].abs() + 1e-6).any()
        assert above == (".layer.0." in path)  # of the last layer the first position alone is read
    few = probe.sensitivities(base, counts(base), rows=5)
    assert {len(own) for own in few.values()} == {5}


# --- what is off ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "distilbert", "mpnet", "albert"])
def test_a_unit_that_is_off_gives_nothing(name: str) -> None:
    """The same outputs as with a hook that puts zeros in the place of its outputs."""
    base = tiny_base(name)
    _, wired = probed(base)
    wired.eval()
    batch = READOUT.collate(base, tiny_task().splits["dev"])
    fields = to_device(batch.as_kwargs(), base.device)
    chosen = method("prune", keep=0.5, by="magnitude")
    with chosen.attach(base) as change, torch.no_grad():
        pruned = wired(**fields)["logits"]
        kept = change.parts["kept"]
    hooks = []
    for path, on in kept.items():
        host = base.towers.get_submodule(path.rpartition(".")[0])

        def silence(module: nn.Module, given: tuple[Any, ...], on: Tensor = on) -> tuple[Any, ...]:
            wide = on.repeat_interleave(given[0].shape[-1] // len(on))
            return (given[0] * wide, *given[1:])

        hooks.append(host.register_forward_pre_hook(silence))
    with torch.no_grad():
        silenced = wired(**fields)["logits"]
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        whole = wired(**fields)["logits"]
    assert torch.allclose(pruned, silenced, atol=1e-5)
    assert not torch.allclose(pruned, whole, atol=1e-4)


def test_both_stacks_of_an_encoder_decoder_have_units() -> None:
    base = tiny_whole("bart")
    with method("prune", by="magnitude").attach(base) as change:
        parts = [base.place(path)[1] for path in change.parts["kept"]]
    assert (parts.count("D"), parts.count("O")) == (base.depth, base.depth)
    assert parts.count("CD") == base.depth - base.anatomy.decoder.first > 0


def test_the_file_holds_which_units_are_on_and_nothing_else() -> None:
    base = tiny_base("bert")
    fitted = fit_a_little(base, method("prune", keep=0.5, by="random"))
    packed = fitted.method.pack(base, fitted.change)
    assert all(value.dtype == torch.bool and value.ndim == 1 for value in packed.values())
    assert sum(value.numel() for value in packed.values()) == LAYERS * (HEADS + INNER)


def test_what_trains_beside_is_stored_without_what_is_off() -> None:
    base = tiny_base("bert")
    fitted = fit_a_little(base, method("prune", by="random", beside=("all@0--1",)), steps=4)
    packed = fitted.method.pack(base, fitted.change)
    kept = fitted.change.parts["kept"]
    fitted.change.remove()
    path = D.format(0)
    off = ~kept[path].repeat_interleave(base.parameter(path).shape[1] // HEADS)
    assert torch.equal(packed[path][:, off], base.original(path)[:, off])
    assert not torch.equal(packed[path][:, ~off], base.original(path)[:, ~off])
    for part in ("query", "key", "value"):
        own = f"text.encoder.layer.0.attention.self.{part}.weight"
        assert torch.equal(packed[own][off], base.original(own)[off])
    own, off = "text.encoder.layer.0.intermediate.dense.weight", ~kept[O.format(0)]
    assert torch.equal(packed[own][off], base.original(own)[off])


# --- from end to end -----------------------------------------------------------------------------


def fit(base: Base, task: Task, folder: Path, chosen: Method, name: str, **training: Any) -> Any:
    start = training.pop("start", None)
    settings = {"max_steps": 4, "batch_size": 8, "learning_rate": 0.01, **training}
    made = Recipe("own", chosen, READOUT, Training(**settings), start=start)
    return tune(base, task, made, out=folder / f"{name}{SUFFIX}", seed=1)


def test_a_fine_tuned_model_is_pruned_and_trained_on(tmp_path: Path) -> None:
    """From a full fine-tuning's file: its weights, then some units off, in a file of its own."""
    base, task = tiny_base("bert"), tiny_task()
    tuned = fit(base, task, tmp_path, method("full"), "tuned", max_steps=30)
    everything = method("prune", keep=1.0, beside=("all",))
    still = {"start": str(tuned.path), "max_steps": 1, "readout_learning_rate": 0.0}
    same = fit(base, task, tmp_path, everything, "same", **{**still, "learning_rate": 0.0})
    assert same.score.scores == tuned.score.scores
    half = method("prune", keep=0.5, beside=("all",))
    pruned = fit(base, task, tmp_path, half, "half", start=str(tuned.path), max_steps=30)
    assert evaluate(pruned.path, base, task, split="dev").scores == pruned.score.scores
    own = pruned.delta.tensors(base)[0]
    assert sum(int(v.sum()) for n, v in own.items() if v.dtype == torch.bool) == pytest.approx(
        LAYERS * (HEADS + INNER) / 2, abs=1
    )
    assert base.is_untouched()


def test_a_pruned_model_merges_into_a_plain_checkpoint(tmp_path: Path) -> None:
    base, task = tiny_base("bert"), tiny_task()
    done = fit(base, task, tmp_path, method("prune", by="gradient"), "x")
    folder = merge(done.path, tmp_path / "plain", base)
    again = Base.load(str(folder))
    batch = READOUT.collate(base, task.splits["dev"])
    with done.delta.changed(base), torch.no_grad():
        base.tower.eval()
        expected = base.body(**batch.inputs).last_hidden_state
    again.tower.eval()
    with torch.no_grad():
        found = again.body(**batch.inputs).last_hidden_state
    assert torch.equal(found, expected)


def test_models_that_write_are_pruned(tmp_path: Path) -> None:
    base = tiny_writer("gpt2")
    read = readout("language_model", max_length=16, max_new_tokens=8)
    made = Recipe(
        "own", method("prune", beside=("norm",)), read, Training(max_steps=2, batch_size=4)
    )
    done = tune(base, written_task(), made, out=tmp_path / f"x{SUFFIX}")
    held = done.delta.tensors(base)[0].values()
    on = [int(value.sum()) for value in held if value.dtype == torch.bool]
    whole = [value.numel() for value in held if value.dtype == torch.bool]
    assert sum(on) == sum(whole) // 2 > 0


# --- bad input -----------------------------------------------------------------------------------


def test_a_budget_below_one_unit_a_layer_names_the_nearest() -> None:
    with pytest.raises(SettingError, match=r"1 of 8 heads would stay on.*nearest keep is 0\.25"):
        method("prune", keep=0.1, by="magnitude").attach(tiny_base("bert"))
    for keep in (0.0, -0.5, 1.5):
        with pytest.raises(SettingError, match="above 0 and at most 1"):
            method("prune", keep=keep)


def test_importance_needs_a_task() -> None:
    with pytest.raises(SettingError, match="measures gradients, which needs a task"):
        method("prune").attach(tiny_base("bert"))


def test_a_start_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    base, task = tiny_base("bert"), tiny_task()
    tuned = fit(base, task, tmp_path, method("full"), "tuned")
    with pytest.raises(SettingError, match="name them in beside"):
        fit(base, task, tmp_path, method("prune"), "x", start=str(tuned.path))
    assert not (tmp_path / f"x{SUFFIX}").exists()
    assert base.is_untouched()


def test_a_file_of_other_units_is_refused() -> None:
    base = tiny_base("bert")
    fitted = fit_a_little(base, method("prune", by="random"))
    packed = fitted.method.pack(base, fitted.change)
    fitted.change.remove()
    name = next(iter(packed))
    for odd in (packed[name][:-1], packed[name].float(), packed[name][None]):
        with pytest.raises(DamagedDelta, match="does not fit the base"):
            fitted.method.unpack(base, {**packed, name: odd})
    with pytest.raises(DamagedDelta, match="does not fit the base"):
        fitted.method.unpack(base, {"units:no.such.weight": packed[name]})
    assert base.is_untouched()


@pytest.mark.parametrize("name", ["prune", "l0", "dynamic", "post_training"])
def test_a_weight_of_another_shape_is_refused(name: str) -> None:
    """Where units lead into it, and it is touched before it is put in place."""
    base = tiny_base("bert")
    chosen = examples()[name]
    with chosen.attach(base, probe_for(chosen, READOUT, base)) as change:
        packed = chosen.pack(base, change)
    path = next(key for key in packed if key.startswith("units:")).removeprefix("units:")
    own = base.parameter(path).detach()
    for odd in (own[:-1], own[:, :-1], own[None], own.long()):
        with pytest.raises(DamagedDelta, match="expected floating-point numbers of shape"):
            chosen.unpack(base, {**packed, path: odd})
    assert base.is_untouched()


def test_a_delta_says_which_units_are_on(tmp_path: Path) -> None:
    base, task = tiny_base("bert"), tiny_task()
    done = fit(base, task, tmp_path, method("prune", keep=0.25), "x")
    delta = Delta.load(done.path)
    assert delta.method == method("prune", keep=0.25)
    assert done.bytes < 1500


def test_a_models_own_answers_are_labels_for_a_mask_of_its_own(tmp_path: Path) -> None:
    """As the card says: answered rows of any text, and a base that all masks share."""
    base, texts, rows = tiny_base("bert"), tmp_path / "texts.txt", tmp_path / "rows.tsv"
    base.tower.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    path, merged = tmp_path / f"full{SUFFIX}", tmp_path / "merged"
    tuned = Recipe("full", method("full"), READOUT).override(epochs=10, learning_rate=3e-3)
    tune(Base.load(tmp_path / "base"), tiny_task(), tuned, out=path)
    texts.write_text("\n".join(row.texts[0] for row in tiny_task().splits["train"]) + "\n")
    told = howfine_here("predict", path, "-", stdin=texts.read_text())
    rows.write_text("label\tprobability\ttext\n" + told.out)
    assert merge(path, merged, base)
    given = ("--task", rows, "--text", "text", "--label", "label", "--max-steps", "2", "--json")
    asked = ("tune", "--base", merged, "--recipe", "prune", "--start", "none", "--beside", "")
    found = howfine_here(*asked, *given, "--out", tmp_path / f"mask{SUFFIX}").json
    assert found["bytes"] < 4000
    with Delta.load(tmp_path / f"mask{SUFFIX}").applied(Base.load(merged)) as model:
        weight = model.towers["text"].get_parameter("encoder.layer.0.output.dense.weight")
        assert 0 < int((weight == 0).all(0).sum()) < weight.shape[1]
