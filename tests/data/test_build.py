"""Building a data set: killed anywhere and started again, in any number of processes,
accounted for to the byte.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stackproof import tensorfile
from stackproof.config import (
    BpeTokenizer,
    ByteTokenizer,
    DataConfig,
    ExactDedup,
    Files,
    FilesSource,
    HashSplit,
    Mixture,
    NearDedup,
)
from stackproof.data import build, corpus, receipts, stages
from stackproof.data import workers as processes
from stackproof.spec.errors import DataError, UsageError

WORDS = [
    "".join(random.Random(n).choices("abcdefghijklmnopqrstuvw", k=3 + n % 7)) for n in range(2000)
]


def prose(seed, n_words=60):
    return " ".join(random.Random(seed).choices(WORDS, k=n_words)) + "."


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), "utf-8")
    return str(path)


def contents(folder):
    """Hash of every file of a folder by its path in it."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def shards_of(manifest):
    return [s for split in manifest["splits"].values() for s in split["shards"]]


def shipped(manifest):
    return sum(s["documents"] for s in shards_of(manifest))


@pytest.fixture
def small_parts(monkeypatch):
    """Parts and chunks of a few documents, so that a small corpus has dozens of them."""
    monkeypatch.setattr(corpus, "PART_BYTES", 4000)
    monkeypatch.setattr(stages, "CHUNK_BYTES", 1500)


@pytest.fixture
def mixture(tmp_path):
    """Two sources with repeats within and between them, near repeats,
    unfit text and an evaluation set.
    """
    common = [prose(n) for n in range(40)]
    near = [t.replace(t.split()[30], "changed", 1) for t in common[:5]]
    one = write_lines(tmp_path / "one.jsonl", [*common, "region " * 60, *common[3:6], *near])
    two = write_lines(
        tmp_path / "two.jsonl",
        [*(prose(100 + n) for n in range(30)), common[7], f"{prose(7, 10)} {prose(999, 20)}"],
    )
    exam = write_lines(tmp_path / "exam.jsonl", [prose(999, 20)])
    sources = (FilesSource(name="one", paths=(one,)), FilesSource(name="two", paths=(two,)))
    return DataConfig(
        corpus=Mixture(sources=sources),
        split=HashSplit(validation_frac=0.2),
        tokenizer=BpeTokenizer(vocab_size=300),
        dedup=NearDedup(),
        decontaminate=(exam,),
    )


# --- killed and started again ---------------------------------------------------------------------


class Killed(BaseException):
    """Nothing in the stack catches it, so nothing is cleaned up that a kill would not clean up."""


class Executioner:
    """Raises Killed at the n-th time something is put on the disk,
    leaving a file that is being written cut in half.
    """

    def __init__(self, monkeypatch):
        self.left, self.seen = None, 0
        write, replace = tensorfile.write, os.replace
        monkeypatch.setattr(
            tensorfile, "write", lambda path, *rest: self.strike(path) or write(path, *rest)
        )
        monkeypatch.setattr(
            os, "replace", lambda source, target: self.strike() or replace(source, target)
        )
        monkeypatch.setattr(build.shutil, "copyfile", self._copy(build.shutil.copyfile))

    def _copy(self, copyfile):
        return lambda source, target: self.strike(target) or copyfile(source, target)

    def strike(self, path=None):
        self.seen += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                if path is not None:
                    Path(path).write_bytes(b"half a file")
                raise Killed


class Ledger:
    """Which parts were read and which chunks encoded, and that none of them was finished before."""

    def __init__(self, monkeypatch, work):
        self.work, self.read, self.encoded = work, [], []
        filter_part, write = stages.corpus.read_part, stages.shards.write_documents
        monkeypatch.setattr(
            stages.corpus,
            "read_part",
            lambda cfg, part: self.read.append(part) or filter_part(cfg, part),
        )
        monkeypatch.setattr(
            stages.shards,
            "write_documents",
            lambda *args, **options: (
                self.encoded.append(options["first_number"]) or write(*args, **options)
            ),
        )

    def finished(self):
        parts = {int(p.parent.name[5:]) for p in self.work.glob("part-*/receipt.json")}
        return parts, {int(p.stem[8:]) for p in self.work.glob("encoded-*.json")}


@pytest.mark.parametrize("seed", range(6))
def test_a_build_killed_at_random_places_ends_in_the_same_bytes(
    mixture, tmp_path, monkeypatch, small_parts, seed
):
    """Killed at random writes until one run gets through: the same files, no finished part is done
    again, no document is doubled.
    """
    straight = build.build(mixture, tmp_path / "straight")
    folder, draw, kills = tmp_path / "killed", random.Random(seed), 0
    executioner, ledger = Executioner(monkeypatch), Ledger(monkeypatch, folder / ".work")
    parts = [job.part for job in build._plan(mixture, folder / ".work")[1]]
    assert len(parts) > 8 and len(set(parts)) == len(parts)
    while True:
        read, encoded = ledger.finished()
        ledger.read, ledger.encoded, executioner.left = [], [], draw.randrange(40)
        try:
            manifest = build.build(mixture, folder)
        except Killed:
            kills += 1
            assert not (folder / "manifest.json").exists()
        else:
            break
        finally:
            assert not read & {parts.index(p) for p in ledger.read} and not encoded & set(
                ledger.encoded
            )
    assert kills >= 2 and manifest == straight
    assert contents(folder) == contents(tmp_path / "straight")
    # 40 + 30 of their own; repeats, near repeats and unfit are gone
    assert shipped(manifest) == manifest["corpus"]["documents"] == 70


def test_a_build_killed_at_any_single_write_ends_in_the_same_bytes(mixture, tmp_path, monkeypatch):
    """Every place once, in a corpus of two parts."""
    straight, executioner = build.build(mixture, tmp_path / "straight"), Executioner(monkeypatch)
    build.build(mixture, tmp_path / "counted")
    places, wanted = executioner.seen, contents(tmp_path / "straight")
    assert places > 12
    for place in range(places):
        executioner.left = place
        with pytest.raises(Killed):
            build.build(mixture, tmp_path / str(place))
        executioner.left = None
        assert build.build(mixture, tmp_path / str(place)) == straight
        assert contents(tmp_path / str(place)) == wanted, place


BUILD = """
import sys
from pathlib import Path
from stackproof.config import DataConfig
from stackproof.data import build, corpus

if __name__ == "__main__":
    corpus.PART_BYTES = 60_000  # many parts, and worth a second process
    build.build(DataConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), workers=2)
"""


@pytest.fixture
def many_lines(tmp_path):
    path = write_lines(tmp_path / "many.jsonl", (prose(n % 5000, 90) for n in range(5500)))
    return DataConfig(
        corpus=Files(paths=(path,)), tokenizer=ByteTokenizer(), split=HashSplit(validation_frac=0.1)
    )


def start(tmp_path, cfg, folder):
    script = tmp_path / "script.py"
    script.write_text(BUILD)
    command = [sys.executable, str(script), cfg.model_dump_json(), str(folder)]
    return subprocess.Popen(command, start_new_session=True)


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()


@pytest.mark.slow
def test_a_build_in_two_processes_that_is_killed_by_the_system_ends_in_the_same_bytes(
    many_lines, tmp_path, monkeypatch
):
    monkeypatch.setattr(corpus, "PART_BYTES", 60_000)
    straight, folder, draw = (
        build.build(many_lines, tmp_path / "straight"),
        tmp_path / "killed",
        random.Random(3),
    )
    finished = lambda: len(  # noqa: E731
        [*(folder / ".work").glob("part-*"), *(folder / ".work").glob("encoded-*")]
    )
    for _ in range(4):
        process, already = start(tmp_path, many_lines, folder), finished()
        wanted = already + draw.randrange(1, 15)
        wait_for(
            lambda process=process, wanted=wanted: (
                finished() >= wanted or process.poll() is not None
            )
        )
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL and not (folder / "manifest.json").exists()
    assert start(tmp_path, many_lines, folder).wait() == 0
    assert contents(folder) == contents(tmp_path / "straight")
    assert straight["corpus"]["documents"] == shipped(straight) == 5000


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the process table of Linux")
def test_a_killed_build_leaves_no_process_behind(many_lines, tmp_path):
    """Workers that outlive their build go on writing into a folder that the next build works in."""
    process = start(tmp_path, many_lines, tmp_path / "out")
    wait_for(lambda: len(list((tmp_path / "out" / ".work").glob("part-*"))) >= 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    alive = lambda: [  # noqa: E731
        p
        for p in children
        if Path(f"/proc/{p}").exists() and Path(f"/proc/{p}/cmdline").read_bytes()
    ]
    try:
        assert len(children) >= 2
        wait_for(lambda: not alive(), seconds=10)
    finally:
        for pid in alive():
            os.kill(int(pid), signal.SIGKILL)


def test_two_processes_give_the_bytes_of_one(mixture, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PART_BYTES", 4000)
    alone = build.build(mixture, tmp_path / "one", workers=1)
    pools, executor = [], processes.ProcessPoolExecutor
    monkeypatch.setattr(
        processes, "ProcessPoolExecutor", lambda *a, **k: pools.append(a) or executor(*a, **k)
    )
    assert build.build(mixture, tmp_path / "two", workers=2) == alone and pools == [(2,)]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.fixture
def scale():
    pytest.importorskip("datatrove", reason="the extra [scale] is not installed")
    from stackproof.data import scale

    return scale


@pytest.mark.parametrize("n_tasks", [1, 2, 3])
def test_tasks_of_datatrove_give_the_bytes_of_one_process(
    scale, mixture, tmp_path, small_parts, monkeypatch, n_tasks
):
    alone = build.build(mixture, tmp_path / "one")
    done, run = [], scale.JobsBlock.run

    def counted(block, data=None, rank=0, world_size=1):
        done.append((block.function.__name__, rank, len(block.jobs[rank::world_size])))
        run(block, data, rank, world_size)

    monkeypatch.setattr(scale.JobsBlock, "run", counted)
    pool = scale.TaskPool.on(tasks=n_tasks, workers=1)
    assert build.build(mixture, tmp_path / "tasks", pool=pool) == alone
    assert contents(tmp_path / "tasks") == contents(tmp_path / "one")
    stages_run = [(stage, r) for stage in ("filter_part", "encode_chunk") for r in range(n_tasks)]
    assert [(stage, rank) for stage, rank, _ in done] == stages_run
    assert all(n_jobs >= 1 for _, _, n_jobs in done)


def test_tasks_in_processes_give_the_bytes_of_one_process(scale, mixture, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PART_BYTES", 4000)
    build.build(mixture, tmp_path / "one")
    build.build(mixture, tmp_path / "tasks", pool=scale.TaskPool.on(tasks=3, workers=2))
    assert contents(tmp_path / "tasks") == contents(tmp_path / "one")


def test_a_stage_waits_for_the_tasks_before_it(scale, mixture, tmp_path, small_parts, monkeypatch):
    """An executor that submits its tasks returns before they have run."""
    started = scale.LocalPipelineExecutor.run
    monkeypatch.setattr(scale.LocalPipelineExecutor, "run", lambda executor: None)
    pool = scale.TaskPool.on(tasks=3, workers=1)
    with pytest.raises(DataError, match="filter_part have not finished") as caught:
        build.build(mixture, tmp_path / "tasks", pool=pool)
    assert caught.value.value == "3 of 3" and not list(tmp_path.glob("tasks/.work/part-*"))
    monkeypatch.setattr(scale.LocalPipelineExecutor, "run", started)
    build.build(mixture, tmp_path / "tasks", pool=pool)
    build.build(mixture, tmp_path / "one")
    assert contents(tmp_path / "tasks") == contents(tmp_path / "one")


# --- receipts -------------------------------------------------------------------------------------

DOCUMENT = st.one_of(
    st.integers(0, 30).map(prose),
    st.integers(0, 5).map(lambda n: prose(n).replace(" ", "  ").upper()),
    st.sampled_from(
        [
            "short",
            "region " * 50,
            "x" * 2500,
            "Это предложение на другом языке, и его здесь быть не должно.",
            "a\0" * 20,
        ]
    ),
    st.text(max_size=60),
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(DOCUMENT, max_size=25),
    st.lists(DOCUMENT, max_size=25),
    st.sampled_from([ExactDedup(), NearDedup()]),
)
def test_receipts_add_up_to_the_byte_and_to_what_is_shipped(
    tmp_path_factory, monkeypatch, first, second, how
):
    monkeypatch.setattr(corpus, "PART_BYTES", 1000)
    folder = tmp_path_factory.mktemp("random")
    given = {
        "first": [*first, *(prose(50 + n) for n in range(30))],
        "second": [*second, "once more, with feeling and all that"],
    }
    sources = tuple(
        FilesSource(name=n, paths=(write_lines(folder / f"{n}.jsonl", texts),))
        for n, texts in given.items()
    )
    cfg = DataConfig(
        corpus=Mixture(sources=sources),
        tokenizer=ByteTokenizer(),
        dedup=how,
        split=HashSplit(validation_frac=0.3),
    )
    manifest = build.build(cfg, folder / "out")
    for source in manifest["sources"]:
        receipt, texts = source["receipt"], given[source["name"]]
        # a record without text counts whole
        n_bytes = sum(len(t.encode()) if t.strip() else len(json.dumps({"text": t})) for t in texts)
        assert (receipt["documents_in"], receipt["bytes_in"]) == (len(texts), n_bytes)
        for unit in ("documents", "bytes"):
            assert receipt[f"{unit}_in"] == receipt[f"{unit}_out"] + sum(
                row[unit] for row in receipt["dropped"].values()
            )
            assert all(row[unit] > 0 for row in receipt["dropped"].values())
        mine = [s for s in shards_of(manifest) if s["source"] == source["name"]]
        assert receipt["documents_out"] == sum(s["documents"] for s in mine)
        # A byte tokenizer spells one byte as one token; each document has an end of text,
        # and each shard a leading one.
        assert sum(s["tokens"] for s in mine) == receipt["bytes_out"] + receipt[
            "documents_out"
        ] + len(mine)
    table = receipts.table(manifest["sources"])
    assert (
        table[-1]["in"] == sum(row["in"] for row in table[:-1])
        and table[-1]["dropped"] == table[-1]["in"] - table[-1]["out"]
    )


def test_a_document_that_several_sources_hold_belongs_to_the_first(tmp_path):
    texts = [prose(n) for n in range(30)]
    one, two = (
        write_lines(tmp_path / "a.jsonl", texts[:20]),
        write_lines(tmp_path / "b.jsonl", [t.upper() for t in texts[10:]]),
    )
    sources = (FilesSource(name="a", paths=(one,)), FilesSource(name="b", paths=(two,)))
    a, b = build.build(
        DataConfig(corpus=Mixture(sources=sources), tokenizer=ByteTokenizer()), tmp_path / "out"
    )["sources"]
    assert (
        a["receipt"]["dropped"] == {} and b["receipt"]["dropped"]["exact-repeat"]["documents"] == 10
    )


def dropped(cfg, folder):
    """Documents of the only source that were dropped, by reason."""
    (source,) = build.build(cfg, folder)["sources"]
    return {reason: row["documents"] for reason, row in source["receipt"]["dropped"].items()}


@pytest.mark.parametrize(
    ("how", "near"),
    [
        (NearDedup(similarity_min=0.6), 1),
        (NearDedup(similarity_min=0.95), 0),
        (NearDedup(shingle_words=1), 2),
        (NearDedup(shingle_words=5), 0),
    ],
)
def test_the_declared_likeness_decides(tmp_path, how, near):
    """Among other texts a pair that shares 0.75 of its runs of five words, and of its words 0.93,
    and a text with its words reversed.
    """
    one, two = prose(1, 120).split(), prose(2, 80).split()
    changed = [*one[:50], "new", *one[51:70], "other", *one[71:90], "third", *one[91:]]
    texts = [" ".join(words) for words in (one, changed, two, two[::-1])]
    path = write_lines(tmp_path / "a.jsonl", [*texts, *(prose(10 + n) for n in range(30))])
    cfg = DataConfig(
        corpus=Files(paths=(path,)),
        tokenizer=ByteTokenizer(),
        dedup=how,
        split=HashSplit(validation_frac=0.3),
    )
    assert dropped(cfg, tmp_path / "out").get("near-repeat", 0) == near


def test_every_evaluation_set_is_kept_out_and_counted(tmp_path):
    exams = [prose(100 + n, 20) for n in range(3)]
    paths = tuple(
        write_lines(tmp_path / f"exam{n}.jsonl", [e, "too short to be found"])
        for n, e in enumerate(exams)
    )
    source = write_lines(
        tmp_path / "a.jsonl",
        [*(prose(n) for n in range(30)), *(f"Before it. {e} After it." for e in exams)],
    )
    cfg = DataConfig(
        corpus=Files(paths=(source,)),
        tokenizer=ByteTokenizer(),
        decontaminate=paths,
        split=HashSplit(validation_frac=0.3),
    )
    assert dropped(cfg, tmp_path / "out") == {"in-evaluation-set": 3}
    declared = json.loads((tmp_path / "out" / "manifest.json").read_bytes())["decontamination"]
    assert [(s["records"], s["records_kept_out"]) for s in declared["sets"]] == [(2, 1)] * 3


# --- what is refused ------------------------------------------------------------------------------


def test_a_folder_with_another_data_set_is_refused_and_the_same_one_is_taken(mixture, tmp_path):
    manifest = build.build(mixture, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert (
        build.build(mixture, tmp_path / "out") == manifest and contents(tmp_path / "out") == before
    )
    with pytest.raises(UsageError, match="another data set"):
        build.build(mixture.model_copy(update={"dedup": ExactDedup()}), tmp_path / "out")
    with open(mixture.corpus.sources[0].paths[0], "a") as f:
        f.write(json.dumps({"text": prose(5000)}) + "\n")
    with pytest.raises(UsageError, match="another data set"):
        build.build(mixture, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_nothing_of_an_abandoned_build_of_another_data_set_is_left(
    mixture, tmp_path, monkeypatch, small_parts
):
    """A build is given up after its shards, and another one with fewer of them takes the folder."""
    executioner = Executioner(monkeypatch)
    build.build(mixture, tmp_path / "whole")
    executioner.left = executioner.seen - 3
    with pytest.raises(Killed):
        build.build(mixture, tmp_path / "out")
    executioner.left = None
    other = mixture.model_copy(
        update={"corpus": mixture.corpus.model_copy(update={"sources": mixture.corpus.sources[:1]})}
    )
    manifest = build.build(other, tmp_path / "out")
    named = {s["path"] for s in shards_of(manifest)}
    assert set(contents(tmp_path / "out")) - {".lock"} == named | {
        "manifest.json",
        "plan.json",
        "tokenizer.json",
        "grams.safetensors",
    }


def test_a_source_that_changes_during_the_build_is_refused(mixture, tmp_path):
    def meanwhile(progress):
        if progress.stage == "tokenise" and progress.done_bytes == 0:
            with open(mixture.corpus.sources[1].paths[0], "a") as f:
                f.write(json.dumps({"text": prose(6000)}) + "\n")

    with pytest.raises(DataError, match="changed while it was read"):
        build.build(mixture, tmp_path / "out", on_progress=meanwhile)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(("frac", "empty"), [(1e-6, "validation"), (1 - 1e-6, "train")])
def test_an_empty_split_says_what_to_do(mixture, tmp_path, frac, empty):
    with pytest.raises(DataError, match=rf"the {empty} split is empty[\s\S]*split\.kind=tail"):
        build.build(
            mixture.model_copy(update={"split": HashSplit(validation_frac=frac)}), tmp_path / "out"
        )


def test_an_evaluation_set_without_a_run_of_words_is_refused(mixture, tmp_path):
    exam = write_lines(tmp_path / "short.jsonl", ["two words", "twelve words " * 6])
    with pytest.raises(DataError, match="nothing could ever be found"):
        build.build(mixture.model_copy(update={"decontaminate": (exam,)}), tmp_path / "out")


# --- memory ---------------------------------------------------------------------------------------

MEASURED = """
import sys
from pathlib import Path
from stackproof.config import DataConfig
from stackproof.data import build, corpus
corpus.PART_BYTES = int(sys.argv[3])
build.build(DataConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])  # ru_maxrss counts the parent too
"""  # noqa: E501


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the process table of Linux"
)
def test_a_large_corpus_is_built_in_bounded_memory(tmp_path):
    """What is held does not grow with the corpus: 32 MB more of it cost less than a quarter of
    their size, read in parts of 1 MiB (measured 1.0 to 4.3 MB; two builds of one corpus differ by
    up to 3 MB), and more than all of it where one part holds everything (235 to 238 MB): so would
    this turn red.
    """
    lines = [prose(n, 100) for n in range(2000)]

    def peak_bytes(n_bytes: int, part_bytes: int) -> int:
        """Peak memory of a build, of its process with all libraries."""
        path = tmp_path / f"{n_bytes}.jsonl"
        texts = (
            f"{n}\n{lines[n % 2000]}\n{lines[n * 7 // 5 % 2000]}\n{lines[n * 13 // 11 % 2000]}"
            for n in range(n_bytes // 2100)
        )
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        assert path.stat().st_size > 0.9 * n_bytes
        cfg = DataConfig(
            corpus=Files(paths=(str(path),)), tokenizer=ByteTokenizer(), dedup=NearDedup()
        )
        command = [
            sys.executable,
            "-c",
            MEASURED,
            cfg.model_dump_json(),
            str(tmp_path / f"{n_bytes} in {part_bytes}"),
            str(part_bytes),
        ]
        return 1024 * int(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )

    few, many, more = 4_000_000, 36_000_000, 32_000_000
    small = peak_bytes(few, 2**20)
    assert peak_bytes(many, 2**20) - small < more / 4
    assert peak_bytes(many, 2**30) - small > more
