"""Runs on several GPUs of one machine, over NCCL."""

import json
import subprocess
import sys

import pytest
import torch

from stackproof.distributed.process_group import device_of_rank
from stackproof.spec.errors import EnvironmentUnfit
from stackproof.train.run_dir import RunDir

STEPS = 8
# bfloat16 rounds other parts of a product in a tensor group; float32 sums in another order
LOSS_REL_MAX = {"float32": 1e-4, "bfloat16": 1e-2}


def trained(folder, *arguments):
    """The losses and the record of a short run on GPUs, by step."""
    sets = (f"train.max_steps={STEPS}", "schedule.warmup_steps=2", "eval.every=4")
    given = [a for s in sets for a in ("--set", s)]
    command = ["train", "pocket", "--device", "cuda", *given, *arguments, "--run-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "stackproof", *command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((folder / "metadata.json").read_text())
    losses = {line["step"]: line["loss_nats"] for line in RunDir(folder).lines("metrics.jsonl")}
    return losses, record


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a CUDA device for each rank")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", ["shard", "replicate", "tensor"])
def test_run_on_two_gpus_is_that_on_one(tmp_path, mesh, dtype):
    precision = "--set", f"train.dtype={dtype}"
    alone, _ = trained(tmp_path / "one", *precision)
    together, record = trained(
        tmp_path / "two", *precision, "--nproc", "2", "--set", f"parallel.{mesh}=2"
    )
    judged = [g for g in record["gates"] if g["id"].startswith("distributed.") and g["checks"]]
    assert len(judged) >= 6 and {g["verdict"] for g in judged} == {"pass"}
    assert together.keys() == alone.keys() and len(alone) == STEPS
    for step, loss_nats in alone.items():
        assert abs(together[step] / loss_nats - 1) <= LOSS_REL_MAX[dtype]


@pytest.mark.parametrize(("local_rank", "refused"), [(0, False), (1, True)])
def test_a_rank_without_a_gpu_is_refused(monkeypatch, local_rank, refused):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    if not refused:
        assert device_of_rank() == local_rank
        return
    with pytest.raises(EnvironmentUnfit, match="CUDA device") as raised:
        device_of_rank()
    assert "--nproc 1" in raised.value.next_step
