"""`stack checkpoint convert`: layouts from the command line, and what is refused."""

import json

from tests.cli.test_export import run_dir, stack  # noqa: F401


def test_a_model_scores_the_same_in_every_layout(stack, run_dir, tmp_path):  # noqa: F811
    text = tmp_path / "text.txt"
    text.write_text("The layouts hold the same weights. " * 40)
    source, scores = run_dir, []
    for layout in ("single", "sharded", "single"):
        out = tmp_path / f"{len(scores)}-{layout}"
        code, document = stack("checkpoint", "convert", source, "--out", out, "--layout", layout)
        assert (code, document["layout"], document["tokenizer"]) == (0, layout, True)
        assert stack("inspect", out)[1]["layout"] == layout
        code, found = stack(
            "evaluate", out, "--text", text, "--run-dir", tmp_path / f"e{len(scores)}"
        )
        assert code == 0
        scores.append(found["loss_nats"])
        source = out
    assert len(set(scores)) == 1 and scores[0] > 0


def test_what_cannot_be_converted_is_refused(stack, run_dir, tmp_path):  # noqa: F811
    code, error = stack(
        "checkpoint", "convert", run_dir, "--out", tmp_path / "a", "--layout", "dcp"
    )
    assert code == 2 and error["allowed"] == "single, sharded"
    code, error = stack("checkpoint", "convert", run_dir, "--out", run_dir)
    assert code == 2 and "is not an empty folder" in error["what"]
    tokenizer = run_dir / "tokenizer.json"
    tokenizer.write_text(json.dumps({"stackproof_tokenizer": "char", "symbols": "abc"}))
    code, error = stack("checkpoint", "convert", run_dir, "--out", tmp_path / "b")
    assert code == 3 and "is not the tokenizer" in error["what"]
    assert not (tmp_path / "b").exists()
