"""Building data and writing folders under kills, errors of the file system and races: the next call
finishes, and nothing is left beside the result.
"""

import os
import platform
import signal
from multiprocessing import get_context

import pytest

from stackproof.config import DataConfig
from stackproof.data import build, prepare
from stackproof.evidence.file_lock import aside
from stackproof.spec import files
from stackproof.spec.errors import DataError, StackproofError
from tests.fault_injection import file_calls
from tests.fault_injection.scale import SEED, chance, scaled

PROCESSES = 8
BUILD = """
import sys
from pathlib import Path
from tests.fault_injection import file_calls
file_calls.arm()
from stackproof.data import build
from stackproof.spec.errors import StackproofError
from tests.fault_injection.test_export_and_build import config
try:
    build.build(config(sys.argv[1]), Path("out"))
except StackproofError as e:
    print(e, file=sys.stderr)
    sys.exit(e.exit_code)
"""


def config(corpus: str, validation_frac: float = 0.3) -> DataConfig:
    return DataConfig.model_validate(
        {
            "corpus": {"kind": "files", "paths": [corpus], "documents": "line"},
            "tokenizer": {"kind": "byte"},
            "split": {"kind": "document-hash", "validation_frac": validation_frac},
        }
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    random, path = chance("corpus"), tmp_path_factory.mktemp("corpus") / "a.txt"
    words = "the a red green house tree river walks sees finds slowly never under over".split()
    lines = (" ".join(random.choices(words, k=40)).capitalize() + "." for _ in range(60))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def files_in(folder) -> dict[str, bytes]:
    paths = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


@pytest.mark.parametrize("fault", ["kill", *file_calls.FAULTS])
def test_a_fault_at_any_call_of_a_build_is_made_good_by_the_next(fault, corpus, tmp_path):
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    done = file_calls.run(corpus, folder=undisturbed, code=BUILD, light=True)
    assert done.code == 0, done.err
    whole, calls = files_in(undisturbed), file_calls.calls(done)
    assert len(calls) > 20, calls
    numbers = range(1, len(calls) + 1)
    for n in sorted(chance(fault).sample(numbers, min(scaled(5, len(calls)), len(calls)))):
        folder, said = tmp_path / str(n), f"{fault} at call {n}, {calls[n - 1]} (SEED={SEED})"
        folder.mkdir()
        done = file_calls.run(corpus, folder=folder, fault=fault, at=n, code=BUILD, light=True)
        # 2: the folder itself cannot be made; 0: what cannot be removed after the manifest
        assert done.code in ((-9,) if fault == "kill" else (0, 2, 3)), (said, done.err)
        assert "Traceback" not in done.err, (said, done.err)
        build.build(config(corpus), folder / "out")
        assert files_in(folder) == whole, said


def test_a_build_with_an_empty_split_leaves_no_shard(corpus, tmp_path):
    with pytest.raises(DataError, match="validation split is empty"):
        build.build(config(corpus, 1e-9), tmp_path / "out")
    assert list((tmp_path / "out").glob("*.safetensors")) == []


def _build(corpus, folder, barrier):
    barrier.wait()
    try:
        build.build(config(corpus), folder)
    except StackproofError as e:
        os._exit(e.exit_code)


def _prepare(corpus, folder, barrier):
    barrier.wait()
    prepare.prepare(config(corpus), cache_dir=folder)


@pytest.mark.parametrize("work", [_build, _prepare])
def test_of_eight_processes_one_builds_and_the_result_is_whole(work, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "WORKERS", 1)
    context = get_context("fork")
    for number in range(scaled(1, 20)):
        folder, barrier = tmp_path / f"{number}", context.Barrier(PROCESSES)
        processes = [
            context.Process(target=work, args=(corpus, folder, barrier)) for _ in range(PROCESSES)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        codes = {p.exitcode for p in processes}
        # a folder that another build is writing to is refused; a cache is used
        assert 0 in codes and codes <= ({0, 2} if work is _build else {0})
        made = folder if work is _build else next((folder / "data").iterdir())
        prepare.open_folder(made, config(corpus).model_copy(update={"verify": "full"}))
        assert len(list(made.parent.glob(".*"))) == 0


def test_a_flipped_bit_in_any_byte_of_a_data_set_is_found(corpus, tmp_path):
    """Of shards and tokenizer, whose hashes the manifest holds."""
    folder, random = tmp_path / "out", chance("flips")
    cfg = config(corpus).model_copy(update={"verify": "full"})
    build.build(cfg, folder)
    for path in sorted([*folder.glob("*.safetensors"), folder / "tokenizer.json"]):
        honest = path.read_bytes()
        at = range(len(honest))
        for byte in random.sample(at, min(scaled(12, len(at)), len(at))):
            flipped = bytearray(honest)
            flipped[byte] ^= 1 << random.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(StackproofError) as found:
                prepare.open_folder(folder, cfg)
            assert path.name in str(found.value), (path.name, byte, f"SEED={SEED}")
        path.write_bytes(honest)
    prepare.open_folder(folder, cfg)


def _leave_aside(target):
    with aside(target) as folder:
        (folder / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_folder_of_a_killed_process_is_removed_and_that_of_a_live_one_is_not(tmp_path):
    target = tmp_path / "model [1]"
    process = get_context("fork").Process(target=_leave_aside, args=(target,))
    process.start()
    process.join()
    assert len(list(tmp_path.iterdir())) == 1, "the killed process left its folder"
    left = next(tmp_path.iterdir())
    start, _, ended = left.name.rpartition("-")
    live = tmp_path / f"{start}-{os.getppid()}"
    elsewhere = tmp_path / f".writing-{target.name}-another.host-{ended}"
    unnamed = tmp_path / f".writing-{target.name}-{ended}"
    endless = tmp_path / f"{start}-{'9' * 30}"
    stay = {live, elsewhere, unnamed, endless}
    for folder in stay:
        folder.mkdir()
    with aside(target) as folder:
        assert set(tmp_path.iterdir()) == {folder, *stay}
    assert set(tmp_path.iterdir()) == stay


def test_a_temporary_file_names_its_host(tmp_path, monkeypatch):
    """Processes of two hosts that share a disk may have one number."""
    made = []
    monkeypatch.setattr(files, "create_durably", lambda path, data, **_: made.append(path.name))
    for host in ("one", "tw-o/ü"):
        monkeypatch.setattr(platform, "node", lambda host=host: host)
        with pytest.raises(FileNotFoundError):
            files.write_atomically(tmp_path / "f", b"")
    assert made == [f".f.one-{os.getpid()}.tmp", f".f.tw_o__-{os.getpid()}.tmp"]
