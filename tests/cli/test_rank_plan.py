"""`stack train --nproc N --dry-run`: the plan of a run on many ranks."""

import pytest

ROWS = ("--set", "train.tokens_per_step=524288")  # 2,048, for a thousand data ranks


def test_plan_of_a_thousand_ranks_is_a_document(in_process):
    code, without = in_process("train", "--dry-run", *ROWS)
    assert code == 0 and "ranks" not in without["derived"]
    code, found = in_process("train", "--nproc", 1024, "--dry-run", *ROWS)
    ranks = found["derived"].pop("ranks")
    assert code == 0 and found["derived"].keys() == without["derived"].keys()
    assert ranks["world_size"] == 1024
    assert ranks["mesh"] == {"replicate": 1, "shard": 1024, "tensor": 1}
    assert ranks["fits"] is True and ranks["cheapest"] in ranks["meshes"]
    state = {"weights", "gradients", "moments"}
    assert state | {"activations", "peak"} <= ranks["memory_bytes"].keys()
    assert {c["operation"] for c in ranks["collectives"]} == {"all-gather", "reduce-scatter"}
    assert ranks["predicted_s"]["step"] > 0 and ranks["assumptions"]["node_ranks"] == 8
    steps = found["config"]["train"]["max_steps"]
    assert ranks["predicted_run_s"] == steps * ranks["predicted_s"]["step"]


def test_processes_on_this_cpu_share_what_it_was_measured_to_compute(in_process):
    def plan(*more):
        code, found = in_process("train", "--dry-run", *ROWS, *more)
        assert code == 0
        ranks, probed = found["derived"]["ranks"], found["derived"]["probed_flops_per_s"]
        return ranks["assumptions"]["flops_per_s"], probed, ranks["flops_per_s_origin"]

    for n in (2, 1024):  # more processes than cores only where the CPU is chosen
        stated, probed, origin = plan("--nproc", n, "--device", "cpu")
        assert stated == pytest.approx(probed / n, rel=1e-6) and "measured on this CPU" in origin
    stated, _, origin = plan("--nproc", 2, "--device", "cpu", "--assume", "flops_per_s=1e12")
    assert (stated, origin) == (1e12, "--assume")
    assert plan("--nproc", 1024)[::2] == (6.7e13, "data sheet")


def test_plan_is_printed_with_its_assumptions(stack):
    done = stack("train", "--nproc", "4", "--dry-run", "--assume", "memory_bytes=1e6")
    assert done.code == 0
    for text in (
        "# 4 ranks: replicate 1 × shard 4 × tensor 1; micro-batches of 2 rows, accumulation 1",
        "# reduce-scatter of gradients over shard: ",
        "predictions from these assumptions, not measurements",
        "memory_bytes 1e+06",
        "# this mesh fits into the memory of a rank: no",
        "# no mesh of so many ranks fits",
        "# eta_s of one process on this machine: ",
        "GiB)",
        "# predicted seconds of all steps: ",
    ):
        assert text in done.out, done.out


def test_a_slow_mesh_and_meshes_that_are_not_shown_are_stated(stack):
    done = stack("train", "--nproc", "1024", "--dry-run", *ROWS)
    assert done.code == 0 and "times as long" in done.out and " more meshes: " in done.out
    done = stack("train", "--nproc", "2", "--dry-run", "--set", "parallel.replicate=2")
    assert done.code == 0 and "times as long" not in done.out and "more meshes" not in done.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--nproc", 1024, "--dry-run"), "cannot be dealt evenly"),
        (("--nproc", 4, "--dry-run", "--set", "parallel.tensor=3"), "has not as many ranks"),
        (("--nproc", 4, "--dry-run", "--assume", "color=1"), "there is no such assumption"),
        (("--nproc", 4, "--dry-run", "--assume", "memory_bytes=much"), "--assume memory_bytes"),
        (("--nproc", 4, "--dry-run", "--assume", "memory_bytes=-1"), "--assume memory_bytes"),
        (("--nproc", 4, "--dry-run", "--assume", "latency_s=inf"), "--assume latency_s"),
        (("--dry-run", "--assume", "memory_bytes=1e9"), "--assume is for the plan"),
        (("--nproc", 4, "--assume", "memory_bytes=1e9"), "--assume is for the plan"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_refused(in_process, arguments, named):
    code, error = in_process("train", *arguments)
    assert code == 2 and named in error["what"] and error["next_step"]
