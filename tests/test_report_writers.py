"""The report's pictures and its two writers: nothing gets through that must not, and both say the same."""

import html.parser
import itertools
import re
import xml.etree.ElementTree as ET

import pytest
import torch

from litdistill.report import plots, points, sections, writers
from litdistill.report.blocks import Card, Code, Fold, Section, Table, Text, Warn, html_page, markdown_page, plain
from litdistill.tasks import metrics
from tests.pages import HOSTILE, write_page

# -- pictures ----------------------------------------------------------------------------------------------------------


def test_no_two_rows_look_alike_nor_depend_on_color_alone():
    looks = plots.styles([str(i) for i in range(19)], [True] + 18 * [False])
    seen = {(s.look["color"], s.look["marker"]) for s in looks}
    assert len(seen) == 19
    for one, other in itertools.pairwise(looks):
        assert one.look["marker"] != other.look["marker"]
    assert len({s.name for s in looks}) == 19


def test_points_that_lie_together_share_a_label():
    looks = plots.styles(list("abcd"), [False] * 4)
    values = [[90.0], [90.0], [90.0], [50.0]]
    svg = points.over_cost(points.Plane(looks, [10.0, 10.01, 500.0, 10.0], values), "kB", "accuracy")
    assert ">1, 2<" in svg
    assert ">3<" in svg
    assert ">4<" in svg


def test_a_picture_is_a_drawing_whose_ids_are_its_own():
    looks = plots.styles(["teacher", HOSTILE, "$x$ & y"], [True, False, False])
    values = [[99.0], [90.0, 92.0], [80.0]]
    drawn = [
        points.over_cost(points.Plane(looks, [1000.0, 10.0, 30.0], values), "kB", "accuracy"),
        points.over_cost(points.Plane(looks, [1000.0, 11.0, 30.0], values), "kB", "accuracy"),
        plots.dots(looks, values, "accuracy", 99.0),
        plots.lines(looks, [1, 2], [[1.0, 2.0]] * 3, "x", "y"),
        plots.bars(["a", HOSTILE], [("b", [1.0, 2.0]), ("c", [3.0, 4.0])], "s"),
        plots.curves([([1, 2], [3.0, 4.0])], 5.0, HOSTILE, "accuracy", (0.0, 100.0)),
        plots.reliability(*[metrics.reliability(torch.randn(50, 4), torch.arange(50) % 4)] * 2, HOSTILE),
    ]
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in drawn]
    for i, svg in enumerate(drawn):
        root = ET.fromstring(svg)
        assert root.tag.endswith("svg")
        assert "width" not in root.attrib  # as wide as there is room for
        assert "<script" not in svg
        assert "currentColor" in svg
        assert not re.search(r"https?://(?!www\.w3\.org/)", svg)
        for used in re.findall(r'(?:href="#|url\(#)([^")]+)', svg):
            assert used in ids[i]
        assert all(ids[i].isdisjoint(other) for other in ids[:i])
    assert "3 $x$ &amp; y<" in drawn[0]  # no formula is made of a name
    assert plots.dots(looks, values, "accuracy", 99.0) == drawn[2]


# -- the two writers ---------------------------------------------------------------------------------------------------


class Parsed(html.parser.HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v or "") for k, v in attrs]

    def handle_data(self, data):
        self.text += data


def test_a_name_with_a_script_comes_out_as_a_name(tmp_path):
    write_page(tmp_path)
    page = Parsed((tmp_path / "index.html").read_text())
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) > 10
    report = (tmp_path / "report.md").read_text()
    assert "<script" not in report
    assert "&lt;script&gt;alert(1)" in report
    for svg in (tmp_path / "pictures").glob("*.svg"):
        assert "<script" not in svg.read_text()


def test_the_page_needs_nothing_but_itself_and_is_small(tmp_path):
    write_page(tmp_path)
    text = (tmp_path / "index.html").read_text()
    assert len(text.encode()) < 5e6
    page = Parsed(text)
    assert not {"link", "iframe", "object", "base", "form"} & set(page.tags)
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:image/png;base64,", "#")), value
    assert "@import" not in text
    assert "url(http" not in text
    ids = [v for _, k, v in page.attributes if k == "id"]
    assert len(ids) == len(set(ids))
    targets = {v.removeprefix("#") for t, k, v in page.attributes if t == "a" and k == "href"}
    assert targets <= set(ids)
    alts = [v for t, k, v in page.attributes if t == "img" and k == "alt"]
    assert len(alts) == page.tags.count("img") > 10
    assert all(alts)
    svgs, labels = page.tags.count("svg"), [v for t, k, v in page.attributes if t == "svg" and k == "aria-label"]
    assert svgs == len(labels) > 10
    assert all(labels)


def test_both_writers_say_the_same(tmp_path):
    made = write_page(tmp_path)
    page, report = Parsed((tmp_path / "index.html").read_text()), (tmp_path / "report.md").read_text()
    assert page.tags.count("table") == len(re.findall(r"^\|(---:?\|)+$", report, re.MULTILINE)) == 8
    tables = [t for t in report.split("\n\n") if t.startswith("|")]
    assert all(t.count("\n") == 1 + len(made.rows) for t in tables[:-1])
    for row in re.findall(r"^\| \d+ .*\|$", report, re.MULTILINE):
        for value in re.findall(r"\d[\d.,]*(?: ± [\d.]+)?", row.split("|", 2)[2]):
            assert value in page.text
    for picture in re.findall(r"\]\((pictures/[^)]+)\)", report):
        assert (tmp_path / picture).is_file()


def test_markdown_stays_within_its_cells():
    text = markdown_page(
        "a\nb", [], [Section("x", "t", [Table("y", ["a|b", "c"], [["*x*\n", "`|`"]]), Code("echo ```")])]
    )
    assert "# a b\n" in text
    assert "| a\\|b | c |" in text
    assert "| \\*x\\* | \\`\\|\\` |" in text
    assert "````bash\necho ```\n````" in text
    assert plain("[x](javascript:1)") == "\\[x\\](javascript:1)"


def test_html_escapes_every_kind_of_block():
    bad = '"><img src=x onerror=alert(1)>'
    blocks = [Text(bad), Code(bad), Table("t", [bad, bad], [[bad, bad]]), Warn(bad)]
    blocks += [Fold(bad, [bad]), Card(bad, [(bad, bad)], bad)]
    page = Parsed(html_page(bad, [bad], [Section("s", bad, blocks)]))
    assert "img" not in page.tags
    assert (
        page.text.count(bad) == 17
    )  # title, h1, fact, h3, text, code, four cells, warning, two of a fold, four of a card


def test_a_measure_of_agreement_that_is_a_metric_too_is_one_row():
    student = {"spearman": 0.8, "cosine": 0.9}
    _, rows = writers.evaluation_table({"student": student, "teacher": {"spearman": 1.0}, "agreement": {"cosine": 0.9}})
    assert [row[0] for row in rows] == ["spearman", "cosine"]


def test_classes_are_listed_from_the_worst_on_with_both_networks():
    each = lambda *values: {n: {"map": v, "map_50": 1.0, "count": 9} for n, v in zip("ab", values, strict=True)}  # noqa: E731
    head, rows = writers.class_table({"student": each(0.9, 0.25), "teacher": each(0.95, 0.5)})
    assert [" ".join(h.split()) for h in head] == ["class", "in the test set", "mAP %, teacher", "mAP %, student"]
    assert rows == [["b", "9", "50.00", "25.00"], ["a", "9", "95.00", "90.00"]]
    many = {str(i): {"map": i / 100, "count": 1} for i in range(80)}
    head, rows = writers.class_table({"student": many})
    assert "20\nworst of 80" in head[0]
    assert [row[0] for row in rows] == [str(i) for i in range(20)]
    assert all(len(row) == len(head) == 3 for row in rows)
    assert writers.class_table({}) == ([], [])


@pytest.mark.parametrize(
    ("quartiles", "shown"),
    [([0.3, 0.31, 0.334], "0.31 (0.30–0.33)"), ([0.00112, 0.00124, 0.00131], "0.0012 (0.0011–0.0013)")],
)
def test_a_small_ratio_keeps_two_digits(quartiles, shown):
    assert sections.share(quartiles, 1) == shown
