"""Verdicts of gates over all shards of a corpus where they read a sample of them."""

import functools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

from stackproof.contracts.gate import Verdict
from stackproof.contracts.subject import NotOffered, Subject

Check = Callable[[SimpleNamespace, Subject], Verdict]


def of_read_shards(verdict: Verdict, subject: Subject) -> Verdict:
    """A verdict that follows from the shards in the splits of the corpus. Where these are a sample
    of the shards in its manifest, green is not_run with both numbers; red stays red.
    """
    try:
        splits, streams = subject.corpus.manifest["splits"], subject.corpus.splits
    except NotOffered:
        return verdict
    n_shards = sum(e.get("n_shards", 1) for s in splits.values() for e in s["shards"])
    n_read = sum(len(stream.paths) for stream in streams.values())
    if not verdict.passed or n_read == n_shards:
        return verdict
    return replace(
        verdict,
        outcome="not_run",
        message=f"green on {n_read} of {n_shards} shards; the others were not read",
        measured={**verdict.measured, "read_shards": n_read, "shards": n_shards},
    )


def over_all_shards(check: Check) -> Check:
    """A check whose verdicts all follow from the shards."""

    @functools.wraps(check)
    def judge(limits: SimpleNamespace, subject: Subject) -> Verdict:
        return of_read_shards(check(limits, subject), subject)

    return judge
