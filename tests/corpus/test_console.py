"""Progress for people: a bar that log lines do not tear on a terminal, a line now and then elsewhere."""

import io
import logging
import os
import pty
import re
import subprocess
import sys

import pytest

from acsr_ray.corpus.console import LINE_SECONDS, Bar, Lines, open_console, told
from acsr_ray.corpus.facts import UnitFacts
from acsr_ray.corpus.run_record import RunTally

JOB = """
import logging, sys, time
from acsr_ray.corpus.console import open_console
from acsr_ray.corpus.facts import UnitFacts
from acsr_ray.corpus.run_record import RunTally

logging.basicConfig(level=logging.INFO, format="%(message)s")
tally = RunTally()
console = open_console()
tally.plan(40)
for number in range(4):
    tally.done("u", UnitFacts({"purified": 10}))
    console.show(tally.progress("r", "running"))
    logging.info("unit %d", number)
    console.show(tally.progress("r", "running"))
console.close(tally.progress("r", "done"))
print(type(console).__name__)
"""


def progress(done=10, planned=40, quarantined=1):
    tally = RunTally(clock=iter(float(n) for n in range(100)).__next__)
    tally.plan(planned)
    tally.done("u", UnitFacts({"purified": done - quarantined, "quarantined": quarantined}))
    return tally.progress("r", "running")


def on_terminal(term="xterm"):
    """Run the job on a terminal and return what it wrote there."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": term}
    job = subprocess.Popen(
        [sys.executable, "-c", JOB], stdout=theirs, stderr=theirs, stdin=theirs, env=environment
    )
    os.close(theirs)
    text = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        text += part
    os.close(ours)
    assert job.wait() == 0, text
    return text.decode()


def screen(text):
    """Return the lines that a terminal shows at the end."""
    lines = [""]
    for token in re.findall(r"\r\n|\r|\n|\x1b\[K|[^\r\n\x1b]+", text):
        if "\n" in token:
            lines.append("")
        elif token == "\r":
            lines[-1] = "\0" + lines[-1].lstrip("\0")  # the next text goes over it
        elif token == "\x1b[K":
            lines[-1] = "" if lines[-1].startswith("\0") else lines[-1]
        else:
            old = lines[-1].lstrip("\0") if lines[-1].startswith("\0") else ""
            assert not lines[-1] or lines[-1].startswith("\0"), "text on a line that is in use"
            lines[-1] = token + old[len(token) :]
    return lines


def test_a_terminal_has_a_bar_and_whole_log_lines():
    text = on_terminal()
    lines = screen(text)
    assert lines[:4] == [f"unit {number}" for number in range(4)]
    assert lines[4].startswith("[" + "#" * 24 + "] 40 of 40 images (100.0 %)")
    assert lines[5] == "Bar"
    assert text.count("\r[") == 9


def test_a_dumb_terminal_and_a_pipe_have_lines():
    assert "\x1b" not in on_terminal("dumb")
    done = subprocess.run([sys.executable, "-c", JOB], capture_output=True, text=True, check=True)
    assert done.stdout == "Lines\n"
    assert "\r" not in done.stderr
    assert "images" not in done.stderr, "no line before half a minute is over"


def test_one_line_per_half_minute(caplog):
    now = [0.0]
    console = Lines(clock=lambda: now[0])
    with caplog.at_level(logging.INFO):
        for _ in range(95):
            now[0] += 1.0
            console.show(progress())
    assert LINE_SECONDS == 30
    assert len(caplog.messages) == 3
    assert re.fullmatch(
        r"10 of 40 images \(25\.0 %\), [\d.]+/s, \d:\d\d left, 10\.00 % quarantined", caplog.messages[0]
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"eta_s": None}, "25.0 %), 5.0/s, time left unknown"),
        ({"eta_s": 3725.4}, "1:02:05 left"),
        ({"images_expected": 40_000, "images_per_s": 5.0}, "10 of about 40,000 images (0.0 %)"),
        ({"images_planned": 0, "elapsed_s": 75.0}, "getting ready, 1:15"),
    ],
)
def test_what_is_told(changes, text):
    assert text in told({**progress(), "images_per_s": 5.0, **changes})


def test_a_terminal_that_goes_away_is_nobodys_trouble():
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    bar = Bar(Gone())
    bar.show(progress())
    bar.close(progress())
    assert not any(bar._wiped in handler.filters for handler in logging.getLogger().handlers)


def test_a_stream_that_is_no_terminal():
    assert isinstance(open_console(io.StringIO()), Lines)
