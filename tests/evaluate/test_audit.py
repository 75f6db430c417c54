"""Audits: a model that knows the answers is as wide as its suite,
and breadth over steps stands still where it does.
"""

import json

import pytest
import torch
from torch import nn

from stackproof.config import ModelConfig
from stackproof.data.tokenizer import Bytes
from stackproof.evaluate.audit import (
    Standstill,
    audit,
    breadth,
    by_step,
    graded,
    read_answers,
    standstill,
    to_lines,
)
from stackproof.evaluate.suite import load_suite, suite_file
from stackproof.model.build import build_model
from stackproof.spec.errors import DataError

CFG = ModelConfig(
    d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32, max_seq_len=512
)
SUITE = load_suite(suite_file("domains"))


class Scripted(nn.Module):
    """Says by heart what its script has for what it has read, byte for byte, and ends; through the
    real sampling with its cache.
    """

    def __init__(self, script):
        super().__init__()
        self.cfg, self.embed, self.script, self.read = CFG, nn.Embedding(1, 1), script, []

    def hidden_states(self, ids_BT, cache):
        self.read = [*self.read[: cache.length], *ids_BT[0].tolist()]
        cache.length += ids_BT.shape[1]
        return ids_BT[..., None].float(), None

    def logits(self, x_BTD):
        said = bytes(i for i in self.read if i < 256).decode("utf-8")
        asked = next((q for q in self.script if said.startswith(q)), said)
        answer = [*self.script.get(asked, "").encode(), 256]
        return nn.functional.one_hot(
            torch.tensor([[answer[len(said.encode()) - len(asked.encode())]]]), 257
        ).float()


def script(suite=SUITE, known=lambda domain, prompt: True):
    """Answers of the prompts that are known, followed by a next turn that must not count."""
    return {
        suite.asked(p): f" {p.answer} / > And the next?" if known(d, p) else " region region region"
        for d in suite.domain
        for p in d.prompts
    }


def asked(known=lambda domain, prompt: True, step=100):
    # bytes, and none of the answers is longer
    longer = SUITE.model_copy(update={"max_new_tokens": 120})
    return audit(Scripted(script(known=known)), Bytes(), longer, step=step)


def test_a_model_that_knows_the_answers_is_as_wide_as_the_suite():
    answers = asked()
    assert len(answers) == 24 and all(
        a.passed and not a.faults and a.grade is None for a in answers
    )
    assert breadth(answers) == {d.name: 4 for d in SUITE.domain} and len(SUITE.domain) == 6
    assert {a.prompt: a.text for a in answers} == {
        p.id: p.answer.strip() for d in SUITE.domain for p in d.prompts
    }


def test_a_model_that_knows_one_answer_of_each_of_two_domains_has_breadth_two():
    answers = asked(lambda d, p: p is d.prompts[0] and d.name in ("biology", "poetry"))
    assert {d: n for d, n in breadth(answers).items() if n} == {"biology": 1, "poetry": 1}
    wrong = next(a for a in answers if a.prompt == "fourier")
    assert (
        wrong.text == "region region region"
        and not wrong.passed
        and "the answer lacks" in wrong.faults[0]
    )


def test_one_domain_by_heart_is_not_breadth():
    passes = breadth(asked(lambda d, p: d.name == "conversation"))
    assert passes["conversation"] == 4 and sum(n > 0 for n in passes.values()) == 1


def test_a_real_model_answers_the_same_twice_and_says_what_it_has_not_read():
    suite = SUITE.model_copy(update={"max_new_tokens": 12})
    model = build_model(CFG.model_copy(update={"max_seq_len": 48}), 257, seed=1)
    state, heard = torch.get_rng_state(), []
    first = audit(model, Bytes(), suite, step=1, tell=heard.append)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    assert to_lines(first) == to_lines(audit(model, Bytes(), suite, step=1)) and heard == [
        a.prompt for a in first
    ]
    assert sum(breadth(first).values()) == 0
    long = {a.prompt: len(a.asked.encode()) + 1 for a in first}
    assert {a.prompt: a.lost_prompt_tokens for a in first} == {
        p: n - 24 if n > 48 else 0 for p, n in long.items()
    }
    assert max(a.lost_prompt_tokens for a in first) > 0 == min(a.lost_prompt_tokens for a in first)


def rounds(*widths):
    """Passes by domain at steps 100, 200 …: the first so many of four domains pass."""
    return {
        100 * (i + 1): {d: int(k < n) for k, d in enumerate("abcd")} for i, n in enumerate(widths)
    }


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ((0, 2, 4, 4, 4), Standstill(300, 4, 2, ())),
        ((0, 2, 4, 4), None),
        ((1, 2, 3, 4), None),
        ((1, 3, 2, 3, 3), Standstill(200, 3, 3, ())),
        ((1, 4, 3, 2), Standstill(200, 4, 2, ("c", "d"))),
        ((0, 0, 0), Standstill(100, 0, 2, ())),
        ((3,), None),
        ((), None),
    ],
)
def test_breadth_stands_still_since_the_first_step_of_its_greatest(widths, expected):
    assert standstill(rounds(*widths)) == expected
    assert standstill(dict(reversed(rounds(*widths).items()))) == expected, (
        "in whatever order they are given"
    )


def test_another_domain_is_another_suite():
    with pytest.raises(DataError, match="different domains"):
        standstill(rounds(1, 2, 3) | {900: {"a": 1, "b": 1}})


def test_rounds_are_told_apart_by_step():
    answers = [*asked(lambda d, p: d.name == "biology", step=20), *asked(step=10)]
    assert {s: sum(n > 0 for n in r.values()) for s, r in by_step(answers).items()} == {
        10: 6,
        20: 1,
    }
    assert list(by_step(answers)) == [10, 20]


def filled(path, answers, **changes):
    """An `audits.jsonl` in which a person has changed the line of one prompt."""
    lines = [json.loads(line) for line in to_lines(answers).splitlines()]
    lines[5] |= changes
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_grade_stands_beside_the_verdict_and_only_beside_the_text_it_was_given(tmp_path):
    answers, path = asked(), tmp_path / "graded.jsonl"
    marked = graded(answers, filled(path, answers, grade=9.5))
    assert (
        [a.grade for a in marked if a.grade is not None] == [9.5]
        and marked[5].prompt == answers[5].prompt
        and marked[5].passed
    )
    with pytest.raises(
        DataError, match=f"grades another answer to {answers[5].prompt} at step 100"
    ):
        graded(answers, filled(path, answers, grade=9.5, text="something else"))
    with pytest.raises(DataError, match="at step 7, which is not part of this audit"):
        graded(answers, filled(path, answers, grade=9.5, step=7))
    assert (
        graded(answers, filled(path, answers, text="ungraded text is nobody's concern")) == answers
    )


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1}',
        "[]",
        "{",
        '{"step":1,"domain":"a","prompt":"p","text":"t","passed":true,"grade":"good"}',
        *(
            f'{{"step":{step},"domain":"a","prompt":"p","text":"t","passed":true}}'
            for step in ("{}", "[]", '"1"', "null", "-1", "1e400")
        ),
        '{"step":1,"domain":["a"],"prompt":"p","text":"t","passed":true}',
        '{"step":1,"domain":"a","prompt":{},"text":"t","passed":true}',
        '{"step":1,"domain":"a","prompt":"p","text":5,"passed":true}',
        '{"step":1,"domain":"a","prompt":"p","text":"t","passed":1}',
        '{"step":1,"domain":"a","prompt":"p","text":"t","passed":true,"grade":' + "9" * 400 + "}",
    ],
)
def test_a_file_of_answers_that_cannot_be_read_is_named(tmp_path, line):
    path = tmp_path / "audits.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=r"audits\.jsonl"):
        read_answers(path)


def test_a_mistyped_answer_is_named_by_its_line_in_the_file(tmp_path):
    path = tmp_path / "graded.jsonl"
    path.write_text('\n\n{"step":{},"domain":"a","prompt":"p","text":"t","passed":true}\n')
    with pytest.raises(DataError, match=r"graded\.jsonl:3: field step"):
        graded(asked(), path)
