"""Blocks in documents that are generated from spec, ledger and registry: `<!-- generated:NAME
-->…<!-- /generated -->`.
"""

import re
from collections.abc import Callable

from stackproof.spec.coverage import tally
from stackproof.spec.errors import EXIT_CODES
from tools.integrity.core import RULES, Repo

PATTERN = re.compile(r"(<!-- generated:([\w.:-]+) -->\n)(.*?)(<!-- /generated -->)", re.S)


def find(text: str) -> list[tuple[str, int, str]]:
    """(name, line, content) of every block of a document."""
    return [
        (m.group(2), text[: m.start()].count("\n") + 1, m.group(3)) for m in PATTERN.finditer(text)
    ]


def make(repo: Repo, name: str) -> str:
    """What the block must hold, newline at the end."""
    generator, _, argument = name.partition(":")
    lines = GENERATORS[generator](repo, argument)
    return "".join(f"{line}\n" for line in lines)


def write(repo: Repo) -> list[str]:
    """Bring every block up to date; returns the files that changed."""
    changed = []
    for path in repo.markdown:
        text = repo.text(path)
        fresh = PATTERN.sub(
            lambda m: (
                m.group(1)
                + (make(repo, m.group(2)) if _known(m.group(2)) else m.group(3))
                + m.group(4)
            ),
            text,
        )
        if fresh != text:
            (repo.root / path).write_text(fresh, "utf-8")
            changed.append(path)
    return changed


def _known(name: str) -> bool:
    return name.split(":")[0] in GENERATORS


def _gate_tally(repo: Repo, argument: str) -> list[str]:
    rows = [f"| {state} | {count} |" for state, count in tally(repo.states).items()]
    return ["", "| state | gates |", "|---|---|", *rows, ""]


def _gate_table(repo: Repo, argument: str) -> list[str]:
    rows = [
        f"| `{g.id}` | {g.moment} | {g.severity} | {g.title} |" for g in repo.spec.gates.values()
    ]
    return ["", "| gate | moment | severity | title |", "|---|---|---|---|", *rows, ""]


def _adr_index(repo: Repo, argument: str) -> list[str]:
    rows = []
    for file in sorted((repo.root / "docs" / "adr").glob("[0-9]*.md")):
        title = file.read_text("utf-8").splitlines()[0].removeprefix("# ")
        rows.append(f"- [{title}]({file.name})")
    return ["", *rows, ""]


def _exit_codes(repo: Repo, argument: str) -> list[str]:
    return [
        "",
        "| code | meaning |",
        "|---|---|",
        *(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()),
        "",
    ]


def _rules(repo: Repo, argument: str) -> list[str]:
    return [
        "",
        "| code | what it holds |",
        "|---|---|",
        *(f"| `{r.code}` | {r.title} |" for r in RULES.values()),
        "",
    ]


FACTS = (
    "n_params vocab_size tokens_seen epochs val_loss_nats val_bits_per_byte "
    "baseline_bigram_bits_per_byte baseline_unigram_bits_per_byte bits_per_byte bits_per_char"
).split()


def _record_facts(repo: Repo, argument: str) -> list[str]:
    model = next((m for m in repo.registry if m.id == argument), None)
    if model is None:
        return ["", f"There is no model {argument} in the registry.", ""]
    rows = []
    for kind in ("train", "evaluate"):
        record = repo.records.get(model.records.get(kind, ""))
        for name in FACTS if record else ():
            if name in record.metrics:
                metric = record.metrics[name]
                value = (
                    f"{metric.value:.4f}"
                    if isinstance(metric.value, float)
                    else f"{metric.value:,}"
                )
                rows.append(f"| {name} | {value} | {metric.unit} | `{record.id}` |")
    return ["", "| metric | value | unit | record |", "|---|---|---|---|", *rows, ""]


GENERATORS: dict[str, Callable[[Repo, str], list[str]]] = {
    "gate-tally": _gate_tally,
    "gate-table": _gate_table,
    "adr-index": _adr_index,
    "exit-codes": _exit_codes,
    "rules": _rules,
    "record-facts": _record_facts,
}
