"""`--help` and docs/reference.md are made of the schema and of the comments of conf/, and those are what the schema says."""

import os
import subprocess
import sys

import pytest

from litdistill import cli
from litdistill.cli.help import help_text
from litdistill.cli.reference import FILES, commented, page
from litdistill.config.schema import SCHEMAS
from litdistill.config.schema.reference import rows
from litdistill.utils.paths import CONF, ROOT


@pytest.mark.parametrize("file", FILES)
def test_the_comments_of_conf_are_the_schemas_texts(file):
    assert (CONF / file).read_text() == commented(file), "run python scripts/reference.py"


def test_the_reference_page_is_the_schema():
    assert (ROOT / "docs" / "reference.md").read_text() == page(), "run python scripts/reference.py"


@pytest.mark.parametrize("schema", sorted({*SCHEMAS.values(), *FILES.values()}, key=lambda schema: schema.__name__))
def test_every_option_is_explained_in_a_line(schema):
    for row in rows(schema):
        assert 2 < len(row.description) < 200, row.key
        assert row.takes, row.key


@pytest.mark.parametrize("command", SCHEMAS)
def test_help_says_what_a_command_does_then_examples_keys_and_groups(command):
    text = help_text(command, [])
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    head, rest = text.split("\n\nExamples:\n")
    assert head.startswith((CONF / f"{command}.yaml").read_text().removeprefix("# ")[:20])
    examples, keys = rest.split("\n\nKeys:\n")
    assert sum(line.startswith(f"  litdistill {command}") for line in examples.splitlines()) >= 3
    own = {"sweep": "  sweep.trials=20 ", "fetch": "  data.name=mnist "}.get(
        command, f"  {next(iter(SCHEMAS[command].model_fields))}="
    )
    assert own in keys
    if command in ("train", "sweep", "fetch"):
        groups = keys.split("\n\nGroups, of which one option each is chosen:\n")[1]
        assert "data (here" in groups
        assert "=" not in groups.partition("Hydra's own")[0]


def test_help_has_the_comments_and_values_of_what_is_chosen():
    text = " ".join(help_text("train", ["data=folder", "method=dkd", "seed=7"]).split())
    for words in (
        "seed=7 of weights, order, augmentation and data subset",
        "data.root=null to be given",
        "method.nckd=8.0 weight of the other classes' term (the paper's β)",
        "method: those of method=dkd",
        "optimizer.lr=0.001 learning rate",
        "ema=null average the student's weights with this decay (0.999); the average is what is evaluated",
    ):
        assert words in text


def test_a_typo_beside_help_is_answered(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "method=kdd", "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.run("train")
    assert ended.value.code == 2
    assert "did you mean kd" in capsys.readouterr().err


def test_help_imports_no_torch():
    code = "import sys; from litdistill.cli import main; main(); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, "train", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Trains a student")


def test_a_reader_that_has_gone_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "litdistill"], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.process
def test_what_needs_no_config_imports_no_pydantic():
    code = (
        "import sys, litdistill, litdistill.methods, litdistill.data, litdistill.models\n"
        "from litdistill import distill, KD\nassert 'pydantic' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
