"""Text of others reaches no terminal as a command, and no text stops a command from speaking."""

import io
import os
import re
import warnings
from types import SimpleNamespace

import pytest
from rich.text import Text

from stackproof.cli import main, output
from stackproof.cli.console import ProgressReporter
from stackproof.export.card import _table
from stackproof.spec.visible import print_visible, visible, without_markup
from tests.hostile_text import NASTY
from tests.processes import STACK, Command

# What may be there: printable text, line ends, tabs, and the colours that the command itself sets.
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
OWN_CODES = re.compile(r"\x1b\[(\d+(;\d+)*m|2K|1A|\?25[lh])|\r")


def unsafe(shown: str) -> set[str]:
    return {c for c in shown if not (c.isprintable() or c in "\n\t")}


@pytest.fixture(params=NASTY.values(), ids=NASTY)
def nasty(request):
    return request.param


@pytest.fixture
def terminal(monkeypatch):
    """Both consoles as a terminal with colours; returns what reached it."""
    stream = io.StringIO()
    made = output.Terminal(stream, file=stream, force_terminal=True, soft_wrap=True)
    made.legacy_windows = False
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(output, name, made)
    monkeypatch.setattr("stackproof.cli.console.stderr", made)
    return stream


def bar(text):
    with output.progress_bar() as made:
        made.add_task(text, total=2)


def preflight(text):
    reporter = ProgressReporter()
    reporter.rows = [[text, output.MARKS["fail"], "1 s", text]]
    reporter._show_preflight()


def sample(text):
    coherence = SimpleNamespace(score=50.0)
    fields = {"step": 1, "prompt": text, "text": text, "coherence": coherence}
    ProgressReporter().on_sample(None, SimpleNamespace(**fields))


PRINTERS = {
    "line": output.print_line,
    "styled line": lambda text: output.print_line(text, "bold"),
    "text": lambda text: output.print_line(Text.assemble((text, "bold"), text)),
    "note": output.note,
    "line over": output.note_over,
    "table": lambda text: output.print_table(text, [text], [[text], [Text(text)]], output.stdout),
    "facts": lambda text: output.print_table(text, ["a"], [[{text: text}]], output.stdout),
    "bar": bar,
    "preflight": preflight,
    "sample": sample,
}


@pytest.mark.parametrize("printer", PRINTERS)
def test_nothing_that_is_printed_commands_a_terminal(printer, nasty, terminal):
    PRINTERS[printer](nasty)
    shown = terminal.getvalue()
    assert len(shown) > 4 and not unsafe(OWN_CODES.sub("", shown)), repr(shown)
    if printer in ("line", "styled line", "note"):
        # Nothing is interpreted, and nothing is lost.
        assert COLOUR.sub("", shown) == visible(nasty) + "\n"


def test_control_characters_are_escaped_and_other_text_is_as_it_was():
    assert visible("\x1b[1m\r\x9b\u202e\u200b\udcff\0") == r"\x1b[1m\r\x9b\u202e\u200b\udcff\x00"
    assert visible("a\tb\nü 漢 🙂 é [/x] \\") == "a\tb\nü 漢 🙂 é [/x] \\"


def test_text_without_markup_is_one_line_of_a_card(nasty):
    (head, _, row) = _table(("a", "b"), [(without_markup(nasty), 1)]).split("\n")
    assert row.count("|") == head.count("|") and not set(row) & set("<>`[]{}*_\"'")
    assert not unsafe(row)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_print_visible_writes_any_text_to_any_stream(nasty, encoding):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding, write_through=True)
    print_visible(nasty + " ü→", file=stream)
    assert not unsafe(raw.getvalue().decode(encoding)) and raw.getvalue().endswith(b"\n")


ARGUMENTS = {
    "unknown verb": lambda x: [x],
    "unknown option": lambda x: ["train", f"--{x}"],
    "wrong value": lambda x: ["train", "--depth", x],
    "unknown gate": lambda x: ["gates", "show", x],
    "unknown key": lambda x: ["train", "--dry-run", "--set", f"{x}=1"],
    "missing folder": lambda x: ["evidence", "add", x],
    "missing record": lambda x: ["evidence", "show", x],
    "missing checkpoint": lambda x: ["evaluate", x],
    "missing text": lambda x: ["trace", x],
    "missing source": lambda x: ["data", "build", x],
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_no_argument_commands_a_terminal_or_breaks_it(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    everything = " ".join(NASTY.values())
    for nasty in (everything, everything.replace("\0", "")):
        given = ARGUMENTS[arguments](nasty)
        for asked in (given, [*given, "--json"]):
            monkeypatch.setattr(output, "_emitted", False)
            with pytest.raises(SystemExit) as ended:
                main(asked)
            shown = capsys.readouterr()
            assert ended.value.code in (2, 3, 5, 6), (asked, shown)
            assert "Traceback" not in shown.err and "error: " in shown.err, (asked, shown)
            assert not unsafe(shown.out + shown.err), asked
            assert shown.out.isascii() or "--json" not in asked


def test_a_warning_commands_no_terminal(nasty):
    with pytest.raises(SystemExit):
        main(["gates", "show"])
    assert not unsafe(warnings.formatwarning(nasty, UserWarning, nasty, 1))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stream_of_few_characters_takes_everything(encoding, tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "LANG": "C"}
    code = f"import sys; sys.stdout.reconfigure(encoding={encoding!r}); {STACK}"
    for arguments in (["gates", "show", "loss.first"], ["gates", "show", "ü→\udcff"]):
        done = Command(*arguments, folder=tmp_path, environment=environment, code=code).wait()
        assert done.code in (0, 2) and "Traceback" not in done.err, done
