"""What a run says is watched: scores tell writing from loops,
and the gates halt at the fifth bad sample, not the fourth.
"""

import json
import pydoc_data.topics

import pytest
import torch

from stackproof.contracts.coherence import (
    PARTS,
    CoherenceWatch,
    Dominance,
    Loops,
    coherence,
    looping_end,
)
from stackproof.contracts.events import Sampled, Started
from stackproof.contracts.gate import limits_of
from stackproof.contracts.keeper import GateFailed, Gatekeeper
from stackproof.museum.plant import load_museum
from stackproof.train import loop
from tests.contracts.test_optim import step_taken

# the founding note ANDREA-120M and the founding note tinygpt validation: text,
# whether it is coherent
SEED_SAMPLES = [
    ("region region region region region region region region", False),
    ("''''' ''''' '' ''' '' ''' '''?' ''' ' '' '' '", False),
    ("games, games, games, games, games, games", False),
    ("Budy Budy Budy Budy Budy Budy Budy Budy Budy", False),
    ("black spider montano is alive, carolina parakeet is extinct.", True),
    (
        "The Fourier transform decomposes signals into frequency components, allowing analysis of "
        "signal characteristics & filtering in the frequency domain.",
        True,
    ),
    ("Rain's rhythmic refrain, Rivulets on the window, Respite from life's pain.", True),
    (
        "Use pip list --outdated names to see the pip packages list in your project management...",
        True,
    ),
    (
        "Once upon a time, has a last, for what it over the the kids and I 2. the guide's areas "
        "at the we have place, a biodiversity healthy has information and the kind of routine.",
        True,
    ),
]
GOOD, BAD = SEED_SAMPLES[5][0], SEED_SAMPLES[0][0]


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


SENTENCES = {
    "nine words": "The old keeper walked slowly along the quiet shore.",
    "twenty words": (
        "In the early morning the baker opens his shop at the corner and puts forty loaves of "
        "bread into the window."
    ),
    "a paragraph": (
        "When a request is made, the name is looked up in the table of the module. If it is not "
        "there, the parent is asked and so on until the root has been reached. Only then an error "
        "is raised that holds the name, and whoever asked may catch it."
    ),
}


@pytest.mark.parametrize("language", ["en", "any"])
@pytest.mark.parametrize("text", SENTENCES.values(), ids=SENTENCES)
def test_a_passage_said_again_and_again_scores_low(text, language):
    """Measured at most 0.0 from the third time on; said once 96 or more."""
    assert coherence(text, language).score >= 90
    for times in (3, 4, 10, 20):
        assert coherence(" ".join([text] * times), language).score < 5


def test_a_loop_at_the_end_is_measured():
    tail = "and so it goes on "
    parts = coherence(SENTENCES["a paragraph"] + " " + tail * 10).parts
    assert parts["loop_frac"] == pytest.approx(
        50 / (len(SENTENCES["a paragraph"].split()) + 50), abs=0.01
    )
    assert coherence(SENTENCES["a paragraph"] + " " + tail * 2).parts["loop_frac"] == 0.0, (
        "twice is no loop"
    )
    assert (
        looping_end("a b c a b c a b c".split()) == 1.0
        and looping_end("a b c a b c a b".split()) == 0.0
    )


def test_loops_sees_the_end_of_a_sample(spec):
    check = Loops(limits_of(spec.gates["sampling.loops"]))
    assert check.observe(Started(step=0, plan={"warmup_steps": 5})) is None
    half = SENTENCES["nine words"] + " and so on" * 12
    assert check.observe(sampled(4, half)).passed and check.observe(sampled(5, half)).passed, (
        "the warm-up does not count"
    )
    assert check.observe(sampled(6, half)).passed and check.observe(sampled(7, half)).passed, (
        "two are none"
    )
    assert not check.observe(sampled(8, half)).passed
    assert not check.observe(sampled(9, "abcdefgh" * 40)).passed, "without a blank zlib sees it"
    assert check.observe(sampled(10, SENTENCES["a paragraph"])).passed
    assert (
        check.observe(sampled(11, "no no no")).passed
        and check.observe(sampled(12, "no no no")).passed
    )
    resumed = Loops(limits_of(spec.gates["sampling.loops"]))
    resumed.load_state_dict(json.loads(json.dumps(check.state_dict())))
    assert resumed.observe(sampled(13, "no no no")).outcome == "fail", "over a resume"


def test_ruling_lines_are_no_loop(spec):
    check = Loops(limits_of(spec.gates["sampling.loops"]))
    ruled = f"{SENTENCES['nine words']}\n{'=' * 120}\n"
    assert all(check.observe(sampled(step, ruled)).passed for step in range(1, 5))


@pytest.mark.parametrize("symbols", ["○●", "◆◇", "★☆✦", "⌘⌥", "꩜҉", "🜁🜂🜃", "†‡"])
@pytest.mark.parametrize("language", ["en", "code", "any"])
def test_ornaments_nobody_has_listed_score_low(symbols, language):
    """The shape gives them away, not the character. Measured at most 10."""
    assert coherence(" ".join(symbols * 12), language).score < 30
    assert coherence("".join(symbols * 24), language).score < 30


OTHERS = {
    "German": (
        "Am frühen Morgen öffnet der Bäcker seinen Laden an der Ecke und legt vierzig Brote ins "
        "Fenster, bevor die Leute kommen."
    ),
    "Russian": (
        "Рано утром пекарь открывает лавку на углу и кладёт сорок хлебов в окно, прежде чем "
        "придут первые покупатели из деревни."
    ),
    "Chinese": (
        "清晨面包师打开街角的店铺，把四十个面包放进橱窗，然后等待第一批从村里来的顾客，"
        "他们每天都在同一时间出现，带着零钱和新闻。"
    ),
}


@pytest.mark.parametrize("text", OTHERS.values(), ids=OTHERS)
def test_other_languages_have_a_language_to_be_declared_as(text):
    """Measured 90 and more; the same text looping scores 0."""
    assert coherence(text, "any").score >= 80
    assert coherence(" ".join([text] * 4), "any").score < 30


def test_program_text_scores_high_as_code():
    source = (
        "def add(a, b):\n    total = a + b\n    return total\n\nfor name, value in "
        "sorted(table.items()):\n    print(name, value)\n"
    )
    assert coherence(source, "code").score >= 90


def test_untrained_and_early_text_is_not_called_a_loop():
    early = (
        " the,\n of the s to a in . thating and re is forer the on, of it be\n an as ( con or "
        "`the` ed with st"
    )
    assert coherence(early).score >= 60
    draw = torch.Generator().manual_seed(0)
    noise = "".join(chr(32 + int(i)) for i in torch.randint(0, 95, (200,), generator=draw))
    assert coherence(noise).score >= 30


def test_the_score_is_the_sum_of_its_parts():
    for text, _ in SEED_SAMPLES:
        result = coherence(text)
        assert result.score == pytest.approx(sum(result.parts[k] for k in PARTS), abs=2e-4)


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


def test_a_loss_that_looks_well_does_not_hide_collapsed_samples(spec):
    """The founding run in small: from guessing, 9.04 nats, to 3.23, while samples collapse.
    Every gate of the loss is green to the end.
    """
    keeper = Gatekeeper(
        spec,
        only=[
            "runtime.loss-spike",
            "runtime.trend",
            "runtime.loss-not-constant",
            "sampling.coherence",
        ],
    )
    keeper.observe(Started(step=0, plan={"random_loss_nats": 9.04, "warmup_steps": 5}))
    loops = ["region " * 40, "games, " * 40, "Budy " * 40, BAD, BAD]
    with pytest.raises(GateFailed, match=r"sampling\.coherence"):
        for step in range(1, 601):
            keeper.observe(
                step_taken(step=step, loss_nats=3.23 + 5.81 * 0.99**step + 0.01 * (step % 7))
            )
            if step >= 100 and step % 100 == 0:
                keeper.observe(sampled(step, loops[step // 100 - 1]))
    assert step == 500
    assert {r.id: r.verdict for r in keeper.results()} == {
        "runtime.loss-spike": "pass",
        "runtime.trend": "pass",
        "runtime.loss-not-constant": "pass",
        "sampling.coherence": "fail",
    }


def test_coherence_plant_loops(spec, subject, dataset):
    model, check = subject.model.module, watch(spec)
    verdicts = []
    with load_museum()["sampling.monitor-blind"].apply():
        for step in range(5):
            draw = torch.Generator().manual_seed(step)
            ids = loop.generate(
                model,
                [dataset.tokenizer.eos_id],
                max_new_tokens=48,
                temperature=0.8,
                top_k=50,
                generator=draw,
            )
            verdicts.append(
                check.observe(Sampled(step=step, text=dataset.tokenizer.decode(ids))).outcome
            )
    assert verdicts == ["pass"] * 4 + ["fail"]
    assert check.state_dict() == {"low": 5}


def sampled(step: int, text: str, **parts):
    return Sampled(step=step, text=text, **parts)


def test_dominance_warns_at_the_first_and_halts_at_the_fifth_sample(spec):
    gate = spec.gates["sampling.dominance"]
    watch = Dominance(limits_of(gate))
    watch.observe(Started(step=0, plan={"warmup_steps": 10}))
    words = "river stone window letter garden morning winter table".split()
    one_word = " the ".join(words * 3)
    assert all(watch.observe(sampled(s, one_word)).outcome == "pass" for s in range(1, 11)), (
        "the warm-up does not count"
    )
    verdicts = [watch.observe(sampled(s, one_word)) for s in range(11, 16)]
    assert [v.outcome for v in verdicts] == ["pass"] * 4 + ["fail"]
    assert all("'the' is 49% of the words" in v.message for v in verdicts), "each is a warning"
    good = watch.observe(sampled(16, " ".join(words * 3)))
    assert good.passed and not good.message, "a good sample starts the count afresh"
    assert watch.observe(sampled(17, "the the the")).measured["top_word_frac"] == 0.0, (
        "three words are no sample"
    )


def test_the_warning_of_a_green_verdict_reaches_the_log(spec):
    told = []
    keeper = Gatekeeper(
        spec,
        only=["sampling.dominance"],
        on_verdict=lambda gate, step, verdict: told.append((step, verdict.outcome)),
    )
    keeper.observe(Started(step=0, plan={"warmup_steps": 0}))
    keeper.observe(sampled(1, SENTENCES["a paragraph"]))
    keeper.observe(sampled(2, " the ".join("river stone window letter garden".split() * 4)))
    assert told == [(2, "pass")]
