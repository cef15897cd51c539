"""The chores: names, versions, pins, commands and files that must agree with each other."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import howfine

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HOMES = vars(howfine)["_HOME"]
SUBMODULES = {path.stem for path in Path(howfine.__file__).parent.iterdir()}
VERBS = sorted(SUBMODULES & set(HOMES))


def typed_names() -> dict[str, str]:
    """Public name -> home, as type checkers are told."""
    tree = ast.parse(Path(howfine.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    return {
        alias.asname or alias.name: node.module.removeprefix("howfine.")
        + (f":{alias.name}" if alias.asname else "")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("howfine.")
        for alias in node.names
    }


def test_public_names_are_sorted_and_said_alike_everywhere() -> None:
    assert howfine.__all__ == sorted(howfine.__all__)
    assert {*HOMES, "__version__"} == set(howfine.__all__)
    assert typed_names() == HOMES
    assert set(howfine.__all__) <= set(dir(howfine))


@pytest.mark.parametrize("name", sorted(HOMES))
def test_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(howfine, name)
    assert callable(value)
    assert inspect.getdoc(value)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'tunes'; see howfine\.__all__"):
        howfine.tunes  # noqa: B018


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_and_its_module_share_a_name_in_peace(name: str) -> None:
    module = importlib.import_module(f"howfine.{name}")
    home, _, other = HOMES[name].partition(":")
    verb = vars(importlib.import_module(f"howfine.{home}"))[other or name]
    public = getattr(howfine, name)
    assert public is module
    assert callable(public)
    assert inspect.signature(public) == inspect.signature(verb)


@pytest.mark.parametrize(
    "first", ["howfine.methods", "import howfine.methods", "import howfine.methods as m"]
)
def test_whichever_is_asked_for_first(first: str) -> None:
    """A fresh interpreter per order; a light function stands in for the verb, to be quick."""
    code = f"""
import howfine
howfine._HOME["methods"] = "errors:near"
{first}
assert "Did you mean 'mask'" in howfine.methods("mask2", ["mask"])
import howfine.methods as m
assert howfine.methods("mask2", ["mask"]) == m("mask2", ["mask"])
from howfine import methods
assert methods is m and m.__path__
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_version_equals_changelog_and_metadata() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert released[0] == PROJECT["version"]
    assert howfine.__version__ == importlib.metadata.version("howfine") == PROJECT["version"]


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(r) for group in [PROJECT["dependencies"], *extras] for r in group]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_requirement_is_pinned_within_its_range(requirement: Requirement) -> None:
    assert pins()[requirement.name] in requirement.specifier


def test_pins_are_sorted_and_torch_names_no_build() -> None:
    assert list(pins()) == sorted(pins())
    # A local label such as +cpu would keep everyone else's accelerator build from matching.
    assert re.fullmatch(r"[\d.]+", pins()["torch"])


@pytest.mark.parametrize("word", ["demo", "test", "slow", "check", "bench", "clean"])
def test_make_knows_the_word(word: str) -> None:
    subprocess.run(["make", "-n", word], cwd=ROOT, check=True, capture_output=True, timeout=10)


def test_ci_runs_the_same_words() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^make (\w+)$", script, re.MULTILINE) == ["check", "test", "slow"]
    subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, check=True, timeout=10)


def test_package_ships_its_data() -> None:
    package = Path(howfine.__file__).parent
    assert (package / "py.typed").exists()
    assert list((package / "recipes").glob("*.yaml"))


def test_tests_are_where_pytest_looks() -> None:
    hidden = [
        path.name
        for path in (ROOT / "tests").rglob("*.py")
        if not path.name.startswith("test_")
        if re.search(r"^(async )?def test_", path.read_text(), re.MULTILINE)
    ]
    assert not hidden, f"{hidden}: pytest collects only test_*.py"


# Folders of one machine, and hosts that packages come from.
PLACES = re.compile(
    rb"(?<![\w./])/(work|root|home|Users|mnt|opt)/\w|pypi\.org|[p]ythonhosted|[n]pmjs|deb\.debian\.org"
)


def repository_files() -> list[Path]:
    """Tracked files and new ones that git does not ignore."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [ROOT / name for name in listing.stdout.split("\0") if name]


def test_no_file_names_a_machine_or_a_registry() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match.group().decode()!r}"
        for path in repository_files()
        if path.is_file()
        if (match := PLACES.search(path.read_bytes()))
    ]
    assert not found, f"{found}: write a relative path, or the package's name"
