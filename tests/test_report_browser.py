"""The report's page in a real browser: it draws, sorts and complains of nothing, offline."""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest

from howfine import report_page
from howfine.report import Report, summarise
from synthetic import BASE, ROWS, distances, located, records, synthetic_task

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# No network: no name resolves, and nothing is fetched in the background.
OFFLINE = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars", "--enable-logging=stderr",
    "--v=0", "--virtual-time-budget=8000",
)  # fmt: skip
DARK = "--blink-settings=preferredColorScheme=0"
HOSTILE = (
    "<img src=x onerror=\"document.title='pwned'\"></script><script>document.title='pwned'</script>"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (package `chromium`)"),
]


def browse(folder: Path, page: str, *flags: str) -> tuple[str, str]:
    """(standard output, log) of Chromium on a page."""
    path = folder / "report.html"
    path.write_text(page)
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *OFFLINE, f"--user-data-dir={folder / 'profile'}", *flags, path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def picture(path: Path) -> tuple[int, int, int]:
    """(width, height, number of distinct bytes in its rows) of a PNG."""
    data = path.read_bytes()
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    pixels, position = b"", 8
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] == b"IDAT":
            pixels += data[position + 8 : position + 8 + length]
        position += length + 12
    return width, height, len(set(zlib.decompress(pixels)))


def summary(name: str = "rotten-tomatoes") -> Report:
    task = synthetic_task(name=name, labels=("negative", name))
    return located(
        summarise(records(task), BASE, task, 0.01, distances=distances(), command="howfine study")
    )


@pytest.fixture(scope="module")
def page() -> str:
    return report_page.html(summary())


@pytest.mark.parametrize("scheme", [(), (DARK,)], ids=["light", "dark"])
def test_the_page_draws_and_complains_of_nothing(
    page: str, tmp_path: Path, scheme: tuple[str, ...]
) -> None:
    shot = tmp_path / "page.png"
    _, log = browse(tmp_path, page, "--window-size=1300,4300", f"--screenshot={shot}", *scheme)
    assert "CONSOLE" not in log
    width, height, colours = picture(shot)
    assert (width, height) == (1300, 4300)
    assert colours > 100


def test_every_plot_is_drawn_as_wide_as_its_place(page: str, tmp_path: Path) -> None:
    measure = """<script>const timer = setInterval(() => {
        const plots = [...document.querySelectorAll("[data-plot]")];
        if (!plots.every((plot) => plot.querySelector(".main-svg"))) return;  // not drawn yet
        clearInterval(timer);
        document.body.dataset.plots = plots.map((plot) => [
            plot.clientWidth,
            plot.querySelector(".main-svg").clientWidth,
            plot.querySelectorAll("svg *").length,
        ].join(":")).join(" ") }, 200)</script></body>"""
    dom, log = browse(
        tmp_path, page.replace("</body>", measure), "--window-size=700,900", "--dump-dom"
    )
    assert "CONSOLE" not in log
    plots = re.findall(r"(\d+):(\d+):(\d+)", dom.partition('data-plots="')[2].partition('"')[0])
    assert len(plots) == 7
    for place, drawn, elements in plots:
        assert place == drawn
        assert int(drawn) > 300
        assert int(elements) > 50


@pytest.mark.parametrize("presses", [1, 2])
def test_a_heading_sorts_its_table(page: str, tmp_path: Path, presses: int) -> None:
    press = 'document.querySelectorAll("th button")[2].click();' * presses
    dom, _ = browse(
        tmp_path, page.replace("</body>", f"<script>{press}</script></body>"), "--dump-dom"
    )
    body = dom.partition("<tbody>")[2].partition("</tbody>")[0]
    rows = body.split("<tr")[1:]
    scores = [float(re.findall(r'data-order="([^"]*)"', row)[2]) for row in rows]
    assert len(scores) == len(ROWS)
    assert scores == sorted(scores, reverse=presses == 2)


def test_hostile_names_run_nothing(tmp_path: Path) -> None:
    found = summary(HOSTILE)
    for group in found["groups"]:
        group["recipe"] = HOSTILE
    dom, log = browse(tmp_path, report_page.html(found), "--dump-dom")
    assert "CONSOLE" not in log
    assert "<title>pwned" not in dom
    assert dom.partition("<title>")[2].startswith("&lt;img src=x")


def test_a_broken_page_would_be_noticed(page: str, tmp_path: Path) -> None:
    broken = page.replace("</body>", "<script>Plotly.nothing()</script></body>")
    assert "CONSOLE" in browse(tmp_path, broken, "--dump-dom")[1]
    outward = page.replace("</body>", '<img src="https://x.example/a.png"></body>')
    assert "Content Security Policy" in browse(tmp_path, outward, "--dump-dom")[1]
