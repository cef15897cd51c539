"""Law *alone*, extended: a row in a batch of several tasks is what it is alone (spec 11)."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import howfine
from howfine import surgery
from howfine.base import Base
from howfine.combine import combine
from howfine.delta import SUFFIX, Delta
from howfine.errors import BaseInUse, DeltaError, SettingError, TaskError, WrongBase
from howfine.evaluate import evaluate, predict
from howfine.method import Method, examples, method
from howfine.readout import Readout, readout
from tiny import (
    LABELS,
    READOUT,
    WORDS,
    Fitted,
    optimiser_of,
    tiny_base,
    tiny_language_base,
    tiny_task,
    wire,
)

BODIES = ("bert", "roberta", "gpt2", "llama", "t5", "albert", "distilbert")
MASKED = ("bert", "roberta", "albert", "distilbert", "electra")
OTHER = readout("classifier", max_length=32, pooling="mean", reference=True)


def fitted(base: Base, chosen: Method, read: Readout = READOUT, seed: int = 0) -> Delta:
    """A change that training moved, as its file has it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made: Fitted = wire(base, chosen, read)
        optimiser = optimiser_of(made)
        made.wired.train()
        for _ in range(3):
            batch = read.collate(base, tiny_task().splits["train"][:8])
            optimiser.zero_grad()
            (made.wired(**batch.as_kwargs())["loss"] + chosen.penalty(made.change, 0)).backward()
            optimiser.step()
        made.wired.eval()
        read.remember(made.wired, base, tiny_task().splits["train"])
        delta = made.delta()
        made.change.remove()
    return delta


def kinds() -> dict[str, Method]:
    """Every method's example, and more of those that share a pass, of other sizes."""
    return {
        **{name: example for name, example in examples().items() if not example.for_towers},
        "adapter-layerwise": method("adapter", placement="layerwise", width=3, std=0.3),
        "adapter-wide": method("adapter", reduction=2, std=0.3),
        "adapter-block": method("adapter", placement="block", width=5, std=0.3, activation="relu"),
        "prefix-long": method("prefix", length=6, hidden=0),
        "prefix-unshifted": method("prefix", length=2, hidden=0, shift=False),
        "prompt-long": method("prompt", length=5, init="normal"),
        "head-only": method("select", train=("none",)),
    }


def rows_of(names: list[str], count: int, seed: int = 0) -> list[tuple[str, str]]:
    numbers = random.Random(seed)
    return [
        (numbers.choice(names), " ".join(numbers.choices(WORDS, k=numbers.randint(1, 14))))
        for _ in range(count)
    ]


def alone(base: Base, deltas: dict[str, Delta], rows: list[tuple[str, Any]]) -> list[Tensor]:
    found = []
    for name, text in rows:
        delta = deltas[name]
        with delta.applied(base) as wired, torch.no_grad():
            from howfine.evaluate import examples_of

            batch = delta.readout.collate(base, examples_of([text]), labelled=False)
            found.append(wired(**batch.as_kwargs())["logits"][0])
    return found


def check(base: Base, deltas: dict[str, Delta], rows: list[tuple[str, Any]]) -> None:
    expected = alone(base, deltas, rows)
    with combine(deltas, base) as tasks:
        found = tasks.outputs(rows)
        again = tasks.outputs(rows[::-1])
    for one, other, wanted in zip(found, again[::-1], expected, strict=True):
        torch.testing.assert_close(one, wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(other, wanted, atol=1e-5, rtol=0)
    assert base.is_untouched()
    assert base.reserved == 0


@pytest.mark.parametrize("name", BODIES)
def test_every_kind_in_one_batch(name: str) -> None:
    """All methods at once, two of each that shares a pass, other readouts, random order."""
    base = tiny_base(name)
    deltas = {
        kind: fitted(base, chosen, READOUT if number % 2 else OTHER, seed=number)
        for number, (kind, chosen) in enumerate(kinds().items())
        if chosen.start != "needed" and (name != "albert" or kind != "deep")
    }
    check(base, deltas, rows_of(list(deltas), 24))
    (text,) = rows_of(["adapter"], 1)
    check(base, deltas, [text])


SHARED = (
    "adapter",
    "adapter-wide",
    "adapter-block",
    "adapter-layerwise",
    "prefix",
    "prefix-unshifted",
    "prompt-long",
    "head-only",
)


@pytest.mark.parametrize(
    "pair", list(itertools.combinations([*SHARED, "sparse", "mask"], 2)), ids=str
)
def test_every_pair(pair: tuple[str, str]) -> None:
    base = tiny_base("bert")
    deltas = {kind: fitted(base, kinds()[kind], seed=3) for kind in pair}
    rows = rows_of(list(pair), 6, seed=1)
    check(base, deltas, rows)
    check(base, deltas, [row for row in rows if row[0] == pair[0]])


def test_one_pass_for_all_that_share_it() -> None:
    """Sixteen adapters and sixteen prefixes: the base runs once."""
    base = tiny_base("bert")
    deltas = {
        f"{kind}{number}": fitted(base, kinds()[kind], seed=number)
        for kind in ("adapter", "prefix-long")
        for number in range(4)
    }
    rows = [(name, "w1 w2 w3") for name in deltas]
    runs: list[int] = []
    with combine(deltas, base) as tasks:
        run = base.body.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            runs.append(len(kwargs["input_ids"]))
            return run(*args, **kwargs)

        undo = surgery.rewire(base.body, counted)
        tasks.outputs(rows)
        undo()
    assert runs == [8]


def test_another_rows_change_changes_no_other_row() -> None:
    base = tiny_base("gpt2")
    deltas = {f"p{n}": fitted(base, kinds()["prefix-long"], seed=n) for n in range(3)}
    text = "w1 w2 w3 w4"
    with combine(deltas, base) as tasks:
        first = tasks.outputs([("p0", text), ("p1", text), ("p2", text)])
        second = tasks.outputs([("p0", text), ("p2", text), ("p2", text)])
    torch.testing.assert_close(first[0], second[0], atol=1e-6, rtol=0)
    assert (first[1] - second[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", MASKED)
def test_readouts_of_a_language_model(name: str) -> None:
    """Slots, masks, options with a mask of four axes, and a linear layer, side by side."""
    base = tiny_language_base(name)
    template = "{slot} {text} {slot*2} {mask} w9 {pair}"
    reads = {
        "warp": (method("prompt"), readout("verbalizer", template=template, max_length=32)),
        "other": (
            method("prompt", length=2),
            readout("verbalizer", template="{text} {mask}", max_length=32),
        ),
        "few": (kinds()["adapter"], readout("label_embedding", max_length=32)),
        "line": (kinds()["prefix"], READOUT),
        # LayerNorms of the language model's head are among those that rows wear.
        "normed": (
            method("adapter", beside=("norm",), std=0.3),
            readout("verbalizer", template="{text} {mask}", max_length=32),
        ),
        "choice": (
            method("adapter", reduction=2, std=0.3, beside=("norm",)),
            readout("multiple_choice", options=("w20 w21", "w22"), answers=("w50", "w51")),
        ),
    }
    deltas = {
        kind: fitted(base, chosen, read, seed=number)
        for number, (kind, (chosen, read)) in enumerate(reads.items())
    }
    check(base, deltas, rows_of(list(deltas), 15, seed=2))


def test_pairs_and_single_texts() -> None:
    base = tiny_base("bert")
    deltas = {"one": fitted(base, kinds()["adapter"]), "two": fitted(base, kinds()["prefix"])}
    rows: list[tuple[str, Any]] = [
        ("one", "w1 w2"),
        ("two", ("w3 w4 w5", "w6")),
        ("one", "w7"),
        ("two", ("w8", "w9")),
    ]
    check(base, deltas, rows)


def test_long_texts_are_cut_as_they_are_alone() -> None:
    """What stands in front takes room from its own texts alone."""
    base = tiny_base("bert")
    read = readout("classifier", max_length=64)
    deltas = {
        "prefix": fitted(base, method("prefix", length=20, hidden=0), read),
        "prompt": fitted(base, method("prompt", length=30), read),
        "plain": fitted(base, method("select", train=("none",)), read),
    }
    text = " ".join(WORDS[:80])
    check(base, deltas, [(name, text) for name in deltas])


def test_strict_is_bit_for_bit(tmp_path: Path) -> None:
    base = tiny_base("bert")
    deltas = {kind: fitted(base, kinds()[kind]) for kind in ("adapter", "prefix", "sparse")}
    rows = rows_of(list(deltas), 9)
    with combine(deltas, base, strict=True) as tasks:
        found = tasks.outputs(rows)
    for name, delta in deltas.items():
        mine = [place for place, (task, _) in enumerate(rows) if task == name]
        with delta.applied(base) as wired, torch.inference_mode():
            from howfine.evaluate import examples_of

            batch = delta.readout.collate(
                base, examples_of([rows[place][1] for place in mine]), labelled=False
            )
            expected = wired(**batch.as_kwargs())["logits"]
        assert torch.equal(torch.stack([found[place] for place in mine]), expected)


def test_answers_are_those_of_predict(tmp_path: Path) -> None:
    base = tiny_base("bert")
    deltas = {kind: fitted(base, kinds()[kind]) for kind in ("adapter", "mask")}
    paths = {}
    for name, delta in deltas.items():
        paths[name] = tmp_path / f"{name}{SUFFIX}"
        delta.save(paths[name])
    rows = rows_of(list(deltas), 6)
    with howfine.combine(paths, base) as tasks:
        found = tasks.predict(rows)
    for (name, text), answer in zip(rows, found, strict=True):
        (expected,) = predict(deltas[name], [text], base)
        assert answer["task"] == name
        assert answer["label"] == expected["label"]
        assert answer["probability"] == pytest.approx(expected["probability"], abs=1e-5)


def test_the_base_is_not_to_be_called_beside(tmp_path: Path) -> None:
    """A forward pass that says for no row which change it wears would be wrong for all."""
    base = tiny_base("bert")
    deltas = {str(n): fitted(base, kinds()["adapter"], seed=n) for n in range(2)}
    with combine(deltas, base), pytest.raises(RuntimeError, match="which row wears which"):
        base.tower(input_ids=torch.tensor([[5, 6, 7]]))
    assert base.is_untouched()


def test_a_delta_of_its_own_is_refused_while_tasks_are_combined() -> None:
    """By the library's own error, of predict and of evaluate."""
    base = tiny_base("bert")
    deltas = {kind: fitted(base, kinds()[kind]) for kind in ("adapter", "full")}
    with combine(deltas, base) as tasks:
        (expected,) = tasks.outputs([("adapter", "w1 w2")])
        with pytest.raises(BaseInUse, match="leave the context of the tasks"):
            predict(deltas["full"], ["w1"], base)
        with pytest.raises(BaseInUse, match="leave the context of the tasks"):
            evaluate(deltas["full"], base, tiny_task())
        with pytest.raises(SettingError, match="another change of this kind is on"):
            predict(deltas["adapter"], ["w1"], base)
        (found,) = tasks.outputs([("adapter", "w1 w2")])
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert base.is_untouched()


@pytest.mark.parametrize("strict", [False, True])
def test_tasks_that_are_never_entered_leave_the_base_alone(strict: bool) -> None:
    base = tiny_base("bert")
    deltas = {"one": fitted(base, kinds()["adapter"])}
    tasks, other = (combine(deltas, base, strict=strict) for _ in range(2))
    assert base.is_untouched()
    for ask in (tasks.predict, tasks.outputs):
        with pytest.raises(SettingError, match="context was not entered"):
            ask([("one", "w1")])
    with tasks:
        assert len(tasks.predict([("one", "w1")])) == 1
        with pytest.raises(SettingError, match="combined on this base already"), other:
            pass
    assert base.is_untouched()
    with other:
        assert len(other.predict([("one", "w1")])) == 1
    with pytest.raises(SettingError, match="context was left"), tasks:
        pass
    assert base.is_untouched()


def test_bad_input_is_named(tmp_path: Path) -> None:
    base = tiny_base("bert")
    deltas = {"mood": fitted(base, kinds()["adapter"])}
    with pytest.raises(SettingError, match="no delta was given"):
        combine({}, base)
    with combine(deltas, base) as tasks:
        with pytest.raises(SettingError, match=r"'moods' is unknown.*mood"):
            tasks.predict([("moods", "w1")])
        with pytest.raises(TaskError, match=r"task 'mood': found inputs of 1 and 2 texts"):
            tasks.predict([("mood", "w1"), ("mood", ("w1", "w2"))])
        for odd in (5, None, ("w1", 5), b"w1", {"text": "w1"}):
            with pytest.raises(TaskError, match=r"task 'mood': found .*, expected a text, a pair"):
                tasks.predict([("mood", odd)])  # type: ignore[list-item]
        for rows in (None, 5, "mood", [None], [("mood",)], {"mood": "w1"}):
            for ask in (tasks.predict, tasks.outputs, tasks.stream):
                with pytest.raises(
                    SettingError, match="expected (a pair of|rows: pairs of) a task"
                ):
                    ask(rows)  # type: ignore[arg-type]
        assert tasks.predict([]) == []
    with pytest.raises(WrongBase, match="tiny-bert"):
        combine(deltas, tiny_base("roberta"))
    with pytest.raises(WrongBase, match="kind"):
        combine(deltas, tiny_language_base("bert"))
    bare = Delta(
        base_name=base.name,
        base_fingerprint=base.fingerprint,
        method=method("full"),
        readout=READOUT,
        labels=LABELS,
        streams=(),
    )
    with pytest.raises(DeltaError, match="no head"):
        combine({"bare": bare}, base)
    assert base.is_untouched()


def test_a_task_that_gives_nan_is_named() -> None:
    base = tiny_base("bert")
    deltas = {"mood": fitted(base, kinds()["adapter"])}
    for name, kind in (("shared", "prefix"), ("apart", "full")):
        with method(kind).attach(base) as change:
            for value in change.trainable.values():
                value.data.fill_(torch.nan)
            head = READOUT.attach(base, LABELS)
            deltas[name] = Delta.pack(base, method(kind), change, READOUT, head, LABELS, "fp32")
    with combine(deltas, base) as tasks:
        for name in ("shared", "apart"):
            with pytest.raises(DeltaError, match=rf"task '{name}': .* NaN .* for 1 of 1 examples"):
                tasks.predict([("mood", "w1 w2"), (name, "w1 w2")])
        assert tasks.predict([("mood", "w1 w2")])


def test_an_error_leaves_the_other_tasks_as_they_were() -> None:
    """Also one in a task's own pass, for which the shared changes were off."""
    base = tiny_base("bert")
    deltas = {kind: fitted(base, kinds()[kind]) for kind in ("prompt-long", "full")}
    (expected,) = alone(base, deltas, [("prompt-long", "w1 w2")])
    with combine(deltas, base) as tasks:

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise MemoryError

        head = tasks._tasks["full"].head
        undo = surgery.rewire(head, broken)
        with pytest.raises(MemoryError):
            tasks.outputs([("full", "w1 w2")])
        undo()
        (found,) = tasks.outputs([("prompt-long", "w1 w2")])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    with pytest.raises(SettingError, match="context was left"):
        tasks.outputs([("prompt-long", "w1 w2")])
    assert base.is_untouched()


def test_a_base_is_combined_once_at_a_time() -> None:
    base = tiny_base("bert")
    deltas = {"one": fitted(base, kinds()["adapter"])}
    with combine(deltas, base), pytest.raises(SettingError, match="combined on this base already"):
        combine(deltas, base)
    with combine(deltas, base) as tasks:
        assert len(tasks.predict([("one", "w1")])) == 1


def test_threads_take_turns() -> None:
    base = tiny_base("bert")
    deltas = {kind: fitted(base, kinds()[kind]) for kind in ("prefix", "adapter", "mask")}
    rows = rows_of(list(deltas), 12, seed=4)
    with combine(deltas, base) as tasks:
        expected = [tasks.outputs([row])[0] for row in rows]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda row: tasks.outputs([row])[0], rows * 4))
    for one, wanted in zip(found, expected * 4, strict=True):
        torch.testing.assert_close(one, wanted, atol=1e-6, rtol=0)


def test_slots_that_no_vectors_fill_stay_as_they_are() -> None:
    """Whether another task of the batch has prompts or not."""
    base = tiny_language_base("bert")
    slotted = readout("label_embedding", template="{slot*2} {text} {mask} {pair}", max_length=32)
    warp = readout("verbalizer", template="{slot*3} {text} {mask}", max_length=32)
    deltas = {
        "filled": fitted(base, method("prompt"), warp),
        "empty": fitted(base, kinds()["adapter"], slotted),
    }
    check(base, deltas, rows_of(list(deltas), 6, seed=5))
