"""The laws: what every method must obey on every tiny base. A new method is tested unasked.

Nothing here knows a method by name but the few laws on stored masks, which ask the file.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from howfine import cost, surgery
from howfine.base import Base
from howfine.codec import PRECISIONS
from howfine.delta import SUFFIX, Delta
from howfine.entries import flat_entries
from howfine.errors import SettingError, WrongBase
from howfine.method import examples, method, methods
from howfine.readout import Wired
from tiny import (
    LABELS,
    READOUT,
    Fitted,
    fit_a_little,
    logits_of,
    loss_of,
    probe_for,
    tiny_base,
    tiny_task,
    weight_at,
    wire,
)

BASES = ("bert", "roberta", "gpt2", "llama", "t5")
# Those of two towers have their laws in test_lilt.
ONE_TOWER = sorted(name for name, example in examples().items() if not example.for_towers)
every_method = pytest.mark.parametrize("name", ONE_TOWER)
# The second is nearly the first.
every_base = pytest.mark.parametrize(
    "base_name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n == "roberta")) for n in BASES],
)
# Rounding of stored values, relative to the largest of a tensor (fp16: and to the value itself).
PRECISION = {"fp16": 2**-10, "bf16": 2**-8, "int8": 1 / 127, "int6": 1 / 31}
# Fewer bits may clip the largest values: there, the error is no larger than the values are.
PRECISION |= {"int4": 0.8, "int3": 0.9, "int2": 1.0}


def reloaded(delta: Delta, folder: Path) -> Delta:
    path = folder / f"change{SUFFIX}"
    delta.save(path)
    return Delta.load(path)


@pytest.fixture(scope="module")
def fits() -> dict[tuple[str, str], Fitted]:
    """Fitted methods by (method, base), for laws that only look at them."""
    return {}


def look(fits: dict[tuple[str, str], Fitted], name: str, base_name: str) -> Fitted:
    key = (name, base_name)
    if key not in fits:
        fits[key] = fit_a_little(tiny_base(base_name), examples()[name])
    return fits[key]


# --- exact ---------------------------------------------------------------------------------------


@every_base
@every_method
def test_exact(name: str, base_name: str, tmp_path: Path) -> None:
    """A change re-loaded from its file gives the trained logits, bit for bit."""
    fitted = fit_a_little(tiny_base(base_name), examples()[name])
    trained = fitted.logits()
    delta = fitted.delta()
    fitted.change.remove()
    with reloaded(delta, tmp_path).applied(fitted.base) as wired:
        assert torch.equal(logits_of(wired, fitted.base), trained)


@every_base
@every_method
def test_exact_on_another_copy_of_the_base(name: str, base_name: str, tmp_path: Path) -> None:
    """Also where the base was loaded anew: nothing that counts is left outside the file."""
    fitted = fit_a_little(tiny_base(base_name), examples()[name])
    trained, delta = fitted.logits(), fitted.delta()
    fresh = tiny_base(base_name)
    with reloaded(delta, tmp_path).applied(fresh) as wired:
        assert torch.equal(logits_of(wired, fresh), trained)


@every_method
def test_packing_an_unpacked_change_gives_the_same_weights(name: str) -> None:
    """pack and unpack agree: the weights that the forward reads are the trained ones."""
    base = tiny_base("bert")
    paths = base.paths()
    fitted = fit_a_little(base, examples()[name])
    trained = {path: weight_at(base, path) for path in paths}
    tensors = fitted.method.pack(base, fitted.change)
    fitted.change.remove()
    with fitted.method.unpack(base, tensors):
        for path in paths:
            assert torch.equal(weight_at(base, path), trained[path]), path


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("variant", ["threshold", "zhao", "zhao-magnitude", "piggyback"])
def test_exact_mask_in_the_forward_pass(variant: str, mode: str) -> None:
    """A mask without chance in it: what a training step reads is what is stored."""
    base = tiny_base("bert")
    fitted = fit_a_little(base, method("mask", variant=variant, initial_sparsity=0.25))
    fitted.wired.train(mode == "train")
    paths = tiny_base("bert").choose(("matrices",))
    read = {path: weight_at(base, path) for path in paths}
    tensors = fitted.method.pack(base, fitted.change)
    fitted.change.remove()
    dropped = 0
    with fitted.method.unpack(base, tensors):
        for path in paths:
            assert torch.equal(read[path], weight_at(base, path)), path
            dropped += int((read[path] == 0).sum())
    assert dropped > 0


# --- untouched -----------------------------------------------------------------------------------


@every_base
@every_method
def test_untouched(name: str, base_name: str, tmp_path: Path) -> None:
    """Training and undoing, applying and leaving, give back the very same base."""
    base = tiny_base(base_name)
    plain = Wired(base, READOUT, READOUT.attach(base, LABELS)).eval()
    before = logits_of(plain, base)
    objects = {path: id(parameter) for path, parameter in base.towers.named_parameters()}
    classes = {path: type(module) for path, module in base.towers.named_modules()}
    flags = {path: p.requires_grad for path, p in base.towers.named_parameters()}

    def check() -> None:
        assert base.is_untouched()
        assert {path: id(p) for path, p in base.towers.named_parameters()} == objects
        assert {path: type(m) for path, m in base.towers.named_modules()} == classes
        assert {path: p.requires_grad for path, p in base.towers.named_parameters()} == flags
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.towers.modules())
        assert torch.equal(logits_of(plain.eval(), base), before)

    fitted = fit_a_little(base, examples()[name])
    delta = fitted.delta()
    fitted.change.remove()
    check()
    fitted.change.remove()  # a second call does nothing
    check()
    delta = reloaded(delta, tmp_path)
    for _ in range(2):
        with delta.applied(base) as wired:
            logits_of(wired, base)
        check()
    with pytest.raises(ZeroDivisionError), delta.applied(base):
        raise ZeroDivisionError
    check()


class Tied(nn.Module):
    """A language model in miniature: the decoder's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.decode = nn.Linear(4, 7, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.middle(self.embed(ids))))


class Halve(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


@pytest.mark.parametrize("path", ["embed.weight", "decode.weight"])
@pytest.mark.parametrize("verb", ["replace", "reweight", "trainable_copy"])
def test_untouched_ties(verb: str, path: str) -> None:
    """A tied weight changes in all its homes, and is the same one object again after undo."""
    torch.manual_seed(0)
    model = Tied().requires_grad_(False)
    ids = torch.arange(7)
    original, before = model.embed.weight, model(ids)
    changed = copy.deepcopy(model)  # deepcopy keeps the tie
    assert changed.embed.weight is changed.decode.weight
    with torch.no_grad():
        changed.embed.weight.mul_(0.5)
    if verb == "reweight":
        undo = surgery.reweight(model, path, Halve())
    elif verb == "replace":
        undo = surgery.replace(model, path, nn.Parameter(original * 0.5, requires_grad=False))
    else:
        trained, undo = surgery.trainable_copy(model, path)
        assert trained.requires_grad
        with torch.no_grad():
            trained.mul_(0.5)
    assert torch.equal(model.embed.weight, model.decode.weight)
    assert torch.equal(model(ids), changed(ids))
    undo()
    assert model.embed.weight is original
    assert model.decode.weight is original
    assert dict(model.named_parameters()).keys() == {"embed.weight", "middle.weight", "middle.bias"}
    assert torch.equal(model(ids), before)


def test_ties_share_one_gate() -> None:
    """The gradient of a gate on a tied weight is the sum over its homes."""
    torch.manual_seed(0)
    model = Tied().requires_grad_(False)
    gate = Halve()
    undo = surgery.reweight(model, "embed.weight", gate)
    model(torch.arange(7)).square().sum().backward()
    undo()
    dense = copy.deepcopy(model)
    scaled = (dense.embed.weight * 0.5).requires_grad_(True)
    hidden = torch.tanh(dense.middle(scaled[torch.arange(7)]))
    (gradient,) = torch.autograd.grad((hidden @ scaled.T).square().sum(), scaled)
    expected = (gradient * model.embed.weight).sum()
    torch.testing.assert_close(gate.factor.grad, expected)


def test_surgery_refuses_what_does_not_fit() -> None:
    model = Tied()
    with pytest.raises(SettingError, match=r"'embed\.wight' is not in this model"):
        surgery.homes(model, "embed.wight")
    with pytest.raises(SettingError, match=r"\(2, 2\).*\(7, 4\)"):
        surgery.replace(model, "embed.weight", nn.Parameter(torch.zeros(2, 2)))


# --- moves, frozen, start ------------------------------------------------------------------------


@every_base
@every_method
def test_moves(name: str, base_name: str) -> None:
    """Three steps change what the attached base puts out: the head is held equal."""
    base = tiny_base(base_name)
    chosen = examples()[name]
    fitted = fit_a_little(base, chosen)
    after = fitted.logits()
    fitted.change.remove()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with chosen.attach(base, probe_for(chosen, READOUT, base)):
            before = fitted.logits()
    assert torch.isfinite(after).all()
    assert (after - before).abs().max() > 1e-3


@every_base
@every_method
def test_frozen(name: str, base_name: str) -> None:
    """Gradients reach the declared parameters alone, and the optimiser has no others."""
    base = tiny_base(base_name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fitted = wire(base, examples()[name])
        fitted.wired.train()
        loss_of(fitted).backward()
    declared = {id(p) for p in fitted.change.trainable.values()}
    head = {id(p) for p in fitted.head.parameters()}
    reached = {id(p) for p in fitted.wired.parameters() if p.grad is not None}
    wanting = {id(p) for p in fitted.wired.parameters() if p.requires_grad}
    grouped = [p for group in fitted.method.groups(fitted.change) for p in group["params"]]
    assert wanting == declared | head
    assert reached <= declared | head
    assert reached & declared
    assert {id(p) for p in grouped} == declared
    assert len(grouped) == len(declared)
    originals = tiny_base(base_name)
    fitted.change.remove()
    kept = [id(p) for p in fitted.base.towers.parameters()]
    assert not declared & set(kept)
    assert originals.fingerprint == base.fingerprint


@every_base
@every_method
def test_start(name: str, base_name: str) -> None:
    """Attaching alone changes nothing, unless the class declares otherwise; then it does."""
    base = tiny_base(base_name)
    chosen = examples()[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fitted = wire(base, chosen)
        fitted.wired.eval()
    attached = fitted.logits()
    fitted.change.remove()
    assert torch.equal(fitted.logits(), attached) == type(chosen).starts_at_base


# --- alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@every_base
@every_method
def test_alone(name: str, base_name: str, side: str, tmp_path: Path) -> None:
    """A padded batch of texts of different lengths equals each text alone."""
    base = tiny_base(base_name, padding_side=side)
    fitted = fit_a_little(base, examples()[name])
    delta = reloaded(fitted.delta(), tmp_path)
    fitted.change.remove()
    texts = tiny_task().splits["test"]
    assert len({len(example.texts[0].split()) for example in texts}) > 2
    with delta.applied(base) as wired:
        together = logits_of(wired, base, texts)
        alone = torch.cat([logits_of(wired, base, [text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


# --- small ---------------------------------------------------------------------------------------


@every_base
@every_method
def test_small(name: str, base_name: str, tmp_path: Path, fits: dict) -> None:
    """Every byte is accounted for, and sets of places are near the combinatorial bound."""
    path = tmp_path / f"change{SUFFIX}"
    written = look(fits, name, base_name).delta().save(path)
    parts = cost.parts(path)
    assert written == path.stat().st_size == sum(part.bytes for part in parts)
    for part in parts:
        if part.bound_bytes is not None:
            assert part.bytes <= 1.01 * part.bound_bytes + 24, part


@every_base
@every_method
def test_same_seed_same_bytes(name: str, base_name: str, tmp_path: Path) -> None:
    files = []
    for run in ("first", "second"):
        path = tmp_path / f"{run}{SUFFIX}"
        fit_a_little(tiny_base(base_name), examples()[name], seed=3).delta().save(path)
        files.append(path.read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("store", PRECISIONS)
@pytest.mark.parametrize(
    "base_name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("bert", "gpt2"))) for n in BASES],
)
@every_method
def test_stored_precision(
    name: str, base_name: str, store: str, tmp_path: Path, fits: dict
) -> None:
    """What is rounded is rounded once: loaded equals stored, and saving again changes no byte."""
    fitted = look(fits, name, base_name)
    delta = fitted.delta(store)
    path, again = tmp_path / f"a{SUFFIX}", tmp_path / f"b{SUFFIX}"
    delta.save(path)
    loaded = Delta.load(path)
    loaded.save(again)
    assert path.read_bytes() == again.read_bytes()
    fresh = tiny_base(base_name)
    for stored, found in zip(delta.tensors(fresh), loaded.tensors(fresh), strict=True):
        assert stored.keys() == found.keys()
        for key, value in stored.items():
            assert torch.equal(dense(value), dense(found[key])), key
    with delta.applied(fresh) as wired:
        stored_logits = logits_of(wired, fresh)
    with loaded.applied(fresh) as wired:
        assert torch.equal(logits_of(wired, fresh), stored_logits)
    check_rounding(fitted, loaded, fresh, store)


def check_rounding(fitted: Fitted, loaded: Delta, fresh: Base, store: str) -> None:
    """Stored values are the trained ones to the precision promised, places exactly."""
    trained = fitted.method.pack(fitted.base, fitted.change)
    found, _ = loaded.tensors(fresh)
    assert found.keys() == trained.keys()
    known = dict(fresh.towers.named_parameters())
    together = [dense(v) - known[p].detach() for p, v in trained.items() if v.is_sparse]
    joint = max((float(moved[moved.abs() < 1e6].abs().max()) for moved in together), default=0.0)
    for path, value in trained.items():
        assert found[path].shape == value.shape
        if value.is_sparse:  # one scale for all of them
            check_entries(value, found[path], known[path].detach(), joint, store)
            continue
        if value.dtype == torch.bool or store == "fp32":
            assert torch.equal(found[path], value), path
            continue
        whole = path in known and known[path].shape == value.shape
        moved = value - known[path] if whole else value  # whole tensors: rounded difference
        if store == "sign":
            back = found[path] - known[path] if whole else found[path]
            assert ((back > 0) == (moved > 0))[moved.abs() > 1e-6].all(), path
        else:
            bound = PRECISION[store] * moved.abs().max() + 2**-23 * value.abs().max()
            assert (found[path] - value).abs().max() <= bound, path


def dense(tensor: Tensor) -> Tensor:
    """A tensor as it is; a sparse one with a number that no weight has where it says nothing."""
    if not tensor.is_sparse:
        return tensor
    index, values = flat_entries(tensor)
    made = torch.full((tensor.numel(),), 1e9)
    made[index] = values
    return made.view(tensor.shape)


def check_entries(
    value: Tensor, found: Tensor, original: Tensor, largest: float, store: str
) -> None:
    """Values rounded by what `store` promises, the scale being one for all.

    The same places, but for those whose difference is rounded to 0: the base's own value is theirs.
    """
    (index, trained), (again, given) = flat_entries(value), flat_entries(found)
    if store == "fp32":
        assert torch.equal(index, again)
        assert torch.equal(trained, given)
        return
    assert set(again.tolist()) <= set(index.tolist())
    whole = original.flatten().clone()
    whole[again] = given
    before, stored = original.flatten()[index], whole[index]
    if store == "sign":
        moved = trained - before
        assert ((stored - before > 0) == (moved > 0))[moved.abs() > 1e-6].all()
    elif store in PRECISION:
        bound = PRECISION[store] * largest + 2**-23 * trained.abs().max()
        assert (stored - trained).abs().max() <= bound


# --- the wrong base ------------------------------------------------------------------------------


@every_method
def test_wrong_base(name: str, tmp_path: Path, fits: dict) -> None:
    """Another base is refused by name, and left as it was."""
    delta = reloaded(look(fits, name, "bert").delta(), tmp_path)
    other = tiny_base("roberta", seed=1)
    with pytest.raises(WrongBase, match=r"tiny-bert.*tiny-roberta"), delta.applied(other):
        pass
    assert other.is_untouched()
    same_shapes = tiny_base("bert", seed=1)
    with pytest.raises(WrongBase), delta.applied(same_shapes):
        pass


def test_every_method_has_an_example() -> None:
    """The laws ran on something."""
    assert {"full", "mask", "select"} <= examples().keys() == methods().keys()
