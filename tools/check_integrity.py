"""Holds spec, code, evidence, registry, documents and git against each other.
Needs the light install, no torch.

python tools/check_integrity.py [--json | --list | --explain CODE | --write] [--root DIR]
python tools/check_integrity.py --self-test
Runs the code of the checkout it stands in, whether that is installed or not; `pip install .` brings
what it needs. Exit code 0: nothing found. 6: findings. 2: usage. 7: a package is missing.
What needs a git history that the checkout lacks is listed as not verified, and "ok" is false.
"""

import argparse
import difflib
import gc
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools/checkout")]

from stackproof.spec.visible import print_visible  # noqa: E402

try:
    from tools.integrity import all_rules, blocks  # noqa: F401
    from tools.integrity.core import RULES, Finding, Repo, findings_in
except ModuleNotFoundError as e:
    print_visible(
        f"error: the integrity check needs {e.name}, which is not installed\n  next     pip "
        "install .",
        file=sys.stderr,
    )
    sys.exit(7)


def self_test(codes: Iterable[str] = RULES) -> list[str]:
    """Tamper with a small valid repository, once for each rule. Returns a message for each rule
    that stays green, and for what is found before.
    """
    from tools.tampers import small_repo
    from tools.tampers.breaks import BREAKS, found

    with tempfile.TemporaryDirectory(prefix="stackproof-tampered-") as name:
        valid = Path(name) / "valid"
        small_repo.build(valid)
        problems = [f"{code} is red on a valid repository" for code in sorted(found(valid))]
        for code in codes:
            tampered = Path(name) / "tampered"
            shutil.copytree(valid, tampered, symlinks=True)
            BREAKS[code](tampered)
            if code not in found(tampered):
                problems.append(f"{code} is green on a repository that was tampered with")
            shutil.rmtree(tampered)
    return problems


def explain(code: str) -> int:
    """Print what a rule holds, why, and how to fix a finding."""
    if code not in RULES:
        near = difflib.get_close_matches(code, RULES, n=1, cutoff=0.3)
        print_visible(
            f"error: there is no rule {code}\n  nearest  {near[0] if near else '--list shows all'}",
            file=sys.stderr,
        )
        return 2
    rule = RULES[code]
    print_visible(f"{rule.code}: {rule.title}\n  why   {rule.why}\n  fix   {rule.hint}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="check_integrity.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="the checkout to look at (default: this one)"
    )
    parser.add_argument(
        "--allowed-signers",
        type=Path,
        metavar="FILE",
        help="who may pin the ledger (default: evidence/allowed_signers, which a cheat could "
        "write); without a pin by one of them the check fails",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--list", action="store_true", help="list all rules")
    parser.add_argument(
        "--explain", metavar="CODE", help="what a rule holds, why, and how to fix a finding"
    )
    parser.add_argument(
        "--write", action="store_true", help="regenerate generated blocks, then check"
    )
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="tamper with a small repository once for each rule, and require that it is found",
    )
    options = parser.parse_args(arguments)
    if options.self_test:
        problems = self_test()
        _print("\n".join([*problems, f"{len(RULES)} tamperings, {len(problems)} problem(s)"]))
        return 6 if problems else 0
    if options.explain:
        return explain(options.explain)
    if options.list:
        _print("\n".join(f"{r.code:20} {r.title}" for r in RULES.values()))
        return 0
    if options.write:
        for path in blocks.write(Repo(options.root)):
            print_visible(f"wrote {path}", file=sys.stderr)
    repo = Repo(options.root, options.allowed_signers)
    findings = findings_in(repo)
    _print(_as_json(repo, findings) if options.json else _as_text(repo, findings))
    return 6 if findings else 0


def _as_json(repo: Repo, findings: list[Finding]) -> str:
    document = {
        "ok": not findings and not repo.not_verified,
        "not_verified": repo.not_verified,
        "findings": [asdict(f) for f in findings],
        "rules_run": len(RULES),
    }
    return json.dumps(document)


def _as_text(repo: Repo, findings: list[Finding]) -> str:
    lines = []
    for f in findings:
        place = f"{f.path}{f':{f.line}' if f.line else ''}"
        lines += [f"{f.code:20} {place}  {f.message}", f"{'':20}   → {f.hint}"]
    lines += (f"not verified: {text}" for text in repo.not_verified)
    return "\n".join([*lines, f"{len(RULES)} rules, {len(findings)} finding(s)"])


def _print(text: str) -> None:
    """Print on stdout, quietly if the reader has ended, as `head` does."""
    try:
        print_visible(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    gc.disable()  # records and syntax trees have no cycles; looking for some takes 13 % of the time
    sys.exit(main())
