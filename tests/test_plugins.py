"""A method of one's own is one file in a folder: registry, laws, command line, recipes, files.

Each check runs in a process of its own, started with HOWFINE_PLUGINS, as a user would.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import howfine
from howfine.delta import Delta
from howfine.errors import SettingError
from howfine.method import methods

TESTS = Path(__file__).parent
TOY = '''
"""One scalar a normalisation: its weight is scaled as a whole, θ · s.

A toy: after LayerNorm tuning, with one number in place of each vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from howfine import surgery
from howfine.base import Base
from howfine.change import Change
from howfine.method import Method, Probe, Tensors, as_parameter


class Scale(nn.Module):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(start))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


@dataclass(frozen=True)
class Toy(Method):
    # Factor that every normalisation starts with.
    start: float = 1.0
    # Which parameters are scaled, as selectors.
    where: tuple[str, ...] = ("norm",)

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        paths = [path for path in base.choose(self.where) if path.endswith(".weight")]
        scales = {path: Scale(self.start) for path in paths}
        undo = [surgery.reweight(base.towers, path, scales[path]) for path in paths]
        return Change({path: scale.factor for path, scale in scales.items()}, undo)

    def pack(self, base: Base, change: Change) -> Tensors:
        return {path: factor.detach().clone() for path, factor in change.trainable.items()}

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        undo = []
        for path, factor in tensors.items():
            weight = base.parameter(path)
            scaled = as_parameter(weight.detach() * factor, weight)
            undo.append(surgery.replace(base.towers, path, scaled))
        return Change({}, undo)


EXAMPLE = Toy()
'''


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plugin folder that holds one method, in one file."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "methods").mkdir()
    (folder / "methods" / "toy.py").write_text(TOY)
    return folder


def run(plugins: Path, *arguments: str, expect: int = 0) -> str:
    """Standard output of `python ARGUMENTS` with the plugin folder; errors fail with its words."""
    sources = [str(Path(howfine.__file__).parent.parent), str(TESTS)]
    environment = {
        **os.environ,
        "HOWFINE_PLUGINS": str(plugins),
        "PYTHONPATH": os.pathsep.join([*sources, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == expect, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout if expect == 0 else done.stdout + done.stderr


def test_without_the_folder_there_is_no_toy() -> None:
    assert "toy" not in methods()


@pytest.mark.slow
def test_the_registry_finds_the_file(plugins: Path) -> None:
    code = (
        "from howfine.method import methods, examples, method\n"
        "print(sorted(methods()), examples()['toy'], method('toy', start='0.5'))"
    )
    found = run(plugins, "-c", code)
    assert "'full'" in found
    assert "'toy'" in found
    assert "Toy(start=1.0" in found
    assert "Toy(start=0.5" in found


@pytest.mark.slow
def test_the_toy_obeys_the_laws(plugins: Path) -> None:
    """Every law runs on it unasked."""
    laws = str(TESTS / "test_laws.py")
    found = run(plugins, "-m", "pytest", laws, "-k", "toy", "-q", "-p", "no:cacheprovider")
    passed = re.search(r"(\d+) passed", found)
    assert passed is not None
    assert int(passed.group(1)) >= 60, found


@pytest.mark.slow
def test_the_command_line_lists_it(plugins: Path) -> None:
    """`howfine methods` knows its summary, settings and their help, from the one file."""
    entries = json.loads(run(plugins, "-m", "howfine.cli", "methods", "--json"))
    toy = next(entry for entry in entries if entry["name"] == "toy")
    assert toy["summary"].startswith("One scalar a normalisation")
    settings = {setting["name"]: setting for setting in toy["settings"]}
    assert settings.keys() == {"start", "where"}
    assert settings["start"]["default"] == 1.0
    assert settings["start"]["help"] == "Factor that every normalisation starts with."
    shown = run(plugins, "-m", "howfine.cli", "methods", "toy")
    assert "--start" in shown
    wrong = run(plugins, "-m", "howfine.cli", "methods", "toi", expect=2)
    assert "Did you mean 'toy'?" in wrong


@pytest.mark.slow
def test_a_recipe_comes_with_it(plugins: Path) -> None:
    code = (
        "from howfine.recipe import Recipe, recipes\n"
        "recipe = Recipe.load('toy')\n"
        "print('toy' in recipes(), recipe.name, recipe.method)\n"
        "print(recipe.override(start=0.5).as_dict()['method'])\n"
        "print(Recipe.parse('mine', {'method': {'toy': {'start': 2}}}).method.start)"
    )
    lines = run(plugins, "-c", code).splitlines()
    assert lines[0].startswith("True toy Toy(start=1.0")
    assert lines[1] == "{'toy': {'start': 0.5}}"
    assert lines[2] == "2.0"


@pytest.mark.slow
def test_a_setting_without_a_default_is_the_examples(tmp_path: Path) -> None:
    """Which has to come from somewhere for `--recipe toy`; other methods run at their defaults."""
    (tmp_path / "methods").mkdir()
    needed = TOY.replace("start", "begin").replace("begin: float = 1.0", "begin: float")
    needed = needed.replace("Toy()", "Toy(begin=0.25)")
    (tmp_path / "methods" / "toy.py").write_text(needed)
    code = "from howfine.recipe import Recipe\nprint(Recipe.load('toy').method.begin)"
    assert run(tmp_path, "-c", code).split() == ["0.25"]


@pytest.mark.slow
def test_the_method_that_contributing_shows_works(tmp_path: Path) -> None:
    """It trains, and obeys the laws of a file."""
    page = (TESTS.parent / "CONTRIBUTING.md").read_text()
    (block,) = re.findall(r"   ```python\n(.*?)   ```", page, re.S)
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "biases.py").write_text(textwrap.dedent(block))
    laws = str(TESTS / "test_laws.py")
    found = run(tmp_path, "-m", "pytest", laws, "-k", "biases and bert", "-q", "--no-header")
    passed = re.search(r"(\d+) passed", found)
    assert passed is not None
    assert int(passed.group(1)) >= 5, found
    assert "failed" not in found


@pytest.mark.slow
def test_tune_trains_it_and_its_file_names_it(plugins: Path, tmp_path: Path) -> None:
    """From tune to a file; without the plugin folder, loading says which method is missing."""
    path = tmp_path / "toy.delta.safetensors"
    code = (
        "import sys\n"
        "from tiny import tiny_base, tiny_task\n"
        "from howfine.tune import tune\n"
        "done = tune(tiny_base('bert'), tiny_task(), 'toy', out=sys.argv[1], learning_rate=0.1)\n"
        "factors, _ = done.delta.tensors(tiny_base('bert'))\n"
        "print(len(factors), all(f.shape == () and f != 1 for f in factors.values()))"
    )
    assert run(plugins, "-c", code, str(path)).splitlines()[-1] == "5 True"
    with pytest.raises(SettingError, match="method 'toy' is unknown"):
        Delta.load(path)


@pytest.mark.slow
def test_a_file_without_an_example_is_refused(tmp_path: Path) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "toy.py").write_text(TOY.replace("EXAMPLE = Toy()", ""))
    code = "from howfine.method import methods\nmethods()"
    found = run(tmp_path, "-c", code, expect=1)
    assert "toy.py has no EXAMPLE that is a Method" in found
    assert "EXAMPLE = YourClass(...)" in found
