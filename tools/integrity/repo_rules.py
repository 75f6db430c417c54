"""Rules about the repository itself: tracked files, file length, CI."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from stackproof.spec.files import text_lines
from tools.integrity.core import At, Messages, Repo, rule

MAX_LINES = 600
MAGICS = {b"GGUF": "GGUF", b"\x89HDF": "HDF5", b"ggml": "GGML", b"lmgg": "GGML"}
ARCHIVES = (".pt", ".pth", ".bin", ".ckpt", ".npz")
CI, WORKFLOW = ".ci/run", ".github/workflows/ci.yml"
# A pattern of the whole line that runs each command.
COMMANDS = {
    "make test": r"make test",
    "ruff check": r"\S*ruff check \.",
    "ruff format --check": r"\S*ruff format --check \.",
    "check_layers.py": r"\S*python tools/check_layers\.py",
    "check_integrity.py": r"\S*python tools/check_integrity\.py",
    "mkdocs build --strict": r"(?:\w+=\S+ )*(?:\S*python -m )?mkdocs build --strict(?: --quiet)?",
}
ENDS_AT_ERRORS = re.compile(r"^set -\w*e", re.M)
# What turns a failure into a success, or leaves a command out.
MASKS = re.compile(
    r"\|(?!\s*$)|\bset \+|\btrap\b|\bexit\b|\breturn\b|(?<!&)&(?!&)|^\s*!|\bcontinue-on-error\b"
    r"|\b(?:if|while|until|case)\b[ :]|\bfalse\b|\btrue\b"
)
SELECTS = re.compile(
    r"\s(?:-k|-m(?! pytest)|--ignore|--deselect|--co|--lf|--ff|--last|\S*tests/)\S*"
)
# written in parts, so that this file is not a finding
UNFINISHED = re.compile(
    r"\b(" + "TO" + "DO|FIX" + r"ME|XX" + r"X)\b|raise NotImplemented" + r"Error\(\)"
)


def looks_like_weights(head: bytes, name: str) -> str:
    """The kind of weight file that the first bytes show; empty for other files."""
    length = int.from_bytes(head[:8], "little") if len(head) > 9 else 0
    if 2 <= length < 2**27 and head[8:9] in (b"{", b" ") and b"\0" in head[:8]:
        return "safetensors"
    if head.startswith(b"\x80") and head[1:2] in b"\x02\x03\x04\x05":
        return "a pickle"
    if head.startswith(b"PK\x03\x04") and (name.endswith(ARCHIVES) or b"data.pkl" in head):
        return "a torch archive"
    return MAGICS.get(head[:4]) or ("ONNX" if name.endswith(".onnx") else "")


@rule(
    "WEIGHTS-IN-GIT",
    title="No weight file is tracked by git",
    why="Weights swell a history for ever and cannot be reviewed.",
    hint="git rm --cached the file; the record keeps its hash",
)
def weights_in_git(repo: Repo) -> Messages:
    for path in repo.tracked:
        if not (repo.root / path).is_symlink():
            with open(repo.root / path, "rb") as f:
                if kind := looks_like_weights(f.read(4096), path):
                    yield At(f"is {kind} by its first bytes", path=path)


@rule(
    "SYMLINK",
    title="Evidence holds regular files",
    why="A link can point at the record of another run.",
    hint="replace the link by the file",
)
def symlink(repo: Repo) -> Messages:
    for folder, folders, files in os.walk(repo.root / "evidence"):
        for path in (Path(folder, x) for x in folders + files if os.path.islink(f"{folder}/{x}")):
            yield At("is a symbolic link", path=path.relative_to(repo.root).as_posix())


@rule(
    "MERGE-MARK",
    title="No mark of a merge is left in a text",
    why="The lines between the marks are two texts, and a reader takes both, one or neither.",
    hint="decide which lines stay, and take the marks out",
)
def merge_mark(repo: Repo) -> Messages:
    for path in repo.tracked:
        file = repo.root / path
        if file.is_symlink() or b"\0" in (content := file.read_bytes()):
            continue
        for number, line in enumerate(content.splitlines(), start=1):
            if line.startswith((b"<" * 7 + b" ", b">" * 7 + b" ")):
                yield At(f"has the mark {line[:20].decode('utf-8', 'replace')}", number, path)


@rule(
    "LOC",
    title=f"No source file is longer than {MAX_LINES} lines",
    why="A file that cannot be read in one sitting is not reviewed.",
    hint="split the file by subject, or name it in a decision in docs/adr that gives the reason",
)
def loc(repo: Repo) -> Messages:
    excused = "".join(f.read_text("utf-8") for f in repo.decisions)
    for path in repo.source_files:
        lines = repo.text(path).count("\n")
        if lines > MAX_LINES and path not in excused:
            yield At(f"has {lines} lines", MAX_LINES, path)


@rule(
    "CI-SELF",
    title="CI runs what it claims",
    why="A check that is listed and never run gives false confidence.",
    hint="fix .ci/run or .github/workflows/ci.yml",
)
def ci_self(repo: Repo) -> Messages:
    for path in (CI, WORKFLOW):
        if not (repo.root / path).is_file():
            yield At("is missing", path=path)
            continue
        lines = [x for x in text_lines(repo.text(path)) if not x.lstrip().startswith("#")]
        yield from (At(f"does not run `{x}`", path=path) for x in _left_out(path, lines))
        if path == CI and not ENDS_AT_ERRORS.search("\n".join(lines)):
            yield At("does not end at the first command that fails (set -e)", path=path)
        for number, line in enumerate(text_lines(repo.text(path)), start=1):
            if line in lines and (masking := MASKS.search(line)):
                text = f"`{masking[0].strip()}` can make a command that fails pass"
                yield At(text, number, path)
    yield from (At(text, path="Makefile") for text in _partial_suite(repo.text("Makefile")))


def _left_out(path: str, lines: list[str]) -> list[str]:
    """Commands that no line is."""
    if path == WORKFLOW:
        return [x for x in (CI, "fetch-depth: 0") if not any(x in line for line in lines)]
    runs = [line.strip() for line in lines]
    return [x for x, form in COMMANDS.items() if not any(re.fullmatch(form, r) for r in runs)]


def _partial_suite(makefile: str) -> Iterator[str]:
    """Why `make test` is not the whole test suite, or cannot fail."""
    recipe = re.search(r"^test:.*\n((?:\t.*\n?)+)", makefile, re.M)
    commands = [line.strip() for line in text_lines(recipe[1])] if recipe else []
    if not any("pytest" in command for command in commands):
        yield "the target test does not run pytest"
    for command in commands:
        if command.startswith("-") or MASKS.search(command):
            yield f"`{command}` can make tests that fail pass"
        if selection := SELECTS.search(command):
            yield f"`{selection[0].strip()}` leaves tests out"


@rule(
    "UNFINISHED",
    title="No part is marked as missing",
    why="A mark that promises a part stands for code that does not exist.",
    hint="build it or delete it",
)
def unfinished(repo: Repo) -> Messages:
    for path in repo.source_files:
        for number, line in enumerate(repo.text(path).splitlines(), start=1):
            if UNFINISHED.search(line):
                yield At(f"unfinished: {line.strip()[:60]}", number, path)
