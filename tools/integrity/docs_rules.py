"""Rules about documents: links, generated blocks, typed numbers, commands, decisions."""

import json
import re
import shlex
from difflib import get_close_matches

from tools.integrity import blocks
from tools.integrity.core import At, Messages, Repo, each_page, rule

GENERATED_PAGES = """
gates/index museum kill-matrix margins failures symptoms findings runs/index data/index benchmarks
models/index cli coverage config errors
""".split()
FACT = re.compile(r"<!--\s*fact:([\w.-]+)#([\w]+)\s*-->(.*?)<!--\s*/fact\s*-->")
TALLY = re.compile(
    r"\b\d+\s*(?:of|/|out of)\s*\d+\s+(?:gates|plants|rules|checks)\b"
    r"|\ball \d+ (?:gates|plants)\b"
    r"|\b\d+ (?:gates|plants) (?:pass|are|killed)\b",
    re.I,
)
CONDITION = re.compile(r"(registry\.models|gates\.discharged|spec\.version)\s*(>=|>)\s*([\d.]+)")
CLI = "spec/cli.json"


def numbered(text: str) -> list[tuple[int, str]]:
    return list(enumerate(text.splitlines(), start=1))


def prose(text: str) -> list[tuple[int, str]]:
    """Lines outside code fences, with their number; inline code is blanked."""
    lines, fenced = [], False
    for number, line in numbered(text):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        elif not fenced:
            lines.append((number, re.sub(r"`[^`]*`", "``", line)))
    return lines


def anchor(heading: str) -> str:
    """The anchor of a heading in Markdown."""
    text = re.sub(r"[`*_\[\]]|\(.*?\)|<[^>]*>", "", heading).strip().lower()
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", text))


def generated(repo: Repo) -> set[str]:
    """Files that exist only in the built site."""
    gates, records = repo.spec.gates, [e.record for e in repo.entries]
    names = [*GENERATED_PAGES, *(f"gates/{g}" for g in gates), *(f"runs/{r}" for r in records)]
    names += [f"models/{m.id}" for m in repo.registry]
    return {f"docs/{name}.md" for name in names} | {"docs/evidence.json", "docs/badge.json"}


@rule(
    "LINK",
    title="Links and anchors resolve",
    why="A renamed file breaks the links to it.",
    hint="correct the link",
)
def link(repo: Repo) -> Messages:
    virtual = generated(repo)
    for path in repo.markdown:
        for number, line in prose(repo.text(path)):
            for target in re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", line):
                if message := _problem(repo, path, target, virtual):
                    yield At(message, number, path)


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
        anchors = {anchor(heading) for heading in re.findall(r"^#+\s+(.*)$", text, re.M)}
        anchors |= set(re.findall(r"(?:id|name)=\"([^\"]+)\"", text))
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
    over=each_page,
)
def gen_stale(repo: Repo, path: str, text: str) -> Messages:
    found = blocks.find(text)
    for name, line, current in found:
        expected = blocks.make(repo, name)
        if expected is None:
            yield At(f"there is no generator {name}", line)
        elif current != expected:
            yield At(f"the block {name} is stale", line)
    if text.count("<!-- generated:") != len(found):
        yield "a generated block is not closed by <!-- /generated -->"


@rule(
    "TALLY-TYPED",
    title="No tally is typed by hand",
    why="A count in prose is true on the day it is typed.",
    hint="use a generated block or a fact marker",
    over=each_page,
)
def tally_typed(repo: Repo, path: str, text: str) -> Messages:
    without = blocks.PATTERN.sub(lambda m: "\n" * m.group(0).count("\n"), text)
    for number, line in prose(without):
        if match := TALLY.search(line):
            yield At(f"a typed tally: {match.group(0)!r}", number)


@rule(
    "FACT-CONFLICT",
    title="Numbers in prose are those of the record they name",
    why="One figure in two documents drifts into two figures.",
    hint="write the record's value at the precision you print",
    over=each_page,
)
def fact_conflict(repo: Repo, path: str, text: str) -> Messages:
    for number, line in numbered(text):
        for name, metric, printed in FACT.findall(line):
            truth, shown = fact_value(repo, name, metric), printed.strip()
            if truth is None:
                yield At(f"the fact {name}#{metric} is not in any record", number)
            elif shown.replace(",", "") != at_precision(truth, shown.replace(",", "")):
                yield At(f"prints {shown} for {name}#{metric}, the record holds {truth}", number)


def fact_value(repo: Repo, name: str, metric: str) -> float | int | str | None:
    """A metric of a record by id, or of the records of a released model."""
    released = (r for m in repo.registry if m.id == name for r in m.records.values())
    ids = [name] if name in repo.records else released
    records = (repo.records[r] for r in ids if r in repo.records)
    return next((r.metrics[metric].value for r in records if metric in r.metrics), None)


def at_precision(truth: float | int | str, shown: str) -> str:
    """The true value with as many decimals as were printed."""
    decimals = len(shown.partition(".")[2])
    return f"{float(truth):.{decimals}f}" if not isinstance(truth, str) else truth


@rule(
    "UNTIL",
    title="No sentence has outlived its condition",
    why="“Until there is a first model” stays in the text two releases after the first.",
    hint="rewrite the sentence; its condition has come true",
    over=each_page,
)
def until(repo: Repo, path: str, text: str) -> Messages:
    for number, line in prose(text):
        for expression in re.findall(r"<!--\s*until:\s*(.+?)\s*-->", line):
            if (match := CONDITION.fullmatch(expression)) is None:
                yield At(f"cannot read the condition {expression!r}", number)
            elif _holds(repo, *match.groups()):
                yield At(f"its condition has come true: {expression}", number)


def _holds(repo: Repo, name: str, operator: str, bound: str) -> bool:
    match name:
        case "registry.models":
            left = (len(repo.registry),)
        case "gates.discharged":
            left = (sum(s.state == "discharged" for s in repo.states.values()),)
        case _:
            left = tuple(map(int, repo.spec.version.split(".")))
    right = tuple(map(int, bound.split(".")))
    return left > right or (operator == ">=" and left == right)


@rule(
    "DOC-COMMAND",
    title="Documented commands parse",
    why="A documented command must run as it is written.",
    hint="write a verb and options of spec/cli.json, or a target of the Makefile",
)
def doc_command(repo: Repo) -> Messages:
    if not (repo.root / CLI).is_file():
        yield At("is missing: python -m stackproof.cli.surface > spec/cli.json", path=CLI)
        return
    verbs = json.loads(repo.text(CLI))["verbs"]
    targets = set(re.findall(r"^([a-z][\w-]*):", repo.text("Makefile"), re.M))
    for path in repo.markdown:
        for number, command in _commands(repo.text(path)):
            if message := _refusal(command, verbs, targets):
                yield At(message, number, path)


def _commands(text: str) -> list[tuple[int, str]]:
    """Command lines of console, sh and bash fences, continuation lines joined."""
    found, language, pending, start = [], None, "", 0
    for number, line in numbered(text):
        stripped = line.strip()
        if stripped.startswith("```"):
            language = (stripped[3:].split() or [""])[0] if language is None else None
        elif language in ("console", "sh", "bash", "shell"):
            start = start if pending else number
            pending += stripped.removeprefix("$ ").removesuffix("\\") + " "
            if not stripped.endswith("\\"):
                found.append((start, pending.strip()))
                pending = ""
    return found


def _refusal(command: str, verbs: dict, targets: set[str]) -> str:
    """Why a `stack` or `make` command does not parse; empty for other commands."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError as e:
        return f"cannot be split: {command!r}: {e}" if command.startswith(("stack", "make")) else ""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    match words:
        case ["make", *arguments]:
            named = (w for w in arguments if not w.startswith("-") and "=" not in w)
            unknown = next((w for w in named if w not in targets), None)
            return f"the Makefile has no target {unknown}" if unknown else ""
        case ["stack" | "stackproof", first, *rest] if first != "--help":
            return _unknown_word([first, *rest], verbs)
    return ""


def _unknown_word(words: list[str], verbs: dict) -> str:
    """The verb or option that `stack` lacks, with the nearest one."""
    verb = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in verbs), None)
    if verb is None:
        near = get_close_matches(" ".join(words[:2]), verbs, n=1, cutoff=0.3)
        return _nearest(f"there is no verb `stack {words[0]}`", near)
    flags = {flag for option in verbs[verb]["options"] for flag in option["flags"]} | {"--help"}
    for word in words[len(verb.split()) :]:
        flag = word.partition("=")[0]
        if word.startswith("--") and flag not in flags:
            near = get_close_matches(flag, sorted(flags), n=1)
            return _nearest(f"stack {verb} has no option {flag}", near)
    return ""


def _nearest(message: str, near: list[str]) -> str:
    return f"{message}; nearest: {near[0]}" if near else message


@rule(
    "DOC-TEST",
    title="Every test a document cites exists",
    why="A claim whose proof was renamed away is a claim without proof.",
    hint="correct the citation or write the test",
    over=each_page,
)
def doc_test(repo: Repo, path: str, text: str) -> Messages:
    for number, line in numbered(text):
        for test in re.findall(r"tests/[\w/]+\.py::\w+", line):
            if repo.missing_test(test):
                yield At(f"cites {test}, which does not exist", number)


@rule(
    "ADR",
    title="Decisions are complete",
    why="A decision without its rejected options will be discussed again.",
    hint="one page: # title, Status:, Context, Decision, Rejected, Evidence",
)
def adr(repo: Repo) -> Messages:
    for file in repo.decisions:
        path, text = file.relative_to(repo.root).as_posix(), file.read_text("utf-8")
        if not re.fullmatch(r"\d{4}-[a-z0-9-]+\.md", file.name):
            yield At("is not named NNNN-title.md", path=path)
        if not text.startswith("# ") or not re.search(r"^\**Status:?\**", text, re.M):
            yield At("lacks its title or its Status line", 1, path)
        for section in ("Context", "Decision", "Rejected", "Evidence"):
            if not re.search(rf"^#+ {section}", text, re.M):
                yield At(f"lacks the section {section}", path=path)
