"""Paths on the command line that name nothing, or a file where a folder has to be: usage, with
what, value, allowed and next step.
"""

from pathlib import Path

import pytest

from stackproof.cli.surface import surface

FOLDERS = (
    "evaluate PATH",
    "evaluate PATH --suite domains",
    "sample PATH",
    "inspect PATH",
    "trace PATH",
    "trace stats PATH",
    "trace compare PATH --against self@bfloat16",
    "trace bisect PATH --against self@bfloat16",
    "trace nonfinite PATH",
    "trace lens PATH",
    "trace ablate PATH layers.0",
    "trace patch PATH layers.0 --from text",
    "trace weights PATH",
    "trace PATH --weights",
    "trace PATH --against self@bfloat16",
    "trace --repro PATH",
    "export PATH --out out",
    "checkpoint convert PATH --out out",
    "import PATH --out out",
    "train --resume PATH",
    "train --fork PATH",
    "train --continue-from PATH",
    "train --data PATH",
    "train --resume PATH --dry-run",
    "data show PATH",
    "data verify PATH",
    "data report PATH",
    "data overlap PATH --against file",
    "gates repro PATH",
    "evidence add PATH",
)
FILES = (
    "tokenizer show PATH",
    "gates backtest PATH",
    "train PATH.toml",
    "import folder --out out --tokenizer PATH",
)
# names of arguments; the sources of a corpus may be globs, and are data
PATHS = {"model", "folder", "path", "log", "bundle", "run_dir"}
LACKING = {
    "inspect PATH": 5,
    "import PATH --out out": 5,
    "data show PATH": 3,
    "gates repro PATH": 3,
    "evidence add PATH": 6,
}


def refused(in_process, command: str, path: str) -> dict:
    Path("folder").mkdir()
    Path("file").write_text("a line\n")
    code, document = in_process(*command.replace("PATH", path).split())
    assert code == document["exit_code"] == 2 and document["error"] in (
        "UsageError",
        "ConfigError",
    ), document
    assert path in document["what"] and str(Path(path).absolute()) in document["value"]
    assert document["allowed"] and document["next_step"]
    assert sorted(p.name for p in Path().iterdir()) == ["file", "folder"], "nothing is written"
    return document


@pytest.mark.parametrize("command", FOLDERS + FILES)
def test_a_path_that_names_nothing_is_a_matter_of_usage(in_process, command):
    refused(in_process, command, "nothing/here")


@pytest.mark.parametrize("command", FOLDERS)
def test_a_file_where_a_folder_has_to_be_is_a_matter_of_usage(in_process, command):
    assert "a file and must be a folder" in refused(in_process, command, "file")["what"]


@pytest.mark.parametrize("command", [c for c in FILES if "toml" not in c])
def test_a_folder_where_a_file_has_to_be_is_a_matter_of_usage(in_process, command):
    assert "a folder and must be a file" in refused(in_process, command, "folder")["what"]


@pytest.mark.parametrize("command", LACKING)
def test_a_folder_that_lacks_what_it_should_hold_is_told_by_its_kind(in_process, command):
    Path("folder").mkdir()
    assert in_process(*command.replace("PATH", "folder").split())[0] == LACKING[command]


def test_every_command_that_takes_a_path_is_in_these_tables():
    asked = {
        verb
        for verb, parts in surface()["verbs"].items()
        if any(a["name"] in PATHS for a in parts["arguments"])
    }
    covered = {verb for verb in asked if any(c.startswith(f"{verb} ") for c in FOLDERS + FILES)}
    assert asked == covered and len(asked) == 23
