"""Gates before step 1 judge the objects that the run goes on with: what is changed in one of them,
after it was built, turns a gate red.
"""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from stackproof.spec.errors import GateFailed
from stackproof.train import start


@contextmanager
def begun(cfg, run, *, only=None, change=lambda state: None):
    """A run before its first step, and the subject that its gates have judged. `change` is made to
    its state after it was built and before it is judged.
    """
    original, judged = start.subject_of, []

    def changed(*parts, state, **settings):
        change(state)
        judged.append(original(*parts, state=state, **settings))
        return judged[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "subject_of", changed)
        with start.fresh(cfg, (), run, only=only) as trainer:
            yield trainer, judged[0]


def test_the_subject_holds_the_objects_of_the_run(small_cfg, tmp_path):
    with begun(small_cfg, tmp_path / "run", only=()) as (trainer, subject):
        state, dataset = trainer.state, trainer.dataset
        assert subject.model.module is subject.training.module is state.model
        assert subject.training.optimizer is state.optimizer
        assert subject.kernels.state is state
        assert subject.tokenizer.tokenizer is dataset.tokenizer
        assert subject.corpus.splits["train"] is dataset.train
        assert subject.corpus.splits["validation"] is dataset.validation
        assert subject.stopping.n_eval_batches == len(trainer.held_out)
        rows = subject.evaluation.held_out_batches(len(trainer.held_out[0].input_ids), 1)
        assert rows[0].input_ids.shape == trainer.held_out[0].input_ids.shape


def test_the_rows_that_are_judged_are_those_that_the_run_draws(small_cfg, tmp_path):
    with begun(small_cfg, tmp_path / "run", only=()) as (trainer, subject):
        judged = subject.data_loader.of_run()
        for batch in (b for _ in range(3) for b in trainer.state.next_batches()):
            same = judged.next_batch()
            assert torch.equal(batch.input_ids, same.input_ids)
            assert torch.equal(batch.labels, same.labels)
            assert torch.equal(batch.document_ids, same.document_ids)
            for name in ("sample_ids", "sources", "epochs", "cursor_after"):
                assert getattr(batch, name) == getattr(same, name)


def test_a_trainee_is_built_as_the_run_is(small_cfg, tmp_path):
    with begun(small_cfg, tmp_path / "run", only=()) as (trainer, subject):
        weights, own = subject.training.trainee().model.state_dict(), trainer.state.model
        assert all(torch.equal(weights[n], w) for n, w in own.state_dict().items())
        groups, mine = (
            [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            for optimizer in (subject.training.trainee().optimizer, trainer.state.optimizer)
        )
        assert groups == mine


def louder(state):
    with torch.no_grad():
        state.model.layers[0].ffn.up.weight.mul_(1.5)


def untied(state):
    state.model.embed.weight = nn.Parameter(state.model.embed.weight.detach().clone())


def decayed(state):
    state.optimizer.param_groups[-1]["weight_decay"] = 0.5


def forgotten(state):
    state.optimizer.param_groups[0]["params"].pop()


def blind(state):
    """Attention of the run's own model, and of no other, sees all keys."""
    attention = state.model.layers[0].attention
    original = attention.qkv

    def reversed_rows(x_BTD, context):
        q, k, v = original(x_BTD, context)
        return q, k.flip(2), v.flip(2)

    attention.qkv = reversed_rows


@pytest.mark.parametrize(
    ("change", "gate_id"),
    [
        (louder, "model.init-law"),
        (untied, "optim.parameter-groups"),
        (decayed, "optim.parameter-groups"),
        (forgotten, "optim.parameter-groups"),
        (blind, "model.causal"),
        (blind, "model.reference-differential"),
    ],
)
def test_a_change_of_the_run_s_own_state_is_red(small_cfg, tmp_path, change, gate_id):
    changed = begun(small_cfg, tmp_path / "run", only=(gate_id,), change=change)
    with pytest.raises(GateFailed) as caught, changed:
        pass
    assert caught.value.gate_id == gate_id
    with begun(small_cfg, tmp_path / "clean", only=(gate_id,)):
        pass
