"""A refusal blames its input only if what is known to be right is not refused at the same place."""

from contextlib import contextmanager

import pytest
from typer.main import get_command

from stackproof.cli import app, known_good
from stackproof.cli.known_good import is_own_fault, place_of
from stackproof.museum import prove
from stackproof.museum.edit import Edit, edited
from stackproof.spec.errors import (
    CheckpointError,
    DataError,
    EnvironmentUnfit,
    GateFailed,
    IntegrityError,
    StreamExhausted,
    UsageError,
)

ORDERED = "stackproof.data.shards:TokenStream.starts_in"
OLD, NEW = "(bounds[1:] <= bounds[:-1]).any()", "(bounds[1:] >= bounds[:-1]).any()"


def command_line(arguments):
    """Performs a command line in this process; raises what the command raises."""
    get_command(app).main(arguments, prog_name="stack", standalone_mode=False)


def arguments(text_file, run):
    sets = (
        "data.corpus.kind=files",
        f'data.corpus.paths=["{text_file}"]',
        "schedule.warmup_steps=1",
        "train.max_steps=2",
    )
    return ["train", "tiny", "--run-dir", run, *(a for s in sets for a in ("--set", s))]


def test_a_refusal_by_wrong_code_is_a_bug(in_process, text_file):
    """The check of document starts is turned around: every shard seems to be damaged."""
    with edited([Edit(ORDERED, OLD, NEW)], lambda: None):
        code, document = in_process(*arguments(text_file, "run"))
    assert code == 1 and "this is a bug of stackproof" in document["what"]
    assert "DataError" in document["value"] and "document_starts" in document["value"]


@pytest.mark.parametrize(
    ("target", "old", "new", "error"),
    [
        (
            "stackproof.data.subject:BuiltCorpus.chat_text",
            'turns, "planted"',
            '"planted", turns',
            DataError,
        ),
        ("stackproof.evaluate.suite:_says", "is not None", "is None", DataError),
        (
            "stackproof.evaluate.sampling:next_logits",
            "use_cache and cache is None",
            "use_cache or cache is None",
            UsageError,
        ),
    ],
)
def test_code_of_gates_and_suites_is_tried_too(monkeypatch, target, old, new, error):
    """That of a suite without gates, the others in the checks of gates alone."""
    monkeypatch.setattr(known_good, "RUNS", known_good.RUNS[:1])
    package, gated = target.split(".")[1], not target.endswith("_says")
    with edited([Edit(target, old, new)], lambda: None):
        assert [type(e) for e in known_good._ends(command_line, package, gated=gated)] == [error]
        if package == "data":
            assert list(known_good._ends(command_line, package, gated=False)) == []


def test_a_refusal_of_bad_input_stays_one(stack, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe\x00" * 999)
    done = stack(*arguments(bad, "run"))
    assert done.code == 3 and "bug" not in done.err and "Traceback" not in done.err


def raised(error):
    try:
        raise error
    except type(error) as e:
        return e


def test_only_errors_of_code_that_reads_are_tried(monkeypatch):
    monkeypatch.setattr(known_good, "_ends", lambda *_, **__: pytest.fail("nothing is to be run"))
    assert place_of(raised(DataError("x")).__traceback__) is None
    assert not is_own_fault(raised(DataError("x")), print)
    monkeypatch.setattr(known_good, "place_of", lambda _: (known_good.__file__, "f"))
    full = CheckpointError("the disk is full")
    full.__cause__ = OSError(28, "no space")
    own = IntegrityError("a table of the project")
    for error in (GateFailed("loss.first"), StreamExhausted("the end"), full, own):
        assert not is_own_fault(raised(error), print)


@pytest.mark.parametrize(("number", "tried"), [(2, True), (17, True), (28, False), (13, False)])
def test_an_error_of_a_path_is_tried_and_one_of_the_machine_is_not(monkeypatch, number, tried):
    error = EnvironmentUnfit("a file could not be read")
    error.__cause__ = OSError(number, "refused")
    found = raised(error)
    monkeypatch.setattr(known_good, "place_of", lambda _: (known_good.__file__, "f"))
    monkeypatch.setattr(known_good, "_ends", lambda *_, **__: iter([found]))
    assert is_own_fault(found, print) == tried


def test_a_tokenizer_that_only_data_is_tried_with(monkeypatch):
    monkeypatch.setattr(known_good, "RUNS", ())
    parse = Edit("stackproof.data.tokenizer:_parse", "Chars(symbols)", "Chars(eos_token)")
    with edited([parse], lambda: None):
        found = list(known_good._ends(command_line, "data", gated=False))
        assert [type(e) for e in found] == [DataError]
    assert list(known_good._ends(command_line, "data", gated=False)) == []


def test_endless_recursion_is_tried_as_an_input_that_is_nested_too_deeply(monkeypatch):
    error = raised(RecursionError("maximum recursion depth exceeded"))
    monkeypatch.setattr(known_good, "place_of", lambda _: (known_good.__file__, "f"))
    for found, own in ((error, True), (raised(DataError("x")), False)):
        monkeypatch.setattr(known_good, "_ends", lambda *_, found=found, **__: iter([found]))
        assert is_own_fault(error, print) == own


def test_a_machine_on_which_nothing_can_be_tried_keeps_the_refusal(monkeypatch):
    @contextmanager
    def full():
        raise OSError(28, "no space left")
        yield

    tried = []
    monkeypatch.setattr(prove, "workshop", lambda: tried.append(1) or full())
    monkeypatch.setattr(known_good, "place_of", lambda _: (known_good.__file__, "f"))
    assert not is_own_fault(raised(DataError("x")), print) and len(tried) == len(known_good.RUNS)


def test_an_error_at_another_place_or_of_another_type_is_not_the_same(monkeypatch):
    error = raised(DataError("x"))
    monkeypatch.setattr(known_good, "place_of", lambda trace: (known_good.__file__, str(trace)))
    for found, own in ((error, True), (raised(DataError("x")), False), (raised(OSError()), False)):
        monkeypatch.setattr(known_good, "_ends", lambda *_, found=found, **__: iter([found]))
        assert is_own_fault(error, print) == own
