"""What the ledger takes in."""

import pytest

from stackproof.evidence import ledgering
from stackproof.museum.collection import museum_config
from stackproof.spec.errors import IntegrityError
from stackproof.train.loop import train
from stackproof.train.start import fresh


def test_a_record_with_a_gate_left_out_is_refused(museum_folder, tmp_path):
    """Of a finished run under two gates; nothing of it is copied.
    The gates that are absent are counted, those of other runs are not.
    """
    base = museum_config(museum_folder)
    cfg = base.model_copy(update={"train": base.train.model_copy(update={"max_steps": 14})})
    record = train(fresh(cfg, (), tmp_path / "run", only=("runtime.finite", "runtime.cadence")))
    assert record.succeeded
    with pytest.raises(IntegrityError, match="lacks gate") as caught:
        ledgering.accept(tmp_path / "run", tmp_path / "evidence")
    from stackproof.spec.gates import load_spec
    from stackproof.spec.records import left_out

    spec = load_spec()
    absent = left_out(spec, record)
    wanted = [g.id for g in spec.required("train") if g.applies_to(record.config)]
    assert str(caught.value.value).startswith(str(len(absent))) and len(absent) == len(wanted) - 2
    assert "kernel.compiled-graph" not in absent and "sampling.coherence" in absent
    assert not (tmp_path / "evidence").exists()
