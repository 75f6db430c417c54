"""Rules about the repository itself: no weights in git, legible files,
a CI that runs what it claims.
"""

import re
from collections.abc import Iterator

from tools.integrity.core import Repo, rule

Found = Iterator[tuple[str, int, str]]
MAX_LINES = 600


def looks_like_weights(head: bytes, name: str) -> str:
    """What kind of weight file this is, by its first bytes; empty if none."""
    length = int.from_bytes(head[:8], "little") if len(head) > 9 else 0
    if 2 <= length < 2**27 and head[8:9] in (b"{", b" ") and b"\0" in head[:8]:
        return "safetensors"
    if head.startswith(b"\x80") and head[1:2] in b"\x02\x03\x04\x05":
        return "a pickle"
    if head.startswith(b"PK\x03\x04") and (
        name.endswith((".pt", ".pth", ".bin", ".ckpt", ".npz")) or b"data.pkl" in head
    ):
        return "a torch archive"
    magics = {b"GGUF": "GGUF", b"\x89HDF": "HDF5", b"ggml": "GGML", b"lmgg": "GGML"}
    if kind := magics.get(head[:4]):
        return kind
    return "ONNX" if name.endswith(".onnx") else ""


@rule(
    "WEIGHTS-IN-GIT",
    title="No weight file is tracked by git",
    why="Weights swell a history for ever and cannot be reviewed.",
    hint="git rm --cached the file; the record keeps its hash",
)
def weights_in_git(repo: Repo) -> Found:
    for path in repo.tracked:
        file = repo.root / path
        if file.is_file() and not file.is_symlink():
            with open(file, "rb") as f:
                kind = looks_like_weights(f.read(4096), path)
            if kind:
                yield path, 0, f"is {kind} by its first bytes"


@rule(
    "SYMLINK",
    title="Evidence holds regular files",
    why="A link can point at somebody else's passing run.",
    hint="replace the link by the file",
)
def symlink(repo: Repo) -> Found:
    for path in (repo.root / "evidence").rglob("*"):
        if path.is_symlink():
            yield path.relative_to(repo.root).as_posix(), 0, "is a symbolic link"


@rule(
    "MERGE-MARK",
    title="No mark of a merge is left in a text",
    why=(
        "What lies between the marks is two texts; a tool that reads the file takes both, one, or "
        "neither."
    ),
    hint="decide which lines stay, and take the marks out",
)
def merge_mark(repo: Repo) -> Found:
    for path in repo.tracked:
        file = repo.root / path
        if not file.is_file() or file.is_symlink() or b"\0" in (content := file.read_bytes()):
            continue
        for number, line in enumerate(content.splitlines(), start=1):
            if line.startswith((b"<" * 7 + b" ", b">" * 7 + b" ")):
                yield path, number, f"has the mark {line[:20].decode('utf-8', 'replace')}"


@rule(
    "LOC",
    title="Every source file fits its room",
    why="A file that cannot be read in one sitting is not reviewed.",
    hint=(
        f"split the file; a longer one than {MAX_LINES} lines needs a decision that names it in "
        "docs/adr"
    ),
)
def loc(repo: Repo) -> Found:
    excused = "".join(f.read_text("utf-8") for f in (repo.root / "docs" / "adr").glob("[0-9]*.md"))
    for path in repo.tracked:
        if (
            path.endswith(".py")
            and path.startswith(("spec/", "contracts/", "stack/", "tools/"))
            and (repo.root / path).is_file()
        ):
            lines = repo.text(path).count("\n")
            if lines > MAX_LINES and path not in excused:
                yield path, MAX_LINES, f"has {lines} lines"


@rule(
    "CI-SELF",
    title="CI runs what it claims",
    why="A check that is not run is worse than none.",
    hint="mend .ci/run or .github/workflows/ci.yml",
)
def ci_self(repo: Repo) -> Found:
    script, workflow = repo.root / ".ci" / "run", repo.root / ".github" / "workflows" / "ci.yml"
    for file, needed in (
        (
            script,
            (
                "make test",
                "ruff check",
                "ruff format --check",
                "check_layers.py",
                "check_integrity.py",
                "mkdocs build --strict",
            ),
        ),
        (workflow, (".ci/run", "fetch-depth: 0")),
    ):
        path = file.relative_to(repo.root).as_posix()
        text = file.read_text("utf-8") if file.is_file() else ""
        live = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        for words in needed:
            if words not in live:
                yield path, 0, f"does not run `{words}`" if file.is_file() else "is missing"
                if not file.is_file():
                    break


@rule(
    "UNFINISHED",
    title="No part is marked as missing",
    why="A mark in the source that promises a part is a stub with a name.",
    hint="build it or delete it",
)
def unfinished(repo: Repo) -> Found:
    pattern = re.compile(
        r"\b(" + "TO" + "DO|FIX" + r"ME|XX" + r"X)\b|raise NotImplemented" + r"Error\(\)"
    )
    for path in repo.tracked:
        if (
            path.endswith(".py")
            and path.startswith(("spec/", "contracts/", "stack/", "tools/"))
            and (repo.root / path).is_file()
        ):
            for number, line in enumerate(repo.text(path).splitlines(), start=1):
                if pattern.search(line):
                    yield path, number, f"unfinished: {line.strip()[:60]}"
