"""Where the ranks of a run print, and which tracebacks are kept."""

import pytest

from stackproof.distributed.output import output_of


@pytest.fixture
def printed(ranks, tmp_path):
    """The files of both ranks after some starts, each of which ends in one way."""

    def run(*ways: str) -> list[str]:
        for start, how in enumerate(ways, start=1):
            ranks.run("tests.distributed.jobs:print_and_fail", tmp_path / "run", start, how)
        files = [output_of(tmp_path / "run", rank) for rank in range(2)]
        return [file.read_text() if file.is_file() else "" for file in files]

    return run


def test_other_ranks_print_into_files_of_their_own(printed):
    first, second = printed("completed")
    assert first == ""  # on the terminal
    for text in ("--- rank 1, start 1, process ", "library of 1", "text of 1", "warning of 1"):
        assert text in second
    assert "of 0" not in second


def test_the_traceback_of_every_rank_is_kept(printed):
    for text in printed("failed"):
        assert "Traceback" in text and "in print_and_fail" in text
        assert "DataError: the shard is damaged" in text


def test_a_run_that_a_signal_stopped_leaves_no_traceback(printed):
    assert all("Traceback" not in text for text in printed("stopped"))


def test_the_stack_of_a_crash_is_kept(printed):
    first, second = printed("crashed")
    assert "Fatal Python error: Aborted" in second and "in print_and_fail" in second
    assert first == ""


def test_nothing_is_written_through_a_link(printed, tmp_path):
    elsewhere, run_dir = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    run_dir.mkdir()
    (run_dir / "ranks").symlink_to(elsewhere)
    assert printed("failed") == ["", ""] and not list(elsewhere.iterdir())


def test_a_restart_does_not_overwrite_what_the_former_start_printed(printed):
    first, second = printed("failed", "completed", "failed")
    assert [second.count(f"start {n}, process") for n in (1, 2, 3)] == [1, 1, 1]
    assert second.count("text of 1") == 3 and second.count("DataError: ") == 2
    assert first.count("DataError: ") == 2
