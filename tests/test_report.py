"""The report: its numbers, its sentence, its page, and the files it leaves in a study's folder."""

from __future__ import annotations

import copy
import dataclasses
import html
import json
import re
import shutil
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from markupsafe import escape

from howfine import (
    figures,
    figures_calibration,
    figures_distance,
    report_page,
    report_tables,
    report_where,
    stored,
    wording,
)
from howfine.delta import Delta
from howfine.errors import SettingError
from howfine.ledger import Ledger
from howfine.plan import Plan
from howfine.report import Report, _hand_over, report, summarise
from howfine.start import weight_at
from howfine.study import study
from synthetic import (
    BASE,
    LAYERS,
    PARTS,
    ROWS,
    distances,
    failed,
    located,
    record,
    records,
    scores_task,
    synthetic_task,
    where,
)
from tiny import tiny_base, tiny_task

HOSTILE = '<img src="https://x.example/a" onerror="boom()"> | `*[x](y)*` & "\n</script>'


@pytest.fixture(scope="module")
def result() -> Report:
    task = synthetic_task()
    runs = records(task)
    runs[-1] = failed(runs[-1], "the loss became nan")
    return located(
        summarise(runs, BASE, task, 0.01, distances=distances(), command="howfine study --x")
    )


@pytest.fixture(scope="module")
def page(result: Report) -> str:
    return report_page.html(result)


def outside_scripts(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def figures_of(page: str) -> str:
    """The figures' JSON."""
    return page.partition('id="figures">')[2].partition("</script>")[0]


class Tags(HTMLParser):
    """Every start tag with its attributes, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.text += data


# The content of report.json.


def test_report_json_has_the_keys_that_were_promised(result: Report) -> None:
    assert set(result) == {
        "sentence", "caveats", "base", "task", "margin", "full", "floor", "recommended", "groups",
        "runs", "distance", "where", "where_runs", "pictures", "latency", "machine", "date",
        "command",
    }  # fmt: skip
    assert set(result["task"]) == {
        "name", "metric", "provenance", "labels", "sizes", "texts", "options", "by_name"
    }  # fmt: skip
    assert result["task"]["sizes"] == {"train": 2, "dev": 2, "test": 400}
    assert set(result["base"]) == {"name", "sha256", "parameters"}
    assert set(result["machine"]) == {"cpu", "cores", "torch", "howfine"}
    assert date.fromisoformat(result["date"]).year >= 2025
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_groups_and_runs_are_all_there(result: Report) -> None:
    assert len(result["groups"]) == len(ROWS)
    assert len(result["runs"]) == 3 * len(ROWS)
    assert result["full"]["role"] == "ceiling"
    assert result["floor"] is not None
    assert result["floor"]["role"] == "floor"
    finished = [run for run in result["runs"] if "error" not in run]
    assert len(finished) == 3 * len(ROWS) - 1
    assert set(finished[0]) == {
        "key", "recipe", "settings", "seed", "role", "score", "interval", "dev_score", "bytes",
        "seconds", "steps", "peak_bytes", "trainable", "file", "ece",
    }  # fmt: skip
    assert result["runs"][-1]["error"] == "the loss became nan"
    assert result["groups"][-1]["seeds"] == [0, 1]


def test_the_recommended_group_is_the_smallest_within_the_margin_on_dev(result: Report) -> None:
    fitting = [row for row in ROWS if row[5] >= 0.99 * ROWS[0][5]]
    smallest = min(fitting, key=lambda row: row[4])
    chosen = result["recommended"]
    assert (chosen["recipe"], chosen["settings"]) == (smallest[0], smallest[2])
    assert chosen["seed"] == 2  # dev grows with the seed
    assert chosen["bytes"] == smallest[4] + 14


def test_distance_rows_are_the_matrices_in_the_order_of_the_data(result: Report) -> None:
    assert result["distance"] is not None
    places = [(row["layer"], row["part"]) for row in result["distance"]]
    assert places == [(layer, part) for layer in range(LAYERS) for part in PARTS]


def test_an_infinite_distance_is_null() -> None:
    rows = distances()
    rows[0] = dataclasses.replace(rows[0], relative=float("inf"))
    task = synthetic_task(50)
    found = summarise(records(task, (0,), ROWS[:3]), BASE, task, 0.01, distances=rows, command="")
    assert found["distance"] is not None
    assert found["distance"][0]["relative"] is None
    assert "–" in report_page.markdown(found)
    assert "Infinity" not in figures_of(report_page.html(found))


def test_a_study_without_a_finished_ceiling_is_an_error() -> None:
    task = synthetic_task(50)
    runs = records(task, (0,), ROWS[:3])
    runs[0] = failed(runs[0], "out of memory")
    with pytest.raises(SettingError, match="no finished ceiling run"):
        summarise(runs, BASE, task, 0.01, distances=None, command="")


# The sentence.


def test_the_sentence_says_all_that_was_found(result: Report) -> None:
    chosen, full = result["recommended"], result["full"]
    low, high = (f"{100 * bound:.1f}" for bound in chosen["mean_interval"])
    assert re.fullmatch(
        rf"rotten-tomatoes on minilm needs {chosen['bytes']:,} bytes \(0\.034 % of full "
        rf"fine-tuning's file\): accuracy {100 * chosen['mean_score']:.1f} % \[{low}, {high}\] "
        rf"against {100 * full['score']:.1f} % for full fine-tuning; the probability that it "
        rf"really is within 1 % of that is {chosen['probability']:.2f} \(paired bootstrap over 400 "
        rf"test examples and 3 seeds\), so 400 test examples can't say either way\.",
        result["sentence"],
    )


@pytest.mark.parametrize(
    ("probability", "said"),
    [
        (1.0, r"is > 0\.99 \([^)]*\)\."),
        (0.9995, r"is > 0\.99 \([^)]*\)\."),
        (0.95, r"is 0\.95 \([^)]*\)\."),
        (0.94, r"is 0\.94 \([^)]*\), likely, though 400 test examples can't prove it\."),
        (0.5, r"is 0\.50 \([^)]*\), so 400 test examples can't say either way\."),
        (0.1, r"is 0\.10 .*so it probably is not, though 400 test examples can't prove that\."),
        (0.0, r"is < 0\.01 .*does not hold on test\."),
        (0.002, r"is < 0\.01 \([^)]*\): chosen on dev, it does not hold on test\."),
    ],
)
def test_the_sentence_is_honest_about_the_probability(
    result: Report, probability: float, said: str
) -> None:
    changed = copy.deepcopy(result)
    changed["recommended"]["probability"] = probability
    assert re.search(said + "$", wording.sentence(changed))


def only(rows: list[Any], seeds: tuple[int, ...] = (0, 1), margin: float = 0.01) -> Report:
    task = synthetic_task(100)
    return summarise(records(task, seeds, rows), BASE, task, margin, distances=None, command="")


def test_where_only_the_ceiling_will_do_the_sentence_says_so() -> None:
    found = only(ROWS[:4], margin=0.0001)
    assert re.search(
        r"needs the whole 90,853,007 bytes of full fine-tuning: accuracy [\d.]+ % \[.*\]; none of "
        r"the 3 smaller changes came within 0\.01 % of it on dev \(closest: bitfit, 80\.\d % "
        r"against 82\.\d %\)\.$",
        found["sentence"],
    )
    assert "the one smaller change did not come within" in only(ROWS[:2])["sentence"]
    assert "no smaller change was measured" in only(ROWS[:1])["sentence"]
    assert only(ROWS[:1])["floor"] is None
    assert "reference" in Tags(report_page.html(only(ROWS[:1]))).text


def test_a_ceiling_that_trains_less_than_everything_is_not_called_full_fine_tuning() -> None:
    lesser = ("top-layers", "ceiling", {}, {"select": {"train": ["all@-1"]}}, 90_853_000, 0.82)
    task = synthetic_task(100)
    runs = [record(task, lesser, 0, trainable=1000), record(task, ROWS[1], 0)]
    found = summarise(runs, BASE, task, 0.01, distances=None, command="")
    assert "bytes of the ceiling top-layers" in found["sentence"]
    assert "full fine-tuning" not in Tags(report_page.html(found)).text


def test_a_single_seed_is_said_as_one_and_warned_of() -> None:
    found = only([*ROWS[:2], ROWS[-2]], seeds=(0,))
    assert "test examples and 1 seed)" in found["sentence"]
    assert any("single seed" in caveat for caveat in found["caveats"])
    assert not any("single seed" in caveat for caveat in only(ROWS[:2])["caveats"])


def test_failed_runs_and_small_test_sets_are_caveats(result: Report) -> None:
    assert any(re.search(r"Failed.*1 run;", caveat) for caveat in result["caveats"])
    low, high = result["full"]["interval"]
    assert any(f"± {50 * (high - low):.1f} points" in caveat for caveat in result["caveats"])


def test_a_floor_that_is_enough_is_said_to_be_the_floor() -> None:
    found = only(ROWS[:3], margin=0.2)
    assert found["recommended"]["recipe"] == "head-only"
    assert any("This is the floor" in caveat for caveat in found["caveats"])


def test_scores_that_are_no_shares_have_three_decimals() -> None:
    task = scores_task(60)
    found = summarise(records(task, (0, 1), ROWS[:4]), BASE, task, 0.05, distances=None, command="")
    ceiling, metric = found["full"], "mean of Pearson and Spearman correlation"
    assert re.search(rf"{metric} 0\.\d{{3}} \[0\.\d{{3}}, 0\.\d{{3}}\]", found["sentence"])
    text = Tags(report_page.html(found)).text
    assert f"{ceiling['score']:.3f} [{ceiling['interval'][0]:.3f}" in text.replace("\xa0", " ")
    assert "labels" not in text.partition("How it was measured")[2].partition("Base")[0]
    score = figures.score_against_bytes(found)
    assert score["layout"]["yaxis"]["ticksuffix"] == ""


# Numbers as people read them.


@pytest.mark.parametrize(
    ("size", "said"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (11_204, "11.2 kB"),
     (999_949, "999.9 kB"), (999_950, "1.0 MB"), (90_853_000, "90.9 MB"), (2e13, "20.0 TB")],
)  # fmt: skip
def test_human_sizes(size: float, said: str) -> None:
    assert wording.human(size) == said


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.00012, "0.012 %"), (0.034, "3.4 %"), (0.0996, "10 %"), (0.009996, "1.0 %"),
     (0.5, "50 %"), (1.0, "100 %"), (1.2, "120 %"), (0.0, "0 %"), (3e-9, "3.0e-07 %")],
)  # fmt: skip
def test_shares(share: float, said: str) -> None:
    assert wording.share_said(share) == said


@pytest.mark.parametrize(
    ("name", "said"),
    [("minilm", "minilm"), ("owner/model", "owner/model"), ("/data/models/bert/", "bert"),
     ("./reviews.csv", "reviews.csv")],
)  # fmt: skip
def test_paths_are_said_by_their_last_part(name: str, said: str) -> None:
    assert wording.name_said(name) == said


def test_settings_are_said_in_words() -> None:
    settings = {"where": ["matrices@-1", "K"], "initial_sparsity": 0.05, "top": 3}
    assert (
        wording.settings_said(settings) == "where matrices@-1 + K · initial sparsity 0.05 · top 3"
    )


# The page.


def test_the_page_loads_nothing(page: str) -> None:
    tags = Tags(page).tags
    assert not [tag for tag, _ in tags if tag in ("link", "img", "iframe", "object", "embed")]
    for tag, attributes in tags:
        assert not {"src", "href", "srcset", "action"} & set(attributes), (tag, attributes)
    assert not re.search(r"https?://|@import|url\(", outside_scripts(page))
    policies = [a["content"] for t, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies
    assert policies[0] is not None
    assert policies[0].startswith("default-src 'none'")
    assert page.count("* plotly.js v") == 1


def test_the_page_has_its_parts_in_order(page: str, result: Report) -> None:
    parser = Tags(page)
    plots = [a["data-plot"] for _, a in parser.tags if "data-plot" in a]
    assert plots == ["score", "reliability", "relative", "angle", "layers", "parts", "where"]
    text = parser.text.replace("\xa0", " ")
    parts = [
        result["sentence"], "Score against bytes", "Every recipe", "How far its confidence", "ECE",
        "The bins in numbers", "R1: base to a fresh random",
        "R2: between two random", "Which layers are critical", "matrices@-2,-1",
        "Where the change lies", "A file of every recipe", "changed entries in numbers", "Use it",
        "howfine evaluate deltas/mask", "howfine predict deltas/mask",
        "howfine merge deltas/mask",
        "How it was measured", "drawn at random, seed 0", "howfine study --x", "Failed runs",
        "the loss became nan",
    ]  # fmt: skip
    place = -1
    for part in parts:
        place = text.find(part, place + 1)
        assert place >= 0, f"{part!r} is not there, or too early"


def test_the_page_says_when_the_distance_is_not_known(result: Report) -> None:
    found = copy.deepcopy(result)
    found["distance"] = None
    parser = Tags(report_page.html(found))
    assert [a["data-plot"] for _, a in parser.tags if "data-plot" in a] == [
        "score", "reliability", "where"
    ]  # fmt: skip
    assert "Not measured: the delta file of full fine-tuning is no longer" in parser.text
    assert "Not measured" in report_page.markdown(found)


def test_hostile_names_are_text() -> None:
    task = synthetic_task(100, name=HOSTILE, labels=(HOSTILE, "b"), provenance=HOSTILE)
    rows = [*ROWS[:2], (HOSTILE, *ROWS[2][1:2], {"where": [HOSTILE]}, *ROWS[2][3:])]
    runs = records(task, (0, 1), rows)
    runs[-1] = failed(runs[-1], HOSTILE)
    found = summarise(
        runs, {**BASE, "name": HOSTILE}, task, 0.5, distances=distances(), command=HOSTILE
    )
    page = report_page.html(located(found))
    parser = Tags(page)
    assert not [tag for tag, _ in parser.tags if tag == "img"]
    assert not [a for _, a in parser.tags if any(name.startswith("on") for name in a)]
    assert page.count("</script>") == 3  # the figures, plotly and the page's own
    assert str(escape(HOSTILE)) in page
    # plotly reads HTML tags in its texts; none of ours is one.
    assert "<img" not in json.dumps(json.loads(figures_of(page)), ensure_ascii=False)
    markdown = report_page.markdown(found)
    code = re.sub(r"^    .*", "", markdown, flags=re.MULTILINE)
    assert not re.search(r"(?<!\\)(<|`|\]\()", code)
    assert_tables_are_rectangular(markdown)


# Figures.


def drawable(figure: dict[str, Any]) -> go.Figure:
    """A figure as plotly checks it, which knows every property and its values."""
    text = re.sub(r"var\(--\w+\)", "#123456", json.dumps(figure))
    return go.Figure(json.loads(text))


def test_figures_are_what_plotly_can_draw(result: Report) -> None:
    rows = result["distance"]
    assert rows
    drawable(figures.score_against_bytes(result))
    drawable(figures_calibration.reliability(result))
    drawable(figures_distance.heatmap(rows, "angle"))
    drawable(figures_distance.ranking(rows, "part"))
    drawable(figures_distance.shares(where()))


def test_every_colour_of_a_figure_is_one_of_the_page(result: Report, page: str) -> None:
    named = set(re.findall(r'"var\((--\w+)\)"', figures_of(page)))
    light, dark = page.partition("prefers-color-scheme: dark")[::2]
    for scheme in (light, dark.partition("* {")[0]):
        assert named <= set(re.findall(r"(--\w+):", scheme))


def test_the_front_has_nothing_smaller_and_better(result: Report) -> None:
    (front,) = (
        trace
        for trace in figures.score_against_bytes(result)["data"]
        if trace["mode"] == "lines" and trace["line"].get("shape") == "hv"
    )
    points = list(zip(front["x"], front["y"], strict=True))
    everything = [(group["bytes"], 100 * group["score"]) for group in result["groups"]]
    for size, score in everything:
        beaten = any(b <= size and s >= score and (b, s) != (size, score) for b, s in everything)
        assert ((size, score) in points) is not beaten


def test_marks_and_intervals_are_where_the_groups_are(result: Report) -> None:
    found = {}
    for trace in figures.score_against_bytes(result)["data"]:
        for number, size in enumerate(trace["x"] if "error_y" in trace else []):
            error = trace["error_y"]
            mean = trace["y"][number]
            ends = mean - error["arrayminus"][number], mean + error["array"][number]
            found[size] = (mean, *ends)
    for group in result["groups"]:
        expected = [100 * number for number in (group["score"], *group["interval"])]
        assert found[group["bytes"]] == pytest.approx(expected)


# Calibration.


def reliability_traces(found: Report) -> list[dict[str, Any]]:
    return figures_calibration.reliability(found)["data"]


def test_a_groups_error_is_the_mean_of_its_seeds_and_its_bins_hold_all(result: Report) -> None:
    by_key = {run["key"]: run for run in result["runs"] if "error" not in run}
    for group in result["groups"]:
        seeds = [by_key[key]["ece"] for key in group["keys"]]
        assert group["ece"] == pytest.approx(np.mean(seeds))
        assert sum(group["reliability"]["count"]) == 400 * len(seeds)
        table = group["reliability"]
        right = sum(
            count * accuracy
            for count, accuracy in zip(table["count"], table["accuracy"], strict=True)
            if count
        )
        assert right / (400 * len(seeds)) == pytest.approx(group["score"], abs=1e-5)


def test_every_recipe_says_its_error(result: Report) -> None:
    table = report_tables.groups_table(result)
    place = table.columns.index("ECE")
    said = {(row[0].order, row[1].text): row[place] for row in table.rows}
    for group in result["groups"]:
        cell = said[group["recipe"], wording.settings_said(group["settings"]) or "–"]
        assert cell == (f"{100 * group['ece']:.1f} %", group["ece"])
    assert "| ECE | seeds |" in report_page.markdown(result)


def test_marks_of_the_reliability_plot_are_the_bins_with_answers(result: Report) -> None:
    diagonal, *traces = reliability_traces(result)
    assert diagonal["x"] == diagonal["y"]
    chosen = next(g for g in result["groups"] if result["recommended"]["key"] in g["keys"])
    names = ["full fine-tuning", "mask (recommended)", "head-only (floor)"]
    for trace, name, group in zip(
        traces, names, (result["full"], chosen, result["floor"]), strict=True
    ):
        assert group is not None
        assert trace["name"] == f"{name}, ECE {100 * group['ece']:.1f} %"
        table = group["reliability"]
        filled = [place for place, count in enumerate(table["count"]) if count]
        assert trace["x"] == pytest.approx([100 * table["confidence"][b] for b in filled])
        assert trace["y"] == pytest.approx([100 * table["accuracy"][b] for b in filled])
        assert len(trace["marker"]["size"]) == len(filled)
        largest = np.argmax([table["count"][b] for b in filled])
        assert trace["marker"]["size"][largest] == max(trace["marker"]["size"])
    assert len({trace["marker"]["symbol"] for trace in traces}) == 3


def test_who_cannot_see_the_plot_reads_it(page: str, result: Report) -> None:
    (said,) = (a["aria-label"] for _, a in Tags(page).tags if a.get("data-plot") == "reliability")
    assert said is not None
    table = result["full"]["reliability"]
    total = sum(table["count"])
    sure = sum(c * v for c, v in zip(table["count"], table["confidence"], strict=True) if c) / total
    assert f"ECE {100 * result['full']['ece']:.1f} %" in said
    assert f"at a mean confidence of {100 * sure:.1f} %; mask (recommended): ECE" in said
    rows = report_tables.reliability_table(result).rows
    assert len(rows) == sum(len(trace["x"]) for trace in reliability_traces(result)[1:])
    (lowest,) = (row for row in rows if row[0].text.startswith("full") and row[1].order == 14 / 15)
    assert lowest[1].text == "93.3 to 100.0 %"
    assert lowest[2].order == table["count"][-1]
    markdown = report_page.markdown(result)
    for row in rows:
        assert f"| {' | '.join(cell.text for cell in row)} |" in markdown


def without(runs: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """Records as a version that knew no calibration wrote them."""
    lost = ("ece", "reliability")
    return [
        {k: v for k, v in run.items() if k not in lost} if run["recipe"] in keys else run
        for run in runs
    ]


def test_records_without_an_error_are_reported_without_one() -> None:
    task = synthetic_task(100)
    runs = without(records(task, (0, 1), ROWS[:3]), *(row[0] for row in ROWS[:3]))
    found = summarise(runs, BASE, task, 0.01, distances=None, command="")
    assert [group["ece"] for group in found["groups"]] == [None] * 3
    page, markdown = report_page.html(found), report_page.markdown(found)
    assert [a["data-plot"] for _, a in Tags(page).tags if "data-plot" in a] == ["score"]
    for text in (Tags(page).text, markdown):
        assert "ECE" not in text
        assert "confidence can be trusted" not in text
    assert_tables_are_rectangular(markdown)


def test_records_of_which_some_lack_an_error_show_the_others() -> None:
    task = synthetic_task(100)
    runs = without(records(task, (0, 1), ROWS[:3]), "full", "bitfit")
    runs[2] = without(runs[2:3], "head-only")[0]
    found = summarise(runs, BASE, task, 0.2, distances=None, command="")
    assert found["full"]["ece"] is None
    assert found["floor"] is not None
    assert found["floor"]["ece"] == runs[3]["ece"]
    names = [trace["name"].partition(",")[0] for trace in reliability_traces(found)[1:]]
    assert names == ["head-only (floor) (recommended)"]
    table = report_tables.groups_table(found)
    cells = [row[table.columns.index("ECE")] for row in table.rows]
    assert [cell.text == "–" for cell in cells] == [False, True, True]
    assert cells[1].order > cells[0].order


def test_regression_is_reported_without_an_error() -> None:
    task = scores_task(60)
    found = summarise(records(task, (0, 1), ROWS[:3]), BASE, task, 0.05, distances=None, command="")
    assert "ECE" not in Tags(report_page.html(found)).text
    assert found["groups"][0]["ece"] is None


# The distances' plots.


def test_the_heatmap_is_logarithmic_and_leaves_the_unmoved_empty(result: Report) -> None:
    assert result["distance"]
    trace = figures_distance.heatmap(result["distance"], "relative")["data"][0]
    assert (trace["x"], trace["y"]) == (list(PARTS), [str(layer) for layer in range(LAYERS)])
    for row in result["distance"]:
        cell = trace["z"][row["layer"]][PARTS.index(row["part"])]
        if row["relative"] == 0:
            assert cell is None
            assert trace["text"][row["layer"]][PARTS.index(row["part"])] == "0 %"
        else:
            assert 10**cell == pytest.approx(row["relative"])


def test_bars_rank_by_the_mean_over_the_layer(result: Report) -> None:
    assert result["distance"]
    bars = figures_distance.ranking(result["distance"], "layer")["data"][0]
    assert bars["x"] == sorted(bars["x"])  # plotly draws the last one on top
    for name, value in zip(bars["y"], bars["x"], strict=True):
        layer = int(name.removeprefix("layer "))
        moved = [row["relative"] for row in result["distance"] if row["layer"] == layer]
        assert value == pytest.approx(100 * np.mean(moved))


def test_references_are_said_in_the_unit_of_the_movement(result: Report) -> None:
    assert result["distance"]
    rows = report_tables.scale_table(result["distance"]).rows
    # The synthetic base's weights have mean |w| 0.03, R1 0.039 and R2 0.0226.
    assert [row[1].text for row in rows[1:]] == ["130 %", "75 %"]
    assert rows[0][1].order == pytest.approx(
        np.median([row["relative"] for row in result["distance"]])
    )


# Where the change lies.


def test_the_heatmap_of_shares_tells_unchanged_parts_from_those_the_base_lacks() -> None:
    rows = where(least=2)
    changed, unchanged = figures_distance.shares(rows)["data"]
    layers = [None, *range(LAYERS)]
    assert changed["y"] == unchanged["y"] == ["outside", *map(str, range(LAYERS))]
    assert changed["x"] == unchanged["x"] == [*PARTS, "bias", "norm", "embedding", "other"]
    cells = {(row["layer"], row["part"]): row for row in rows}
    for i, layer in enumerate(layers):
        for j, part in enumerate(changed["x"]):
            row = cells.get((layer, part))
            logarithm, zero = changed["z"][i][j], unchanged["z"][i][j]
            if row is None:
                assert (logarithm, zero, changed["text"][i][j]) == (None, None, "")
            elif row["changed"]:
                assert (zero, unchanged["text"][i][j]) == (None, "")
                assert 10**logarithm == pytest.approx(row["changed"] / row["entries"])
            else:
                assert (logarithm, changed["text"][i][j]) == (None, "")  # else written twice
                assert (zero, unchanged["text"][i][j]) == (0, "0 %")
    assert changed["hovertext"][LAYERS][5] == "layer 5, O: 10 %"
    assert changed["hovertext"][0][8] == "outside the layers, embedding: 0 %"


def test_who_cannot_see_the_heatmap_of_shares_reads_it(page: str, result: Report) -> None:
    rows = where(least=2)
    changed, entries = (sum(row[name] for row in rows) for name in ("changed", "entries"))
    said = f"{changed:,} of {entries:,} entries changed ({100 * changed / entries:.2f} %). "
    said += "The largest shares: "
    text = report_where.said(rows)
    assert text.startswith(said)
    assert text.count(" of layer 5 (10 %)") == 3  # the densest first
    assert text.endswith(" Nothing changed in layers 0, 1.")
    (label,) = (
        a["aria-label"] for _, a in Tags(page).tags if a.get("data-plot") == "where"
    )  # fmt: skip
    assert label
    assert label.endswith(text)
    assert text.replace("(", r"(") in report_page.markdown(result)


def test_every_recipe_says_how_much_it_changes_and_where(result: Report) -> None:
    shown = report_where.view(result)
    assert shown
    table = shown["overview"]
    assert sorted(row[0].text for row in table.rows) == sorted({row[0] for row in ROWS})
    assert (table.chosen, table.rows[0][0].text) == (0, "mask")
    rows = where(least=2)
    top = sum(row["changed"] for row in rows if row["layer"] == 5)
    changed = sum(row["changed"] for row in rows)
    assert table.rows[0][2].text == str(result["recommended"]["seed"])
    assert table.rows[0][3:6] == [
        (f"{changed:,}", changed),
        (f"{100 * changed / sum(row['entries'] for row in rows):.2f} %", table.rows[0][4].order),
        (f"5 ({100 * top / changed:.0f} %)", "5"),
    ]
    (name, layers), *_ = shown["tables"]
    assert name == "mask"
    assert [cell.text for cell in layers.rows[5]][:2] == ["5", "10 %"]
    assert [cell.text for cell in layers.rows[0]] == ["0", *["0"] * 8, "–", "–"]
    assert [c.text for c in layers.rows[-1]] == ["outside", *["–"] * 7, "0", "0", "0"]


def test_a_change_of_the_head_alone_has_no_heatmap(result: Report) -> None:
    found = copy.deepcopy(result)
    found["where"] = {"mask": where(share=0.0)}
    page = report_page.html(found)
    assert 'data-plot="where"' not in page
    assert "entries changed; the head alone was trained" in page
    shown = report_where.view(found)
    assert shown
    assert shown["tables"] == []
    assert [cell.text for cell in shown["overview"].rows[0][3:]] == ["0", "0", "–", "–"]
    missing = "Not counted, as the file is gone or can't be decoded: full, head-only, bitfit"
    assert missing in html.unescape(page)
    found["where"] = {}
    assert "Not counted: no delta file is left" in report_page.html(found)
    assert "Not counted: no delta file is left" in report_page.markdown(found)


# Markdown.


def assert_tables_are_rectangular(markdown: str) -> None:
    lines = markdown.splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("| ---"):
            continue
        width = line.count("|")
        for other in lines[number - 1 :]:
            if not other.startswith("|"):
                break
            assert len(re.findall(r"(?<!\\)\|", other)) == width, other


def test_markdown_tables(result: Report) -> None:
    markdown = report_page.markdown(result)
    assert_tables_are_rectangular(markdown)
    rows = [line for line in markdown.splitlines() if line.startswith("| **")]
    assert len(rows) == 2  # of all recipes, and of where they change the base
    assert rows[1].startswith("| **mask** | where matrices@-2,-1 · initial sparsity 0.02 | 2 | ")
    assert rows[0].startswith("| **mask** | where matrices@-2,-1 · initial sparsity 0.02 | ")
    assert f"| {result['groups'][0]['bytes']:,} | 100 % |" in markdown
    assert "    howfine evaluate deltas/mask" in markdown


# A study's folder.


PLAN = Plan(
    ceiling="full",
    floor="head-only",
    seeds=(0, 1),
    margin=0.5,
    settings={"max_steps": 2, "batch_size": 8},
)


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("study")
    study(tiny_base("bert"), tiny_task(), PLAN, out=folder)
    return folder


@pytest.fixture
def folder(studied: Any, tmp_path: Any) -> Any:
    return shutil.copytree(studied, tmp_path / "study")


def better(folder: Any, role: str) -> None:
    """Give the runs of a role the highest dev score there is."""
    ledger = Ledger(folder / "runs.jsonl")
    ledger.replace([{**r, "dev_score": 1.0} if r["role"] == role else r for r in ledger])


def made(folder: Any, **options: Any) -> Report:
    return report(folder, base=tiny_base("bert"), task=tiny_task(), **options)


def test_the_folder_gets_three_files_and_the_recommended_delta(folder: Any) -> None:
    found = made(folder, command="by hand")
    assert json.loads((folder / "report.json").read_text()) == found
    assert found["sentence"] in html.unescape((folder / "report.html").read_text()).replace(
        "\xa0", " "
    )
    assert (folder / "report.md").read_text().startswith("# tiny on tiny-bert\n")
    assert found["command"] == "by hand"
    assert found["margin"] == 0.5  # the plan's, from study.json
    chosen = found["recommended"]
    (copied,) = folder.glob("*.delta.safetensors")
    assert copied.name == chosen["file"] == f"{chosen['recipe']}.delta.safetensors"
    assert copied.stat().st_size == chosen["bytes"]
    assert (
        copied.read_bytes() == (folder / f"deltas/{chosen['key']}{copied.name[-18:]}").read_bytes()
    )


def test_distances_are_those_of_the_ceilings_best_seed(folder: Any) -> None:
    from howfine.compare import delta_distance

    found = made(folder)
    best = max(
        (run for run in found["runs"] if run["role"] == "ceiling"), key=lambda run: run["dev_score"]
    )
    rows = delta_distance(Delta.load(folder / best["file"]), tiny_base("bert"))
    expected = {row.path: row.relative for row in rows}
    assert found["distance"] is not None
    assert len(found["distance"]) == 2 * 6
    for row in found["distance"]:
        assert row["relative"] == expected[row["path"]] > 0


def test_where_counts_in_the_recommended_file_and_in_one_of_every_recipe(folder: Any) -> None:
    better(folder, role="ceiling")
    found = made(folder, margin=0.0)
    assert set(found["where"]) == {"full", "head-only"}
    runs = {run["key"]: run for run in found["runs"]}
    assert found["where_runs"]["full"] == found["recommended"]["key"]
    assert runs[found["where_runs"]["head-only"]]["seed"] == 0
    base = tiny_base("bert")
    file = folder / runs[found["recommended"]["key"]]["file"]
    with Delta.load(file).applied(base):
        now = {path: weight_at(base, path).clone() for path in base.paths()}
    counts: dict[tuple[int | None, str], int] = {}
    for path, value in now.items():
        place, theta = base.place(path), base.original(path).flatten().tolist()
        differ = sum(a != b for a, b in zip(theta, value.flatten().tolist(), strict=True))
        counts[place] = counts.get(place, 0) + differ
    rows = found["where"]["full"]
    assert {(row["layer"], row["part"]): row["changed"] for row in rows} == counts
    assert [row["part"] for row in rows if row["layer"] == 0] == [*PARTS, "bias", "norm"]
    assert not any(row["changed"] for row in found["where"]["head-only"])
    assert 'data-plot="where"' in (folder / "report.html").read_text()


def test_a_file_that_cannot_be_decoded_costs_its_rows_and_no_report(folder: Any) -> None:
    for path in (folder / "deltas").glob("head-only*"):
        path.write_bytes(path.read_bytes()[:-9])
    better(folder, role="ceiling")
    assert set(made(folder, margin=0.0)["where"]) == {"full"}
    text = (folder / "report.md").read_text()
    assert "Not counted, as the file is gone or can't be decoded: head-only." in text
    shutil.rmtree(folder / "deltas")
    assert made(folder)["where"] == {}


def test_another_report_replaces_the_earlier_file_and_no_other(folder: Any) -> None:
    first = made(folder)["recommended"]
    mine = folder / "mine.delta.safetensors"
    mine.write_bytes(b"not the report's")
    better(folder, role="ceiling")
    second = made(folder, margin=0.0)["recommended"]
    assert (first["file"], second["file"]) == (
        "head-only.delta.safetensors", "full.delta.safetensors"
    )  # fmt: skip
    assert {path.name for path in folder.glob("*.delta.safetensors")} == {
        mine.name, second["file"]
    }  # fmt: skip


def test_the_last_copy_of_the_recommended_file_stays(folder: Any) -> None:
    """Also where the study's own deltas were removed to save space."""
    first = made(folder)["recommended"]
    kept = (folder / first["file"]).read_bytes()
    shutil.rmtree(folder / "deltas")
    for _ in range(2):
        assert made(folder)["recommended"]["file"] == first["file"]
        assert (folder / first["file"]).read_bytes() == kept
    assert f"howfine predict {first['file']}" in (folder / "report.md").read_text()
    better(folder, role="ceiling")  # another one is recommended, of which nothing is left
    assert made(folder, margin=0.0)["recommended"]["file"] is None
    assert (folder / first["file"]).read_bytes() == kept


def test_a_ceiling_that_cannot_be_measured_costs_no_report(folder: Any) -> None:
    for path in (folder / "deltas").glob("full*"):
        path.write_bytes(path.read_bytes()[:-9])
    assert made(folder)["distance"] is None


@pytest.mark.slow
def test_a_ceiling_beside_the_base_costs_no_report(tmp_path: Path) -> None:
    base, task = tiny_base("bert"), tiny_task()
    plan = Plan(
        ceiling="adapter",
        floor="bitfit",
        recipes=(),
        seeds=(0,),
        settings={"max_steps": 2, "batch_size": 8},
        margin=0.9,
    )
    study(base, task, plan, out=tmp_path)
    better(tmp_path, role="ceiling")
    found = report(tmp_path, base=base, task=task, margin=0.0)
    assert found["distance"] is None
    assert found["recommended"]["recipe"] == "adapter"
    assert "howfine merge" not in (tmp_path / "report.md").read_text()


def test_commands_are_those_that_the_file_can_take(result: Report) -> None:
    """A task of options of each row is not asked on a command line; one of options is named."""
    found = copy.deepcopy(result)
    found["task"] |= {"options": True, "by_name": False}
    found["recommended"]["merges"] = False
    given = report_page.commands(found)
    assert given is not None
    text = given["shell"] + given["python"]
    assert "predict" not in text
    assert "merge" not in text
    assert "howfine evaluate deltas/mask" in text
    assert "--task TASK  # with the study's options" in text
    usual = report_page.commands(result)
    assert usual is not None
    assert "TASK" not in usual["shell"]


@pytest.mark.parametrize(
    "content", [b'{"recommended": null}', b'{"recommended": {"file": 5}}', b"{", b"[]", b"\xff"]
)
def test_an_earlier_report_that_cannot_be_read_is_as_if_there_was_none(
    content: bytes, folder: Any
) -> None:
    (folder / "report.json").write_bytes(content)
    result: Any = {"recommended": {"file": None, "key": "k"}}
    _hand_over(folder, [], result)
    assert (folder / "report.json").read_bytes() == content  # `report` writes it last


def spoilt(folder: Any, name: str, **values: Any) -> None:
    """The first run's record, or study.json, with other values; "missing" takes one away."""
    path = folder / name
    first, *rest = path.read_text().splitlines() if name == "runs.jsonl" else [path.read_text()]
    found = {**json.loads(first), **values}
    kept = {key: value for key, value in found.items() if value != "missing"}
    path.write_text("\n".join([json.dumps(kept), *rest]) + "\n")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("runs.jsonl", {"score": "missing"}),
        ("runs.jsonl", {"predictions": "missing"}),
        ("runs.jsonl", {"predictions": "<i2:eJx"}),
        ("runs.jsonl", {"predictions": "<i2:eJxjYGRgYGBi"}),
        ("runs.jsonl", {"predictions": "nonsense:eJwDAAAAAAE="}),
        ("runs.jsonl", {"predictions": 5}),
        ("runs.jsonl", {"dev_score": None}),
        ("runs.jsonl", {"record": {}}),
        ("runs.jsonl", {"steps": 0}),
        ("runs.jsonl", {"metric": "nonsense"}),
        ("study.json", {"task": 5}),
        ("study.json", {"task": {"name_or_path": "rte", "nonsense": 1}}),
        ("study.json", {"task": {"name_or_path": 5}}),
        ("study.json", {"keys": 5}),
        ("study.json", {"keys": [5]}),
        ("study.json", {"made_on": None}),
        ("study.json", {"margin": "wide"}),
        ("study.json", {"kind": 5}),
    ],
    ids=str,
)
def test_a_damaged_study_is_one_sentence(name: str, values: dict[str, Any], folder: Any) -> None:
    spoilt(folder, name, **values)
    with pytest.raises(SettingError) as caught:
        stored.read(folder, tiny_base("bert"), tiny_task())
    for part in (str(folder / name), *values, "run the study again"):
        assert part in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff", b"[" * 200_000])
def test_a_study_that_is_no_text_is_one_sentence(content: bytes, folder: Any) -> None:
    (folder / "study.json").write_bytes(content)
    with pytest.raises(SettingError, match="is not JSON"):
        stored.read(folder, tiny_base("bert"), tiny_task())


def test_without_files_the_report_says_so(folder: Any) -> None:
    shutil.rmtree(folder / "deltas")
    found = made(folder)
    assert found["distance"] is None
    assert found["recommended"]["file"] is None
    assert any("was not kept" in caveat for caveat in found["caveats"])
    assert not list(folder.glob("*.delta.safetensors"))
    assert "The study kept no delta files" in (folder / "report.html").read_text()


def test_runs_of_other_plans_in_the_folder_are_left_out(folder: Any) -> None:
    path = folder / "runs.jsonl"
    lines = path.read_text().splitlines()
    other = {**json.loads(lines[-1]), "key": "of-another-task"}
    path.write_text("\n".join([json.dumps(other), *lines]))
    assert [run["key"] for run in made(folder)["runs"]] == [json.loads(x)["key"] for x in lines]


def test_another_task_is_refused(folder: Any) -> None:
    task = tiny_task()
    flipped = [dataclasses.replace(e, label=1 - e.label) for e in task.splits["test"]]
    other = dataclasses.replace(task, splits={**task.splits, "test": flipped})
    with pytest.raises(SettingError, match="was not made on this task: tiny .16 in train"):
        report(folder, base=tiny_base("bert"), task=other)
    (folder / "study.json").unlink()
    with pytest.raises(SettingError, match="was not measured on the test split of task 'tiny'"):
        report(folder, base=tiny_base("bert"), task=other)


def test_a_folder_without_a_study_is_an_error(tmp_path: Any) -> None:
    with pytest.raises(SettingError, match="has no runs to report"):
        made(tmp_path)


def test_a_folder_that_names_no_task_needs_one(folder: Any) -> None:
    (folder / "study.json").unlink()
    assert made(folder)["margin"] == 0.01
    with pytest.raises(SettingError, match=r"study\.json names no base"):
        report(folder, task=tiny_task())
    with pytest.raises(SettingError, match=r"study\.json names no task"):
        report(folder, base=tiny_base("bert"))
    (folder / "study.json").write_text("{")
    with pytest.raises(SettingError, match="is not JSON"):
        made(folder)
