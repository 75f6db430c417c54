"""Gates of commands, and of the samples and logs of a run: green on what a small model really
gives, red on each way to be wrong.
"""

import copy
import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

from stackproof.contracts.drawn import DrawOptions, TextFollows
from stackproof.contracts.events import (
    BatchDrawn,
    Evaluated,
    LogsRead,
    LossRescored,
    MemorizationMeasured,
    Recited,
    Recorded,
    Sampled,
    Started,
    StepTaken,
)
from stackproof.contracts.gate import call_check, limits_of
from stackproof.contracts.keeper import Gatekeeper
from stackproof.contracts.logged import Logged, RecordStates
from stackproof.contracts.rescored import Rescored
from stackproof.contracts.subject import NotOffered, Subject
from stackproof.contracts.traced import module_of
from stackproof.data.tokenizer import Bytes
from stackproof.evaluate import audit
from stackproof.evaluate.bits_per_byte import evaluate_text
from stackproof.evaluate.sampling import generate
from stackproof.evaluate.suite import load_suite, suite_file
from stackproof.spec.canonical import sha256_file
from stackproof.subject.commands import Answered, Opened, Scored, Traced, drawn, rows_read
from stackproof.tensorfile import write
from stackproof.trace import trace, untraced
from tests.export import models

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 12
TOKENIZER = Bytes()


@pytest.fixture(scope="module")
def model():
    return models.ours("plain", TOKENIZER.vocab_size).eval()


# --- samples --------------------------------------------------------------------------------------

OPTIONS = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2}


def sampled(spec, model, declared=None, prompt="The fox", seed=3, n=40, **changes):
    """The verdict on a text that was drawn by OPTIONS and `changes`, under those declared."""
    ids = generate(
        model,
        [TOKENIZER.eos_id, *TOKENIZER.encode("The fox").ids],
        max_new_tokens=n,
        generator=torch.Generator().manual_seed(3),
        **OPTIONS | changes,
    )
    options = DrawOptions(40, **OPTIONS | (declared or {}))
    chance = torch.Generator().manual_seed(seed)
    text = TOKENIZER.decode(ids)
    found = drawn(model, TOKENIZER, prompt, ids, text, options, chance)
    return TextFollows(limits_of(spec.gates["sampling.drawn"])).observe(found)


def test_a_text_is_drawn_as_declared(spec, model):
    green = sampled(spec, model)
    assert green.passed, green.message
    assert green.measured["largest_distance"] < 1e-5, "measured 0; the limit is 1e-4"
    assert green.measured["n_tokens"] == 40


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"top_k": 0},
        {"top_k": 39},
        {"top_p": 1.0},
        {"repetition_penalty": 1.0},
    ],
)
def test_every_option_that_is_not_passed_is_seen(spec, model, changes):
    assert not sampled(spec, model, **changes).passed


def test_prompt_seed_and_length_of_a_text_are_judged(spec, model):
    for wrong in ({"prompt": "The fax"}, {"seed": 4}, {"n": 39}):
        assert not sampled(spec, model, **wrong).passed, wrong


def test_a_text_longer_than_the_context_is_followed_to_its_end(spec, model):
    n = 2 * model.cfg.max_seq_len
    ids = generate(model, [TOKENIZER.eos_id], max_new_tokens=n, temperature=0.0)
    found = drawn(model, TOKENIZER, "", ids, TOKENIZER.decode(ids), DrawOptions(n), None)
    assert len(found.distances) == n and max(found.distances) < 1e-3 and not found.n_unfinished
    ids[-1] = (ids[-1] + 1) % TOKENIZER.vocab_size
    found = drawn(model, TOKENIZER, "", ids, TOKENIZER.decode(ids), DrawOptions(n), None)
    assert found.distances[-1] > 1e-3


def test_a_text_that_its_end_stops_early_is_followed_past_it(spec, model):
    """The end-of-text token is followed too; without it a short text is unfinished."""
    seeded = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    prompt = [TOKENIZER.eos_id]
    ids = generate(model, prompt, max_new_tokens=8, temperature=1.0, generator=seeded())
    end = next(i for i in ids if i != ids[0])
    cut = ids[: ids.index(end)]
    text, ends = TOKENIZER.decode(cut), DrawOptions(8, temperature=1.0, eos_id=end)
    found = drawn(model, TOKENIZER, "", cut, text, ends, seeded())
    assert len(found.distances) == len(cut) + 1 and max(found.distances) < 1e-5
    assert not found.n_unfinished and found.ended
    check = TextFollows(limits_of(spec.gates["sampling.drawn"]))
    assert check.observe(found).passed
    early = DrawOptions(len(ids) + 1, temperature=1.0, eos_id=TOKENIZER.eos_id)
    found = drawn(model, TOKENIZER, "", ids, TOKENIZER.decode(ids), early, seeded())
    assert "it ends where" in check.observe(found).message
    endless = DrawOptions(8, temperature=1.0)
    assert drawn(model, TOKENIZER, "", cut, text, endless, seeded()).n_unfinished < 0


# --- opened checkpoints ---------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path, model):
    """Two step folders of a run in the single layout, of which `latest` names the second."""
    for step in (3, 6):
        folder = tmp_path / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        tensors = {n: t + (6 - step) for n, t in model.state_dict().items()}
        write(folder / "model.safetensors", tensors, {"format": "pt"})
        files = {"model.safetensors": {"sha256": sha256_file(folder / "model.safetensors")}}
        (folder / "manifest.json").write_text(json.dumps({"files": files}))
        state = {"step": step, "tokenizer_sha256": TOKENIZER.sha256}
        (folder / "state.json").write_text(json.dumps(state))
    (tmp_path / "checkpoints/latest").write_text("step-00000006")
    return tmp_path


class Single(Opened):
    """The adapter reads the layout from a whole manifest, which these folders lack."""

    @property
    def assembled(self):
        raise NotOffered("OpenedCheckpoint.assembled")


def opened(spec, run_dir, model, step=6, *, asked=None, **changes):
    settings = {
        "asked": asked or run_dir,
        "folder": run_dir / f"checkpoints/step-{step:08d}",
        "stated_step": step,
        "model": model,
        "architecture": model.cfg.model_dump(),
        "tokenizer_sha256": TOKENIZER.sha256,
    }
    part = Single(**settings | changes)
    return call_check(spec.gates["checkpoint.opened"], Subject(opened=part))


def test_an_opened_checkpoint_is_the_named_one(spec, run_dir, model):
    green = opened(spec, run_dir, model)
    assert green.passed and green.measured["compared"] == len(model.state_dict())
    assert "tensors are not those" in opened(spec, run_dir, model, 3).message
    assert "`latest` names step-00000006" in opened(spec, run_dir, model, 3).message
    asked = run_dir / "checkpoints/step-00000003"
    assert "`latest`" not in opened(spec, run_dir, model, 3, asked=asked).message


def test_a_changed_weight_step_mode_tokenizer_or_file_is_red(spec, run_dir, model):
    assert "step 7 is stated" in opened(spec, run_dir, model, stated_step=7).message
    assert "tokenizer" in opened(spec, run_dir, model, tokenizer_sha256="0" * 64).message
    model.layers[0].train()
    assert "training mode" in opened(spec, run_dir, model).message
    model.eval()
    with torch.no_grad():
        weight = model.final_norm.weight
        before = weight[0].clone()
        weight[0] = torch.nextafter(before, before + 1)
        assert "1 tensors are not those" in opened(spec, run_dir, model).message
        weight[0] = before
        cos = model.positions.cos
        kept = cos.clone()
        cos[-1] += 2e-5
        assert "rotary tables" in opened(spec, run_dir, model).message
        cos.copy_(kept)
        assert opened(spec, run_dir, model).passed
    file = run_dir / "checkpoints/step-00000006/manifest.json"
    file.write_text(file.read_text().replace('"sha256": "', '"sha256": "0'))
    assert "by its hash" in opened(spec, run_dir, model).message


# --- scored texts ---------------------------------------------------------------------------------


def scored(spec, model, *, stride=8, declared=TEXT, n_bytes=None, reader=None, **changed):
    score = evaluate_text(model, TOKENIZER, [TEXT], seq_len=32, stride=stride)
    metrics = dataclasses.asdict(score) | changed
    part = Scored(
        reader=reader or model,
        tokenizer=TOKENIZER,
        texts=[declared],
        declared_bytes=len(declared.encode()) if n_bytes is None else n_bytes,
        seq_len=32,
        stride=8,
        score=score,
        metrics=metrics,
    )
    return call_check(spec.gates["evaluation.text-score"], Subject(scored=part))


class Uncounted(Bytes):
    """Drops every z and does not count it."""

    def encode(self, text):
        return super().encode(text.replace("z", ""))


def test_dropped_characters_are_counted(spec, model):
    def judged(tokenizer):
        score = evaluate_text(model, tokenizer, [TEXT], seq_len=32, stride=8)
        part = Scored(
            reader=model,
            tokenizer=tokenizer,
            texts=[TEXT],
            declared_bytes=len(TEXT),
            seq_len=32,
            stride=8,
            score=score,
            metrics=dataclasses.asdict(score),
        )
        return call_check(spec.gates["evaluation.text-score"], Subject(scored=part))

    assert judged(Bytes()).passed
    assert "chars" in judged(Uncounted()).message


def test_a_score_is_that_of_its_text(spec, model):
    green = scored(spec, model)
    assert green.passed, green.message
    assert green.measured["window_rel_error"] < 1e-6, "measured 2e-8; the limit is 1e-5"
    for wrong in (
        {"stride": 16},
        {"declared": TEXT.lower()},
        {"declared": TEXT[:-1]},
        {"n_bytes": len(TEXT) + 1},
        {"bits_per_byte": 1.0},
        {"tokens": 7},
    ):
        assert not scored(spec, model, **wrong).passed, wrong


def scaled(model, factor):
    """A model whose logits are another one's, times a factor."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        made.final_norm.weight.mul_(factor)
    return made


def test_one_percent_of_a_score_and_of_the_logits_is_seen(spec, model):
    """In the sum of all windows, and in the window that is computed again."""
    bits = scored(spec, model).measured
    green = evaluate_text(model, TOKENIZER, [TEXT], seq_len=32, stride=8)
    for factor in (1.01, 0.99, -1.0):
        name = {"bits_per_byte": factor * green.bits_per_byte}
        assert not scored(spec, model, **name).passed
        read = scored(spec, model, reader=scaled(model, factor))
        assert read.measured["window_rel_error"] > 1e-4 > bits["window_rel_error"]
        assert not read.passed


# --- suites ---------------------------------------------------------------------------------------


def answered(spec, model, change=lambda answers, rows, metrics, rounds: None):
    file = suite_file("domains")
    suite = load_suite(file)
    with rows_read(model) as rows:
        answers = audit.audit(model, TOKENIZER, suite, step=6)
    passes = audit.breadth(answers)
    metrics = {f"passes_{name}": n for name, n in passes.items()}
    metrics |= {"passes": sum(passes.values()), "breadth": sum(n > 0 for n in passes.values())}
    counted = {"rounds": audit.by_step(answers), "every_answer": list(answers)}
    change(answers, rows, metrics, counted["rounds"])
    numbers = {"metrics": metrics, **counted}
    part = Answered(model, TOKENIZER, suite, file, answers=answers, rows=rows, **numbers)
    return call_check(spec.gates["evaluation.answers"], Subject(answered=part))


def replace_first(**changes):
    def change(answers, rows, metrics, rounds):
        answers[0] = dataclasses.replace(answers[0], **changes)

    return change


def test_an_answer_is_that_to_its_question(spec, model):
    green = answered(spec, model)
    assert green.passed, green.message
    assert green.measured["questions"] == 24 and green.measured["largest_gap"] < 1e-4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (replace_first(asked="Name a bird."), "template and question"),
        (replace_first(text="a dodo", faults=(), passed=True), "the text is not the answer"),
        (replace_first(passed=True), "the verdict"),
        (replace_first(lost_prompt_tokens=1), "the prompt lost"),
        (replace_first(dropped_prompt_chars=1), "the prompt lost"),
        (replace_first(ids=(5, 6, 7)), "do not follow"),
        (lambda answers, rows, metrics, rounds: answers.pop(), "23 answers are not those"),
        (lambda answers, rows, metrics, rounds: answers.reverse(), "are not those"),
        (lambda answers, rows, metrics, rounds: rows.pop(), "other rows"),
        (lambda answers, rows, metrics, rounds: rows[3].pop(0), "other rows"),
        (lambda answers, rows, metrics, rounds: metrics.update(breadth=6), "breadth is 6"),
        (lambda answers, rows, metrics, rounds: rounds[6].update(poetry=4), "passes of step 6"),
        (lambda answers, rows, metrics, rounds: rounds.clear(), "passes of step 6"),
    ],
)
def test_each_way_to_ask_judge_or_count_wrong_is_red(spec, model, change, text):
    red = answered(spec, model, change)
    assert not red.passed and text in red.message


SUITE = """
name = "mine"
[[domain]]
name = "first"
prompts = [{ id = "legs", text = "Legs?", answer = "Six", checks = [{ kind = "regex", pattern = "six" }] }]
[[domain]]
name = "second"
prompts = [{ id = "arms", text = "Arms?", answer = "Two", checks = [{ kind = "regex", pattern = "two" }] }]
"""  # noqa: E501


def test_the_prompt_of_a_suite_is_template_and_question(model, tmp_path):
    """Golden: the texts and the rows that a model is given, each question alone."""
    (tmp_path / "mine.toml").write_text(SUITE)
    suite = load_suite(tmp_path / "mine.toml").model_copy(update={"max_new_tokens": 4})
    with rows_read(model) as rows:
        first, second = audit.audit(model, TOKENIZER, suite, step=1)
    assert (first.asked, second.asked) == ("> Legs? / <", "> Arms? / <")
    begins = [TOKENIZER.eos_id]
    assert rows == [
        [*begins, *TOKENIZER.encode("> Legs? / <").ids],
        [*begins, *TOKENIZER.encode("> Arms? / <").ids],
    ]


# --- traces ---------------------------------------------------------------------------------------


def traced(spec, model, **changes):
    ids = [0, 5, 6, 7, 8, 9]
    found = trace(model, torch.tensor([ids]))
    points = {t.point.name: (t.stat.rms, t.stat.absmax) for t in found.points}
    settings = {"model": model, "input_ids": ids, "declared_ids": ids}
    settings |= {"traced_logits": found.logits, "points": points}
    part = Traced(**settings | changes, run=lambda ids_BT: untraced(model, ids_BT, False))
    return call_check(spec.gates["model.traced"], Subject(traced=part)), points


def test_a_trace_is_of_the_untraced_forward(spec, model):
    green, points = traced(spec, model)
    assert green.passed, green.message
    assert green.measured["compared"] == sum(module_of(name) is not None for name in points) > 10
    swapped = points | {
        "layers.0.attention_norm": points["layers.1.attention_norm"],
        "layers.1.attention_norm": points["layers.0.attention_norm"],
    }
    assert "layers.0.attention_norm" in traced(spec, model, points=swapped)[0].message
    other = torch.zeros(1, 6, TOKENIZER.vocab_size)
    assert "changes the logits" in traced(spec, model, traced_logits=other)[0].message
    assert "other tokens" in traced(spec, model, declared_ids=[0, 5])[0].message
    assert "no point" in traced(spec, model, points={})[0].message
    for factor in (1.01, 0.99, -1.0):
        rms, absmax = points["layers.1.attention_norm"]
        wrong = points | {"layers.1.attention_norm": (factor * rms, factor * absmax)}
        assert "layers.1.attention_norm" in traced(spec, model, points=wrong)[0].message


# --- logs -----------------------------------------------------------------------------------------

LAST = {"loss_nats": 2.0, "grad_norm": 1.0, "clipped_grad_norm": 0.5, "lr": 0.1, "tokens_seen": 64}
TAKEN = StepTaken(
    step=2,
    **LAST,
    max_grad_norm=1,
    n_valid_tokens=1,
    n_expected_tokens=1,
    wall_s=1,
    flops=1,
    peak_flops=1,
)
SAMPLE = {"text": "b", "prompt": "p", "loss_nats": 1.5, "score": 7}
EVALUATED = {
    "val_loss_nats": 2.0,
    "val_bits_per_byte": 3.0,
    "val_stderr_nats": 1.0,
    "passages": 32,
    "recited": 0,
    "matched_tokens": 0.25,
}
LOGS = LogsRead(
    2,
    log_every=1,
    mismarked=(),
    steps=(1, 2),
    last=LAST | {"ema_loss_nats": 2.98},
    evaluations={2: EVALUATED},
    samples={1: {"text": "a"}, 2: SAMPLE},
    sources=("x", "y"),
    rows=lambda step: {"x": 3, "y": 1},
)


def logged(spec, **changes):
    check = Logged(limits_of(spec.gates["runtime.logged"]))
    check.load_state_dict({"mean_nats": 3.0})
    check.observe(Started(1, {}))
    check.observe(BatchDrawn(2, 4, 8, (7, 8, 9, 1), 0, 64, (0, 1, 0, 0)))
    check.observe(TAKEN)
    check.observe(Evaluated(2, 2.0, 3.0, (1.0, 3.0), "h", None, 5.0))
    check.observe(MemorizationMeasured(2, Recited(32, 0, 32, 0.25, 32, lambda: 0)))
    check.observe(Sampled(2, "b", "p", loss_nats=1.5))
    return check.observe(dataclasses.replace(LOGS, **changes))


def test_logs_hold_what_happened(spec):
    """The sample of step 1 is of a process before this one."""
    assert logged(spec).passed
    for wrong in (
        {"steps": ()},
        {"steps": (1,)},
        {"steps": (1, 1, 2)},
        {"last": LAST | {"loss_nats": 2.1}},
        {"last": LAST | {"clipped_grad_norm": 1.0}},
        {"last": LAST},
        {"last": LAST | {"ema_loss_nats": 2.9800001}},
        {"evaluations": {}},
        *(
            {"evaluations": {2: EVALUATED | {name: value + 0.1}}}
            for name, value in EVALUATED.items()
        ),
        {"samples": {1: {"text": "a"}}},
        {"samples": {2: SAMPLE | {"text": "c"}}},
        {"samples": {2: SAMPLE | {"prompt": "c"}}},
        {"samples": {2: SAMPLE | {"loss_nats": 1.6}}},
        {"rows": lambda step: {"x": 3, "y": 2}},
        {"rows": lambda step: {"x": 4}},
        {"sources": ("y", "x")},
        {"steps": (1, 2, 3)},
        {"mismarked": ("samples.jsonl",)},
        {"turn_every": 2},
        {"turn_every": 2, "turns": (1, 2, 2)},
        {"turn_every": 3, "turns": (2,)},
        {"turns": (2,)},
        {"unlogged": ("loss.golden",)},
    ):
        assert not logged(spec, **wrong).passed, wrong
    for right in (
        {"steps": (2,)},
        {"steps": (1, 2), "log_every": 100},
        {"turn_every": 2, "turns": (1, 2)},
        {"turn_every": 3, "turns": (1,)},
    ):
        assert logged(spec, **right).passed, right


@pytest.mark.parametrize(("first", "ok"), [(4.0, True), (4.1, False)])
def test_the_running_mean_of_the_loss_begins_at_step_1(spec, first, ok):
    """In a run whose first steps were not seen it is not judged."""
    check = Logged(limits_of(spec.gates["runtime.logged"]))
    check.observe(Started(0, {}))
    check.observe(dataclasses.replace(TAKEN, step=1, loss_nats=first))
    check.observe(TAKEN)
    mean = 0.98 * 4.0 + 0.02 * 2.0
    parts = {"evaluations": {}, "samples": {}, "rows": lambda step: {}}
    logs = dataclasses.replace(LOGS, last=LAST | {"ema_loss_nats": mean}, **parts)
    assert check.observe(logs).passed == ok
    unknown = Logged(limits_of(spec.gates["runtime.logged"]))
    unknown.observe(Started(1, {}))
    unknown.observe(TAKEN)
    assert unknown.observe(logs).passed


@pytest.mark.parametrize(
    ("steps", "log_every", "ok"),
    [
        ((1, 2, 3, 4, 5, 6), 1, True),
        ((1, 3, 4, 5, 6), 1, True),  # a process before this one logs by another interval
        ((1, 2, 4, 5, 6), 1, False),
        ((1, 2, 4, 5, 6), 2, False),
        ((1, 2, 4, 6), 2, True),
        ((1, 2, 3, 5, 6), 5, True),
        ((1, 2, 6), 5, False),
        ((1, 2, 3, 6), 100, True),
    ],
)
def test_the_lines_of_a_process_are_those_that_are_due(spec, steps, log_every, ok):
    """It began after step 2 and has evaluated at step 3, unless the line of that is missing."""
    check = Logged(limits_of(spec.gates["runtime.logged"]))
    check.observe(Started(2, {}))
    lines = {3: {"val_loss_nats": 2.0, "val_bits_per_byte": 3.0, "val_stderr_nats": 0.0}}
    evaluations = lines if 3 in steps else {}
    for step in evaluations:
        check.observe(Evaluated(step, 2.0, 3.0, (2.0,), "h", None, 5.0))
    found = LogsRead(6, log_every, (), steps, {}, evaluations, {}, ("all",), lambda step: {})
    assert check.observe(found).passed == ok


METRICS = {
    "steps": 2,
    "tokens_seen": 64,
    "train_loss_nats": 2.0,
    "val_loss_nats": 2.5,
    "val_bits_per_byte": 3.0,
    "best_val_loss_nats": 2.25,
    "best_step": 1,
    "baseline_unigram_bits_per_byte": 4.0,
    "vocab_size": 50,
    "n_params": 1000,
    "unique_tokens": 32,
    "epochs": 2.0,
    "tokens_per_parameter": 0.064,
    "random_loss_nats": math.log(50),
    "val_ppl": math.exp(2.5),
}
FACTS = {"vocab_size": 50, "n_params": 1000, "unique_tokens": 32}
DERIVED = ("epochs", "tokens_per_parameter", "random_loss_nats", "val_ppl")
COUNTS = dict.fromkeys(METRICS) | {"baseline_unigram_bits_per_byte": 100}
READ = {"manifest.json": 64 * "a", "tokenizer.json": 64 * "b"}
MACHINE = {"python": "3.11", "cuda": None}
SAVED = {"checkpoints/step-00000002/model.safetensors": 100}


def recorded(spec, *, looked=True, **changes):
    check = RecordStates(limits_of(spec.gates["runtime.recorded"]))
    if resumed := changes.pop("resumed", None):
        check.load_state_dict(json.loads(json.dumps(resumed)))
    if looked:
        check.observe(TAKEN)
        best = {"best_step": 1, "best_loss_nats": 2.25}
        check.observe(Evaluated(2, 2.5, 3.0, (2.5,), "h", None, 5.0, **best))
    inputs = READ | {"other": 64 * "c"}
    stated = MACHINE | {"allocator": "malloc"}, MACHINE, SAVED | {"tokenizer.json": 9}, SAVED
    event = Recorded(2, "completed", 2, METRICS, COUNTS, inputs, READ, 100, *stated, FACTS)
    return check.observe(dataclasses.replace(event, **changes))


def test_a_record_states_what_happened(spec):
    """What was never observed is not judged. A resumed check continues with the earlier values."""
    assert recorded(spec).passed and recorded(spec).measured["judged"] == 17
    assert recorded(spec, looked=False).measured["judged"] == 11
    before = {"happened": {"val_loss_nats": 2.5}}
    assert recorded(spec, looked=False, resumed=before).measured["judged"] == 12
    assert recorded(spec, max_steps=3, status="early_stopped").passed
    before = {"happened": {"val_loss_nats": 2.4}}
    assert not recorded(spec, looked=False, resumed=before).passed
    for name, value in METRICS.items():
        if not name.startswith("baseline"):
            off = 1e-7 if name in DERIVED else 1e-9  # sums in another order
            verdict = recorded(spec, metrics=METRICS | {name: value + off})
            assert not verdict.passed and name in verdict.message
            rest = {k: v for k, v in METRICS.items() if k != name}
            assert not recorded(spec, metrics=rest).passed, name
    for wrong in (
        {"counts": COUNTS | {"baseline_unigram_bits_per_byte": 99}},
        {"counts": COUNTS | {"baseline_unigram_bits_per_byte": None}},
        {"metrics": {k: v for k, v in METRICS.items() if not k.startswith("baseline")}},
        {"inputs": {}},
        {"inputs": READ | {"manifest.json": 64 * "b"}},
        {"environment": {}},
        {"environment": {"python": "3.11"}},
        {"environment": MACHINE | {"python": "3.12"}},
        {"outputs": {}},
        {"outputs": {name: n + 1 for name, n in SAVED.items()}},
        {"saved": {}},
        {"status": "early_stopped"},
        {"max_steps": 3},
    ):
        assert not recorded(spec, **wrong).passed, wrong


@pytest.mark.parametrize(
    ("reported", "own", "half", "ok"),
    [
        (2.0, 2.0 + 1e-6, False, True),
        (2.0, 2.0 + 1e-4, False, False),
        (2.0 + 1e-4, 2.0, False, False),
        (2.0, 2.0 + 1e-4, True, True),
        (2.0, 2.01, True, False),
        (2.0, float("nan"), False, False),
    ],
)
def test_a_batch_that_is_scored_again_has_the_reported_mean(spec, reported, own, half, ok):
    check = Rescored(limits_of(spec.gates["evaluation.rescored"]))
    assert check.observe(LossRescored(6, "the sample", reported, own, half)).passed == ok


# --- commands -------------------------------------------------------------------------------------


def test_a_command_without_a_verdict_of_its_gates_fails(spec):
    """Also where the gates of another kind were installed."""
    text = {"evaluate": {"of": "text"}}
    keeper = Gatekeeper(spec, kind="evaluate", config=text)
    assert set(keeper.states) == {"checkpoint.opened", "evaluation.text-score"}
    assert keeper.unjudged("evaluate", text).gate_id in keeper.states
    assert keeper.unjudged("export", {}).gate_id in ("checkpoint.opened", "export.logit-parity")
    assert keeper.unjudged("evaluate", text, unasked=tuple(keeper.states)) is None
    for state in keeper.states.values():
        state.verdict = SimpleNamespace(outcome="pass")
    assert keeper.unjudged("evaluate", text) is None
