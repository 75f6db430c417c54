"""Gates of sampling: parity, distribution and the coherence watch."""

import json
import pydoc_data.topics

import pytest
import torch

from contracts.events import Sampled, Started
from contracts.gate import call_check, limits_of
from contracts.sampling import CoherenceWatch, Dominance, Memorised, coherence
from stack.museum.plant import load_museum, touches
from stack.train import run
from stack.train.preflight import gather

# the founding note ANDREA-120M and the founding note tinygpt validation: text, whether it is coherent
SEED_SAMPLES = [
    ("region region region region region region region region", False),
    ("''''' ''''' '' ''' '' ''' '''?' ''' ' '' '' '", False),
    ("games, games, games, games, games, games", False),
    ("Budy Budy Budy Budy Budy Budy Budy Budy Budy", False),
    ("black spider montano is alive, carolina parakeet is extinct.", True),
    (
        "The Fourier transform decomposes signals into frequency components, allowing analysis of signal characteristics & filtering "
        "in the frequency domain.",
        True,
    ),
    ("Rain's rhythmic refrain, Rivulets on the window, Respite from life's pain.", True),
    ("Use pip list --outdated names to see the pip packages list in your project management...", True),
    (
        "Once upon a time, has a last, for what it over the the kids and I 2. the guide's areas at the we have place, a biodiversity "
        "healthy has information and the kind of routine.",
        True,
    ),
]
GOOD, BAD = SEED_SAMPLES[5][0], SEED_SAMPLES[0][0]


@pytest.mark.parametrize("gate_id", ["sampling.cache-parity", "sampling.distribution"])
def test_gate_is_green_on_the_stack(spec, ingredients, gate_id):
    verdict = call_check(spec.gates[gate_id], ingredients)
    assert verdict.outcome == "pass", verdict.message
    if gate_id == "sampling.cache-parity":
        assert verdict.measured["rel_error"] < 3e-5  # measured worst case 4e-6


@pytest.mark.parametrize(
    "plant_id",
    [
        "sampling.cache-position-off-by-one",
        "model.gqa-head-order",
        "sampling.top-p-drops-crossing",
        "sampling.zero-probability",
        "sampling.filter-before-temperature",
    ],
)
def test_gate_is_red_on_its_plant(spec, small_cfg, dataset, plant_id):
    plant, before = load_museum()[plant_id], touches()
    with plant.apply():
        verdict = call_check(spec.gates[plant.gate], gather(small_cfg, dataset, torch.device("cpu"))[1])
    assert verdict.outcome == "fail" and verdict.message and touches() > before


def test_chi_square_sees_two_percent(spec, ingredients):
    honest = ingredients["pick"]

    def skewed(probs, uniforms):
        moved = probs.clone()
        if probs.shape == (8,) and probs[0] > 0.3 and probs[1] > 0.2:
            moved[0], moved[1] = probs[0] - 0.02, probs[1] + 0.02
        return honest(moved, uniforms)

    verdict = call_check(spec.gates["sampling.distribution"], ingredients | {"pick": skewed})
    assert verdict.outcome == "fail" and verdict.measured["p_value"] < 1e-12 and verdict.measured["impossible_draws"] == 0


@pytest.mark.parametrize(("text", "coherent"), SEED_SAMPLES)
def test_coherence_separates_the_seed_samples(text, coherent):
    score = coherence(text).score
    assert score >= 90 if coherent else score <= 24


@pytest.mark.parametrize("topic", ["assert", "for", "class", "try"])
@pytest.mark.parametrize("copies", [1, 4])
def test_healthy_prose_scores_high_at_any_length(topic, copies):
    topics = sorted(pydoc_data.topics.topics)
    start = topics.index(topic)
    text = "\n".join(pydoc_data.topics.topics[t] for t in topics[start : start + copies])
    assert coherence(text).score >= 80
    assert coherence(text, "any").score >= 80


@pytest.mark.parametrize("language", ["en", "code", "any"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "\n" * 96,
        "a b " * 40,
        "a" * 96,
        "the the the the the the the the the",
        "= = = = = = = = = =",
        "a" + "\n" * 96,
        "(" * 48,
        "�" * 96,
        "abcdefghijklm" * 12,
        "111111" * 12,
    ],
)
def test_loops_score_low_in_every_language(text, language):
    assert coherence(text, language).score < 30


def test_program_text_scores_high_as_code():
    source = "def add(a, b):\n    total = a + b\n    return total\n\nfor name, value in sorted(table.items()):\n    print(name, value)\n"
    assert coherence(source, "code").score >= 90


def test_untrained_and_early_text_is_not_called_a_loop():
    early = " the,\n of the s to a in . thating and re is forer the on, of it be\n an as ( con or `the` ed with st"
    assert coherence(early).score >= 60
    draw = torch.Generator().manual_seed(0)
    noise = "".join(chr(32 + int(i)) for i in torch.randint(0, 95, (200,), generator=draw))
    assert coherence(noise).score >= 30


def test_the_score_is_the_sum_of_its_parts():
    for text, _ in SEED_SAMPLES:
        result = coherence(text)
        assert result.score == pytest.approx(sum(result.parts[k] for k in ("bigram", "trigram", "words", "letters")), abs=2e-4)


def watch(spec):
    return CoherenceWatch(limits_of(spec.gates["sampling.coherence"]))


def outcomes(check, texts):
    return [check.observe(Sampled(step=i, text=t)).outcome for i, t in enumerate(texts)]


def test_coherence_halts_at_the_fifth_low_score(spec):
    assert outcomes(watch(spec), [BAD] * 5) == ["pass"] * 4 + ["fail"]


def test_a_good_sample_starts_the_count_afresh(spec):
    assert outcomes(watch(spec), [BAD] * 4 + [GOOD] + [BAD] * 5) == ["pass"] * 9 + ["fail"]


def test_the_count_survives_a_resume(spec):
    first, second = watch(spec), watch(spec)
    outcomes(first, [BAD] * 3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert outcomes(second, [BAD] * 2) == ["pass", "fail"]


def test_back_test_on_seed_004_fires_at_the_fifth_collapsed_sample(spec):
    history = [GOOD, *(text for text, good in SEED_SAMPLES if not good), BAD]
    assert outcomes(watch(spec), history)[-2:] == ["pass", "fail"]


def test_coherence_plant_loops(spec, ingredients, dataset):
    model, check = ingredients["model"], watch(spec)
    verdicts = []
    with load_museum()["sampling.monitor-blind"].apply():
        for step in range(5):
            draw = torch.Generator().manual_seed(step)
            ids = run.generate(model, [dataset.tokenizer.eos_id], max_new_tokens=48, temperature=0.8, top_k=50, generator=draw)
            verdicts.append(check.observe(Sampled(step=step, text=dataset.tokenizer.decode(ids))).outcome)
    assert verdicts == ["pass"] * 4 + ["fail"]
    assert check.state_dict() == {"low": 5}


def sampled(step: int, text: str, **parts):
    return Sampled(step=step, text=text, **parts)


def test_dominance_halts_at_the_fifth_sample(spec):
    gate = spec.gates["sampling.dominance"]
    watch = Dominance(limits_of(gate))
    watch.observe(Started(step=0, plan={"warmup_steps": 10}))
    words = "river stone window letter garden morning winter table".split()
    one_word = " the ".join(words * 3)
    assert all(watch.observe(sampled(s, one_word)).outcome == "pass" for s in range(1, 11)), "the warm-up does not count"
    outcomes = [watch.observe(sampled(s, one_word)).outcome for s in range(11, 16)]
    assert outcomes == ["pass"] * 4 + ["fail"]
    assert watch.observe(sampled(16, " ".join(words * 3))).outcome == "pass", "a good sample starts the count afresh"
    assert watch.observe(sampled(17, "the the the")).measured["top_word_frac"] == 0.0, "three words are no sample"


def test_memorised_needs_a_low_loss_and_a_passage(spec):
    asked = []

    def found(share):
        return lambda: asked.append(share) or share

    def outcome(loss, share, usual=()):
        watch = Memorised(limits_of(spec.gates["sampling.memorised"]))
        for step, nats in enumerate(usual):
            watch.observe(sampled(step, "a", loss_nats=nats, found_in_corpus=found(1.0)))
        return watch.observe(sampled(99, "b", loss_nats=loss, found_in_corpus=found(share))).outcome

    assert outcome(2.0, 1.0) == "pass" and not asked, "the corpus is only searched where the loss is suspicious"
    assert outcome(0.13, 0.9) == "fail" and outcome(0.13, 0.05) == "pass"
    usual = [2.0, 2.1, 1.9, 2.05, 1.95, 2.0, 2.02]
    assert outcome(1.2, 0.9, usual) == "fail" and outcome(1.8, 0.9, usual) == "pass"
    assert Memorised(limits_of(spec.gates["sampling.memorised"])).observe(sampled(1, "foreign trainers may not know the loss")) is None
