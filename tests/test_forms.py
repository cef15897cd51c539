"""One's own rows made of segments, by form; sets of the hub in their real layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from howfine import options
from howfine.cli import app
from howfine.errors import BadSplit, MissingColumn, SettingError, TaskError, TaskNotFound
from howfine.task import Task
from howfine.tasks import SPLITS, files, forms, generation, hub, tables
from howfine.tasks.segments import Segments, parsed

# Form -> rows in its columns, and the segments and targets they make.
EXAMPLES: dict[str, list[tuple[dict[str, Any], Segments, tuple[str, ...]]]] = {
    "table": [
        (
            {"table": {"name": "Aromi", "area": "riverside", "food": None}, "response": "Aromi."},
            (("name", "Aromi"), ("area", "riverside"), ("response", "")),
            ("Aromi.",),
        ),
        (
            {"table": {"name": None, "area": None, "food": "fish"}, "response": "They sell fish."},
            (("food", "fish"), ("response", "")),
            ("They sell fish.",),
        ),
    ],
    "translation": [
        ({"source": "a : b | c", "target": "A"}, (("source", "a : b | c"), ("target", "")), ("A",))
    ],
    "summary": [
        ({"source": "Long.", "target": "L"}, (("source", "Long."), ("target", "")), ("L",))
    ],
    "dialogue": [
        (
            {"persona": ["I ski.", "I am old."], "history": ["Hi!"], "reply": "Hello."},
            (("persona", "I ski. I am old."), ("speaker1", "Hi!"), ("speaker2", "")),
            ("Hello.",),
        ),
        (
            {"persona": None, "history": [f"turn {n}" for n in range(6)], "reply": "Bye."},
            (
                *(("speaker1" if n % 2 else "speaker2", f"turn {n}") for n in range(1, 6)),
                ("speaker2", ""),
            ),
            ("Bye.",),
        ),
    ],
    "qa": [
        (
            {"document": "Of cats.", "history": [], "question": "Of what?", "answer": "Cats"},
            (("document", "Of cats."), ("question", "Of what?"), ("answer", "")),
            ("Cats",),
        ),
        (
            {"document": "D", "history": ["a?", "b", "c?", "d"], "question": "e?", "answer": "f"},
            (
                *(("document", "D"), ("question", "c?"), ("answer", "d")),
                *(("question", "e?"), ("answer", "")),
            ),
            ("f",),
        ),
    ],
}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def as_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]))
    return path


def loaded(home: Path, form: str, rows: list[dict[str, Any]], save: Any = jsonl) -> Task:
    ending = {jsonl: "jsonl", as_parquet: "parquet", as_csv: "csv"}[save]
    for split in SPLITS:
        save(home / f"{split}.{ending}", rows)
    return Task.load(home, form=form)


@pytest.mark.parametrize("form", forms.FORMS)
@pytest.mark.parametrize("save", [jsonl, as_parquet])
def test_rows_of_each_form(tmp_path: Path, form: str, save: Any) -> None:
    rows = [row for row, _, _ in EXAMPLES[form]]
    task = loaded(tmp_path, form, rows, save)
    for split in SPLITS:
        found = [(row.segments, row.targets) for row in task.splits[split]]
        assert found == [(segments, targets) for _, segments, targets in EXAMPLES[form]]
        for row in task.splits[split]:
            assert parsed(row.texts[0], task.segment_kinds) == row.segments
    assert task.kind == "generation"
    assert task.metric == {"summary": "rouge_l", "qa": "token_f1"}.get(form, "bleu")


@pytest.mark.parametrize("form", ["translation", "summary"])
def test_csv_holds_plain_texts(tmp_path: Path, form: str) -> None:
    task = loaded(tmp_path, form, [{"source": "1", "target": "2"}], as_csv)
    row = task.splits["test"][0]
    assert (row.segments, row.targets) == ((("source", "1"), ("target", "")), ("2",))


def test_tables_as_pairs_and_several_targets(tmp_path: Path) -> None:
    row = {"table": [["to", "x"], ["to", "y"]], "response": ["one", "two"]}
    task = loaded(tmp_path, "table", [row])
    assert [row.targets for row in task.splits["train"]] == [("one",), ("two",)]
    assert task.splits["dev"][0].targets == ("one", "two")
    assert task.splits["dev"][0].segments == (("to", "x"), ("to", "y"), ("response", ""))
    assert task.splits["dev"][0].texts == ("to : x | to : y",)


def test_rows_of_one_file_are_carved_and_may_lose_a_kind(tmp_path: Path) -> None:
    rows = [{"table": {f"k{n}": "v"}, "response": "r"} for n in range(20)]
    task = Task.load(jsonl(tmp_path / "a.jsonl", rows), form="table")
    assert [len(task.splits[split]) for split in SPLITS] == [16, 2, 2]
    assert set(task.segment_kinds) == {*(f"k{n}" for n in range(20)), "response"}
    lost = [row.segments[0][0] for split in ("dev", "test") for row in task.splits[split]]
    end = f"; no train row has a segment of {', '.join(map(repr, lost))}"
    assert task.provenance.endswith(f"carved out of train by a hash of the text, seed 0{end}")


TALK: dict[str, Any] = {"history": ["Hi!"], "reply": "Hello."}
QA: dict[str, Any] = {"document": "D", "question": "q?", "answer": "a"}


@pytest.mark.parametrize(
    ("form", "row", "said"),
    [
        ("table", {"table": {"a": "b"}, "response": ""}, "column 'response' holds '', expected a"),
        ("table", {"table": {"a": "b"}, "response": ["x", " "]}, "column 'response' holds"),
        ("table", {"table": {"a": " "}, "response": "x"}, "expected an object of names and texts"),
        ("table", {"table": {"a": 3}, "response": "x"}, "column 'table' holds {'a': 3}"),
        ("table", {"table": {}, "response": "x"}, "column 'table' holds {}"),
        ("table", {"table": [["a"]], "response": "x"}, r"column 'table' holds \[\['a'\]\]"),
        ("table", {"table": {"a : b": "x"}, "response": "x"}, "no name with ' | ' or ' : '"),
        ("table", {"table": "name[x]", "response": "x"}, r"a list of \[name, text\]"),
        ("translation", {"source": "", "target": "x"}, "column 'source' holds '', expected a text"),
        ("summary", {"source": ["x"], "target": "x"}, r"column 'source' holds \['x'\]"),
        ("summary", {"source": "x", "target": 3}, "column 'target' holds 3, expected a text, or"),
        ("dialogue", {**TALK, "history": []}, "column 'history' holds \\[\\], expected a list of"),
        ("dialogue", {**TALK, "history": "Hi!"}, "column 'history' holds 'Hi!'"),
        ("dialogue", {**TALK, "history": ["Hi!", ""]}, "none of them empty"),
        ("dialogue", {**TALK, "persona": "I ski."}, "column 'persona' holds 'I ski.'"),
        ("dialogue", {**TALK, "reply": None}, "column 'reply' holds None"),
        ("qa", {**QA, "history": ["q?"]}, "questions and answers in turn"),
        ("qa", {**QA, "document": None}, "column 'document' holds None"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, form: str, row: dict[str, Any], said: str) -> None:
    good = {"dialogue": TALK, "qa": QA}.get(form, EXAMPLES[form][0][0])
    path = jsonl(tmp_path / "a.jsonl", [good, row])
    with pytest.raises(TaskError, match=rf"a\.jsonl, row 2: .*{said.replace('|', '.')}"):
        Task.load(path, form=form)


@pytest.mark.parametrize("form", forms.FORMS)
def test_missing_columns(tmp_path: Path, form: str) -> None:
    row = EXAMPLES[form][0][0]
    for column in row:
        path = jsonl(tmp_path / "a.jsonl", [{k: v for k, v in row.items() if k != column}])
        if (form, column) in (("dialogue", "persona"), ("qa", "history")):
            (found,) = forms.rows_of(tables.columns(path), form, "a")
            assert column not in dict(found.segments)
            continue
        said = f"a.jsonl has no column '{column}'; found .*the form {form} has .*{column}"
        with pytest.raises(MissingColumn, match=said):
            Task.load(path, form=form)


def test_a_form_says_the_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{}])
    with pytest.raises(SettingError, match="form 'tabel' is unknown. Did you mean 'table'?"):
        Task.load(path, form="tabel")
    with pytest.raises(SettingError, match="names its columns itself, but found text='a', target"):
        Task.load(path, form="table", text="a", target="b")
    with pytest.raises(SettingError, match="fixed columns and splits, but found form"):
        Task.load("gen/e2e", data=tmp_path, form="table")


def test_the_command_line_has_forms(tmp_path: Path) -> None:
    row, segments, _ = EXAMPLES["qa"][0]
    path = jsonl(tmp_path / "a.jsonl", [{**row, "document": f"{n}"} for n in range(30)])
    task = options.load_task(options.stated_task(str(path), form="qa", train=3))
    assert len(task.splits["train"]) == 3
    assert task.splits["train"][0].segments[1:] == segments[1:]
    told = CliRunner().invoke(app, ["tune", "--recipe=bitfit", f"--task={path}", "--form=qs"])
    assert (
        str(told.exception)
        == "form 'qs' is unknown. Known: dialogue, qa, summary, table, translation."
    )


# ---- the hub


def persona(personality: list[str], turns: list[str], candidates: int = 2) -> dict[str, Any]:
    """A row as the hub has it: every second turn is a reply, the last candidate is the one said."""
    wrong = ["no"] * (candidates - 1)
    utterances = [
        {"candidates": [*wrong, turns[at]], "history": turns[:at]} for at in range(1, len(turns), 2)
    ]
    return {"personality": personality, "utterances": utterances}


def story(text: str, rounds: int) -> dict[str, Any]:
    answers = [f"a{n}" for n in range(rounds)]
    told = {"input_text": answers, "answer_start": [0] * rounds, "answer_end": [1] * rounds}
    questions = [f"q{n}?" for n in range(rounds)]
    return {"source": "wikipedia", "story": text, "questions": questions, "answers": told}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Any, ...]]]:
    """Lets the hub have these splits, and lists what is asked of it."""
    asked: list[tuple[Any, ...]] = []

    def serve(**splits: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        tables = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}

        def hub_splits(*args: Any) -> dict[str, datasets.Dataset]:
            asked.append(args)
            return tables

        monkeypatch.setattr(files, "hub_splits", hub_splits)
        return asked

    return serve


def test_persona_chat(served: Callable[..., list[tuple[Any, ...]]]) -> None:
    """Both rows of a dialogue stay on one side; personas turn; the silence is nobody's turn."""
    rows = []
    for n in range(30):
        turns = [f"{n} turn {at}" for at in range(6)]
        rows += [persona(["I ski.", "I am old."], turns)]
        rows += [persona([f"I am {n}."], ["__ SILENCE __", *turns[:5]])]
    asked = served(train=rows, validation=rows[:2])
    task = Task.load("gen/personachat")
    assert asked == [("AlekseyKorshuk/persona-chat", None, None)]
    assert task.segment_kinds == ("persona", "speaker1", "speaker2")
    first, second, third, *twin = task.splits["test"]
    assert first.segments == (
        *(("persona", "I ski. I am old."), ("speaker1", "0 turn 0"), ("speaker2", "")),
    )
    assert first.targets == ("0 turn 1",)
    assert second.segments[0] == ("persona", "I am old. I ski.")
    assert third.segments[0] == first.segments[0]
    assert [kind for kind, _ in third.segments] == [
        *("persona", *("speaker1", "speaker2") * 2, "speaker1", "speaker2"),
    ]
    assert twin[0].segments == (("persona", "I am 0."), ("speaker2", ""))
    assert twin[0].targets == ("0 turn 0",)
    assert "speaker2" == twin[1].segments[1][0] != twin[1].segments[2][0]
    sides = [{row.targets[0].split()[0] for row in task.splits[s]} for s in ("train", "dev")]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 3
    assert task.provenance == (
        "AlekseyKorshuk/persona-chat from the hub (test: validation); dev carved out of train by "
        "a hash"
    )


def test_coqa(served: Callable[..., list[tuple[Any, ...]]]) -> None:
    served(train=[story(f"S{n}", 3) for n in range(20)], validation=[story("V", 3)])
    task = Task.load("gen/coqa")
    assert [row.segments for row in task.splits["test"]] == [
        (("document", "V"), ("question", "q0?"), ("answer", "")),
        *(
            (
                *(("document", "V"), ("question", f"q{n}?"), ("answer", f"a{n}")),
                *(("question", f"q{n + 1}?"), ("answer", "")),
            )
            for n in range(2)
        ),
    ]
    assert [row.targets for row in task.splits["test"]] == [("a0",), ("a1",), ("a2",)]
    assert [len(task.splits[split]) for split in SPLITS] == [18 * 3, 2 * 3, 3]
    served(train=[story("S", 2)], validation=[{**story("S", 2), "questions": ["q?"]}])
    with pytest.raises(TaskError, match=r"stanfordnlp/coqa validation, row 1: .*answers.* changed"):
        Task.load("gen/coqa")
    served(train=[story("S", 2)], test=[story("S", 2)])
    with pytest.raises(BadSplit, match="coqa has no validation split; found train, test"):
        Task.load("gen/coqa")


def test_summaries_and_translations(served: Callable[..., list[tuple[Any, ...]]]) -> None:
    news = [{"article": f"A{n}", "highlights": "h\ni", "id": "x"} for n in range(3)]
    splits = {"train": [*news, {**news[0], "article": ""}], "validation": news, "test": news}
    asked = served(**splits)
    task = Task.load("gen/cnn-dailymail")
    assert (task.metric, len(task.splits["train"])) == ("rouge_l", 3)
    assert (
        task.provenance == "abisee/cnn_dailymail:3.0.0 from the hub; 1 with an empty text left out"
    )
    assert task.splits["dev"][2].segments == (("source", "A2"), ("target", ""))
    assert task.splits["dev"][2].targets == ("h\ni",)
    served(**{split: [{"translation": {"de": "ja", "en": "yes"}}] for split in splits})
    for source, target in (("de", "en"), ("en", "de")):
        row = Task.load(f"gen/iwslt-{source}-{target}").splits["train"][0]
        assert (*row.texts, *row.targets) == {"de": ("ja", "yes"), "en": ("yes", "ja")}[source]
    assert asked[1] == ("IWSLT/iwslt2017", "iwslt2017-de-en", "refs/convert/parquet")
    both = Task.load("gen/iwslt-de-en+gen/iwslt-en-de")
    assert [row.texts for row in both.splits["test"]] == [("ja",), ("yes",)]


def test_a_branch_is_read_by_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the branch lies on the hub: a folder for each configuration, and in it for each split."""
    for config, words in (("iwslt2017-de-en", ("ja", "yes")), ("iwslt2017-en-de", ("nein", "no"))):
        for split in ("train", "validation", "test"):
            folder = tmp_path / "repository" / config / split
            folder.mkdir(parents=True)
            rows = [{"translation": dict(zip(("de", "en"), words, strict=True))}]
            as_parquet(folder / "0000.parquet", rows)
    load = datasets.load_dataset

    def from_folder(name: str, *, data_dir: str, revision: str) -> Any:
        assert (name, revision) == ("IWSLT/iwslt2017", "refs/convert/parquet")
        home = str(tmp_path / "repository")
        return load(home, data_dir=data_dir, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    row = Task.load("gen/iwslt-de-en").splits["test"][0]
    assert (row.texts, row.targets) == (("ja",), ("yes",))


@pytest.mark.parametrize("name", hub.SETS)
def test_without_a_network(name: str) -> None:
    with pytest.raises(TaskNotFound, match=r"can't be had from the hub: .*\. Give a file"):
        Task.load(f"gen/{name}")
    assert generation.known(f"gen/{name}")


def test_data_sets_made_by_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found a.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(TaskNotFound, match="no longer supported, but found a.py. Give a file"):
        Task.load("owner/name", form="table")
