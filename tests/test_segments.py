"""Inputs made of typed segments: their plain text and back, the tasks that have them, checks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from pyarrow import parquet

from howfine.errors import TaskError
from howfine.task import Example, Task
from howfine.tasks import SPLITS
from howfine.tasks.dialogue import replies, talk, turns_of
from howfine.tasks.segments import Segments, parsed, rendered
from tiny import written_task

SLOTS = (("name", "The Vaults"), ("area", "riverside"), ("response", ""))
TRIPLES = (
    *(("subject", "A"), ("relation", "near"), ("object", "2-10 : 0-14")),
    *(("subject", "B"), ("relation", "is"), ("object", "x")),
    ("response", ""),
)
TALK = (("speaker1", "Hi!"), ("speaker2", "Yes?"), ("speaker1", "A | B: both."), ("speaker2", ""))


def segmented(*segments: Segments) -> Task:
    """A task whose train rows have these segments, and whose other rows have the first."""
    rows = [Example((rendered(each),), targets=("so",), segments=each) for each in segments]
    return Task("made", {"train": rows, "dev": rows[:1], "test": rows[:1]}, (), "bleu", "")


@pytest.mark.parametrize(
    ("segments", "text"),
    [
        (SLOTS, "name : The Vaults | area : riverside"),
        (TRIPLES, "A : near : 2-10 : 0-14 | B : is : x"),
        (TALK, "speaker1 : Hi! | speaker2 : Yes? | speaker1 : A | B: both."),
        ((("source", "A | b : c"), ("target", "")), "A | b : c"),
        ((("speaker1", "Hi!"), ("speaker2", "")), "speaker1 : Hi!"),
    ],
)
def test_plain_text_and_back(segments: Segments, text: str) -> None:
    assert rendered(segments) == text
    assert parsed(text, segmented(segments).segment_kinds) == segments


noise = some.text("ab |:é\n", max_size=8)
texts = some.tuples(noise, some.sampled_from("ab|:é"), noise).map("".join)


@settings(deadline=None)
@given(
    kinds=some.sampled_from([("x", "customer rating", "y"), ("k", "x", "k")]),
    read=some.lists(some.tuples(some.integers(0, 1), texts), min_size=1),
)
def test_every_text_without_a_boundary_comes_back(
    kinds: tuple[str, ...], read: list[tuple[int, str]]
) -> None:
    """Bars and colons too, as long as no known kind stands between them."""
    segments = (*((kinds[number], text) for number, text in read), (kinds[-1], ""))
    assert parsed(rendered(segments), kinds) == segments


@settings(deadline=None)
@given(some.lists(some.tuples(*[some.text("ab-é", min_size=1)] * 2, noise)))
def test_every_triple_comes_back(triples: list[tuple[str, str, str]]) -> None:
    """Objects may have colons, and bars too: what follows one is no triple."""
    triples = [(a, b, f"<{c}>".replace(" | ", "|")) for a, b, c in triples]
    triples.append(("a", "b", "c : d | e"))
    names = ("subject", "relation", "object")
    read = (pair for each in triples for pair in zip(names, each, strict=True))
    segments = (*read, ("response", ""))
    assert parsed(rendered(segments), ("subject", "relation", "object", "response")) == segments


def test_kinds_are_found_whatever_their_capitals_and_spaces() -> None:
    kinds = ("customerRating", "area", "response")
    for name in ("customerRating", "customer rating", "customerrating", "Customer Rating"):
        assert parsed(f"{name} : low | food : a", kinds)[0] == ("customerRating", "low | food : a")
    # A kind that is written as it is comes before one that is like it.
    assert parsed("Area : x", ("area", "Area", "so"))[0] == ("Area", "x")


def test_a_text_alone_is_the_only_source() -> None:
    assert parsed("no kind : here", ("keyword", "so")) == (
        ("keyword", "no kind : here"),
        ("so", ""),
    )
    # Among other kinds it is what is translated, which has no name in front.
    kinds = ("name", "subject", "relation", "object", "source", "response", "target")
    assert parsed("A dog.", kinds) == (("source", "A dog."), ("target", ""))
    assert parsed("A : b : c | d", kinds)[2] == ("object", "c | d")


@pytest.mark.parametrize("text", ["", "foo : bar", "The Vaults | name : x"])
def test_texts_of_no_known_kind(text: str) -> None:
    expected = r"none of the kinds name, area, response; expected such as 'name : … \| area : …'"
    with pytest.raises(TaskError, match=expected):
        parsed(text, ("name", "area", "response"))


def test_texts_with_an_empty_segment() -> None:
    with pytest.raises(TaskError, match="has nothing for 'area'"):
        parsed("name : x | area :  ", ("name", "area", "response"))
    with pytest.raises(TaskError, match="'… : … : …'"):
        parsed("a : b", ("subject", "relation", "object", "response"))
    with pytest.raises(TaskError, match="nothing for 'source'"):
        parsed(" ", ("source", "target"))


def test_kinds_of_a_task_end_with_what_is_written() -> None:
    assert segmented(SLOTS, TRIPLES).segment_kinds == (
        *("name", "area", "subject", "relation", "object", "response"),
    )
    assert segmented(TALK).segment_kinds == ("speaker1", "speaker2")
    assert written_task().segment_kinds == ()


def test_a_subset_keeps_the_kinds_it_needs() -> None:
    """A rare kind may be drawn for test alone: it has its place after those of train."""
    rare = (("near", "x"), ("response", ""))
    rows = segmented(SLOTS, rare).splits["train"]
    splits = {"train": rows[:1], "dev": rows, "test": rows}
    task = Task("made", splits, (), "bleu", "")
    assert task.segment_kinds == ("name", "area", "near", "response")


def test_the_fingerprint_sees_segments() -> None:
    task = segmented(SLOTS)
    told = [Example(row.texts, targets=row.targets) for row in task.splits["train"]]
    plain = Task("made", dict.fromkeys(SPLITS, told), (), "bleu", "")
    other = segmented((("name", "The Vaults | area : riverside"), ("response", "")))
    assert task.splits["train"][0].texts == other.splits["train"][0].texts
    assert len({each.fingerprint for each in (task, plain, other)}) == 3
    # As it was before there were segments.
    assert plain.fingerprint == "0bf0c12f0819156e"


@pytest.mark.parametrize(
    ("segments", "said"),
    [
        ((("name", "x"),), "expected at least one to read"),
        ((("response", ""),), "expected at least one to read"),
        ((("name", "x"), ("response", "y")), "with '' as its text"),
        ((("name", " "), ("response", "")), "row 2 has nothing for 'name'"),
        ((), r"split 'train' of task 'made', row 2 has no segments, and the first train row has"),
    ],
)
def test_segments_that_cant_be_read(segments: Segments, said: str) -> None:
    good = segmented(SLOTS).splits["train"]
    rows = [*good, Example(("x",), targets=("so",), segments=segments)]
    with pytest.raises(TaskError, match=said):
        Task("made", {"train": rows, "dev": good, "test": good}, (), "bleu", "")


def test_segments_need_a_text_to_write() -> None:
    rows = [Example(("x",), score, segments=SLOTS) for score in (0.0, 1.0)]
    with pytest.raises(TaskError, match="no text to be written"):
        Task("made", dict.fromkeys(SPLITS, rows), (), "pearson", "")


# ---- named tasks


def saved(path: Path, **columns: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def e2e(home: Path) -> None:
    for split, rating in (("train", "customerrating"), ("dev", "customer rating"), ("test", "")):
        saved(
            home / "gen" / "e2e" / f"{split}.parquet",
            mr=[f"name[Of {split}], {rating or 'area'}[low], name[B]", f"near[{split}]"],
            ref=["It is cheap.", "Go there."],
        )


def test_slots_and_triples(tmp_path: Path) -> None:
    e2e(tmp_path)
    # Tables of a test set may have names that none of the train set has.
    task = Task.load("gen/e2e", data=tmp_path)
    assert task.provenance.endswith("data; no train row has a segment of 'area'")
    assert task.segment_kinds == ("name", "customerRating", "near", "area", "response")
    saved(tmp_path / "gen/e2e/test.parquet", mr=["name[x], near[ ]"], ref=["y"])
    task = Task.load("gen/e2e", data=tmp_path)
    assert task.segment_kinds == ("name", "customerRating", "near", "response")
    assert task.provenance.endswith("gen/e2e from a folder of data")
    # The text stays as it was, with the name that the file has.
    assert task.splits["dev"][0].texts[0] == "name : Of dev | customer rating : low | name : B"
    assert task.splits["train"][0].texts[0].count("customerrating : low") == 1
    for split in ("train", "dev"):
        for row in task.splits[split]:
            assert parsed(row.texts[0], task.segment_kinds) == row.segments
    # What is empty is no segment.
    assert task.splits["test"][0].segments == (("name", "x"), ("response", ""))
    triples = [[f"M{n} | JOINED | 19 : 73"] for n in range(30)]
    saved(tmp_path / "gen/dart/train.parquet", triples=triples, refs=[["It", "that"]] * 30)
    row = Task.load("gen/dart", data=tmp_path).splits["train"][0]
    assert row.segments[1:] == (("relation", "JOINED"), ("object", "19 : 73"), ("response", ""))
    assert row.segments[0] == ("subject", row.texts[0].split()[0])
    whole = Task.load("gen/e2e+gen/dart", data=tmp_path)
    assert whole.segment_kinds == (
        *("name", "customerRating", "near", "subject", "relation", "object", "response"),
    )
    assert [len(whole.splits[split]) for split in SPLITS] == [2 + 2 * 24, 2 + 3, 1 + 3]
    saved(tmp_path / "gen/dart/train.parquet", triples=[["M | JOINED"]], refs=[["It"]])
    with pytest.raises(TaskError, match=r"train.parquet, row 1: .* found the columns"):
        Task.load("gen/dart", data=tmp_path)


def test_turns_of_a_dialogue() -> None:
    script = "M: Hello.\nMary : Who: me?\nM: Yes.\nM: You.\nand him.\n\nW:\nSon: Me?"
    turns = turns_of(script)
    assert turns == [
        *(("M", "Hello."), ("Mary", "Who: me?"), ("M", "Yes. You. and him."), ("Son", "Me?")),
    ]
    assert replies(turns) == [
        ((("speaker1", "Hello."), ("speaker2", "")), "Who: me?"),
        (
            (("speaker2", "Hello."), ("speaker1", "Who: me?"), ("speaker2", "")),
            "Yes. You. and him.",
        ),
        # A third one speaks: all before are others.
        ((*(("speaker1", said) for _, said in turns[:3]), ("speaker2", "")), "Me?"),
    ]


def test_dialogues_stay_whole_and_are_read_once(tmp_path: Path) -> None:
    numbers = random.Random(0)
    scripts = {}
    for split in SPLITS:
        talks = ["\n".join(f"{'MW'[at % 2]}: {split} {numbers.random()}" for at in range(9))] * 2
        scripts[split] = talks[0].split("\n")
        saved(tmp_path / "mc/dream" / f"{split}.parquet", context=talks, question=["a", "b"])
    task = Task.load("gen/dream", data=tmp_path)
    assert (task.metric, task.segment_kinds) == ("bleu", ("speaker1", "speaker2"))
    for split in SPLITS:
        rows = task.splits[split]
        assert [row.targets for row in rows] == [(line[3:],) for line in scripts[split][1:]]
        assert [len(row.segments) - 1 for row in rows] == [1, 2, 3, 4, 5, 5, 5, 5]
        for row, line in zip(rows, scripts[split][1:], strict=True):
            before = scripts[split][: scripts[split].index(line)]
            assert [text for _, text in row.segments[:-1]] == [said[3:] for said in before][-5:]
            assert row.segments == talk(None, [said[3:] for said in before])
            assert row.texts == (rendered(row.segments),)


def test_dialogues_are_carved_out_whole(tmp_path: Path) -> None:
    talks = ["\n".join(f"{'MW'[at % 2]}: {n} {at}" for at in range(4)) for n in range(20)]
    saved(tmp_path / "mc/dream/train.parquet", context=talks)
    task = Task.load("gen/dream", data=tmp_path)
    assert [len(task.splits[split]) for split in SPLITS] == [16 * 3, 2 * 3, 2 * 3]
    sides = [{row.targets[0].split()[0] for row in task.splits[split]} for split in SPLITS]
    assert [len(side) for side in sides] == [16, 2, 2]
