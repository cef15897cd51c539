"""The shape of the code, held by reading it: who may import whom, and what may stand where."""

from __future__ import annotations

import ast
import fnmatch
import graphlib
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import howfine

SRC = Path(howfine.__file__).parent

# Each row may import from the rows above it, and within itself as long as no circle arises.
ROOMS = [
    ("errors", "batch", "gates", "concrete", "crossing", "sampled", "adamw"),
    (
        *("plugins", "fingerprint", "anatomy", "architectures", "codec", "codec.*", "checkpoint"),
        *("container", "folded", "metrics", "calibration", "text", "lora", "sources", "spread"),
        *("text_metrics", "consensus", "images", "retrieval", "pooling", "processes"),
        *("widths", "subwords"),
    ),
    ("task", "checks", "tasks", "tasks.*", "base", "pretrained", "stated"),
    ("surgery", "change"),
    ("method", "readout", "units", "cuts", "macs", "timing", "budgets"),
    (
        *("whole", "entries", "overlay", "probe", "language", "template", "tokens", "slots"),
        *(
            "inserted",
            "attention",
            "first",
            "choices",
            "layout",
            "worn",
            "mixed",
            "reparametrisation",
            "unread",
        ),
        *("vectors", "writing", "segmented", "first", "unit_gates", "replay", "rescaling"),
        "hidden",
        "encoding",
    ),
    ("methods", "methods.*", "readouts", "readouts.*"),
    ("streams", "recode"),
    ("delta", "recipe", "training"),
    (
        *("operands", "joining", "start", "regions", "cost", "align", "distance", "compare"),
        *("sampler", "head", "pair"),
    ),
    ("harvest",),
    (
        *(
            "tune",
            "loop",
            "trainer",
            "arguments",
            "callbacks",
            "rates",
            "rounding",
            "evaluate",
            "merge",
            "attach",
        ),
        *("compose", "extract", "gain", "targets", "zero_shot", "combine", "passes"),
        *("streaming", "distill", "features", "directions", "search", "knowledge", "slicing"),
        *("export", "vocabulary", "latency", "attach", "semi_structured"),
    ),
    ("ledger", "answer", "plan", "stored"),
    ("queue", "refine", "study"),
    (
        *("report", "report_page", "report_tables", "report_where", "wording", "catalogue"),
        *("figures", "figures_calibration", "figures_distance", "pictures_page"),
        "report_pictures",
        "report_latency",
        "figures_latency",
    ),
    (
        *("cli", "cli_align", "cli_compose", "cli_extract", "cli_inspect", "cli_models"),
        *("cli_zero_shot", "options"),
    ),
]
# Files that never import another of their own folder.
APART = ("methods.*", "readouts.*")
# Two worlds that meet only in the batch.
STRANGERS = [("methods.*", ("readout", "readouts.*")), ("readouts.*", ("method", "methods.*"))]

MOST_LINES, MOST_FUNCTION_LINES = 300, 40
HEAVY = {"torch", "transformers", "numpy"}


@cache
def modules() -> dict[str, Path]:
    """Dotted name below howfine -> file; a package is named like its folder."""
    names = {}
    for path in sorted(SRC.rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:  # the root package is no layer: it only points at the others, lazily
            names[name] = path
    return names


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room(name: str) -> int | None:
    for number, patterns in enumerate(ROOMS):
        if within(name, patterns):
            return number
    return None


def within(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def imported(name: str) -> set[str]:
    """The howfine modules a module imports anywhere, in functions and for typing too.

    "" stands for the root package itself, which no module may take anything from.
    """
    path = modules()[name]
    package = ["howfine", *name.split(".")]
    if path.name != "__init__.py":
        package.pop()
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(inner if inner.removeprefix("howfine.") in modules() else source)
    ours = {full for full in found if full == "howfine" or full.startswith("howfine.")}
    return {full.removeprefix("howfine").removeprefix(".") for full in ours}


def edges() -> list[tuple[str, str]]:
    return [(name, other) for name in modules() for other in sorted(imported(name))]


def test_every_module_has_its_place() -> None:
    lost = [name for name in modules() if room(name) is None]
    assert not lost, f"{lost}: place each new module in ROOMS, as low as its imports allow"


def test_every_place_has_its_module() -> None:
    named = {p.removesuffix(".*") for patterns in ROOMS for p in patterns}
    gone = sorted(named - set(modules()))
    assert not gone, f"{gone}: named in ROOMS but not in {SRC.name}/; remove or write them"


def test_imports_point_down() -> None:
    up = [
        f"{name} imports {other or 'howfine itself'}"
        for name, other in edges()
        if other == "" or (room(name) or 0) < (room(other) or 0)
    ]
    assert not up, f"{up}: a module may import only from its own row of ROOMS or one above"


def test_imports_have_no_circle() -> None:
    graph = {name: imported(name) - {name} for name in modules()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


def test_methods_and_readouts_stand_alone() -> None:
    def apart(name: str, other: str) -> bool:
        siblings = any(within(name, (p,)) and within(other, (p,)) for p in APART)
        return siblings or any(within(name, (a,)) and within(other, b) for a, b in STRANGERS)

    wrong = [f"{name} imports {other}" for name, other in edges() if apart(name, other)]
    assert not wrong, f"{wrong}: share through gates, surgery or the batch instead"


def test_no_registry_name_outside_its_own_file() -> None:
    own = {n.rpartition(".")[2]: p for n, p in modules().items() if within(n, APART)}
    found = [
        f"{path.relative_to(SRC)}:{node.lineno} {node.value!r}"
        for path in [*modules().values(), SRC / "__init__.py"]
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if node.value in own and own[node.value] != path
    ]
    assert not found, f"{found}: the core knows no method or readout by name; ask the registry"


def test_architectures_are_rows() -> None:
    def asks(node: ast.AST) -> bool:
        if isinstance(node, ast.Compare):
            parts: list[ast.expr] = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            parts = [node.subject]
        else:
            return False
        inner = [leaf for part in parts for leaf in ast.walk(part)]
        return any(
            getattr(leaf, "attr", getattr(leaf, "id", getattr(leaf, "value", None))) == "model_type"
            for leaf in inner
        )

    found = [
        f"{name}:{node.lineno}"
        for name, path in modules().items()
        if name != "anatomy"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Compare | ast.Match) and asks(node)
    ]
    assert not found, f"{found}: facts about architectures are rows of anatomy, never branches"


@pytest.mark.parametrize("name", ["", *modules()])
def test_files_and_functions_are_short(name: str) -> None:
    path = modules()[name] if name else SRC / "__init__.py"
    lines = path.read_text(encoding="utf-8").splitlines()
    said = [number for number, line in enumerate(lines, 1) if line.strip().startswith("# long: ")]
    functions = {first_line(node) - 1: node for node in ast.walk(tree(path)) if is_function(node)}
    of_file = any(number not in functions for number in said)  # else it is of the function below
    long = [f"{path.name}: {len(lines)} lines"] if len(lines) > MOST_LINES and not of_file else []
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if first_line(node) - 1 in said:
            continue
        if (length := code_lines(node)) > MOST_FUNCTION_LINES:
            long.append(f"{path.name}:{node.lineno} {node.name}: {length} lines")
    assert not long, f"{long}: split it, or write `# long: why it reads better in one piece`"


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def first_line(function: Any) -> int:
    return min([function.lineno, *(each.lineno for each in function.decorator_list)])


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    assert function.end_lineno is not None
    length = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        assert docstring.end_lineno is not None
        length -= docstring.end_lineno - docstring.lineno + 1
    return length


@pytest.mark.parametrize("name", ["", *modules()])
def test_every_module_says_what_it_is(name: str) -> None:
    path = modules()[name] if name else SRC / "__init__.py"
    assert ast.get_docstring(tree(path)), f"{path.relative_to(SRC)} has no docstring"


def heavy_after(code: str) -> set[str]:
    """Which heavy libraries a fresh interpreter holds after `code`."""
    probe = f"import sys\n{code}\nprint(); print(*sorted({HEAVY} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split())


def test_the_probe_sees_heavy_libraries() -> None:
    assert heavy_after("import numpy") == {"numpy"}


def test_importing_howfine_is_light() -> None:
    assert not heavy_after("import howfine; howfine.__all__; dir(howfine)")


def test_help_is_light() -> None:
    if "cli" not in modules():
        pytest.skip("no cli yet; test_every_place_has_its_module fails until there is one")
    code = (
        "from howfine.cli import main\n"
        "sys.argv = ['howfine', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code"
    )
    assert not heavy_after(code)
