"""Rules about documents: links, generated blocks, typed numbers, commands, decisions."""

import json
import re
import shlex
from collections.abc import Iterator
from difflib import get_close_matches

from tools.integrity import blocks
from tools.integrity.core import Repo, rule

Found = Iterator[tuple[str, int, str]]
GENERATED_PAGES = """
gates/index museum kill-matrix margins failures symptoms findings runs/index data/index benchmarks
models/index cli coverage config errors
""".split()


def prose(text: str) -> list[tuple[int, str]]:
    """Lines outside code fences, with their number; inline code is blanked."""
    lines, fenced = [], False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        elif not fenced:
            lines.append((number, re.sub(r"`[^`]*`", "``", line)))
    return lines


def anchor(heading: str) -> str:
    """The anchor Markdown makes of a heading."""
    text = re.sub(r"[`*_\[\]]|\(.*?\)|<[^>]*>", "", heading).strip().lower()
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", text))


def generated(repo: Repo) -> set[str]:
    """Pages that exist only in the built site."""
    pages = {f"docs/{p}.md" for p in GENERATED_PAGES}
    pages |= {f"docs/gates/{g}.md" for g in repo.spec.gates} | {
        f"docs/runs/{e.record}.md" for e in repo.entries
    }
    return (
        pages
        | {f"docs/models/{m.id}.md" for m in repo.registry}
        | {"docs/evidence.json", "docs/badge.json"}
    )


@rule(
    "LINK",
    title="Links and anchors resolve",
    why="A renamed file leaves every document that knew it lying.",
    hint="correct the link",
)
def link(repo: Repo) -> Found:
    virtual = generated(repo)
    for path in repo.markdown:
        for number, line in prose(repo.text(path)):
            for target in re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", line):
                message = _problem(repo, path, target, virtual)
                if message:
                    yield path, number, message


def _problem(repo: Repo, path: str, target: str, virtual: set[str]) -> str:
    if re.match(r"[a-z][a-z0-9+.-]*:", target):
        return ""
    file, _, fragment = target.partition("#")
    resolved = (repo.root / path).parent / file if file else repo.root / path
    try:
        relative = resolved.resolve().relative_to(repo.root).as_posix()
    except ValueError:
        return f"{target} leaves the repository"
    if relative in virtual:
        return ""
    if not resolved.exists() or not _same_case(repo, relative):
        return f"{target} does not exist"
    if fragment and resolved.suffix == ".md":
        text = resolved.read_text("utf-8")
        anchors = {anchor(h) for h in re.findall(r"^#+\s+(.*)$", text, re.M)} | set(
            re.findall(r"(?:id|name)=\"([^\"]+)\"", text)
        )
        anchors |= set(re.findall(r"\{\s*#([\w-]+)\s*\}", text))
        return "" if fragment in anchors else f"{target}: there is no heading #{fragment}"
    return ""


def _same_case(repo: Repo, relative: str) -> bool:
    folder = repo.root
    for part in relative.split("/"):
        if part not in (".", "") and part not in {p.name for p in folder.iterdir()}:
            return False
        folder = folder / part
    return True


@rule(
    "GEN-STALE",
    title="Generated blocks are as the generator makes them",
    why="A generated table edited by hand is a second home for its facts.",
    hint="python tools/check_integrity.py --write",
)
def gen_stale(repo: Repo) -> Found:
    for path in repo.markdown:
        text = repo.text(path)
        for name, line, current in blocks.find(text):
            if name not in blocks.GENERATORS and name.split(":")[0] not in blocks.GENERATORS:
                yield path, line, f"there is no generator {name}"
            elif current != blocks.make(repo, name):
                yield path, line, f"the block {name} is stale"
        if text.count("<!-- generated:") != len(blocks.find(text)):
            yield path, 0, "a generated block is not closed by <!-- /generated -->"


@rule(
    "TALLY-TYPED",
    title="No tally is typed by hand",
    why="A count in prose is true on the day it is typed.",
    hint="use a generated block or a fact marker",
)
def tally_typed(repo: Repo) -> Found:
    shapes = (
        r"\b\d+\s*(?:of|/|out of)\s*\d+\s+(?:gates|plants|rules|checks)\b",
        r"\ball \d+ (?:gates|plants)\b",
        r"\b\d+ (?:gates|plants) (?:pass|are|killed)\b",
    )
    pattern = re.compile("|".join(shapes), re.I)
    for path in repo.markdown:
        without = blocks.PATTERN.sub(lambda m: "\n" * m.group(0).count("\n"), repo.text(path))
        for number, line in prose(without):
            if match := pattern.search(line):
                yield path, number, f"a typed tally: {match.group(0)!r}"


FACT = re.compile(r"<!--\s*fact:([\w.-]+)#([\w]+)\s*-->(.*?)<!--\s*/fact\s*-->")


@rule(
    "FACT-CONFLICT",
    title="Numbers in prose are those of the record they name",
    why="One figure in two documents drifts into two figures.",
    hint="write the record's value at the precision you print",
)
def fact_conflict(repo: Repo) -> Found:
    for path in repo.markdown:
        for number, line in enumerate(repo.text(path).splitlines(), start=1):
            for name, metric, printed in FACT.findall(line):
                truth = fact_value(repo, name, metric)
                shown = printed.strip().replace(",", "")
                if truth is None:
                    yield path, number, f"the fact {name}#{metric} is not in any record"
                elif shown != at_precision(truth, shown):
                    yield (
                        path,
                        number,
                        f"prints {printed.strip()} for {name}#{metric}, the record says {truth}",
                    )


def fact_value(repo: Repo, name: str, metric: str) -> float | int | str | None:
    """A metric of a record by id, or of the records of a released model."""
    ids = (
        [name]
        if name in repo.records
        else [r for m in repo.registry if m.id == name for r in m.records.values()]
    )
    return next(
        (
            repo.records[r].metrics[metric].value
            for r in ids
            if r in repo.records and metric in repo.records[r].metrics
        ),
        None,
    )


def at_precision(truth: float | int | str, shown: str) -> str:
    """The true value with as many decimals as were printed."""
    decimals = len(shown.partition(".")[2])
    return f"{float(truth):.{decimals}f}" if not isinstance(truth, str) else truth


@rule(
    "UNTIL",
    title="No sentence has outlived its condition",
    why="“Until there is a first model” stays in the text two releases after the first.",
    hint="rewrite the sentence; its condition has come true",
)
def until(repo: Repo) -> Found:
    for path in repo.markdown:
        for number, line in prose(repo.text(path)):
            for expression in re.findall(r"<!--\s*until:\s*(.+?)\s*-->", line):
                outcome = _holds(repo, expression)
                if outcome is None:
                    yield path, number, f"cannot read the condition {expression!r}"
                elif outcome:
                    yield path, number, f"its condition has come true: {expression}"


def _holds(repo: Repo, expression: str) -> bool | None:
    match = re.fullmatch(
        r"(registry\.models|gates\.discharged|spec\.version)\s*(>=|>)\s*([\d.]+)", expression
    )
    if not match:
        return None
    name, operator, bound = match.groups()
    values = {
        "registry.models": lambda: (len(repo.registry),),
        "gates.discharged": lambda: (sum(s.state == "discharged" for s in repo.states.values()),),
        "spec.version": lambda: tuple(map(int, repo.spec.version.split("."))),
    }
    left, right = values[name](), tuple(map(int, bound.split(".")))
    return left > right or (operator == ">=" and left == right)


@rule(
    "DOC-COMMAND",
    title="Documented commands parse",
    why="A command that is documented and refused costs every reader an hour.",
    hint="write a verb and options of spec/cli.json, or a target of the Makefile",
)
def doc_command(repo: Repo) -> Found:
    file = repo.root / "spec" / "cli.json"
    if not file.is_file():
        yield "spec/cli.json", 0, "is missing: python -m stackproof.cli.surface > spec/cli.json"
        return
    verbs = json.loads(file.read_text("utf-8"))["verbs"]
    makefile = repo.root / "Makefile"
    targets = (
        set(re.findall(r"^([a-z][\w-]*):", makefile.read_text("utf-8"), re.M))
        if makefile.is_file()
        else set()
    )
    for path in repo.markdown:
        for number, command in _commands(repo.text(path)):
            message = _refusal(command, verbs, targets)
            if message:
                yield path, number, message


def _commands(text: str) -> Iterator[tuple[int, str]]:
    """Command lines of console, sh and bash fences, continuation lines joined."""
    language, pending, start = None, "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if stripped.startswith("```"):
            language = (stripped[3:].split() or [""])[0] if language is None else None
        elif language in ("console", "sh", "bash", "shell"):
            start = start if pending else number
            pending += stripped.removeprefix("$ ").removesuffix("\\") + " "
            if not stripped.endswith("\\"):
                yield start, pending.strip()
                pending = ""


def _refusal(command: str, verbs: dict, targets: set[str]) -> str:
    try:
        words = shlex.split(command, comments=True)
    except ValueError as e:
        return f"cannot be split: {command!r}: {e}" if command.startswith(("stack", "make")) else ""
    words = [
        w
        for i, w in enumerate(words)
        if not (re.fullmatch(r"[A-Z_]+=.*", w) and all("=" in x for x in words[:i]))
    ]
    if words[:1] == ["make"]:
        unknown = [
            w for w in words[1:] if not w.startswith("-") and "=" not in w and w not in targets
        ]
        return f"the Makefile has no target {unknown[0]}" if unknown else ""
    if words[:1] not in (["stack"], ["stackproof"]) or words[1:2] in (["--help"], []):
        return ""
    verb = next(
        (" ".join(words[1 : 1 + n]) for n in (2, 1) if " ".join(words[1 : 1 + n]) in verbs), None
    )
    if verb is None:
        near = get_close_matches(" ".join(words[1:3]), verbs, n=1, cutoff=0.3)
        return f"there is no verb `stack {' '.join(words[1:2])}`" + (
            f"; nearest: {near[0]}" if near else ""
        )
    flags = {f: o["takes_value"] for o in verbs[verb]["options"] for f in o["flags"]} | {
        "--help": False
    }
    for word in words[1 + len(verb.split()) :]:
        flag = word.partition("=")[0]
        if word.startswith("--") and flag not in flags:
            near = get_close_matches(flag, flags, n=1)
            return f"stack {verb} has no option {flag}" + (f"; nearest: {near[0]}" if near else "")
    return ""


@rule(
    "DOC-TEST",
    title="Every test a document cites exists",
    why="A claim whose proof was renamed away is a claim without proof.",
    hint="correct the citation or write the test",
)
def doc_test(repo: Repo) -> Found:
    for path in repo.markdown:
        for number, line in enumerate(repo.text(path).splitlines(), start=1):
            for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", line):
                if name not in repo.python_functions(file):
                    yield path, number, f"cites {file}::{name}, which does not exist"


@rule(
    "ADR",
    title="Decisions are complete",
    why="A decision without what was rejected will be taken again.",
    hint="one page: # title, Status:, Context, Decision, Rejected, Evidence",
)
def adr(repo: Repo) -> Found:
    for file in sorted((repo.root / "docs" / "adr").glob("[0-9]*.md")):
        path, text = file.relative_to(repo.root).as_posix(), file.read_text("utf-8")
        if not re.fullmatch(r"\d{4}-[a-z0-9-]+\.md", file.name):
            yield path, 0, "is not named NNNN-title.md"
        if not text.startswith("# ") or not re.search(r"^\**Status:?\**", text, re.M):
            yield path, 1, "lacks its title or its Status line"
        for section in ("Context", "Decision", "Rejected", "Evidence"):
            if not re.search(rf"^#+ {section}", text, re.M):
                yield path, 0, f"lacks the section {section}"
