"""Foreign input is data: nothing in it is executed, nothing takes memory or time without a limit,
and every refusal has its documented exit code.

Each case is a real command in a process of its own with limits of memory and processor time.
"""

import os
import re
import shutil
from functools import cache
from pathlib import Path

import pytest

from stackproof.spec.errors import EXIT_CODES
from tests.fault_injection import hostile
from tests.fault_injection.hostile import (
    ANY_FILE,
    JSON_FILE,
    MARKING,
    TENSOR_FILE,
    TOML_FILE,
    VALUES,
    Case,
    changed,
    put,
)
from tests.fault_injection.scale import SEED, STRESS, chance, scaled
from tests.processes import PRELOADED, STACK, Command

if STRESS:  # hundreds of cases import it
    PRELOADED.append("transformers.models.llama.modeling_llama")
MAX_RSS_BYTES, MAX_CPU_S = 2**30, 120
# Address space beyond that of the process that the command is forked from.
ADDRESSES_BYTES = 4 * 2**30
LIMITED = f"""
import os, resource, sys, time
from multiprocessing import util
pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + {ADDRESSES_BYTES}
resource.setrlimit(resource.RLIMIT_AS, (most, most))
resource.setrlimit(resource.RLIMIT_CPU, ({MAX_CPU_S}, {MAX_CPU_S}))
sys.path.insert(0, os.environ["IMPORTABLE"])
sys.stdin = open("/dev/zero")  # whoever asks is answered, and not with a refusal
util.Finalize(None, lambda: open(os.environ["STATUS"], "w").write(
    f"{{open('/proc/self/status').read()}}processor_s {{time.process_time():.2f}}"), exitpriority=0)
{STACK}
"""
REFUSED = set(range(2, 8))
SHOW, RUN, HF = ("tokenizer", "show"), "run", "hf"
STEP = "run/checkpoints/step-00000000"
TRACE = ("trace", "stats", HF, "--input-ids", "1,2,3")
IMPORT = ("import", HF, "--out", "imported")
SCORE = ("evaluate", RUN, "--text", "plain.txt")
BUILD = ("data", "build", "texts", "--out", "out", "--workers", "1")


@cache
def _commands() -> dict[str, tuple[tuple[str, ...], bool]]:
    """Commands that read a file, and whether they import transformers, by a name."""
    return {
        "inspect": (("inspect", RUN), False),
        "evaluate": (SCORE, False),
        "sample": (("sample", RUN, "--max-new-tokens", "2"), False),
        "resume": (("train", "--resume", RUN), False),
        "fork": (("train", "--fork", RUN, "--run-dir", "child", "--dry-run"), False),
        "trace run": (("trace", "stats", RUN, "--input-ids", "1,2,3"), False),
        "export": (("export", RUN, "--out", "exported"), True),
        "import": (IMPORT, True),
        "trace hf": (TRACE, True),
        "tokenizer": ((*SHOW, "hf/tokenizer.json"), False),
        "given tokenizer": ((*BUILD, "--tokenizer", "hf/tokenizer.json"), False),
        "data show": (("data", "show", "built"), False),
        "data verify": (("data", "verify", "built"), False),
        "data train": (("train", "--data", "built", "--dry-run"), False),
        "build": (BUILD, False),
        "train tokenizer": (("tokenizer", "train", "texts", "--out", "made.json"), False),
        "run file": (("train", "run.toml", "--dry-run"), False),
        "mixture": (("data", "build", "mixture.toml", "--out", "out", "--workers", "1"), False),
        "suite": (("evaluate", RUN, "--suite", "run.toml"), False),
        "against": ((*BUILD, "--against", "plain.txt"), False),
        "score": (SCORE, False),
        "record": (("evidence", "show", "trace"), False),
        "rerun": (("evidence", "rerun", "trace", "--run-dir", "again"), False),
        "gguf": (("trace", "stats", "model.gguf", "--input-ids", "1,2,3"), True),
        "bundle": (("gates", "repro", "trace"), False),
    }


# Which commands read which file.
JSON_READERS = {
    "hf/config.json": ("import", "trace hf"),
    "hf/tokenizer.json": ("tokenizer", "given tokenizer", "import"),
    "hf/tokenizer_config.json": ("import",),
    "hf/generation_config.json": ("trace hf",),
    "hf/model.safetensors.index.json": ("import", "trace hf"),
    "built/manifest.json": ("data show", "data verify", "data train"),
    "built/tokenizer.json": ("data show",),
    "trace/metadata.json": ("record", "rerun"),
    "trace/repro.json": ("bundle",),
    f"{STEP}/manifest.json": ("inspect", "evaluate"),
    f"{STEP}/state.json": ("sample",),
    "run/tokenizer.json": ("evaluate",),
    "run/run.json": ("resume", "fork"),
    "texts/a.jsonl": ("build", "train tokenizer"),
}
TENSOR_READERS = {
    "hf/model.safetensors": ("import", "trace hf"),
    f"{STEP}/model.safetensors": ("inspect", "evaluate", "trace run"),
    f"{STEP}/state.safetensors": ("sample",),
    "built/train-00000.safetensors": ("data show", "data verify"),
}
TOML_READERS = {"run.toml": ("run file", "suite"), "mixture.toml": ("mixture",)}
OTHER_READERS = {
    "plain.txt": ("score", "against"),
    "model.gguf": ("gguf",),
    "run/checkpoints/latest": ("inspect",),
    "texts/b.parquet": ("build",),
    "texts/b.txt.gz": ("build",),
    "texts/b.txt.zst": ("build",),
}


# Files that the sound folder lacks.
ABSENT = (
    "texts/b.parquet", "texts/b.txt.gz", "texts/b.txt.zst", "trace/repro.json",
    "hf/model.safetensors.index.json",
)  # fmt: skip


def _of(file, reader, what, spoil, *, may_pass=False):
    command, heavy = _commands()[reader]
    return Case(
        f"{reader}: {file} {what}", lambda root: spoil(root / file), command, may_pass, heavy
    )


def by_generation() -> list[Case]:
    """Every reader with every way to spoil its files."""
    cases = []
    kinds = (
        (JSON_READERS, JSON_FILE),
        (TENSOR_READERS, TENSOR_FILE),
        (TOML_READERS, TOML_FILE),
        (OTHER_READERS, {}),
    )
    # A link to nothing is no file, and most folders need not have each of these.
    optional = ("hf/tokenizer_config.json", "hf/generation_config.json", "texts/", "index.json")
    for readers, own in kinds:
        for file, names in readers.items():
            lax = any(o in file for o in optional) or file.endswith((".txt", "latest", ".toml"))
            lax |= file.startswith(("hf/model", "built/train")) and own is not TENSOR_FILE
            for reader in names:
                for what, spoil in (ANY_FILE | own).items():
                    if what == "missing" and file in ABSENT:
                        continue
                    if what == "huge" and file.startswith(("texts/", "plain.txt")):
                        continue  # text may be large and is read in pieces
                    passes = lax or reader in ("fork", "data train", "data show")
                    cases.append(_of(file, reader, what, spoil, may_pass=passes))
    return cases


def by_value() -> list[Case]:
    """Every value of the documents replaced by every odd one; some are harmless."""
    documents = {
        "hf/config.json": (("import", "trace hf"), CONFIG),
        f"{STEP}/state.json": (("evaluate",), STATE),
        "run/run.json": (("fork",), RUN_JSON),
        "built/manifest.json": (("data show", "data train"), MANIFEST),
        "trace/metadata.json": (("record",), RECORD),
    }
    return [
        _of(
            file,
            reader,
            f"{key} = {value!r}",
            changed(key, value, sealed=file.startswith(STEP)),
            may_pass=True,
        )
        for file, (readers, keys) in documents.items()
        for reader in readers
        for key in keys
        for value in VALUES
    ]


CONFIG = (
    "architectures model_type vocab_size hidden_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim intermediate_size max_position_embeddings rms_norm_eps "
    "rope_theta rope_scaling tie_word_embeddings hidden_act torch_dtype eos_token_id auto_map "
    "quantization_config _name_or_path _attn_implementation layer_types dtype"
).split()
STATE = "step tokens_seen cursor config config.model config.data record vocab_size".split()
STATE += ["config.model.n_layers", "config.model.max_seq_len", "config.data.filters"]
RUN_JSON = "config overrides config.data config.model config.optim config.model.d_model".split()
MANIFEST = "schema config corpus sources splits splits.train splits.train.shards".split()
MANIFEST += [
    "tokenizer",
    "tokenizer.vocab_size",
    "config.filters",
    "filters",
    "splits.train.tokens",
    "decontamination",
]
RECORD = "id kind command config inputs series metrics gates overrides parents wall_s".split()

# --- what would execute ---------------------------------------------------------------------------


def _code(key_of_auto_map: str, kind: str):
    def spoil(root: Path) -> None:
        changed("auto_map", {key_of_auto_map: "evil.Model"})(root / "hf/config.json")
        changed("model_type", kind)(root / "hf/config.json")
        (root / "hf/evil.py").write_text(MARKING)

    return spoil


def _adapter(root: Path) -> None:
    (root / "hf/adapter_config.json").write_text(
        '{"base_model_name_or_path": "../outside", "peft_type": "LORA"}'
    )


def _bin(root: Path) -> None:
    (root / "hf/model.safetensors").unlink()
    ANY_FILE["torch.save"](root / "hf/pytorch_model.bin")


def _index(target: str):
    def spoil(root: Path) -> None:
        (root / "hf/model.safetensors").rename(root / "outside/model.safetensors")
        (root / "hf/model.safetensors.index.json").write_text(
            f'{{"weight_map": {{"lm_head.weight": "{target}"}}}}'
        )

    return spoil


def _filters(file: str, key: str, *, sealed: bool = False):
    return lambda root: changed(key, ["evil:keep"], sealed=sealed)(root / file)


def _unfinished(spoil):
    def spoilt(root: Path) -> None:
        spoil(root)
        (root / "run/metadata.json").unlink()

    return spoilt


def _command(*words: str):
    return lambda root: changed("command", list(words))(root / "trace/metadata.json")


def _tokenizer(**parts):
    """A tokenizer.json with parts of the Hugging Face format."""
    import json

    vocabulary = {"<|endoftext|>": 0} | {chr(97 + i): i + 1 for i in range(26)}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    } | parts
    return lambda root: (root / "hf/tokenizer.json").write_text(json.dumps(document))


def _split(pattern: str):
    how = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return _tokenizer(pre_tokenizer=how)


def _texts(name: str, data: bytes):
    return lambda root: (root / "texts" / name).write_bytes(data)


def _suite(pattern: str):
    prompt = '[[domain.prompts]]\nid = "p{}"\ntext = "q"\nanswer = "{}"\n'
    check = f"checks = [{{ kind = 'regex', pattern = '{pattern}' }}]\n"
    head = 'name = "s"\n'
    domains = "".join(
        f'[[domain]]\nname = "d{i}"\n{prompt.format(i, "a" * 60)}{check}' for i in range(2)
    )
    return lambda root: (root / "run.toml").write_text(head + domains)


def _gguf(**changes):
    return lambda root: hostile.write_gguf(root / "model.gguf", **changes)


def _key(kind: int, value: bytes) -> bytes:
    return (1).to_bytes(8, "little") + b"k" + kind.to_bytes(4, "little") + value


def _list(kind: int, count: int, rest: bytes = b"") -> bytes:
    return kind.to_bytes(4, "little") + count.to_bytes(8, "little") + rest


def core() -> list[Case]:
    """What is known to have executed, hung or exhausted the memory, and its kin."""
    made = []

    def add(reader: str, what: str, spoil, *, may_pass: bool = False) -> None:
        command, heavy = _commands()[reader]
        made.append(Case(f"{reader}: {what}", spoil, command, may_pass, heavy))

    for reader in ("trace hf", "import"):
        add(reader, "code of a model", _code("AutoModelForCausalLM", "evil"))
        add(reader, "code of a configuration", _code("AutoConfig", "evil"))
        add(reader, "code beside a known kind", _code("AutoConfig", "llama"), may_pass=True)
        add(reader, "an adapter", _adapter, may_pass=reader == "import")
        add(reader, "weights that are a pickle", _bin)
        for target in ("../outside/model.safetensors", "/dev/zero", "hf/../x", "."):
            add(reader, f"an index that names {target}", _index(target))
        for key, value in (
            ("_attn_implementation", "evil/kernel"),
            ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
            ("num_hidden_layers", 10**9),
            ("hidden_size", 10**12),
            ("vocab_size", 10**12),
            ("max_position_embeddings", 10**12),
            ("transformers_weights", "../outside/model.safetensors"),
        ):
            add(
                reader,
                f"{key} = {value}",
                lambda root, k=key, v=value: changed(k, v)(root / "hf/config.json"),
                may_pass=key == "_attn_implementation",
            )
    plain = ("--set", "train.max_steps=1", "--set", "data.corpus.kind=stdlib-docs")
    fork = ("train", "--fork", RUN, "--run-dir", "child", *plain)
    state, run = f"{STEP}/state.json", "run/run.json"
    made.append(Case("fork: a plug-in in run.json", _filters(run, "config.data.filters"), fork))
    add("resume", "a plug-in in run.json", _unfinished(_filters(run, "config.data.filters")))
    for reader in ("evaluate", "sample", "trace run"):
        add(
            reader,
            "a plug-in in state.json",
            _filters(state, "config.data.filters", sealed=True),
            may_pass=True,
        )
    held_out = Case(
        "evaluate the held-out split: a plug-in in state.json",
        _filters(state, "config.data.filters", sealed=True),
        ("evaluate", RUN),
    )
    made.append(held_out)
    add(
        "data train",
        "a plug-in in the manifest",
        _filters("built/manifest.json", "config.filters"),
        may_pass=True,
    )
    add(
        "data show",
        "a plug-in in the manifest",
        _filters("built/manifest.json", "config.filters"),
        may_pass=True,
    )
    for words in (
        ("stack", "trace", "bisect", RUN, "--against", RUN, "--check", "touch ../marker"),
        ("stack", "train", "pocket", "--set", "data.filters=['evil:keep']"),
        ("stack", "data", "build", "texts", "--out", "../outside/x"),
        ("stack", "trace", RUN, "--csv", "../outside/x", "--plugin", "a"),
        ("python", "-c", MARKING),
        (),
    ):
        add("rerun", f"a command {' '.join(words)[:40]}", _command(*words))
    for pattern in ("(a+)+$", "(a|aa)+$", r"(\w+\s?)*$", "(a)\\1+", "a" * 9999):
        add("tokenizer", f"the pattern {pattern[:20]}", _split(pattern))
        # the engine of suites does not backtrack
        add("suite", f"the pattern {pattern[:20]}", _suite(pattern), may_pass=pattern[-1] == "$")
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 60}
    add(
        "tokenizer",
        "replacements that multiply",
        _tokenizer(normalizer={"type": "Sequence", "normalizers": [replace] * 6}),
    )
    add(
        "tokenizer",
        "five million tokens",
        lambda root: put(
            b'{"model": {"type": "BPE", "merges": [], "vocab": {'
            + b",".join(b'"t%d":%d' % (i, i) for i in range(5_000_000))
            + b"}}}"
        )(root / "hf/tokenizer.json"),
    )
    add(
        "build",
        "262 kB of zstandard",
        lambda root: _texts("b.txt.zst", hostile.packed(2**33, ".zst"))(root),
    )
    add("build", "a gzip bomb", lambda root: _texts("b.txt.gz", hostile.packed(2**28, ".gz"))(root))
    add(
        "build",
        "a parquet bomb",
        lambda root: hostile.parquet(root / "texts/b.parquet", "w" * 2**23, 3000),
    )
    add(
        "build",
        "a parquet value beyond the limit",
        lambda root: hostile.parquet(root / "texts/b.parquet", "w" * 2**26, 64),
    )
    add(
        "build", "a line of 256 MB", lambda root: _texts("b.txt", b"a" * 2**28)(root), may_pass=True
    )
    add("build", "a deep line", _texts("b.jsonl", b"[" * 2**20 + b"\n"))
    add("build", "a wide line", _texts("b.jsonl", b"[" + b"[]," * 2**22 + b"0]\n"))
    for name, changes in {
        "tensors": {"tensors": 2**62},
        "keys": {"keys": 2**62},
        "a text without end": {"keys": 1, "rest": _key(8, (2**62).to_bytes(8, "little"))},
        "a list without end": {"keys": 1, "rest": _key(9, _list(4, 2**62))},
        "a list of numbers behind the end": {"keys": 1, "rest": _key(9, _list(4, 10**6))},
        "lists in lists": {"keys": 1, "rest": _key(9, _list(9, 1) * 100_000)},
        "an unknown type": {"keys": 1, "rest": _key(99, b"")},
        "another version": {"rest": b""},
        "tensors of any size": {
            "tensors": 1,
            "rest": (1).to_bytes(8, "little")
            + b"t"
            + (4).to_bytes(4, "little")
            + (2**15).to_bytes(8, "little") * 4
            + bytes(12),
        },
    }.items():
        add("gguf", name, _gguf(**changes))
    return made


EVERYTHING = by_generation() + by_value()
LIGHT = [case for case in EVERYTHING if not case.heavy]


def _known() -> list[Case]:
    """All known attacks in `make stress`; in `make test` those that are quick to make, and one that
    transformers once executed.
    """
    slow = ("million", "262 kB", "bomb", "beyond", "256 MB", "wide", "9999", "held-out", "fork")
    heavy = ("trace hf: code of a model",)
    return [
        case
        for case in core()
        if STRESS
        or case.name in heavy
        or not (case.heavy or any(word in case.name for word in slow))
    ]


@pytest.fixture(scope="session")
def sound(tmp_path_factory, text_file):
    folder = tmp_path_factory.mktemp("sound")
    hostile.write_sound(folder, text_file)
    return folder


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("case", _known(), ids=lambda case: case.name[:90])
def test_a_known_attack_is_refused_without_executing_it(case, sound, tmp_path, report):
    _refused(case, sound, tmp_path, report)


@pytest.mark.parametrize("number", range(scaled(8, len(EVERYTHING))))
def test_a_spoilt_file_is_refused_without_executing_it(number, sound, tmp_path, report):
    """All of them in `make stress`, others each time in `make test`."""
    case = EVERYTHING[number] if STRESS else chance(f"hostile {number}").choice(LIGHT)
    _refused(case, sound, tmp_path, report)


def _refused(case: Case, sound: Path, tmp_path: Path, report) -> None:
    root = tmp_path / "root"
    shutil.copytree(sound, root)
    for name in ("outside", "importable", "cache"):
        (root / name).mkdir()
    (root / "importable/evil.py").write_text(MARKING + "def keep(*a):\n    return False\n")
    case.spoil(root)
    before = _snapshot(root / "outside")
    environment = os.environ | {
        "MARKER": str(tmp_path / "marker"),
        "STATUS": str(tmp_path / "status"),
        "IMPORTABLE": str(root / "importable"),
        "STACKPROOF_CACHE": str(root / "cache"),
    }
    done = Command(*case.command, folder=root, environment=environment, code=LIMITED).wait()
    status = (tmp_path / "status").read_text() if (tmp_path / "status").is_file() else ""
    used = dict(re.findall(r"^(\S+)\s+(\S+)", status, re.MULTILINE))
    peak, processor_s = int(used.get("VmHWM:", 0)) * 1024, used.get("processor_s", "")
    report(case, done, peak, processor_s, (tmp_path / "marker").exists())
    said = f"SEED={SEED} {case.name}: exit {done.code}, {peak} bytes\n{done.err[-3000:]}"
    assert not (tmp_path / "marker").exists(), said
    assert "Traceback (most recent call last)" not in done.err, said
    assert done.code in REFUSED | ({0} if case.may_pass else set()), said
    assert done.code in EXIT_CODES and peak <= MAX_RSS_BYTES, said
    assert _snapshot(root / "outside") == before, said


def _accepted() -> list[str]:
    """Commands that succeed on the sound folders: the others need a run, a suite, a bundle or a
    .gguf file of their own, and have tests of their own.
    """
    if not STRESS:
        return ["inspect", "tokenizer", "data show", "run file"]
    lacking = ("bundle", "resume", "suite", "rerun", "gguf")
    return sorted(_commands().keys() - lacking)


@pytest.fixture(scope="session")
def report():
    """Writes one line per case to the file HOSTILE_REPORT, if it is set."""
    path = os.environ.get("HOSTILE_REPORT")

    def line(case: Case, done, peak: int, processor_s: str, executed: bool) -> None:
        if path:
            traceback = "Traceback (most recent call last)" in done.err
            with open(path, "a") as f:
                shown = f"{done.code}\t{peak}\t{processor_s}\t{executed}\t{traceback}"
                f.write(f"{shown}\t{case.name[:120]!r}\n")

    return line


@pytest.mark.parametrize("command", _accepted())
def test_the_same_commands_accept_sound_folders(command, sound, tmp_path):
    """Otherwise everything would be refused for another reason."""
    words, _ = _commands()[command]
    root = tmp_path / "root"
    shutil.copytree(sound, root)
    done = Command(
        *words, folder=root, environment=os.environ | {"STACKPROOF_CACHE": str(root / "cache")}
    ).wait()
    assert done.code == 0, done.err[-2000:]
