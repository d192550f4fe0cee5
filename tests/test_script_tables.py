"""What scripts that write tables share: options, marks in a document, and how they end."""

import pytest

from litdistill.benchmarks.tables import between_marks, read_options, run_script
from litdistill.utils.errors import UserError

DEFAULTS = {"out": "docs/x.md", "seeds": 3, "data": "digits", "parts": ["a", "b"]}
RULES = ({"seeds": 1}, {"data": ("digits", "mnist"), "parts": ("a", "b")})


def read(monkeypatch, *said):
    monkeypatch.setattr("sys.argv", ["x", *said])
    return read_options(DEFAULTS, *RULES)


def test_options_are_the_defaults_with_what_was_said(monkeypatch):
    assert read(monkeypatch) == DEFAULTS
    assert read(monkeypatch, "seeds=1", "data=mnist", "parts=[]") == {
        **DEFAULTS,
        "seeds": 1,
        "data": "mnist",
        "parts": [],
    }


@pytest.mark.parametrize("wrong", ["seed=1", "seeds=0", "data=iris", "parts=[a,c]", "parts=c"])
def test_other_options_and_values_are_refused_with_what_there_is(monkeypatch, wrong):
    with pytest.raises(UserError, match=r"out=docs/x.md, seeds=3.*seeds from 1; data: digits, mnist; parts: a, b\.$"):
        read(monkeypatch, wrong)


def test_a_text_stands_between_its_marks_and_the_rest_is_kept():
    before = "# A\n\n<!-- robust -->\nold\n<!-- end robust -->\n\nB\n"
    after = "# A\n\n<!-- robust -->\n\nnew\n\n<!-- end robust -->\n\nB\n"
    assert between_marks(before, "robust", "new") == after == between_marks(after, "robust", "new")
    for document in ("# A", before + before, before.replace("<!-- end robust -->", ""), f"{before}<!-- end robust -->"):
        with pytest.raises(UserError, match="needs <!-- robust --> and <!-- end robust -->"):
            between_marks(document, "robust", "new")


def test_what_the_user_can_mend_ends_a_script_with_a_line_and_status_2(capsys):
    def wrong() -> None:
        raise UserError("Give seeds=1.")

    with pytest.raises(SystemExit) as ended:
        run_script(wrong)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "Give seeds=1.\n"
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: print(1 / 0))
