"""What is compared of two runs, and what is left out."""

import json

import pytest

from stackproof.mutation.fruits import Reference, fruits_of, is_result, is_statement
from stackproof.spec.errors import IntegrityError

RECORD = "train-20261121T175237Z-a37144ba"
OTHER = "train-20261122T175237Z-a37144bb"


def written(folder, **files) -> dict[str, str]:
    """The fruits of a folder with these files; `_` in a name stands for a point."""
    folder.mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path = folder / name.replace("_", ".")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return fruits_of(folder)


def test_a_place_is_volatile_alone():
    clean = [{"r::.gates[0].x": str(n), "r::.gates[1].x": "1", "r::.gates[2].x": "1"} for n in "ab"]
    reference = Reference(clean)
    assert reference.differing(clean[0] | {"r::.gates[0].x": "c"}) == []
    assert reference.differing(clean[0] | {"r::.gates[1].x": "2"}) == ["r::.gates[1].x"]


def test_lists_of_other_lengths_are_volatile_as_a_whole():
    reference = Reference([{"e::[0].at": "1"}, {"e::[0].at": "1", "e::[1].at": "2"}])
    assert reference.differing({"e::[0].at": "3", "e::[5].at": "2"}) == []
    assert reference.differing({"e::[0].at": "1", "e::[0].event": "x"}) == ["e::[0].event"]


def test_a_size_is_volatile_with_its_hash_and_a_time_always():
    reference = Reference([{"m::.f.sha256": "1", "m::.f.bytes": "1", "m::.g.bytes": "1"}] * 2)
    changed = {"m::.f.sha256": "2", "m::.f.bytes": "2", "m::.g.bytes": "1"}
    assert len(reference.differing(changed)) == 2
    assert Reference([reference.fruits, changed]).differing(changed | {"m::.f.bytes": "3"}) == []
    timed = Reference([{"m::.wall_s": "1", "m::.gates[x].seconds": "0.0", "m::.lr": "1"}] * 2)
    others = {"m::.wall_s": "2", "m::.gates[x].seconds": "0.1", "m::.lr": "2"}
    assert timed.differing(others) == ["m::.lr"]


def test_places_of_other_scenarios_are_left_out_too():
    reference = Reference([{"m::.peak_frac": "1", "m::.x": "1"}] * 2)
    changed = {"m::.peak_frac": "2", "m::.x": "2"}
    assert reference.differing(changed, {"m::.peak_frac"}) == ["m::.x"]


@pytest.mark.parametrize(
    "key",
    (
        "run/checkpoints/step-6/model.safetensors",
        "run/metrics.jsonl::[0].loss_nats",
        "run/metrics.jsonl::[0].lr",
        "run/samples.jsonl::[0].text",
        "evaluated/metadata.json::.metrics.bits_per_byte.value",
        "cache/data/1/manifest.json::.corpus.documents",
        "output.txt::document1.samples[0].text",
    ),
)
def test_a_result_is_never_volatile(key):
    assert is_result(key) and not is_statement(key)
    with pytest.raises(IntegrityError, match="clean runs of one command differ in a result"):
        Reference([{key: "1"}, {key: "2"}])


def test_statements_and_results():
    assert is_statement("run/checkpoints/step-6/state.json::.gates.loss.first.measured.gap_nats")
    assert not is_statement("run/checkpoints/step-6/state.json::.stopper.best")
    assert is_statement("run/metadata.json::.claim")
    assert is_statement("run/metadata.json::.metrics.best_step.value"), "logs hold the losses"
    assert not is_statement("evaluated/metadata.json::.metrics.bits_per_byte.value")
    for statement in (
        "run/checkpoints/step-6/state.json::.run.logs.gates.jsonl.sha256",
        "cache/data/1a/plan.json::.files[1][0]",
        "cache/data/1a/manifest.json::.tokenizer.encoder",
        "cache/data/1a/manifest.json::.sources[a].receipt.dropped.repetition.example",
    ):
        assert is_statement(statement), statement
    for result in (
        "run/checkpoints/step-6/state.json::.run.logs.samples.jsonl.sha256",
        "cache/data/1a/manifest.json::.tokenizer.vocab_size",
        "cache/data/1a/manifest.json::.sources[a].receipt.dropped.repetition.documents",
    ):
        assert not is_statement(result), result
    assert is_statement("output.txt::document1.checkpoint") and is_statement("output.txt::saved #")
    assert not is_result("run/metrics.jsonl::[0].tokens_per_s")
    assert not is_result("run/metadata.json::.metrics.train_s.value")


def test_entries_of_lists_are_known_by_name(tmp_path):
    gates = [{"id": "b", "checks": 1}, {"id": "a", "checks": 2}]
    found = written(tmp_path / "a", r_json={"gates": gates, "steps": [1, 2]})
    assert found["r.json::.gates[a].checks"] == "2" and found["r.json::.steps[1]"] == "2"
    turned = written(tmp_path / "b", r_json={"gates": gates[::-1], "steps": [1, 2]})
    assert Reference([found, found]).differing(turned) == ["r.json::.gates[order]"]


def test_what_is_empty_is_there(tmp_path):
    one = written(tmp_path / "a", r_json={"gates": [], "x": {}})
    assert one == {"r.json::.gates": "[]", "r.json::.x": "{}"}


def test_ids_are_compared_by_their_order_and_moments_not_at_all(tmp_path):
    def of(folder, *ids, parent=None, at="2026-11-21T17:52:37Z"):
        lines = "".join(f'{{"id": "{i}", "at": "{at}"}}\n' for i in ids)
        return written(tmp_path / folder, a_jsonl=lines, z_json={"parent": parent or ids[0]})

    first = of("a", RECORD, OTHER)
    assert of("b", OTHER, RECORD, at="2027-01-01T00:00:00.123Z") == first
    assert Reference([first, first]).differing(of("c", RECORD, OTHER, parent=OTHER)) == [
        "z.json::.parent"
    ]


def test_texts_are_compared_by_lines_and_other_files_by_hash(tmp_path):
    def of(folder, line, data=b"\xff\x00"):
        return written(tmp_path / folder, README_md=f"# Model\n{line}\n", w_bin=data)

    first = of("a", "trained for 3 steps")
    assert first["README.md::[1]"] == "'trained for 3 steps'"
    assert Reference([first] * 2).differing(of("b", "trained")) == ["README.md::[1]"]
    assert Reference([first] * 2).differing(of("c", "trained for 3 steps", b"\xff\x01")) == [
        "w.bin"
    ]


def test_a_damaged_document_is_a_text(tmp_path):
    assert written(tmp_path / "a", r_json='{"a": 1')["r.json::[0]"] == repr('{"a": 1')


def test_what_is_printed_is_compared_without_numbers_and_the_clock(tmp_path):
    def printed(folder, *lines):
        return written(tmp_path / folder, output_txt="".join(f"{line}\n" for line in lines))

    first = printed("a", "saved step-6 in 0.3 s", "step 1/12  loss 5.1  tok/s 900", '{"x": [1]}')
    later = printed("b", "saved step-6 in 12 ms", "  3 gates checked, the last loss.golden")
    assert first["output.txt::document1.x[0]"] == "1"
    differing = Reference([first, first]).differing(later)
    assert differing == ["output.txt::document1.x[0]"]
    said = printed("c", "saved step-6 in 0.3 s", '{"x": [1]}', "a row was dropped")
    assert Reference([first, first]).differing(said) == ["output.txt::a row was dropped"]
    twice = printed("d", "saved step-6 in 0.3 s", "saved step-7 in 0.3 s", '{"x": [1]}')
    assert Reference([first, first]).differing(twice) == ["output.txt::saved step# in #"]
