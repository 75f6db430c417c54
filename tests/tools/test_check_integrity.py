"""Every integrity rule is green on a valid repository and red on the break it is for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.check_integrity import explain, main, self_test
from tools.integrity import core
from tools.integrity.all_rules import check
from tools.integrity.core import RULES
from tools.integrity.repo_rules import looks_like_weights
from tools.tampers.breaks import (
    BREAKS,
    found,
)
from tools.tampers.small_repo import edit

ROOT = Path(__file__).resolve().parents[2]


def test_a_valid_repository_has_no_finding(repo):
    assert [f"{f.code} {f.path} {f.message}" for f in check(repo)] == []


def test_every_rule_has_its_break():
    assert set(BREAKS) == set(RULES) and len(RULES) >= 24


def test_the_self_test_names_a_rule_that_finds_nothing(monkeypatch):
    """`.ci/run` makes the whole of it: every rule on the tampering that it is for."""
    assert self_test(("PPL", "TOKENS")) == []
    blind = core.Rule("PPL", "t", "w", "h", lambda repo: iter(()), core.whole)
    monkeypatch.setitem(RULES, "PPL", blind)
    (problem,) = self_test(("PPL", "TOKENS"))
    assert problem.startswith("PPL is green")


def test_the_self_test_names_a_rule_that_is_red_on_what_is_valid(monkeypatch):
    red = core.Rule("PPL", "t", "w", "h", lambda repo: iter(("wrong",)), core.whole)
    monkeypatch.setitem(RULES, "PPL", red)
    assert self_test(("TOKENS",)) == ["PPL is red on a valid repository"]


def test_a_missing_commit_a_lost_tag_and_a_dead_link_are_named(repo):
    edit(repo, "README.md", "0001-one.md#context", "0002-two.md")
    findings = [f for f in check(repo) if f.code == "LINK"]
    assert (
        findings[0].path == "README.md"
        and findings[0].line == 3
        and "0002-two.md" in findings[0].message
    )


def test_a_citation_of_a_test_that_is_there_is_fine(repo):
    edit(
        repo, "README.md", "# Small\n", "# Small\n\nIt holds: `tests/test_loss.py::test_golden`.\n"
    )
    assert "DOC-TEST" not in found(repo)


def test_write_restores_blocks_byte_for_byte_and_twice_is_once(repo, capsys):
    before = (repo / "README.md").read_bytes()
    BREAKS["GEN-STALE"](repo)
    assert main(["--root", str(repo), "--write"]) == 0
    assert (repo / "README.md").read_bytes() == before
    assert main(["--root", str(repo), "--write"]) == 0
    assert (repo / "README.md").read_bytes() == before


def test_a_crashing_rule_is_a_finding(repo, monkeypatch):
    def crash(repo):
        raise RuntimeError("oops")
        yield

    monkeypatch.setitem(RULES, "CHAIN", core.Rule("CHAIN", "t", "w", "h", crash, core.whole))
    assert "INTERNAL" in found(repo)


@pytest.mark.parametrize("end", ["\x0b", "\x1c", "\u2028"])
def test_a_comment_reaches_to_the_end_of_its_line_in_a_shell(repo, end):
    edit(repo, ".ci/run", "make test", f"# {end}make test")
    assert "CI-SELF" in found(repo)


def test_json_is_one_document_and_exit_code_6(repo):
    BREAKS["LINK"](repo)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/check_integrity.py"), "--json", "--root", str(repo)],
        capture_output=True,
        text=True,
        cwd="/",
    )
    document = json.loads(done.stdout)
    assert done.returncode == 6 and document["ok"] is False and document["rules_run"] == len(RULES)
    assert set(document["findings"][0]) == {"code", "path", "line", "message", "hint"}


def test_explain_names_the_nearest_rule(capsys):
    assert explain("GOALPOST") == 0 and "fix   " in capsys.readouterr().out
    assert explain("GOALPOSTS") == 2 and "GOALPOST" in capsys.readouterr().err


def test_weights_are_known_by_their_first_bytes():
    assert looks_like_weights(b"\x80\x04\x95" + b"\0" * 20, "notes.txt") == "a pickle"
    assert looks_like_weights(b"GGUF" + b"\0" * 20, "a") == "GGUF"
    assert looks_like_weights((40).to_bytes(8, "little") + b'{"x"', "a.md") == "safetensors"
    assert looks_like_weights(b"PK\x03\x04" + b"archive/data.pkl", "a.dat") == "a torch archive"
    assert looks_like_weights(b"# a heading of plain text\n", "a.md") == ""


def test_the_real_repository_is_read_with_the_light_install():
    missing = ("torch", "numpy", "jinja2", "markupsafe", "mkdocs")
    code = f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
    code += "from tools.check_integrity import ROOT\n"
    code += "from tools.integrity.all_rules import check; f = check(ROOT)\n"
    code += "assert not [x for x in f if x.code == 'INTERNAL'], f"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
