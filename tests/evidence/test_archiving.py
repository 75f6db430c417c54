"""Which records stay in the tree, and what the archive refuses."""

import os
import shutil
import subprocess
from functools import partial

import pytest

from stackproof.evidence import archiving
from stackproof.evidence.archiving import citations, kept_records
from stackproof.evidence.ledgering import verify
from stackproof.spec import archive
from stackproof.spec.archive import History
from stackproof.spec.coverage import coverage
from stackproof.spec.errors import IntegrityError, NoHistory
from stackproof.spec.gates import load_spec
from stackproof.spec.ledger import Ledger
from stackproof.spec.records import GateResult, Kill, Record
from tests.site import small_repository
from tools.freeze_spec import freeze
from tools.integrity.all_rules import check
from tools.integrity.core import Checkout
from tools.tampers import archived, small_repo
from tools.tampers.small_repo import git, write


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_repository.write_repository(tmp_path_factory.mktemp("spec"))


@pytest.fixture
def made(small):
    """Makes a record of the small spec: kinds in order, newest last."""

    def make(kind: str, nonce: str, *, gates=(), kills=(), **parts) -> Record:
        spec, old = load_spec(small), "0" * 64
        results = tuple(
            GateResult(
                id="loss.adds-up",
                fingerprint=old if verdict == "old" else spec.fingerprint("loss.adds-up"),
                verdict="pass" if verdict == "old" else verdict,
                checks=1,
            )
            for verdict in gates
        )
        receipts = tuple(
            Kill(
                gate="loss.adds-up",
                fingerprint=old if outcome == "old" else spec.fingerprint("loss.adds-up"),
                plant=plant,
                plant_sha256=old,
                outcome="killed" if outcome == "old" else outcome,
                control="pass",
                latency="preflight",
                seconds=0.1,
            )
            for plant, outcome in kills
        )
        return small_repository.record(
            small, kind, nonce * 8, gates=results, kills=receipts, **parts
        )

    return make


def kept(small, *records: Record, **given) -> set[str]:
    """Nonces of the records that stay."""
    given = {"released": {}, "cited": {}} | given
    names = kept_records(load_spec(small), {r.id: r for r in records}, **given)
    return {name[-1] for name in names}


BOTH = (("loss.off-by-one", "killed"), ("loss.swapped", "killed"))


def test_of_proofs_and_runs_the_newest_that_give_the_state_stay(small, made):
    proofs = [made("falsification", n, kills=BOTH) for n in "ab"]
    runs = [made("train", n, gates=["pass"]) for n in "cde"]
    assert kept(small, *proofs, *runs) == set("be")


def test_a_proof_in_parts_stays_in_all_its_parts(small, made):
    parts = [made("falsification", n, kills=[kill]) for n, kill in zip("ab", BOTH)]
    between = made("falsification", "c", kills=[("loss.swapped", "old")])
    assert kept(small, *parts, between) == set("ab")


def test_a_stale_and_a_failed_gate_stay_so(small, made):
    stale = made("falsification", "a", kills=[("loss.swapped", "old")])
    assert kept(small, stale, made("falsification", "b")) == {"a"}
    passed, failed = made("train", "c", gates=["pass"]), made("train", "d", gates=["fail"])
    proof = made("falsification", "b", kills=BOTH)
    assert kept(small, proof, passed, failed) == set("bd")


def test_a_kept_failure_keeps_the_pass_that_came_after_it(small, made):
    """Without the pass, the failure that another reason keeps would be the gate's last word."""
    proof = made("falsification", "a", kills=BOTH)
    failed, passed = made("train", "b", gates=["fail"]), made("train", "c", gates=["pass"])
    assert kept(small, proof, failed, passed, cited={failed.id: "README.md"}) == set("abc")


def test_the_states_of_the_kept_are_the_states_of_all(small, made):
    records = [
        made("falsification", "a", kills=BOTH),
        made("train", "b", gates=["old"]),
        made("falsification", "c", kills=[("loss.swapped", "missed")]),
        made("train", "d", gates=["pass"]),
        made("falsification", "e", kills=BOTH[1:]),
        made("train", "f", gates=["pass"]),
    ]
    spec = load_spec(small)
    for n in range(len(records) + 1):
        of_all = {r.id: r for r in records[:n]}
        stay = kept_records(spec, of_all, released={}, cited={})
        of_kept = {name: r for name, r in of_all.items() if name in stay}
        for gate_id, state in coverage(spec, of_all).items():
            assert coverage(spec, of_kept)[gate_id].state == state.state, (n, gate_id)


def test_released_cited_and_failed_records_stay_and_what_they_name(small, made):
    parent = made("train", "a")
    child = made("evaluate", "b", parents=(parent.id,))
    claimed = made("benchmark", "c", claim=f"Faster than {child.id}.")
    failed = made("benchmark", "d", status="halted", exit_code=4)
    other = [made(kind, n) for kind, n in (("train", "e"), ("evaluate", "f"), ("benchmark", "0"))]
    records = (parent, child, claimed, failed, *other)
    assert kept(small, *records, cited={claimed.id: "README.md"}) == set("abcd")
    assert kept(small, *records, released={child.id: "pocket-1"}) == set("abd")
    assert kept(small, *records) == set("def"), "else the newest of each kind"


def test_the_data_set_of_a_kept_run_stays(small, made):
    manifest = small_repo.artefact("manifest.json", "e" * 64)
    sets = [made("data", "a", outputs=[manifest]), made("data", "b")]
    run = made("train", "c", inputs=[manifest])
    assert kept(small, *sets, run) == set("ac")


def test_of_a_kind_the_newest_stays_whose_parents_stay(small, made):
    runs = [made("train", "a"), made("train", "b")]
    traces = [made("trace", n, parents=(runs[n == "d"].id,)) for n in "cd"]
    assert kept(small, *runs, *traces, cited={runs[0].id: "README.md"}) == set("ac")
    assert kept(small, *runs, *traces[:1]) == set("ac")


def test_a_record_in_the_tree_takes_the_place_of_an_archived_one(small, made):
    proof = made("falsification", "a", kills=BOTH)
    runs = [made("train", n, gates=["pass"]) for n in "bc"]
    benchmarks = [made("benchmark", n) for n in "de"]
    records = (proof, *runs, *benchmarks)
    assert kept(small, *records) == set("ace")
    assert kept(small, *records, archived={runs[1].id, benchmarks[1].id}) == set("abd")
    gone = {r.id for r in (*runs, *benchmarks)}
    assert kept(small, *records, archived=gone) == set("ac"), "without a run the state is another"


def test_a_superseded_record_speaks_for_no_gate(small, made):
    proof, wrong = (made("falsification", n, kills=BOTH) for n in "ab")
    assert kept(small, proof, wrong, superseded={wrong.id}) == {"a"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("archived") / "repo"
    small_repo.build(root)
    for minute in (10, 11, 12):
        archived.benchmark(root, minute)
    small_repo.commit_all(root)
    return root


@pytest.fixture
def repo(built, tmp_path):
    shutil.copytree(built, tmp_path / "repo", symlinks=True)
    return tmp_path / "repo"


def named(root, minute: int) -> str:
    return next((root / "evidence").glob(f"benchmark-*{minute:08x}")).name


def test_a_file_of_the_tree_cites_a_record_by_id_or_prefix(repo):
    first, second, _ = (named(repo, minute) for minute in (10, 11, 12))
    write(repo, "docs/one.md", f"See {first}.\n")
    write(repo, "docs/two.md", f"See {second[:-9]} and {first}.\n")
    git(repo, "add", "-A")
    everything = [e.record for e in Ledger(repo / "evidence").entries()]
    found = citations(repo / "evidence", everything)
    assert found[first] == "docs/one.md" and found[second] == "docs/two.md"
    assert {v for k, v in found.items() if k not in (first, second)} == {"evidence/registry.toml"}
    assert named(repo, 12) not in found, "a record, the ledger and the archive cite nothing"


@pytest.mark.parametrize("n_bytes", range(50, 160, 7))
def test_a_file_above_every_limit_is_searched_in_blocks(n_bytes, repo, monkeypatch):
    monkeypatch.setattr(archive, "MAX_BYTES", 40)
    monkeypatch.setattr(archive, "BLOCK_BYTES", n_bytes)
    cited, other = named(repo, 10), named(repo, 11)
    write(repo, "docs/large.md", "a" * 100 + f" {cited} " + "-" * 100)
    write(repo, "docs/small.md", other)
    git(repo, "add", "-A")
    found = citations(repo / "evidence", [cited, other])
    assert found == {cited: "docs/large.md", other: "docs/small.md"}


def test_a_file_whose_content_the_clone_lacks_is_no_file_without_citations(repo):
    """As in a clone with a filter, which holds the names and fetches contents later."""
    write(repo, "docs/one.md", f"See {named(repo, 10)}.\n")
    git(repo, "add", "-A")
    blob = git(repo, "ls-files", "--stage", "docs/one.md").split()[1]
    (repo / ".git/objects" / blob[:2] / blob[2:]).unlink()
    with pytest.raises(IntegrityError, match=r"docs/one\.md cannot be searched"):
        citations(repo / "evidence", [named(repo, 10)])


def test_the_commit_listed_is_the_last_that_changed_the_folder(repo):
    gone, commit = named(repo, 10), git(repo, "rev-parse", "HEAD")
    write(repo, "docs/more.md", "more\n")
    small_repo.commit_all(repo)
    ledger = (repo / "evidence" / "ledger.jsonl").read_bytes()
    before = Ledger(repo / "evidence").records()
    plan = archiving.plan(repo / "evidence")
    assert (repo / "evidence" / gone).is_dir(), "a plan changes nothing"
    assert archiving.archive(repo / "evidence") == plan
    assert [line.commit for line in plan.lines] == [commit] * 2 and plan.n_bytes > 0
    assert not (repo / "evidence" / gone).exists()
    assert (repo / "evidence" / "ledger.jsonl").read_bytes() == ledger
    assert Ledger(repo / "evidence").records() == before
    assert set(before) == {*plan.kept, *(line.record for line in plan.lines)}


def test_a_second_time_appends_what_is_new(repo):
    directory = repo / "evidence"
    archiving.archive(directory)
    small_repo.commit_all(repo)
    first = (directory / "archive.jsonl").read_bytes()
    assert archiving.archive(directory).lines == ()
    assert (directory / "archive.jsonl").read_bytes() == first
    superseding = archived.benchmark(repo, 13)
    small_repo.commit_all(repo)
    (line,) = archiving.archive(directory).lines
    assert line.record == Ledger(directory).entries()[-2].record != superseding
    assert (directory / "archive.jsonl").read_bytes() == first + line.to_line()


def test_only_a_committed_folder_in_a_full_clone_is_archived(repo, tmp_path):
    directory, name = repo / "evidence", named(repo, 10)

    def refuses(folder, says: str) -> None:
        with pytest.raises(IntegrityError, match=says):
            archiving.archive(folder)
        assert (folder / name).is_dir() and not (folder / "archive.jsonl").exists()

    subprocess.run(
        ["git", "clone", "-q", "--depth", "1", f"file://{repo}", tmp_path / "s"], check=True
    )
    refuses(tmp_path / "s" / "evidence", "clone is shallow")
    shutil.copytree(directory, tmp_path / "loose")
    refuses(tmp_path / "loose", "not tracked by git")
    write(repo, f"evidence/{name}/more.jsonl", "{}\n")
    refuses(directory, "differs from its commit")
    write(repo, ".gitignore", "more.jsonl\n")
    small_repo.commit_all(repo)
    refuses(directory, f"differs from its commit\n  got      {name}/more.jsonl")
    (directory / name / "more.jsonl").unlink()
    record = archived.benchmark(repo, 14)
    refuses(directory, "differs from its commit")
    write(repo, ".gitignore", f"*{record[-8:]}\n")
    small_repo.commit_all(repo)
    refuses(directory, f"differs from its commit\n  got      {record}/metadata.json")


@pytest.mark.parametrize("change", ["edit", "remove", "link", "link of a folder", "add"])
def test_a_change_is_found_by_hash(repo, change):
    """The file keeps its size and its time, by which git takes it for unchanged."""
    directory = repo / "evidence"
    assert archiving.plan(directory).lines
    (directory / ".hidden").write_text("no record")
    assert archiving.plan(directory).lines
    record = named(repo, 10)
    file = directory / record / archived.SERIES
    times, data = file.stat(), file.read_bytes()
    if change != "add":
        file.unlink()
    match change:
        case "edit":
            file.write_bytes(data.replace(b"1", b"2"))
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        case "link":
            (repo / "same").write_bytes(data)
            file.symlink_to(repo / "same")
        case "link of a folder":
            os.rename(file.parent, repo / "folder")
            file.parent.symlink_to(repo / "folder")
        case "add":
            file.with_name(".more").write_bytes(b"")
    with pytest.raises(IntegrityError, match=f"its commit\n  got      {record}"):
        archiving.plan(directory)


def test_no_program_that_a_foreign_repository_names_is_started(repo, tmp_path):
    """Filters, drivers, hooks and signatures: git itself starts them for a status, a diff, an
    archive and a log.
    """
    mark, evil = tmp_path / "mark", tmp_path / "evil"
    evil.write_text(f"#!/bin/sh\ntouch {mark}\ncat\n")
    evil.chmod(0o755)
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for hook in ("post-index-change", "post-checkout", "pre-auto-gc"):
        (hooks / hook).symlink_to(evil)
    write(repo, ".gitattributes", "* filter=evil diff=evil merge=evil\n")
    small_repo.commit_all(repo)
    settings = {f"filter.evil.{name}": evil for name in ("clean", "smudge", "process")}
    settings |= {f"diff.evil.{name}": evil for name in ("command", "textconv")}
    settings |= {"diff.external": evil, "core.hooksPath": hooks, "core.fsmonitor": evil}
    settings |= {"core.pager": evil, "pager.log": "true", "merge.evil.driver": evil}
    settings |= {"log.showSignature": "true", "gpg.program": evil}
    for key, value in settings.items():
        git(repo, "config", key, str(value))
    _sign(repo)
    for file in (repo / "evidence").rglob("*.json*"):
        os.utime(file, (1, 1))

    def starts(act) -> bool:
        mark.unlink(missing_ok=True)
        act()
        return mark.exists()

    for words in ("status", "diff", "archive HEAD", "log -1"):
        command = ["git", "-C", str(repo), *words.split()]
        assert starts(partial(subprocess.run, command, capture_output=True)), words
    commit = git(repo, "-c", "log.showSignature=false", "rev-parse", "HEAD")
    checkout = Checkout(repo)

    def at_commit():
        with checkout.tree_at(commit, "spec") as folder:
            assert (folder / "spec/spec.toml").is_file()

    assert not starts(at_commit)
    assert not starts(lambda: check(repo))
    assert not starts(lambda: freeze(repo))
    assert not starts(lambda: archiving.plan(repo / "evidence"))
    assert not starts(lambda: archiving.archive(repo / "evidence"))
    assert not starts(lambda: verify(repo / "evidence"))


def _sign(root) -> None:
    """Put a signature into the last commit."""
    head, _, message = git(root, "cat-file", "commit", "HEAD").partition("\n\n")
    marks = [f"-----{word} PGP SIGNATURE-----" for word in ("BEGIN", "END")]
    signed = f"{head}\ngpgsig {marks[0]}\n \n abcd\n {marks[1]}\n\n{message}\n"
    write = ["git", "-C", str(root), "hash-object", "-t", "commit", "-w", "--stdin"]
    done = subprocess.run(write, input=signed, text=True, capture_output=True, check=True)
    (root / ".git" / git(root, "symbolic-ref", "HEAD")).write_text(done.stdout)


READS_FILES = ["status", "diff", "show HEAD", "grep a", "grep --cached a", "ls-files -m"]
READS_FILES += ["log -p -1", "log --follow README.md", "cat-file --filters HEAD:README.md"]


@pytest.mark.parametrize("command", READS_FILES)
def test_a_git_command_that_reads_files_is_not_for_a_foreign_folder(repo, command):
    with pytest.raises(ValueError, match="may start a program"):
        History(repo).git(*command.split())


def test_the_last_commit_of_a_folder_also_changes_what_left_it(tmp_path):
    """Under any names of files, and any settings of the repository."""
    git(tmp_path, "init", "-q")
    for key, value in {"core.quotePath": "false", "log.showRoot": "false"}.items():
        git(tmp_path, "config", key, value)
    write(tmp_path, "evidence/first/f", "1")
    write(tmp_path, "evidence/moved/f", "2")
    write(tmp_path, f"evidence/{'a' * 40}", "no commit")
    names = (os.fsdecode(b"caf\xe9"), "two\nlines", 'a "quoted" \u00e9')
    for name in names:
        write(tmp_path, f"evidence/{name}/{name}", "3")
    small_repo.commit_all(tmp_path)
    first = git(tmp_path, "rev-parse", "HEAD")
    expected = dict.fromkeys(("first", *names), first)
    assert archiving.last_commits(History(tmp_path / "evidence")) == expected | {"moved": first}
    git(tmp_path, "mv", "evidence/moved", "evidence/new")
    small_repo.commit_all(tmp_path)
    second = git(tmp_path, "rev-parse", "HEAD")
    expected |= {"moved": second, "new": second}
    assert archiving.last_commits(History(tmp_path / "evidence")) == expected


def test_evidence_that_does_not_verify_is_not_archived(repo):
    path = next((repo / "evidence").glob("train-*")) / "metrics.jsonl"
    path.write_text(path.read_text().replace("2.3", "2.2", 1))
    small_repo.commit_all(repo)
    with pytest.raises(IntegrityError, match="does not match the hash"):
        archiving.archive(repo / "evidence")


def large(root, minute: int) -> tuple[str, str]:
    """Accept a benchmark with a small series and a large one; returns its id and the large file."""
    lines = {
        archived.SERIES: [{"round": 1}],
        "points.jsonl": [{"n": n, "text": "x" * 1000} for n in range(300)],
    }
    commit = git(root, "rev-list", "--max-parents=0", "HEAD")
    made = small_repo.record(root, "benchmark", minute, commit, series_lines=lines)
    small_repo.commit_all(root)
    return made.id, "points.jsonl"


def test_a_large_series_leaves_the_tree_and_its_record_stays(repo):
    directory = repo / "evidence"
    name, file = large(repo, 20)
    data = (directory / name / file).read_bytes()
    assert len(data) > archiving.LARGE_SERIES_BYTES
    plan = archiving.archive(directory)
    assert name in plan.kept
    (line,) = [line for line in plan.lines if line.record == name]
    assert list(line.files) == [file] and not line.whole
    assert {f.name for f in (directory / name).iterdir()} == {"metadata.json", archived.SERIES}
    ledger = Ledger(directory)
    assert name not in ledger.archive and ledger.content(name, file) == data
    small_repo.commit_all(repo)
    assert archiving.archive(directory).lines == (), "a listed series is not listed again"


def test_a_record_without_its_large_series_is_archived_later(repo):
    directory = repo / "evidence"
    name, file = large(repo, 20)
    data = (directory / name / file).read_bytes()
    archiving.archive(directory)
    small_repo.commit_all(repo)
    archived.benchmark(repo, 21)
    small_repo.commit_all(repo)
    (line,) = archiving.archive(directory).lines
    assert line.record == name and set(line.files) == {"metadata.json", archived.SERIES}
    assert not (directory / name).exists()
    assert Ledger(directory).content(name, file) == data


def test_without_history_a_large_series_is_unread_and_its_record_is_read(repo, tmp_path):
    name, file = large(repo, 20)
    archiving.archive(repo / "evidence")
    small_repo.commit_all(repo)
    copy = tmp_path / "exported"
    shutil.copytree(repo, copy, ignore=shutil.ignore_patterns(".git"))
    ledger = Ledger(copy / "evidence")
    assert ledger.unread_series() == [(name, file)] and name in ledger.records()
    with pytest.raises(NoHistory, match="lacks the history"):
        ledger.content(name, file)
    assert verify(copy / "evidence") == []
    assert Ledger(repo / "evidence").unread_series() == []
