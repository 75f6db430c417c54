"""Blocks of documents that are generated: `<!-- generated:NAME -->…<!-- /generated -->`."""

import re
from collections.abc import Callable, Iterable

from stackproof.spec.coverage import tally
from stackproof.spec.errors import EXIT_CODES
from tools.integrity.core import RULES, Repo

PATTERN = re.compile(r"(<!-- generated:([\w.:-]+) -->\n)(.*?)(<!-- /generated -->)", re.S)
FACTS = """
n_params vocab_size tokens_seen epochs val_loss_nats val_bits_per_byte
baseline_bigram_bits_per_byte baseline_unigram_bits_per_byte bits_per_byte bits_per_char
""".split()


def find(text: str) -> list[tuple[str, int, str]]:
    """(name, line, content) of every block of a document."""
    return [(m[2], text[: m.start()].count("\n") + 1, m[3]) for m in PATTERN.finditer(text)]


def make(repo: Repo, name: str) -> str | None:
    """The content of a block; None for an unknown generator."""
    generator, _, argument = name.partition(":")
    if generator not in GENERATORS:
        return None
    lines = GENERATORS[generator](repo, *([argument] if argument else []))
    return "".join(f"{line}\n" for line in ("", *lines, ""))


def write(repo: Repo) -> list[str]:
    """Bring every block up to date; returns the files that changed."""
    changed = []
    for path in repo.markdown:
        text = repo.text(path)
        fresh = PATTERN.sub(lambda m: m[1] + (make(repo, m[2]) or m[3]) + m[4], text)
        if fresh != text:
            (repo.root / path).write_text(fresh, "utf-8")
            changed.append(path)
    return changed


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    head = list(head)
    lines = (f"| {' | '.join(map(str, row))} |" for row in (head, *rows))
    first, *rest = lines
    return [first, f"|{'---|' * len(head)}", *rest]


def _record_facts(repo: Repo, model_id: str) -> list[str]:
    model = next((m for m in repo.registry if m.id == model_id), None)
    if model is None:
        return [f"There is no model {model_id} in the registry."]
    found = (repo.records.get(model.records.get(kind, "")) for kind in ("train", "evaluate"))
    rows = []
    for record in filter(None, found):
        for name in (name for name in FACTS if name in record.metrics):
            metric = record.metrics[name]
            is_float = isinstance(metric.value, float)
            value = f"{metric.value:.4f}" if is_float else f"{metric.value:,}"
            rows.append([name, value, metric.unit, f"`{record.id}`"])
    return _table(["metric", "value", "unit", "record"], rows)


GENERATORS: dict[str, Callable[..., list[str]]] = {
    "gate-tally": lambda repo: _table(["state", "gates"], tally(repo.states).items()),
    "gate-table": lambda repo: _table(
        ["gate", "moment", "severity", "title"],
        ([f"`{g.id}`", g.moment, g.severity, g.title] for g in repo.spec.gates.values()),
    ),
    "adr-index": lambda repo: [
        f"- [{f.read_text('utf-8').splitlines()[0].removeprefix('# ')}]({f.name})"
        for f in repo.decisions
    ],
    "exit-codes": lambda repo: _table(["code", "meaning"], EXIT_CODES.items()),
    "rules": lambda repo: _table(
        ["code", "rule"], ([f"`{r.code}`", r.title] for r in RULES.values())
    ),
    "record-facts": _record_facts,
}
