"""What the README shows runs as it stands there, on a small share of the data."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

import howfine
from console import howfine_here
from howfine.recipe import Recipe
from howfine.task import Task
from tiny import tiny_tower

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [
    line.removeprefix("$ ").partition("#")[0].strip()
    for block in re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An empty folder to work in, tasks of few examples and trainings of few steps."""
    monkeypatch.chdir(tmp_path)
    load, recipe = Task.load, Recipe.load
    monkeypatch.setattr(
        Task, "load", lambda *a, **k: load(*a, **k).subset(train=32, dev=16, test=16)
    )
    monkeypatch.setattr(Recipe, "load", lambda name: recipe(name).override(max_steps=2))
    return tmp_path


@pytest.mark.slow
def test_the_python_snippets_run(small, capsys):
    assert len(SNIPPETS) == 4
    exec(compile(SNIPPETS[0], "README.md", "exec"), {})
    bytes_on_disk, score = capsys.readouterr().out.split()
    (file,) = (small / "runs").iterdir()
    assert file.stat().st_size == int(bytes_on_disk)
    assert 0 <= float(score) <= 1

    model = tiny_tower("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exec(compile("import howfine, torch\n" + SNIPPETS[1], "README.md", "exec"), {"model": model})
    assert all((model.state_dict()[name] == value).all() for name, value in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/combine.md"])
def test_several_tasks_run(small, page):
    """Two tasks' files by the names that the page gives them."""
    base, task = howfine.Base.load("minilm"), Task.load("rotten-tomatoes")
    for name, recipe in (("mood", "adapter"), ("same", "head-only")):
        howfine.tune(base, task, recipe, out=f"{name}.delta.safetensors")
    text = (Path(__file__).parent.parent / page).read_text()
    snippet, *_ = (s for s in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "combine" in s)
    found = {"howfine": howfine}
    exec(compile(snippet.replace("tasks.predict", "found = tasks.predict"), page, "exec"), found)
    if page == "README.md":
        alone = SNIPPETS[2].replace("howfine.predict", "found = howfine.predict")
        held = {"howfine": howfine}
        exec(compile(alone, page, "exec"), held)
        assert held["found"][0]["label"] == found["found"][0]["label"]
    assert [answer["task"] for answer in found["found"]][:2] == ["mood", "same"]
    assert all(0 <= answer["probability"] <= 1 for answer in found["found"])


@pytest.mark.slow
def test_the_commands_run(small):
    lines = [line for line in COMMANDS if line.startswith("howfine")]
    assert len(lines) >= 5
    for line in lines:
        verb, *arguments = shlex.split(line)[1:]
        if verb == "study":  # the default plan trains for hours; its flags are checked
            said = howfine_here(verb, "--help")
            assert all(word in said.out for word in arguments if word.startswith("--"))
        else:
            said = howfine_here(verb, *arguments)
            assert said.code == 0, (line, said.err)
            assert said.out
    assert (small / "reviews.delta.safetensors").exists()


def test_every_verb_is_in_the_table():
    said = howfine_here("--help").out
    verbs = re.findall(r"^\W*([a-z-]+) {2,}", said[said.index("Commands") :], re.MULTILINE)
    table = set(re.findall(r"`([a-z-]+)`", " ".join(re.findall(r"^\| (`.*?) \|", TEXT, re.M))))
    assert len(verbs) >= 9
    assert set(verbs) == table


def test_the_extras_are_those_that_something_uses():
    """A server is planned: its extra is none to install while nothing imports its packages."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(stated["optional-dependencies"])
    code = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    extras -= set() if re.search(r"\bimport (fastapi|uvicorn)|from fastapi", code) else {"serve"}
    (listed,) = re.findall(r"^Extras: (.*?)\. ", TEXT, re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"`(\w+)`(?!\))", listed)) == extras


def test_the_public_names_are_all_there():
    assert all(getattr(howfine, name) is not None for name in howfine.__all__)
