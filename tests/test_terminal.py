"""A training as a user sees it: on a terminal, where the bar moves, and its thread looks at the trainer at any moment."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_cli import ROOT

pytestmark = pytest.mark.process
LONG = [
    *("trainer=cpu", "trainer.max_epochs=12", "data.batch_size=2", "threads=1"),
    *("student.widths=[8,8]", "method=supervised", "teacher=null"),
]


def on_a_terminal(command: list[str], cwd: Path, seconds: float = 300) -> tuple[int, str]:
    """The exit status of a command and all that its terminal, 120 columns wide, has shown."""
    ours, its = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("RUN_STAMP", "NO_COLOR", "CI")}
    env |= {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    process = subprocess.Popen(command, cwd=cwd, env=env, stdin=its, stdout=its, stderr=its, close_fds=True)
    os.close(its)
    shown, end = b"", time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            if not select.select([ours], [], [], 1)[0]:
                if process.poll() is not None:
                    break
                continue
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            shown += part
        return process.wait(max(1.0, end - time.monotonic())), shown.decode(errors="replace")
    finally:
        process.kill()
        os.close(ours)


@pytest.mark.parametrize("number", range(4))  # what two threads do to each other shows in some starts only
def test_a_training_on_a_terminal_moves_a_bar_and_shows_no_traceback(tmp_path, number):
    status, shown = on_a_terminal([sys.executable, str(ROOT / "scripts" / "train.py"), *LONG], tmp_path)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert status == 0, plain[-4000:]
    assert "Traceback" not in plain
    assert "Exception in thread" not in plain
    bars = re.findall(r"Student: epoch (\d+)/12 +[━╸╺ ]+ *(\d+)/(\d+) steps", plain)
    assert len({epoch for epoch, _, _ in bars}) > 3, plain[-4000:]
    assert not re.search(r"Epoch \d", plain)  # Lightning's own count, from 0
    assert any(0 < int(done) < int(whole) for _, done, whole in bars)  # in the middle of an epoch too
