"""Fingerprints of checks in a copy of the code in which one text is replaced."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from stackproof.spec import ROOT
from stackproof.spec.fingerprint import code_below


def around_a_change(
    folder: Path, file: str, old: str, new: str, checks: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Hashes of the checks before and after `old`, which occurs once in the file, becomes `new`.
    An unchanged copy has the hashes of the checkout.
    """
    for room in ("contracts", "spec"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("*.pyc"))
    before, text = [code_below(ROOT).hash(check) for check in checks], (folder / file).read_text()
    assert [code_below(folder).hash(check) for check in checks] == before
    assert text.count(old) == 1
    (folder / file).write_text(text.replace(old, new))
    code_below.cache_clear()
    return before, [code_below(folder).hash(check) for check in checks]
