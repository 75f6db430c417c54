"""A comparison of recorded numbers is green on equal files, and red on one changed digit or key."""

import copy
import json
import stat
import sys

import pytest

from tools import same_numbers

RECORDED = {
    "environment": {"torch": "2.13.0", "threads": 1},
    "variants": {
        "gpt2": {
            "weights": "6f90d2",
            "metrics": [{"step": 1, "loss_nats": 5.549076}, {"step": 2, "loss_nats": 5.5}],
            "gates": [],
        }
    },
}


def verdict(tmp_path, capsys, after, before=RECORDED):
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, document in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(document))
    return same_numbers.main(["compare", *map(str, paths)]), capsys.readouterr()


def changed(change):
    after = copy.deepcopy(RECORDED)
    change(after, after["variants"]["gpt2"])
    return after


def test_equal_files_are_equal(tmp_path, capsys):
    code, said = verdict(tmp_path, capsys, RECORDED)
    assert code == 0 and said.out == "equal: variants\n"


@pytest.mark.parametrize(
    ("change", "row"),
    [
        (
            lambda a, v: v["metrics"][0].update(loss_nats=5.549077),
            "variants.gpt2.metrics[0].loss_nats 5.549076 5.549077",
        ),
        (lambda a, v: v["metrics"][1].update(step=2.0), "variants.gpt2.metrics[1].step 2 2.0"),
        (lambda a, v: v.update(weights="6f90d3"), 'variants.gpt2.weights "6f90d2" "6f90d3"'),
        (lambda a, v: v["metrics"][1].pop("step"), "variants.gpt2.metrics[1].step 2 absent"),
        (lambda a, v: v.update(extra=1), "variants.gpt2.extra absent 1"),
        (lambda a, v: v.update(gates={}), "variants.gpt2.gates [] {}"),
        (lambda a, v: a["environment"].update(threads=2), "environment.threads 1 2"),
    ],
)
def test_one_changed_digit_or_key_is_red_and_named(tmp_path, capsys, change, row):
    code, said = verdict(tmp_path, capsys, changed(change))
    first, last = said.out.splitlines()
    assert code == 1 and first.split() == row.split() and last == "1 values differ in variants"


def test_a_part_of_one_file_alone_is_named_and_no_common_part_is_an_error(tmp_path, capsys):
    code, said = verdict(tmp_path, capsys, RECORDED | {"pocket": {}})
    assert code == 0 and "not compared: pocket" in said.out
    code, said = verdict(tmp_path, capsys, {"environment": RECORDED["environment"], "pocket": {}})
    assert code == 2 and "no part in common" in said.err


def test_a_mask_hides_the_value_at_its_path_alone():
    gate = {"id": "loss.golden", "measured": {"abs_error": 0.5}, "seconds": 0.1}
    record = {"id": "train-1", "code": {"commit": "8e75"}, "gates": [gate]}
    hidden = {"id": "masked", "code": "masked", "gates": [gate | {"seconds": "masked"}]}
    assert same_numbers.mask(record, "record") == hidden
    rows = [{"step": 1, "rows": {"code": 4, "docs": 4}}]
    assert same_numbers.mask(rows, "curriculum") == rows


STACK = f"""#!{sys.executable}
import json, pathlib, sys
words = sys.argv[1:]
if "--json" in words:
    print(json.dumps({{"words": words, "record": "x", "loss_nats": 0.25}}))
else:
    run = pathlib.Path(words[words.index("--run-dir") + 1])
    last = run / "checkpoints" / "step-1"
    last.mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("step-1\\n")
    for name in ("model", "state"):
        (last / f"{{name}}.safetensors").write_bytes(name.encode())
    row = {{"step": 1, "loss_nats": 7.5, "tokens_per_s": 9}}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
    record = {{"id": "a", "environment": {{"torch": "2", "threads": 1}}}}
    (run / "metadata.json").write_text(json.dumps(record))
"""


def record(tmp_path, code):
    stack, out = tmp_path / "stack", tmp_path / "out.json"
    stack.write_text(code)
    stack.chmod(stack.stat().st_mode | stat.S_IXUSR)
    return same_numbers.main(
        ["record", "--stack", str(stack), "--out", str(out), "--parts", "variants", "documents"]
    ), out


def test_what_the_commands_leave_and_print_is_recorded(tmp_path):
    code, out = record(tmp_path, STACK)
    recorded = json.loads(out.read_text())
    assert code == 0 and recorded["environment"] == {"torch": "2", "threads": 1}
    assert recorded["variants"].keys() == same_numbers.VARIANTS.keys()
    run = recorded["variants"]["gpt2"]
    assert run["weights"] == "9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4"
    assert run["metrics"] == [{"step": 1, "loss_nats": 7.5, "tokens_per_s": "masked"}]
    assert recorded["documents"]["inspect"] == {
        "words": ["inspect", "gpt2", "--json"],
        "record": "masked",
        "loss_nats": 0.25,
    }


def test_a_command_that_fails_is_named_and_nothing_is_written(tmp_path, capsys):
    code, out = record(tmp_path, f"#!{sys.executable}\nimport sys\nsys.exit('no such recipe')\n")
    assert code == 1 and not out.exists() and "no such recipe" in capsys.readouterr().err
