"""The device of a run: its kernels, by key, by a shipped record, by a comparison made here or by
the record of a run that goes on; and the operations of a step, against a count of its products.
"""

import json

import pytest
import torch

from stackproof.config import DifferentialAttention, MixtureOfExperts, ModelConfig, NeverStop
from stackproof.config.model import HardCapacity, MixtureOfDepths
from stackproof.contracts.gate import call_check
from stackproof.kernels import choice, chunked_attention, dispatch, measured, parity
from stackproof.kernels.choice import Choice, Fastest
from stackproof.kernels.table import OPERATIONS
from stackproof.kernels.triton import launch
from stackproof.museum.collection import museum_config
from stackproof.recipes import RECIPES
from stackproof.replay.rerun import rerun
from stackproof.spec.errors import EnvironmentUnfit, IntegrityError
from stackproof.spec.records import read_record
from stackproof.subject.assemble import subject_of
from stackproof.train import device
from stackproof.train.device import kernels_of
from stackproof.train.loop import train
from stackproof.train.start import fresh, read_config, resume
from stackproof.train.trainer import Callback

CPU, GATES = torch.device("cpu"), ("kernel.parity", "runtime.finite")
HERE = choice.CPU_NAME


@pytest.fixture
def cfg(museum_folder):
    base = museum_config(museum_folder)
    train = base.train.model_copy(update={"max_steps": 9})
    checkpoint = base.checkpoint.model_copy(update={"every": 3})
    return base.model_copy(update={"train": train, "stop": NeverStop(), "checkpoint": checkpoint})


@pytest.fixture
def cache(tmp_path, monkeypatch, private_cache):
    """A folder of the user's cache that holds what was compared here."""
    monkeypatch.setattr(device, "cache_directory", lambda: tmp_path / "kernels-cache")
    monkeypatch.setattr(choice, "MEASURED", {})
    return tmp_path / "kernels-cache"


def compared(**winners):
    """A comparison made on this device with these winners in float32."""
    found = {op.name: measured.hashes(op) for op in OPERATIONS.values()}
    return measured.Measurement(
        device=HERE,
        made_at="2026-01-01",
        versions=measured.versions(),
        sha256=found,
        winners={"float32": winners},
    )


def with_kernels(cfg, kernels):
    return cfg.model_copy(update={"train": cfg.train.model_copy(update={"kernels": kernels})})


def in_force(cfg, recorded=None, device=CPU):
    with kernels_of(cfg, device, recorded):
        return {op: dispatch.choose(op, device) for op in OPERATIONS}


# ---- a fresh run


def test_torch_is_chosen_without_a_record_or_a_comparison(cfg, cache):
    assert {(c.kernel, c.origin) for c in in_force(cfg).values()} == {("torch", "default")}


def test_a_shipped_record_comes_before_a_comparison_made_here(cfg, cache, monkeypatch):
    monkeypatch.setattr(choice, "MEASURED", {(HERE, "attention"): Fastest("chunks", "benchmark-1")})
    measured.write(cache, compared(attention="torch", linear_cross_entropy="library"))
    found = in_force(cfg)
    assert found["attention"] == Choice(
        "chunks", f"fastest on {HERE}, record benchmark-1", "shipped"
    )
    assert (found["linear_cross_entropy"].kernel, found["linear_cross_entropy"].origin) == (
        "library",
        "measured-here",
    )
    assert found["linear"].origin == "default"


def test_a_key_comes_before_both(cfg, cache, monkeypatch):
    monkeypatch.setattr(choice, "MEASURED", {(HERE, "attention"): Fastest("chunks", "benchmark-1")})
    measured.write(cache, compared(linear_cross_entropy="library"))
    assert {(c.kernel, c.origin) for c in in_force(with_kernels(cfg, "torch")).values()} == {
        ("torch", "key")
    }
    found = in_force(with_kernels(cfg, {"attention": "torch", "linear": "auto"}))
    assert (found["attention"].kernel, found["linear_cross_entropy"].kernel) == ("torch", "library")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        (
            {"versions": {"torch": "1.0", "triton": "1.0", "stackproof": "1.0"}},
            "torch was 1.0, now",
        ),
        (
            {"sha256": {"attention": {"torch": "0" * 64}}},
            "the source of a kernel of attention has changed",
        ),
        ({"device": "another"}, None),
    ],
    ids=["as it is", "another torch", "another source", "another device"],
)
def test_a_comparison_holds_for_its_device_versions_and_sources_alone(cfg, cache, change, reason):
    measured.write(cache, compared(attention="chunks").model_copy(update=change))
    found = in_force(cfg)["attention"]
    assert found.kernel == ("chunks" if reason == "" else "torch")
    assert (
        (found.reason == f"not measured on {HERE} yet")
        if reason is None
        else (reason in found.reason)
    )


def test_a_comparison_holds_for_its_precision_and_without_a_compiler(cfg, cache):
    measured.write(cache, compared(attention="chunks"))
    of_train = lambda **changes: cfg.model_copy(  # noqa: E731
        update={"train": cfg.train.model_copy(update=changes)}
    )
    assert in_force(of_train(dtype="bfloat16"))["attention"].kernel == "torch"
    assert in_force(of_train(compile=True))["attention"].kernel == "torch"
    assert in_force(of_train(dtype="float32"))["attention"].kernel == "chunks"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"schema": "other"}', '{"schema": "stackproof.kernels/1", "devices": 3}'],
)
def test_a_broken_cache_is_no_comparison(cfg, cache, text):
    cache.mkdir()
    (cache / measured.FILE).write_text(text)
    assert in_force(cfg)["attention"].kernel == "torch"
    measured.write(cache, compared(attention="chunks"))
    assert in_force(cfg)["attention"].kernel == "chunks"


def test_two_devices_share_a_cache(cache):
    for name in ("one", "two", "one"):
        measured.write(cache, compared().model_copy(update={"device": name}))
    assert measured.read(cache, "two").device == "two" and measured.read(cache, "three") is None
    assert list(json.loads((cache / measured.FILE).read_text())["devices"]) == ["one", "two"]


def test_a_winner_in_triton_needs_a_source_that_has_passed(cfg, cache, monkeypatch):
    measured.write(cache, compared(rope="triton"))
    monkeypatch.setattr(launch, "why_not", lambda device: "")
    assert in_force(cfg)["rope"].kernel == "triton"
    monkeypatch.setattr(parity, "why_not", lambda kernel: "its source has changed")
    found = in_force(cfg)["rope"]
    assert found.kernel == "torch" and "its source has changed" in found.reason
    with pytest.raises(IntegrityError, match="rope"):
        in_force(with_kernels(cfg, {"rope": "triton"}))


def test_a_named_kernel_that_cannot_run_is_refused(cfg, monkeypatch):
    monkeypatch.setattr(launch, "installed", lambda: False)
    with pytest.raises(
        EnvironmentUnfit, match="attention: the kernel triton cannot run on cpu"
    ) as caught:
        in_force(with_kernels(cfg, "triton"))
    assert (
        caught.value.value == "triton is not installed"
        and "torch" in caught.value.allowed
        and "auto" in caught.value.next_step
    )
    with pytest.raises(EnvironmentUnfit, match="it is for the CPU"):
        in_force(with_kernels(cfg, {"linear": "onednn"}), device=torch.device("cuda"))


def test_the_choice_of_a_run_is_for_its_device(cfg):
    with kernels_of(with_kernels(cfg, {"attention": "chunks"}), CPU):
        assert (
            dispatch.choose("attention", "cpu").kernel == "chunks"
            and dispatch.choose("attention", "meta").kernel == "torch"
        )
    assert dispatch.choose("attention", "cpu").origin != "key"


# ---- what a record names


def test_the_record_names_kernels_and_origins_and_a_resume_uses_them_and_not_the_cache(
    cfg, cache, tmp_path, monkeypatch
):
    """The run was interrupted; meanwhile a comparison and a shipped record name other kernels."""
    measured.write(cache, compared(attention="chunks"))
    folder, taken = tmp_path / "run", []
    original = chunked_attention.attention
    monkeypatch.setattr(chunked_attention, "attention", lambda *a: taken.append(1) or original(*a))

    with pytest.raises(KeyboardInterrupt):
        train(fresh(cfg, (), folder, [interrupting(5)], only=GATES))
    environment = json.loads((folder / "run.json").read_text())["environment"]
    named = (
        "kernel_attention_name",
        "kernel_attention_origin",
        "kernel_linear_name",
        "kernel_linear_origin",
        "kernel_device",
    )
    assert [environment[k] for k in named] == [
        "chunks",
        "measured-here",
        "torch",
        "default",
        HERE,
    ] and taken
    measured.write(cache, compared(attention="torch", linear_cross_entropy="library"))
    monkeypatch.setattr(
        choice, "MEASURED", {(HERE, "linear_cross_entropy"): Fastest("onednn", "benchmark-1")}
    )
    taken.clear()
    record = train(resume(folder, (), cfg))
    assert taken and record.environment["kernel_attention_name"] == "chunks"
    assert (
        record.environment["kernel_attention_origin"],
        record.environment["kernel_linear_cross_entropy_name"],
    ) == ("measured-here", "torch")
    assert "compared here" in record.environment["kernel_attention_reason"]


def interrupting(step):
    """A callback that ends the run as Ctrl-C does, after a step."""

    class Interrupting(Callback):
        def on_step(self, trainer, report):
            if report.step == step:
                raise KeyboardInterrupt

    return Interrupting()


def test_a_rerun_uses_the_kernels_of_the_record(cfg, cache, tmp_path, monkeypatch):
    chunks = with_kernels(cfg, {"attention": "chunks"})
    first = train(fresh(chunks, (), tmp_path / "first", only=GATES))
    assert first.environment["kernel_attention_origin"] == "key"
    measured.write(cache, compared(attention="torch", linear_cross_entropy="library"))
    repeated = record_with(first, train=first.config["train"] | {"kernels": "auto"})
    found = rerun(repeated, tmp_path / "again", Callback())
    again = read_record(tmp_path / "again" / "metadata.json")
    assert (
        again.environment["kernel_attention_name"] == "chunks"
        and again.environment["kernel_linear_cross_entropy_name"] == "torch"
    )
    assert found["ok"], found
    with pytest.raises(EnvironmentUnfit, match="attention: the run used the kernel rows"):
        rerun(
            repeated.model_copy(
                update={"environment": repeated.environment | {"kernel_attention_name": "rows"}}
            ),
            None,
            Callback(),
        )


def record_with(record, **config):
    return record.model_copy(update={"config": record.config | config})


def test_a_resume_is_refused_where_a_kernel_is_gone(cfg, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        library = with_kernels(cfg, {"linear_cross_entropy": "library"})
        train(fresh(library, (), folder, [interrupting(4)], only=GATES))
    monkeypatch.setattr(
        "stackproof.kernels.eager.why_no_library_linear_cross_entropy",
        lambda: "torch 2.10 has none",
    )
    with pytest.raises(
        EnvironmentUnfit, match="linear_cross_entropy: the kernel library cannot run on cpu"
    ) as caught:
        train(resume(folder, (), read_config(folder)))
    assert caught.value.value == "torch 2.10 has none" and "--fork" in caught.value.next_step
    assert dispatch.choose("linear_cross_entropy", CPU).kernel != "library"


OLD = {
    "kernel_linear": "oneDNN, small products by torch.nn.functional.linear",
    "kernel_linear_reason": f"fastest on {HERE}, record benchmark-20261122T091225Z-f056d3d8",
    "kernel_rope": "torch, derivative written out",
    "kernel_rope_reason": f"not measured on {HERE} yet",
    "kernel_swiglu": "torch.compile",
    "kernel_swiglu_reason": "the compiler is given the formula",
    "kernel_attention": "torch.scaled_dot_product_attention",
    "kernel_attention_reason": "chunks is for float32, this is bfloat16",
}


def test_a_record_without_names_means_the_titles_it_holds(cfg, cache):
    """Of half precision the reason names the choice; an operation that it does not
    know is chosen by default.
    """
    found = in_force(cfg, OLD)
    named = {op: c.kernel for op, c in found.items() if c.origin == "recorded"}
    assert named == {"linear": "onednn", "rope": "torch", "swiglu": "torch", "attention": "chunks"}
    assert found["rms_norm"].origin == "default"


@pytest.mark.parametrize(
    "names",
    [{}, {"kernel_linear_name": "onednn", "kernel_device": "AnotherMaker AVX9"}],
    ids=["old", "new"],
)
def test_kernels_of_a_processor_with_other_instructions_are_refused(cfg, names):
    """torch's own are not: they are there on every processor."""
    other = (
        OLD | {"kernel_linear_reason": "fastest on AnotherMaker AVX9, record benchmark-1"} | names
    )
    assert in_force(cfg, OLD)["linear"].kernel == "onednn"
    with pytest.raises(
        EnvironmentUnfit, match="linear: the run's kernel onednn was chosen for another processor"
    ) as caught:
        in_force(cfg, other)
    assert (
        caught.value.value == HERE
        and "AVX9" in caught.value.allowed
        and "--fork" in caught.value.next_step
    )
    of_torch = other | {"kernel_linear_name": "torch"}
    assert (
        in_force(cfg, {k: v for k, v in of_torch.items() if "attention" not in k})["linear"].kernel
        == "torch"
    )


# --- operations of a step -------------------------------------------------------------------------

SIZES = dict(d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40, max_seq_len=64)
DENSE = ModelConfig(**SIZES)
VARIANTS = {
    "dense": DENSE,
    "untied": DENSE.model_copy(update={"tied_head": False}),
    "differential": DENSE.model_copy(update={"attention": DifferentialAttention()}),
    "experts": DENSE.model_copy(update={"ffn": MixtureOfExperts(n_experts=8, top_k=2)}),
    "experts with little room": DENSE.model_copy(
        update={"ffn": MixtureOfExperts(n_experts=8, top_k=2, capacity_factor=1.0)}
    ),
    "soft depth": DENSE.model_copy(update={"depth": MixtureOfDepths()}),
    "pocket": RECIPES["pocket"]().model,
}


@pytest.fixture
def ratio(spec, small_cfg, dataset):
    """Declared over counted operations of a run with another model."""

    def of(model: ModelConfig) -> float:
        subject = subject_of(with_model(small_cfg, model), dataset, torch.device("cpu"))
        return call_check(spec.gates["runtime.flops"], subject).measured["declared_over_counted"]

    return of


def with_model(cfg, model, tokens_per_step=2048):
    train = cfg.train.model_copy(update={"tokens_per_step": tokens_per_step})
    return cfg.model_copy(update={"model": model, "train": train})


@pytest.mark.parametrize("name", VARIANTS)
def test_the_count_is_the_formula(ratio, name):
    """To the operation; what a full expert would drop in training is run in evaluation."""
    assert ratio(VARIANTS[name]) == 1.0


def test_hard_depth_is_no_matter_of_a_formula(ratio):
    """Which blocks a token meets depends on its scores: the gate is not for it. Measured 0.92."""
    model = DENSE.model_copy(
        update={"depth": MixtureOfDepths(gate=HardCapacity(capacity_frac=0.5))}
    )
    assert 0.8 < ratio(model) < 0.99


def test_attention_is_left_out_of_what_is_compared(ratio, small_cfg):
    longer = DENSE.model_copy(update={"max_seq_len": 128})
    assert ratio(longer) == 1.0
    whole, short = (
        device.flops_per_step(with_model(small_cfg, model, tokens_per_step=1), 500)
        for model in (longer, DENSE)
    )
    assert whole - short == 12 * 3 * 32 * 64 // 2, (
        "twelve products of the width per further visible key and layer, half of them seen"
    )


@pytest.mark.skipif(not device.PROCESS_STATUS.is_file(), reason="Linux states it")
def test_peak_memory_of_a_process_grows_with_what_it_holds_and_stays():
    before = device.peak_memory_bytes(CPU)
    n_bytes = before + 2**26  # more than was ever held
    held = torch.ones(n_bytes, dtype=torch.uint8)
    peak = device.peak_memory_bytes(CPU)
    assert before < n_bytes < peak
    del held
    assert device.peak_memory_bytes(CPU) > n_bytes


def test_peak_memory_on_a_gpu_is_what_torch_allocated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda of: {"cuda": 7}[of.type])
    assert device.peak_memory_bytes(torch.device("cuda")) == 7


def test_peak_memory_is_not_known_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "PROCESS_STATUS", tmp_path / "status")
    assert device.peak_memory_bytes(CPU) is None
