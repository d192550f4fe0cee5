"""The report's page in a real browser, on a phone and on a screen, by day and by night, and on paper."""

import re

import pytest

from tests.browser import CHROMIUM, browser
from tests.pages import group, write_page

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium)"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page of a teacher and twelve rows, and a browser to look at it."""
    folder = tmp_path_factory.mktemp("page")
    write_page(folder, group(rows=12))
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield folder / "index.html", page


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_whole_at_every_width(made, width, dark):
    path, page = made
    page.open(path, width, dark=dark)
    assert page.complaints() == []
    fetched = [url for url in page.requests() if not url.startswith("data:")]
    assert fetched == [path.resolve().as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == page.evaluate("innerWidth") == width
    sizes = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth)")
    assert sizes
    assert set(sizes) == {8}
    for name in ("quality", "cost", "each-class", "ece", "corruptions", "attacks", "time"):
        assert page.evaluate(f"document.querySelectorAll('#{name} tbody tr').length") == 13, name
    outside = page.evaluate("""
        [...document.querySelectorAll('main *')].filter(e => {
            const box = e.getBoundingClientRect();
            return box.right > innerWidth + 1 && !e.closest('.box, pre, svg');
        }).map(e => e.outerHTML.slice(0, 80))
    """)
    assert outside == []
    small = "[...document.querySelectorAll('.wide svg text')].map(t => t.getBoundingClientRect().height)"
    assert min(page.evaluate(small)) >= 8  # pixels: what one can read


def test_tables_scroll_in_their_own_box_and_the_first_column_stays(made):
    path, page = made
    page.open(path, 390)
    box = "document.querySelector('#cost').closest('.box')"
    assert page.evaluate(f"{box}.scrollWidth > {box}.clientWidth")
    before = page.evaluate("document.querySelector('#cost tbody th').getBoundingClientRect().left")
    page.evaluate(f"{box}.scrollLeft = 300")
    assert page.evaluate(f"{box}.scrollLeft") == 300
    assert page.evaluate("document.querySelector('#cost tbody th').getBoundingClientRect().left") == before


@pytest.mark.parametrize("name", ["a_" * 50, "many words " * 9])
def test_a_long_name_is_a_few_lines_on_a_phone(made, tmp_path, name):
    _, page = made
    write_page(tmp_path, group(rows=2, name=name))
    page.open(tmp_path / "index.html", 390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    heights = page.evaluate("[...document.querySelectorAll('tbody th')].map(t => t.getBoundingClientRect().height)")
    assert 40 < max(heights) <= 6 * 16 + 12
    assert max(page.evaluate("[...document.querySelectorAll('tbody th')].map(t => t.clientWidth)")) <= 0.46 * 390


def test_ink_and_paper_contrast_by_day_and_by_night(made):
    """WCAG 2.1's ratio of luminances, of text and of the pictures' text: 4.5 at least."""
    path, page = made
    for dark in (False, True):
        page.open(path, 1280, dark=dark)
        paper = color(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (luminance(paper) < 0.2) == dark
        for selector, property in (("body", "color"), (".facts li", "color"), ("nav a", "color"), ("svg text", "fill")):
            ink = color(page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{property}"))
            low, high = sorted([luminance(ink), luminance(paper)])
            assert (high + 0.05) / (low + 0.05) >= 4.5, (selector, dark)


def test_no_script_runs_and_nothing_is_fetched_even_if_it_got_in(made, tmp_path):
    """The page's own policy, should an escape ever be missed. The one test in which the browser must complain."""
    path, page = made
    bad = (
        "<script>document.title = 'ran'</script><img src='https://example.org/x.png' onerror=\"document.title='ran'\">"
    )
    injected = tmp_path / "index.html"
    injected.write_text(path.read_text().replace("<main>", "<main>" + bad))
    page.open(injected, 1280)
    assert page.evaluate("document.title") != "ran"
    assert "Content Security Policy" in " ".join(page.complaints())


def test_the_page_prints_to_a_few_sheets(made):
    path, page = made
    page.open(path, 1280, dark=True)
    printed = page.pdf()
    assert printed.startswith(b"%PDF-")
    sheets = len(re.findall(rb"/Type\s*/Page\b", printed))
    assert 4 <= sheets <= 25
    page.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"  # spares the ink
    heads = "[...document.querySelectorAll('h3'), ...document.querySelectorAll('p:has(+ pre, + .grid)')]"
    assert page.evaluate(f"{heads}.length") > 20
    assert set(page.evaluate(f"{heads}.map(e => getComputedStyle(e).breakAfter)")) == {
        "avoid"
    }  # no heading and no name of a row stands alone at the end of a sheet
    tall = "Math.max(...[...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect().height))"
    assert page.evaluate(tall) <= 590  # 156 mm of the 186 of a sheet: a heading fits above
    page.call("Emulation.setDeviceMetricsOverride", width=1032, height=700, deviceScaleFactor=1, mobile=False)
    wide = "[...document.querySelectorAll('table')].map(t => t.getBoundingClientRect().right - innerWidth)"
    assert max(page.evaluate(wide)) <= 0  # 273 mm of A4 on its side: nothing scrolls on paper, so all must fit


def color(text: str) -> list[float]:
    return [int(v) / 255 for v in re.findall(r"\d+", text)[:3]]


def luminance(rgb: list[float]) -> float:
    r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
