"""Blocks of datatrove give what the plain functions give, once, wherever they run."""

import json
import pickle
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from stackproof import tensorfile
from stackproof.config import BpeTokenizer, Files
from stackproof.data import corpus
from stackproof.data.filters import rejection
from stackproof.data.shards import TokenStream, document_hash
from stackproof.data.tokenizer import load_tokenizer, make_tokenizer
from stackproof.spec.canonical import sha256_file
from stackproof.spec.errors import DataError
from stackproof.spec.files import host_name

NO_PROCESS = 2**22 + 1  # above the largest number of a process on Linux
TASKS, MAX_TOKENS = 2, 300
WORDS = (
    "river stone letter winter garden window morning paper silver bridge table forest market "
    "island candle mirror"
).split()


def _prose(seed: int) -> str:
    order = np.random.default_rng(seed).permutation(len(WORDS))
    return (
        f"Document {seed} lists {', '.join(WORDS[i] for i in order)}; 漢字 and <|endoftext|> are "
        "only text here."
    )


def _texts(file: int) -> list[str]:
    """Good documents, and one of each of several kinds that filters drop."""
    bad = [
        "short",
        "word " * 400,
        "Было бы хорошо писать по-русски, но язык корпуса другой. " * 3,
        "x" * 5000,
    ]
    return [
        t
        for n in range(20)
        for t in (_prose(100 * file + n), *([bad[n // 5]] if n % 5 == file else []))
    ]


@pytest.fixture
def scale():
    pytest.importorskip("datatrove")
    from stackproof.data import scale

    return scale


@pytest.fixture
def place(tmp_path):
    """Three files for two tasks, and a tokenizer."""
    (tmp_path / "in").mkdir()
    for n in range(3):
        lines = [json.dumps({"text": t}).encode() for t in _texts(n)] + [
            b'{"text": "half a \xe2\x82 sign"}'
        ] * (n == 2)
        (tmp_path / "in" / f"{n}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    make_tokenizer(BpeTokenizer(vocab_size=400), [t for n in range(3) for t in _texts(n)]).save(
        tmp_path / "tokenizer.json"
    )
    return tmp_path


def _files(place) -> Files:
    return Files(paths=(str(place / "in"),))


def _pipeline(scale, place) -> list:
    shards = scale.TokenizeBlock(
        place / "tokenizer.json", place / "out", batch_size=7, max_tokens=MAX_TOKENS
    )
    return [scale.ReadBlock(_files(place)), scale.FilterBlock(("en",)), shards]


def _run(scale, place, pipeline=None, **options):
    from datatrove.executor import LocalPipelineExecutor

    options = {"tasks": TASKS, "workers": 1, "logging_dir": str(place / "logs")} | options
    return LocalPipelineExecutor(pipeline or _pipeline(scale, place), **options).run()


def _plain(place) -> tuple[list[str], Counter]:
    """What a loop over the plain functions keeps, in the order of tasks,
    and why it drops the others.
    """
    kept, dropped = [], Counter()
    for rank in range(TASKS):
        for path in corpus.resolve_paths(_files(place))[rank::TASKS]:
            for document in corpus.read_documents(Files(paths=(str(path),))):
                reason = rejection(document.text, "en")
                kept += [document.text] if reason is None else []
                dropped.update([reason] if reason else [])
    return kept, dropped + Counter({"not-utf8": 1})


def _written_documents(place, split: dict, eos_id: int) -> list[list[int]]:
    """Ids of every document in the shards, without the ids around it.
    Each shard begins with an end-of-text id.
    """
    documents = []
    for entry in split["shards"]:
        tokens = np.asarray(tensorfile.memmap(place / "out" / entry["path"], "tokens")).tolist()
        ends = [i for i, t in enumerate(tokens) if t == eos_id]
        assert ends[0] == 0 and ends[-1] == len(tokens) - 1
        documents += [tokens[a + 1 : b] for a, b in zip(ends, ends[1:])]
    return documents


def _state(place) -> dict:
    return {
        p.relative_to(place): (p.stat().st_mtime_ns, sha256_file(p))
        for p in sorted((place / "out").rglob("*"))
        if p.is_file()
    }


def test_two_tasks_keep_and_encode_what_a_loop_does(scale, place):
    _run(scale, place)
    kept, dropped = _plain(place)
    tokenizer = load_tokenizer(place / "tokenizer.json")
    split = scale.collect(place / "out", "train", TASKS)
    assert _written_documents(place, split, tokenizer.eos_id) == [
        tokenizer.encode(t).ids for t in kept
    ]
    stream = TokenStream(place / "out", split, tokenizer.vocab_size)
    assert stream.document_hashes.tolist() == [document_hash(t) for t in kept]
    assert len(split["shards"]) > TASKS and set(stream.tokenizer_sha256) == {tokenizer.sha256} == {
        split["tokenizer_sha256"]
    }
    assert (split["documents"], split["bytes"]) == (len(kept), sum(len(t.encode()) for t in kept))
    n_ends = split["documents"] + len(split["shards"])
    assert (
        split["tokens"]
        == len(stream.token_range(0, 10**9))
        == n_ends + sum(len(tokenizer.encode(t).ids) for t in kept)
    )
    assert len(dropped) >= 3 and scale.drop_counts(place / "logs", TASKS) == {
        "documents": len(kept) + dropped.total(),
        "kept": len(kept),
        "dropped": dict(sorted(dropped.items())),
    }


def test_a_finished_pipeline_does_nothing_when_it_is_started_again(scale, place):
    _run(scale, place)
    before, drops = _state(place), scale.drop_counts(place / "logs", TASKS)
    assert _run(scale, place) is None
    assert _state(place) == before and scale.drop_counts(place / "logs", TASKS) == drops


def test_only_the_task_that_is_not_marked_as_done_is_repeated_and_gives_the_same_bytes(
    scale, place
):
    _run(scale, place)
    before, drops = _state(place), scale.drop_counts(place / "logs", TASKS)
    (place / "logs" / "completions" / "00001").unlink()
    (place / "out" / f".train-00001-{host_name()}-{NO_PROCESS}").mkdir()
    _run(scale, place)
    assert len(list((place / "out").iterdir())) == TASKS
    after = _state(place)
    assert {k: v[1] for k, v in after.items()} == {k: v[1] for k, v in before.items()}
    assert {k.parts[1] for k in before if before[k] != after[k]} == {"train-00001"}
    assert scale.drop_counts(place / "logs", TASKS) == drops, (
        "counted once, although one task ran twice"
    )


def test_a_task_that_dies_leaves_no_part_and_is_made_up_for(scale, place, monkeypatch):
    written, original = [], scale.shards.tensorfile.write

    def dies_at_the_second_shard_of_task_1(path, *a):
        written.append(path)
        if "train-00001-" in path.parent.name and path.name.endswith("00001.safetensors"):
            raise OSError(28, "No space left on device")
        original(path, *a)

    with monkeypatch.context() as patch:
        patch.setattr(scale.shards.tensorfile, "write", dies_at_the_second_shard_of_task_1)
        with pytest.raises(DataError, match="No space left"):
            _run(scale, place)
    assert sorted(p.name for p in (place / "out").iterdir()) == ["train-00000"] and len(written) > 3
    with pytest.raises(DataError, match="part of task 1 cannot be read"):
        scale.collect(place / "out", "train", TASKS)
    with pytest.raises(DataError, match="has no counts of dropped documents"):
        scale.drop_counts(place / "logs", TASKS)
    _run(scale, place)
    kept, dropped = _plain(place)
    assert scale.collect(place / "out", "train", TASKS)["documents"] == len(kept)
    assert scale.drop_counts(place / "logs", TASKS)["dropped"] == dict(sorted(dropped.items()))


def test_tasks_in_processes_of_their_own_write_the_same_files(scale, place):
    _run(scale, place)
    alone = {k: v[1] for k, v in _state(place).items()}
    shutil.rmtree(place / "out")
    _run(scale, place, workers=2, logging_dir=str(place / "logs-2"))
    assert {k: v[1] for k, v in _state(place).items()} == alone
    assert scale.drop_counts(place / "logs-2", TASKS) == scale.drop_counts(place / "logs", TASKS)


def test_more_tasks_than_files_give_empty_parts_and_the_same_documents(scale, place):
    _run(scale, place, tasks=5)
    split = scale.collect(place / "out", "train", 5)
    assert (
        split["documents"] == len(_plain(place)[0])
        and len({s["path"].split("/")[0] for s in split["shards"]}) == 3
    )
    with pytest.raises(DataError, match="of another pipeline"):
        scale.collect(place / "out", "train", 4)


def test_the_same_list_runs_under_slurm(scale, place, monkeypatch):
    """The executor is pickled for the cluster; each array task loads it and writes
    what the local tasks write.
    """
    import dill
    from datatrove.executor import SlurmPipelineExecutor, slurm

    pipeline, scripts = _pipeline(scale, place), []
    _run(scale, place, pipeline)
    local = {k: v[1] for k, v in _state(place).items()}
    shutil.rmtree(place / "out")
    monkeypatch.setattr(slurm, "launch_slurm_job", lambda script, *a: scripts.append(script) or 1)
    monkeypatch.setattr(slurm, "expand_slurm_nodelist", lambda nodes: [nodes])
    logs = {"logging_dir": str(place / "slurm"), "requeue_signals": None}
    SlurmPipelineExecutor(pipeline, tasks=TASKS, time="1:00:00", partition="cpu", **logs).run()
    assert f"--array=0-{TASKS - 1}" in scripts[0] and not (place / "out").exists()
    monkeypatch.setenv("SLURM_NODELIST", "node")
    for task in range(TASKS):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        dill.loads((place / "slurm" / "executor.pik").read_bytes()).run()
    assert {k: v[1] for k, v in _state(place).items()} == local
    assert scale.drop_counts(place / "slurm", TASKS) == scale.drop_counts(place / "logs", TASKS)


def test_the_same_list_is_taken_by_ray_and_travels(scale, place):
    """Ray itself is not needed to see that the list is accepted and that blocks survive being sent,
    without a loaded tokenizer.
    """
    from datatrove.executor import RayPipelineExecutor

    pipeline = _pipeline(scale, place)
    executor = RayPipelineExecutor(pipeline, tasks=TASKS, logging_dir=str(place / "ray"))
    sent = pickle.dumps(executor.pipeline)
    assert executor.pipeline is pipeline and len(sent) < 10_000
    without_stats = lambda block: {k: v for k, v in vars(block).items() if k != "stats"}  # noqa: E731
    assert [without_stats(b) for b in pickle.loads(sent)] == [without_stats(b) for b in pipeline]


def test_documents_may_name_their_own_language(scale):
    from datatrove.data import Document

    russian = "Это предложение написано по-русски, и в нём нет ничего плохого."
    block = scale.FilterBlock()
    assert block.filter(Document(text=russian, id="a", metadata={"language": "ru"})) is True
    assert block.filter(Document(text=russian, id="a", metadata={"language": "en"})) == (
        False,
        "foreign-script",
    )
    for metadata in ({}, {"language": "eng_Latn"}):
        with pytest.raises(DataError, match="document a names no known language"):
            block.filter(Document(text=russian, id="a", metadata=metadata))


def test_dropped_documents_can_be_kept_aside(scale, place):
    from datatrove.pipeline.base import PipelineStep

    class Aside(PipelineStep):
        name = type = "aside"
        seen: list = []

        def run(self, data, rank=0, world_size=1):
            raise NotImplementedError

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *a: None  # noqa: E731

        def write(self, document, rank):
            self.seen.append(document.metadata["filter_reason"])

    block = scale.FilterBlock(("en",), exclusion_writer=Aside())
    list(block(scale.ReadBlock(_files(place))()))
    assert Counter(Aside.seen) == _plain(place)[1] - Counter({"not-utf8": 1})


def test_a_line_that_cannot_be_read_stops_the_task(scale, place):
    with open(place / "in" / "1.jsonl", "a") as f:
        f.write("{half a line\n")
    with pytest.raises(DataError, match=r"1\.jsonl line \d+ is not JSON"):
        _run(scale, place)
    assert not list((place / "out").glob("train-00001"))


def test_parts_that_do_not_belong_together_are_refused(scale, place):
    _run(scale, place)
    shutil.copytree(place / "out" / "train-00001", place / "out" / "train-00002")
    with pytest.raises(DataError, match="3 parts of train"):
        scale.collect(place / "out", "train", TASKS)
    shutil.rmtree(place / "out" / "train-00002")
    part = place / "out" / "train-00001" / "part.json"
    good = part.read_bytes()
    part.write_bytes(
        good.replace(load_tokenizer(place / "tokenizer.json").sha256.encode(), b"0" * 64)
    )
    with pytest.raises(DataError, match=r"2 tokenizer\(s\)"):
        scale.collect(place / "out", "train", TASKS)
    part.write_bytes(good[:-5])
    with pytest.raises(DataError, match="cannot be read"):
        scale.collect(place / "out", "train", TASKS)


def test_what_other_blocks_drop_is_counted_under_their_name(scale, place):
    from datatrove.pipeline.filters import LambdaFilter

    reads, filters, shards = _pipeline(scale, place)
    _run(scale, place, [reads, LambdaFilter(lambda d: "7 lists" not in d.text), filters, shards])
    kept, dropped = _plain(place)
    others = sum("7 lists" in t for t in kept)
    counts = scale.drop_counts(place / "logs", TASKS)
    assert (
        counts["kept"]
        == len(kept) - others
        == scale.collect(place / "out", "train", TASKS)["documents"]
    )
    assert (
        Counter(counts["dropped"]) == dropped + Counter({str(LambdaFilter(bool)): others})
        and others > 3
    )


@pytest.mark.parametrize(
    ("block", "key"),
    [(0, "forwarded"), (1, "dropped"), (1, "dropped_too-short"), (1, "total"), (2, "total")],
)
def test_counts_that_do_not_add_up_are_refused(scale, place, block, key):
    _run(scale, place)
    path = place / "logs" / "stats" / "00000.json"
    stats = json.loads(path.read_text())
    stats[block]["stats"][key] += 1
    path.write_text(json.dumps(stats))
    with pytest.raises(DataError, match="do not add up"):
        scale.drop_counts(place / "logs", TASKS)


def test_without_datatrove_the_extra_is_named():
    code = "import sys; sys.modules['datatrove'] = None; import stackproof.data.scale"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.returncode
        and "EnvironmentUnfit" in done.stderr
        and "pip install 'stackproof[scale]'" in done.stderr
    )
