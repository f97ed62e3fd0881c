"""Every kind of page in a real browser: no error, all figures, sorting and filtering, no barrier, no clipped column."""

import copy
import json
import shutil

import pytest
from runs import run_labels
from test_text_page import CURVES, text_page, whole
from test_verdicts import around, decoded, over

from w2sg.compare.decoders import DecoderGroups
from w2sg.compare.label_section import LabelRuns
from w2sg.known_answers.result import Check, Findings, Line
from w2sg.known_answers.suite import Done, whole_page
from w2sg.reports.render import page, render
from w2sg.reports.sections.axes import Axes
from w2sg.reports.sections.decoded import Cost, Decoded
from w2sg.reports.sections.divergence import Divergence
from w2sg.reports.words import folded

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'w2sg[browser]'")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe: pip install 'w2sg[browser]'")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.drawn,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH"),
]
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
QUIET += ("--disable-background-networking", "--disable-component-update")
KINDS = ("labels", "cong", "decoder", "refine", "label_runs", "decoders", "known_answers")
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]


def a_cell(k):
    """A setting and loss of a sweep over pairs and losses; one has no gap."""
    weak, strong, loss = (
        ("gpt2", "opt-125m")[k % 2],
        ("gpt2-medium", "gpt2-xl")[k // 2 % 2],
        ("cross_entropy", "rkl")[k // 4],
    )
    mean = {"weak": 0.6, "student": 0.61 + 0.02 * k, "ceiling": 0.85}
    pgr = {"value": 0.1 * k, "low": 0.05 * k, "high": 0.2 * k, "resolved": k != 3, "gap": 0.2 + 0.01 * k}
    return {
        "setting": f"{weak} → {strong}",
        "values": {"weak.name": weak, "strong.name": strong},
        "loss": loss,
        "loss_target": f"w2sg.losses.{loss}",
        "seeds": [0, 1],
        "repeats": "2 seeds of one split",
        "accuracy": {name: {"mean": value, "sd": 0.01, "seeds": 2} for name, value in mean.items()},
        **dict.fromkeys(("length_only", "nll", "overconfidence", "gain", "misfit", "remainder"), 0.5),
        "pgr": pgr | {"gap_low": 0.1, "gap_high": 0.3},
        "parameters": {"weak": None, "strong": {"gpt2-medium": 354823168, "gpt2-xl": 1557611200}[strong]},
    }


def label_runs():
    cells = [a_cell(k) for k in range(8)]
    test = {
        "difference": 0.05,
        "low": 0.01,
        "high": 0.09,
        "p_holm": 0.02,
        "mcnemar_p": [0.01, 0.02],
        "test": "t",
        "exact": "x",
    }
    against = [test | {"setting": cell["setting"], "loss": cell["loss"]} for cell in cells]
    content = {"cells": cells, "student_against_teacher": against, "between_losses": [], "ahead": [], "notes": []}
    content |= {"left_out": [], "seconds": {"computed": 1.0, "without_store": 2.0}}
    more = {"title": "8 runs", "command": "python evaluate.py runs=outputs", "findings": ["one", "two"]}
    more["left_out"] = folded([f"run{k}: its report is of an earlier version" for k in range(40)])
    return page("8 runs", [render("summary.html", report=content, **more), LabelRuns().html(content)])


def decoders():
    rows = [
        {
            "name": f"decoder {k}, temperature 0.7, some of its settings in words",
            "reward": around(0.1 * k),
            "surprise": around(2.0 + k),
            "kl": {"value": float(k), "low": k - 0.5, "high": k + 0.5},
            "length": {"mean": 9.0, "truncated": 0.5},
            "cost": {"strong": 2.0 + k, "guide": 1.0, "seconds": 0.001},
        }
        for k in range(8)
    ]
    content = {"decoders": [{"strong": "s", "dataset": "d", "seed": 0, "judge": "j", "rows": rows}]}
    return page("decoders", ["<h1>Decoders</h1>", DecoderGroups().html(content)])


def decoder():
    report = decoded("search", {}, reward=0.3, against=over(16, 0, 0.2))
    for k, system in enumerate(report["decoding"]["systems"].values()):
        system |= {"surprise": around(2.0 + k), "kl": {"value": float(k), "low": None, "high": None, "how": "exact"}}
    report["decoding"]["without_kl"] = {}
    return page(
        "decoder", ["<h1>Search</h1>", *(section.html(report) for section in (Decoded(), Cost(), Divergence()))]
    )


def refine():
    system = {"content": around(0.5), "concept": around(0.7), "characters": 9.0, "cut_off": 0.0}
    systems = {name: copy.deepcopy(system) for name in ("weak", "naive", "base", "student", "ceiling")}
    refinement = {"systems": systems, "differences": {}, "left_out": [], "prompts": 16, "wins": {"base": over(2, 14)}}
    return page("refine", ["<h1>Refinement</h1>", Axes().html({"refinement": refinement})])


def known_answers():
    found = Findings()
    found.add("two", 2.0, 3.0, 0.5, "for show")
    found.draw("t", "x", "y", [Line("theory", [1, 2], [1, 2], "theory"), Line.runs([(1, 2, 0.1)], "runs")])
    done = Done(Check("broken", "It fails.", "nobody", lambda bench: found), found, 1.0)
    return whole_page("all", [done, done])


@pytest.fixture(scope="module")
def written(pairs_folder, tiny_gpt2, tmp_path_factory):
    out = tmp_path_factory.mktemp("pages")
    run_labels(pairs_folder, tiny_gpt2, out, "strong.epochs=2")
    content = json.loads(json.dumps(whole()).replace("word " * 850, ""))  # axe looks at every line of a text
    content["warnings"] += [f"alpha-{k}: 1{k} examples longer than max_length and cut" for k in range(36)]
    made = {"labels": (out / "run" / "report.html").read_text(), "cong": text_page(content, CURVES)}
    made |= {"decoder": decoder(), "refine": refine(), "label_runs": label_runs(), "decoders": decoders()}
    made |= {"known_answers": known_answers()}
    for name, html in made.items():
        (out / f"{name}.html").write_text(html)
    return out


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET])
        yield started
        started.close()


@pytest.fixture
def shown(browser, written):
    """Opens a page, given its kind and how the browser is set; fails on anything that the page itself complains of."""
    contexts, said = [], []

    def show(kind, width=1200, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        opened = contexts[-1].new_page()
        opened.on("console", lambda message: said.append(message.text))
        opened.on("pageerror", lambda error: said.append(str(error)))
        opened.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
        opened.goto((written / f"{kind}.html").as_uri())
        return opened

    yield show
    for context in contexts:
        context.close()
    assert said == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_has_no_barrier_in_either_scheme(shown, kind):
    for scheme in ("light", "dark"):
        opened = shown(kind, color_scheme=scheme)
        opened.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        rules = WCAG if scheme == "light" else ["color-contrast"]  # what else there is is the same in both
        found = axe.Axe().run(opened, options={"runOnly": rules, "resultTypes": ["violations"]}).response
        broken = [(rule["id"], node["html"][:200]) for rule in found["violations"] for node in rule["nodes"]]
        assert broken == []
        sizes = [figure.bounding_box() for figure in opened.query_selector_all(".plot svg")]
        assert sizes
        assert all(box["width"] > 100 and box["height"] > 50 for box in sizes)
        names = [figure.get_attribute("aria-label") for figure in opened.query_selector_all(".plot svg")]
        assert all(len(name) > 20 for name in names)
        opened.close()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_wider_than_the_page_and_what_scrolls_has_the_focus(shown, kind):
    for width in (1200, 400):
        opened = shown(kind, width)
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        boxes = opened.evaluate(
            "[...document.querySelectorAll('.wide, .drawn')].map(box =>"
            " [box.scrollWidth > box.clientWidth + 1, box.tabIndex === 0, box.getBoundingClientRect().right])"
        )
        assert all(scrolls == focus and right <= width for scrolls, focus, right in boxes)
        opened.close()


def test_a_sweep_over_pairs_has_the_figures_that_it_has_axes_for(shown):
    opened = shown("label_runs")
    names = [figure.get_attribute("aria-label") for figure in opened.query_selector_all(".plot svg")]
    sizes, pairs, gaps = (
        next(name for name in names if name.startswith(what))
        for what in (
            "accuracy of the student over the strong model's size",
            "PGR of each pair",
            "performance gap recover",
        )
    )
    assert "gpt2 → gpt2-xl, rkl 0.730" in sizes
    assert "opt-125m → gpt2-xl, cross entropy unknown" in pairs  # its gap is not resolved
    assert "without 1 cell whose gap is not resolved" in gaps
    assert len(names) == 5  # bars and differences, too; no number varies, so no lines


def column(opened, place):
    texts = opened.locator("table.runs >> nth=0").locator(f"tbody tr td:nth-child({place})").all_inner_texts()
    return [text.split("\n")[0] for text in texts]


def test_tables_sort_by_click_and_by_key_with_missing_numbers_last(shown):
    opened = shown("label_runs")
    heading = opened.locator("table.runs >> nth=0").locator("th", has_text="PGR")
    place = heading.evaluate("header => header.cellIndex + 1")
    before = column(opened, place)
    assert "gap not resolved" in before[:-1]
    heading.locator("button").click()
    up = column(opened, place)
    assert heading.get_attribute("aria-sort") == "ascending"
    assert up[-1] == "gap not resolved"
    assert [float(text) for text in up[:-1]] == sorted(float(text) for text in up[:-1])
    opened.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert column(opened, place) == [*up[-2::-1], "gap not resolved"]
    opened.keyboard.press("Space")
    assert heading.get_attribute("aria-sort") is None
    assert column(opened, place) == before


def test_the_filter_box_keeps_the_rows_that_hold_every_word(shown):
    opened = shown("label_runs")
    opened.get_by_label("Show the rows that hold").fill("xl rkl")
    rows = opened.locator("table.runs >> nth=0").locator("tbody tr:visible").all_inner_texts()
    assert len(rows) == 2
    assert all("gpt2-xl" in row and "rkl" in row for row in rows)
    assert opened.locator(".filter output").inner_text() == "4 of 16 rows"


def test_notes_of_one_cause_are_one_line_that_opens(shown):
    opened = shown("cong")
    notes = opened.locator(".warnings > li")
    assert notes.count() == 2
    assert "36" not in notes.nth(0).inner_text()
    assert notes.nth(1).locator("summary").inner_text().endswith("(and 35 more of the same cause)")
    notes.nth(1).locator("summary").click()
    assert notes.nth(1).locator("li:visible").count() == 36


@pytest.mark.parametrize("kind", ["labels", "label_runs"])
def test_it_prints_black_on_white_with_everything_open(shown, kind):
    opened = shown(kind, 700, color_scheme="dark")
    opened.emulate_media(media="print", color_scheme="dark")
    style = "getComputedStyle(document.body)"
    assert opened.evaluate(f"[{style}.color, {style}.backgroundColor]") == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
    assert opened.evaluate("document.documentElement.scrollWidth") <= 700
    opened.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    opened.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.pdf().startswith(b"%PDF")


def test_numbers_of_a_figure_are_a_table_and_a_file(shown):
    opened = shown("decoders")
    opened.locator(".plot summary").first.click()
    rows = opened.locator(".plot table >> nth=0").locator("tbody tr").count()
    with opened.expect_download() as download:
        opened.locator(".plot a[download]").first.click()
    lines = download.value.path().read_text().splitlines()
    assert len(lines) == rows + 1 == 9
