"""Whole small runs in one process: seeds, precisions, records and gates that must be fed."""

import json
import signal
from contextlib import nullcontext

import pytest
import torch

from stackproof.cli.load_model import open_model
from stackproof.config import AdamW, Cosine, Muon, NeverStop, SampleConfig, Wsd
from stackproof.data.sampler import MixtureSampler, Source
from stackproof.evaluate.sampling import generate
from stackproof.museum.collection import museum_config
from stackproof.spec.errors import EnvironmentUnfit, GateFailed, StreamExhausted, UsageError
from stackproof.spec.records import read_record
from stackproof.train import device, loop, start
from stackproof.train import step as steps
from stackproof.train.loop import train
from stackproof.train.rng import generator
from stackproof.train.signals import listening
from stackproof.train.start import fresh
from tests.verdicts import all_green


@pytest.fixture(scope="module")
def cfg(museum_folder):
    base = museum_config(museum_folder)
    return base.model_copy(
        update={"train": base.train.model_copy(update={"max_steps": 14}), "stop": NeverStop()}
    )


def losses(folder) -> list[float]:
    return [
        json.loads(line)["loss_nats"]
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def with_train(cfg, **changes):
    return cfg.model_copy(update={"train": cfg.train.model_copy(update=changes)})


FEW = ("runtime.finite", "schedule.rate", "optim.movement")


@pytest.fixture(scope="module")
def plain(cfg, tmp_path_factory):
    """The folder of a run of `cfg` under all gates; tests only read it."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(fresh(cfg, (), folder))
    return folder


def test_same_seed_same_losses_other_seed_other_losses(cfg, plain, tmp_path):
    """Whichever gates look on."""
    for name, seed in (("again", cfg.seed), ("other", cfg.seed + 1)):
        train(fresh(cfg.model_copy(update={"seed": seed}), (), tmp_path / name, only=FEW))
    first, again, other = (
        losses(folder) for folder in (plain, tmp_path / "again", tmp_path / "other")
    )
    assert first == again, "bit for bit"
    assert max(abs(x - y) for x, y in zip(first, other)) > 1e-4


@pytest.fixture
def any_precision(monkeypatch):
    """Lets half precision run on processors that only emulate it."""
    monkeypatch.setattr(start, "refuse_emulated", lambda *asked: None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_under_all_gates_close_to_single(
    cfg, plain, tmp_path, dtype, any_precision
):
    """After 14 steps the half-precision loss is within 0.05 nats of float32's;
    measured worst case 0.01.
    """
    record = train(fresh(with_train(cfg, dtype=dtype), (), tmp_path / dtype))
    assert record.status == "completed" and all_green(record.gates, record.metric("steps"))
    assert abs(losses(tmp_path / dtype)[-1] - losses(plain)[-1]) < 0.05


def test_a_type_of_the_optimizer_that_is_only_emulated_is_refused_by_its_key(
    cfg, tmp_path, monkeypatch
):
    monkeypatch.setattr(device, "product_s", lambda dtype: 1.0 if dtype == torch.float32 else 10.0)
    half = cfg.model_copy(update={"optim": cfg.optim.model_copy(update={"dtype": "bfloat16"})})
    with pytest.raises(EnvironmentUnfit, match="no units for bfloat16") as caught:
        train(fresh(half, (), tmp_path / "run"))
    assert "optim.dtype=float32" in str(caught.value)


def test_fp16_overflow_is_retried_and_the_scale_survives_a_resume(
    cfg, tmp_path, monkeypatch, any_precision
):
    accumulate, unscale, now, failed = steps.accumulate, torch.amp.GradScaler.unscale_, [0], []

    def noting(state, batches):
        now[0] = state.step
        return accumulate(state, batches)

    def overflowing(self, optimizer):
        if not failed and now[0] == 3:
            failed.append(1)
            optimizer.param_groups[0]["params"][0].grad.fill_(float("inf"))
        return unscale(self, optimizer)

    monkeypatch.setattr(steps, "accumulate", noting)
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", overflowing)
    half = with_train(cfg, dtype="float16")
    record = train(fresh(half, (), tmp_path / "run", only=(*FEW, "checkpoint.reloads")))
    assert failed and record.status == "completed"
    state = json.loads((tmp_path / "run/checkpoints/step-00000014/state.json").read_text())
    assert state["scaler"]["scale"] == 2.0**15


def test_the_record_is_what_is_written(cfg, tmp_path):
    record = train(fresh(cfg, (), tmp_path / "run", only=FEW))
    again = read_record(tmp_path / "run" / "metadata.json")
    assert again == record and again.sha256 == record.sha256


def test_the_record_holds_what_the_run_was(cfg, plain):
    record = read_record(plain / "metadata.json")
    lines = [json.loads(x) for x in (plain / "metrics.jsonl").read_text().splitlines()]
    assert (
        record.metric("tokens_seen") == 14 * cfg.train.tokens_per_step == lines[-1]["tokens_seen"]
    )
    assert record.metric("best_val_loss_nats") == min(
        x["val_loss_nats"] for x in lines if "val_loss_nats" in x
    )
    assert {"baseline_unigram_bits_per_byte", "baseline_bigram_bits_per_byte", "epochs"} <= set(
        record.metrics
    )
    assert (
        len(record.gates) >= 18
        and all_green(record.gates, 14)
        and all(g.checks >= 1 for g in record.gates)
    )
    assert (plain / "checkpoints/best").read_text() == f"step-{record.metric('best_step'):08d}"
    samples = [json.loads(x) for x in (plain / "samples.jsonl").read_text().splitlines()]
    assert samples and all(
        0 <= s["score"] <= 100 and s["parts"]["bigram"] >= 0 and s["loss_nats"] > 0 for s in samples
    )
    assert record.compute == "real", (
        "what the user's own command line makes is real; only a caller that says so is synthetic"
    )


def test_samples_are_drawn_as_configured(cfg, tmp_path):
    """Each sample in the log is what the saved model gives under the settings of its run, and every
    setting makes another text.
    """
    settings = (
        {"temperature": 0.0},
        {"temperature": 0.2},
        {"temperature": 1.7},
        {"temperature": 1.7, "top_k": 2},
        {"prompt": "An "},
    )
    texts = []
    for i, changes in enumerate(settings):
        plan = {"every": 4, "max_new_tokens": 24, "top_k": 0, "temperature": 1.0} | changes
        asked = cfg.model_copy(
            update={"sample": SampleConfig(**plan), "schedule": Cosine(warmup_steps=1)}
        )
        train(fresh(with_train(asked, max_steps=4), (), tmp_path / str(i), only=FEW))
        opened = open_model(tmp_path / str(i))
        (line,) = (
            json.loads(x) for x in (tmp_path / str(i) / "samples.jsonl").read_text().splitlines()
        )
        options = {
            name: getattr(asked.sample, name) for name in ("max_new_tokens", "temperature", "top_k")
        }
        ids = [opened.tokenizer.eos_id, *opened.tokenizer.encode(asked.sample.prompt).ids]
        new = generate(opened.model, ids, **options, generator=generator(asked.seed, "sample", 4))
        assert (line["prompt"], line["text"]) == (asked.sample.prompt, opened.tokenizer.decode(new))
        texts.append(line["text"])
    assert len(set(texts)) == len(settings)


@pytest.mark.parametrize(
    ("optim", "schedule"),
    [
        (AdamW(lr=3e-3, max_grad_norm=0.5), Wsd(warmup_steps=4, decay_frac=0.4)),
        (
            Muon(lr=2e-2, adamw_lr=1e-3, lr_scale="original"),
            Cosine(warmup_steps=4, decay_from="start"),
        ),
    ],
)
def test_every_rule_and_schedule_trains_under_all_gates(
    cfg, tmp_path, any_precision, optim, schedule
):
    """And under fp16, whose scaler has to know both rules as one optimizer."""
    cfg = cfg.model_copy(update={"optim": optim, "schedule": schedule})
    record = train(fresh(with_train(cfg, dtype="float16"), (), tmp_path / "run"))
    assert record.status == "completed" and all_green(record.gates, record.metric("steps"))
    # measured falls of 0.1 and more
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.05


def test_a_compiled_run_ends_as_the_plain_one_and_names_its_gate(cfg, plain, tmp_path, monkeypatch):
    """Evaluates and samples with the eager model, which shares the parameters.
    The graph runs in eager: that is the same to a rounding.
    """
    real = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda model, *, fullgraph, options: real(model, fullgraph=fullgraph, backend="aot_eager"),
    )
    compiled = train(fresh(with_train(cfg, compile=True), (), tmp_path / "compiled"))
    plain = read_record(plain / "metadata.json")
    assert compiled.status == plain.status == "completed" and all_green(
        compiled.gates, compiled.metric("steps")
    )
    assert {g.id for g in compiled.gates} - {g.id for g in plain.gates} == {"kernel.compiled-graph"}
    for name in ("val_loss_nats", "train_loss_nats"):
        assert compiled.metric(name) == pytest.approx(plain.metric(name), rel=1e-4)
    torch._dynamo.reset()


def test_a_gate_that_never_looked_fails_the_run(cfg, tmp_path, monkeypatch):
    """A monitor that is wired to nothing: the run does not end well, also without the gate that
    sees it at the first gap.
    """
    monkeypatch.setattr(loop, "sample", lambda trainer: None)
    with pytest.raises(GateFailed, match=r"runtime\.cadence.*no Sampled for 3 steps"):
        train(
            fresh(cfg, (), tmp_path / "gap", only=(*FEW, "runtime.cadence", "sampling.coherence"))
        )
    with pytest.raises(GateFailed, match=r"sampling\.coherence.*without one verdict") as caught:
        train(fresh(cfg, (), tmp_path / "run", only=(*FEW, "sampling.coherence")))
    assert caught.value.record.status == "halted"
    silent = next(g for g in caught.value.record.gates if g.id == "sampling.coherence")
    assert silent.verdict == "not_run" and silent.checks == 0


def test_a_folder_with_a_run_is_refused(cfg, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="already holds a run"):
        train(fresh(cfg, (), tmp_path / "run"))


def test_certain_exhaustion_is_judged_where_the_run_stands(cfg):
    """A run that has read 250 windows of `a` may go on with 50 of `b`,
    although 300 of `b` were never there.
    """
    a, b = Source("a", 0, 400, 0.0, 0.0, 0.0), Source("b", 400, 100, 1.0, 1.0, 0.0)
    rows = 300 * cfg.model.max_seq_len // cfg.train.tokens_per_step  # steps of 300 windows
    cfg = with_train(cfg, max_steps=rows).model_copy(
        update={"data": cfg.data.model_copy(update={"on_exhausted": "error"})}
    )
    for begin, refused in ((250, False), (150, True), (0, True)):
        order = MixtureSampler([a, b], 7)
        order.load_state_dict({"start": begin, "base": {"a": begin}})
        with (
            pytest.raises(StreamExhausted, match="source b ends before the run does")
            if refused
            else nullcontext()
        ):
            start._refuse_exhaustion(cfg, order)
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"on_exhausted": "wrap"})})
    start._refuse_exhaustion(cfg, order)


def test_observing_more_often_does_not_change_training(cfg, plain, tmp_path):
    """Evaluations, samples and saves at other intervals leave every loss as it is,
    with dropout on.
    """
    often = cfg.model_copy(
        update={
            "eval": cfg.eval.model_copy(update={"every": 2}),
            "sample": cfg.sample.model_copy(update={"every": 1}),
        }
    )
    often = often.model_copy(update={"checkpoint": cfg.checkpoint.model_copy(update={"every": 3})})
    train(fresh(often, (), tmp_path / "often", only=FEW))
    assert losses(plain) == losses(tmp_path / "often")


def test_listening_to_signals_does_not_write_out_the_run():
    """`signal.signal` makes a text of its handler, six times a run:
    of all tensors and batches if the handler shows them.
    """

    class Held:
        def __repr__(self):
            raise AssertionError("written out")

        def asked(self):
            return None

    with listening() as requests:
        requests.defer(Held().asked)
        assert requests.stop is None and signal.getsignal(signal.SIGTERM) == requests._on_stop


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_run_passes_every_gate_and_resumes_equal(cfg, tmp_path):
    record = train(fresh(cfg.model_copy(update={"device": "cuda"}), (), tmp_path / "run"))
    assert record.status == "completed" and all_green(record.gates, record.metric("steps"))
    assert record.metric("peak_device_memory_bytes") > 0 and record.environment["device_uuid"]


def test_a_rate_that_leaves_no_number_is_left_to_the_gates(museum_folder, tmp_path):
    """Evaluations that are not finite ask for no number of batches; a gate says what is wrong, and
    no contract breaks before it.
    """
    wild = museum_config(museum_folder).model_copy(update={"optim": AdamW(lr=1e18)})
    assert wild.stop.kind == "patience"
    with pytest.raises(GateFailed, match="not finite"):
        train(fresh(wild, (), tmp_path / "run", only=("optim.parameter-groups",)))
