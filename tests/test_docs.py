"""Being documented is a test: cards, links, and the settings that docs name."""

import re
from pathlib import Path

import pytest

from howfine import plugins
from howfine.method import Method
from howfine.plan import Plan, runs_of
from howfine.readout import Readout
from howfine.recipe import Recipe
from tiny import tiny_base, tiny_task

DOCS = Path(__file__).parent.parent / "docs"
ROOT = DOCS.parent
SECTIONS = ("What is stored", "Settings", "When it is a bad choice", "Our numbers")
CARDS = [
    *(DOCS / "methods" / f"{name}.md" for name in plugins.examples("methods", Method)),
    *(DOCS / "readouts" / f"{name}.md" for name in plugins.examples("readouts", Readout)),
]
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_every_method_and_readout_has_an_honest_card(card):
    text = card.read_text()
    assert text.startswith(f"# {card.stem}\n")
    for section in SECTIONS:
        assert f"## {section}" in text, f"{card.name} lacks the section {section!r}"
    assert "**Paper.**" in text
    assert "**Idea.**" in text


def test_no_card_without_its_method():
    assert {
        path for folder in ("methods", "readouts") for path in (DOCS / folder).glob("*.md")
    } == (set(CARDS))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_recipes_and_plans_are_what_their_page_shows(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "recipes.md").read_text(), re.S)
    files = [tmp_path / "mine.yaml", tmp_path / "plan.yaml"]
    for file, block in zip(files, blocks, strict=True):
        file.write_text(block.replace("mine.yaml", str(files[0])))
    recipe = Recipe.load(files[0])
    assert set(recipe.knob) == {"density"}
    assert isinstance(recipe.start, Recipe)
    made = runs_of(Plan.load(files[1]), tiny_base("bert"), tiny_task())
    assert len({run.key for run in made}) == len(made) == 3 * (1 + 1 + 2 + 1 + 3)


@pytest.mark.parametrize("name", ["default", "wide", "demo"])
def test_plans_that_ship_are_named_and_run(name):
    assert f"`{name}`" in (DOCS / "recipes.md").read_text()
    plan = Plan.load(name)
    made = runs_of(plan, tiny_base("bert"), tiny_task())
    assert {run.recipe.name for run in made} == {plan.ceiling, plan.floor, *plan.recipes}


@pytest.mark.parametrize("name", plugins.examples("methods", Method))
def test_every_setting_has_help(name):
    from howfine.catalogue import catalogue

    (entry,) = catalogue(name)
    for setting in entry["settings"]:
        assert setting["help"], f"{name}.{setting['name']} has no comment above it"


@pytest.mark.parametrize("name", plugins.examples("methods", Method))
def test_a_method_has_at_most_six_settings(name):
    from howfine.catalogue import catalogue

    assert len(catalogue(name)[0]["settings"]) <= 6
