"""Runs of nine steps in this process: begun, killed, resumed, and with a changed run.json."""

import json
from contextlib import contextmanager, nullcontext

import pytest

from stackproof.config import load_config
from stackproof.spec.canonical import canonical_json, sha256_json
from stackproof.train import loop, start
from stackproof.train.run_dir import SEAL
from stackproof.train.trainer import Callback

# Runtime gates that see every kind of event, and the artifact gate.
FEW = (
    "runtime.finite", "runtime.cadence", "checkpoint.reloads", "loss.logit-gradient",
    "evaluation.same-batches",
)  # fmt: skip
STEPS, EVERY = 9, 3


class Dead(BaseException):
    """Ends a run as a kill does: nothing writes a record."""


class Ending(Callback):
    """Raises after a step, or after the checkpoint of a step."""

    def __init__(self, error, step, after="on_step_end"):
        self.error, self.step = error, step
        setattr(self, after, self.end)

    def end(self, trainer, *_):
        if trainer.state.step == self.step:
            raise self.error


def begin(cfg, run, *callbacks):
    return loop.train(start.fresh(cfg, (), run, callbacks))


def resume(run, *sets, at=None, callbacks=()):
    changed, overrides = load_config(start.read_config(run), sets=sets)
    return loop.train(start.resume(run, overrides, changed, callbacks, at=at))


def killed(cfg, run, step, after="on_step_end"):
    """A run that was killed, which leaves no record; begun, or resumed without a `cfg`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Dead):
        patch.setattr(start, "recorded", lambda trainer: nullcontext())
        ending = Ending(Dead(), step, after)
        begin(cfg, run, ending) if cfg else resume(run, callbacks=[ending])
    assert not (run / "metadata.json").exists()
    return run


@contextmanager
def environment_with(**values):
    """Processes in the context state these values in their environment."""
    environment = start.environment
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "environment", lambda *a, **o: environment(*a, **o) | values)
        yield


def waived(*names):
    parts = {"reason": "memory was replaced", "expires": "2999-01-01"}
    inline = ", ".join(f"{k} = {json.dumps(v)}" for k, v in parts.items())
    return f"gates.waive=[{', '.join(f'{{id = {json.dumps(n)}, {inline}}}' for n in names)}]"


def rewrite(run, change, *, sealed):
    """Change run.json; with `sealed` as somebody does who corrects its hash."""
    document = json.loads((run / "run.json").read_bytes())
    change(document)
    if sealed:
        content = {k: v for k, v in document.items() if k != SEAL}
        document[SEAL] = sha256_json(content)
    (run / "run.json").write_bytes(canonical_json(document))
