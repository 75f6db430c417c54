"""The account of a built data set: its table of sources, the verdicts of its gates, its record and
its page.
"""

import html
from pathlib import Path
from typing import Any

from stackproof.config import DataConfig
from stackproof.contracts.keeper import Gatekeeper
from stackproof.data import corpus, dedup, receipts
from stackproof.data.prepare import Dataset
from stackproof.data.subject import data_set_subject
from stackproof.spec.building import RecordBuilder, artefact
from stackproof.spec.canonical import canonical_lines, sha256_file
from stackproof.spec.errors import DataError, GateFailed
from stackproof.spec.files import write_atomically
from stackproof.spec.gates import load_spec
from stackproof.spec.provenance import environment
from stackproof.spec.records import GateResult, Record, read_record
from stackproof.spec.visible import visible

SOURCES = "sources.jsonl"
JUDGED_SEQ_LEN = 512
LOST_BYTES_FRAC = 0.5  # a build ends with a notice for each source that lost more
MAX_INPUT_FILES = 1000
GATES = (
    "corpus.filters corpus.no-repeats corpus.decontamination corpus.packing data.integrity "
    "data.leakage tokenizer.round-trip tokenizer.identity tokenizer.merges"
).split()
DECLARED = (
    "name kind license languages weight cap floor files files_passed_over sha256 tokens".split()
)
RECEIVED = "documents_in documents_out bytes_in bytes_out dropped".split()
CLAIM = (
    "These files, filtered, freed of repeats and tokenised by this code, give these shards, and "
    "every document is accounted for."
)
NOT_COVERED = (
    "whether the text is true, useful or lawful to train on: the licence is what the user declared",
    (
        "repeats below the declared similarity, and passages shared with evaluation sets that "
        "nobody declared"
    ),
)


def open_record(cfg: DataConfig) -> RecordBuilder:
    """A record of kind data, opened before the build begins."""
    return RecordBuilder(
        kind="data",
        spec=load_spec(),
        config=cfg.model_dump(mode="json", exclude={"packing", "on_exhausted", "verify"}),
        claim=CLAIM,
        not_covered=NOT_COVERED,
    )


def judge(dataset: Dataset) -> tuple[list[GateResult], GateFailed | None]:
    """The result of every gate that needs no run, and the error of the first red one that halts."""
    seq_len = min(JUDGED_SEQ_LEN, max(1, dataset.train.n_tokens // 4))
    keeper = Gatekeeper(load_spec(), only=GATES)
    try:
        keeper.preflight(data_set_subject(dataset, seq_len))
    except GateFailed as failure:
        return keeper.results(), failure
    return keeper.results(), None


def require_recorded(folder: Path) -> None:
    """Raises DataError if manifest or tokenizer are not those the folder's record names."""
    if not (folder / "metadata.json").is_file():
        return
    for output in read_record(folder / "metadata.json").outputs:
        if sha256_file(folder / output.path) != output.sha256:
            raise DataError(
                f"{folder / output.path} was changed since it was recorded",
                next_step="build the data again",
            )


def source_rows(manifest: dict) -> list[dict[str, Any]]:
    """One JSON-ready row per source: what it is, what came in and out,
    and why the rest was dropped.
    """
    return [
        {k: s[k] for k in DECLARED} | {k: s["receipt"][k] for k in RECEIVED}
        for s in manifest["sources"]
    ]


def write_record(
    builder: RecordBuilder,
    cfg: DataConfig,
    dataset: Dataset,
    results: list[GateResult],
    seconds: float,
) -> Record:
    """Write sources.jsonl and metadata.json into the folder of a data set and return the record."""
    folder, manifest = dataset.directory, dataset.manifest
    write_atomically(folder / SOURCES, canonical_lines(source_rows(manifest)))
    builder.environment = environment()
    builder.inputs = [
        artefact(path, root=Path.cwd(), name=name, license=source.license)
        for name, source in corpus.sources_of(cfg.corpus).items()
        for path in corpus.source_paths(source)[:MAX_INPUT_FILES]
    ]
    builder.outputs = [
        artefact(folder / name, root=folder) for name in ("manifest.json", "tokenizer.json")
    ]
    whole = receipts.total(s["receipt"] for s in manifest["sources"])
    for unit in ("documents", "bytes"):
        builder.metric(f"{unit}_in", whole[f"{unit}_in"], unit)
        builder.metric(f"{unit}_out", whole[f"{unit}_out"], unit)
    for split, entry in manifest["splits"].items():
        builder.metric(f"{split}_tokens", entry["tokens"], "tokens")
    builder.metric("vocab_size", manifest["tokenizer"]["vocab_size"], "tokens")
    builder.metric("sources", len(manifest["sources"]), "sources")
    builder.metric(
        "build_bytes_per_s", whole["bytes_in"] / max(seconds, 1e-9), "bytes/s", better="higher"
    )
    red = [r.id for r in results if r.verdict == "fail"]
    return builder.finish(
        folder,
        status="failed" if red else "completed",
        end_reason=f"red: {', '.join(red)}" if red else "every document accounted for",
        exit_code=4 if red else 0,
        gates=results,
        series=(SOURCES,),
    )


def overlap(dataset: Dataset, texts: list[str]) -> dict[str, Any]:
    """How many training documents share a run of words with an evaluation set, per source, and how
    many of its texts are touched.

    `canary_found`: the scanner found one of the texts hidden in a document.
    """
    grams = dedup.gram_set(texts)
    long = [t for t in texts if dedup.is_long(t)]
    canary = bool(long) and dedup.finds_hidden(long[0], grams)
    rows = {name: {"documents": 0, "hits": 0} for name in dataset.sources}
    seen = []
    for source, start, stop in dataset.train.documents():
        text = dataset.text(dataset.train, start, stop)
        rows[source]["documents"] += 1
        if dedup.shares_gram(text, grams):
            rows[source]["hits"] += 1
            seen.append(dedup.runs(dedup.word_hashes(text), dedup.GRAM_WORDS))
    touched = set().union(*(s.tolist() for s in seen)) if seen else set()
    return {
        "canary_found": canary,
        "gram_words": dedup.GRAM_WORDS,
        "evaluation_texts": len(texts),
        "evaluation_texts_long_enough": len(long),
        "evaluation_texts_touched": sum(
            not touched.isdisjoint(dedup.runs(dedup.word_hashes(t), dedup.GRAM_WORDS).tolist())
            for t in long
        ),
        "sources": rows,
    }


def page(manifest: dict, results: list[GateResult]) -> str:
    """A page that stands alone: sources with what was dropped and why, splits,
    tokenizer and gates.
    """
    rows = receipts.table(manifest["sources"])
    reasons = sorted({r for row in rows for r in row["reasons"]})
    sources = [
        [
            r["source"],
            f"{r['in']:,}",
            f"{r['out']:,}",
            f"{r['dropped_frac']:.1%}",
            *(f"{r['reasons'].get(k, 0):,}" for k in reasons),
        ]
        for r in rows
    ]
    declared = [
        [
            s["name"],
            s["kind"],
            s["license"],
            ", ".join(s["languages"]),
            *(f"{s[k]:g}" for k in ("weight", "cap", "floor")),
            *(f"{n:,}" for n in s["tokens"].values()),
        ]
        for s in manifest["sources"]
    ]
    examples = [
        [s["name"], reason, row["example"]]
        for s in manifest["sources"]
        for reason, row in s["receipt"]["dropped"].items()
        if row["example"]
    ]
    gates = [[g.id, g.verdict, g.message] for g in results]
    parts = [
        "<!doctype html><meta charset='utf-8'><title>Data set</title>",
        "<style>body{font:15px system-ui;margin:2em auto;max-width:72em;padding:0 "
        "1em}table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em "
        ".7em;border-bottom:1px solid "
        "#bbb;text-align:left}td+td{font-variant-numeric:tabular-nums}</style>",
        "<h1>Data set</h1>",
        f"<p>tokenizer {_escaped(manifest['tokenizer']['kind'])}, "
        f"{manifest['tokenizer']['vocab_size']:,} entries, sha256 "
        f"{_escaped(manifest['tokenizer']['sha256'][:16])}…</p>",
        _table(
            "Documents in, out and dropped by reason",
            ["source", "in", "out", "dropped", *reasons],
            sources,
        ),
        _table(
            "Sources",
            [
                *"source kind licence languages weight cap floor".split(),
                *("train tokens", "held-out tokens"),
            ],
            declared,
        ),
        *(f"<p>{_escaped(line)}</p>" for line in notices(manifest)),
        _table("First dropped document of each reason", ["source", "reason", "where"], examples),
        _table("Gates", ["gate", "verdict", "message"], gates),
    ]
    return "\n".join(parts) + "\n"


def _escaped(text: object) -> str:
    return html.escape(visible(text))


def notices(manifest: dict) -> list[str]:
    """Notices at the end of a build: files not read, sources that lost most of their text, what is
    kept out.
    """
    lines = []
    for source in manifest["sources"]:
        skipped, receipt = source["files_passed_over"], source["receipt"]
        if skipped["number"]:
            lines.append(
                f"{source['name']}: {skipped['number']:,} file(s) of another kind were not read, "
                f"the first {skipped['example']}"
            )
        lost = 1 - receipt["bytes_out"] / max(1, receipt["bytes_in"])
        if lost > LOST_BYTES_FRAC:
            cut = (
                "; --documents paragraph or line cuts files, so that less is lost"
                if "long-paragraph" in receipt["dropped"]
                else ""
            )
            lines.append(
                f"{source['name']}: {lost:.0%} of its bytes were dropped: "
                f"{receipts.worst(receipt)}{cut}"
            )
    for kept_out in (manifest["decontamination"] or {}).get("sets", ()):
        found = f"{kept_out['records_kept_out']:,} of {kept_out['records']:,} records"
        lines.append(
            f"kept out: {found} of {kept_out['path']}; the others are shorter than "
            f"{dedup.GRAM_WORDS} words"
        )
    return lines


def _table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{_escaped(c)}</th>" for c in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_escaped(c)}</td>" for c in row) + "</tr>" for row in rows
    )
    return f"<h2>{_escaped(title)}</h2><table><tr>{head}</tr>{body}</table>"
