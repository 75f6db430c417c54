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
    ):
        assert text in done.out, done.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--nproc", 1024, "--dry-run"), "cannot be dealt evenly"),
        (("--nproc", 4, "--dry-run", "--set", "parallel.tensor=3"), "has not as many ranks"),
        (("--nproc", 4, "--dry-run", "--assume", "color=1"), "--assume color"),
        (("--nproc", 4, "--dry-run", "--assume", "memory_bytes=much"), "--assume memory_bytes"),
        (("--nproc", 4, "--dry-run", "--assume", "memory_bytes=-1"), "--assume memory_bytes"),
        (("--dry-run", "--assume", "memory_bytes=1e9"), "--assume is for the plan"),
        (("--nproc", 4, "--assume", "memory_bytes=1e9"), "--assume is for the plan"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_refused(in_process, arguments, named):
    code, error = in_process("train", *arguments)
    assert code == 2 and named in error["what"] and error["next_step"]
