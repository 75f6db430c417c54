"""`stack gates …`, `stack evidence …` and `stack doctor` as a user runs them."""

import json
import shutil
import subprocess
import sys

import pytest

from stackproof.spec.errors import EXIT_CODES
from tests.cli.conftest import Stack, tiny
from tests.processes import NO_PREFLIGHT, ROOT, STACK
from tools.tampers import archived, small_repo


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_file, cli_cache):
    stack = Stack(tmp_path_factory.mktemp("trained"), cli_cache)
    (stack.folder / "evidence").mkdir()
    for name in ("a", "b"):
        done = stack("train", *tiny(text_file, train__max_steps="9"), "--run-dir", name, "--json")
        assert done.code == 0, done.err
    return stack


def test_gates_list_and_coverage_agree(trained):
    listed = trained("gates", "list", "--json").json
    covered = trained("gates", "coverage", "--json").json
    assert (
        listed["counts"] == covered["counts"]
        and sum(listed["counts"].values()) == len(listed["gates"]) >= 18
    )
    assert all(g["state"] == "unproven" and g["plants"] for g in listed["gates"]), (
        "an empty ledger proves nothing"
    )
    failures = covered["failures"]
    assert failures["documented"] == 103 and failures["awaiting"] == len(failures["awaits"]) > 0
    assert failures["awaits"]["SF-PT4"] == "preference-tuning"
    assert not {"SF-L01", "SF-X01"} & failures["awaits"].keys()


def test_runners_are_listed_with_their_gates_and_events(stack):
    """Exit code 4 where an adapter does not emit an event that a gate of its kind watches."""
    listed = stack("gates", "list", "--runners", "--json")
    rows = {r["runner"]: r for r in listed.json["runners"]}
    assert listed.code == 0 and all(r["unfed"] == [] for r in rows.values()), listed.err
    assert (
        "sampling.coherence" in rows["resume"]["gates"]
        and rows["train"]["counts"]["preflight"] > 30
    )
    assert "export.folder" in rows["export"]["gates"] and rows["data"]["gates"] == []
    assert "Sampled" in rows["train"]["announces"] and rows["pytest"]["announces"] == []
    assert set(rows["pytest"]["counts"]) == {"preflight"}
    code = (
        "import sys\nfrom dataclasses import replace\n"
        "from stackproof.contracts import adapters, events\nfrom stackproof.cli import main\n"
        "first, *others = adapters.ADAPTERS\n"
        "fewer = tuple(e for e in first.events if e is not events.Sampled)\n"
        "adapters.ADAPTERS = (replace(first, events=fewer), *others)\nmain(sys.argv[1:])"
    )
    done = stack("gates", "list", "--runners", code=code)
    assert done.code == 4 and "train: the adapter does not emit Sampled" in done.err, done.err


def test_gates_show_names_limits_and_nearest(trained):
    shown = trained("gates", "show", "loss.golden", "--json").json
    assert (
        shown["limits"]["abs_error_max"]["why"]
        and shown["state"] == "unproven"
        and len(shown["fingerprint"]) == 64
    )
    wrong = trained("gates", "show", "loss.gold")
    assert wrong.code == 2 and "loss.golden" in wrong.err


def test_prove_one_gate_writes_a_record_of_its_kills(trained):
    done = trained("gates", "prove", "loss.golden", "--run-dir", "proof", "--json")
    assert done.code == 0, done.err
    plants = {
        "loss.padding-counted",
        "loss.labels-shifted-twice",
        "loss.bits-instead-of-nats",
        "loss.z-term-reported",
    }
    assert {k["plant"] for k in done.json["kills"]} == plants and done.json["counts"][
        "awaiting"
    ] == 0
    margin = done.json["margins"][0]
    assert (
        margin["gate"] == "loss.golden"
        and margin["clean"] < margin["bound"] < margin["value"]
        and margin["plants"] == 4
    )
    assert all(
        k["outcome"] == "killed" and k["control"] == "pass" and k["seconds"] > 0
        for k in done.json["kills"]
    )
    assert (
        json.loads((trained.folder / "proof" / "metadata.json").read_text())["kind"]
        == "falsification"
    )
    assert trained("gates", "prove", "loss.nothing").code == 2


def test_a_surviving_plant_is_reported_and_exits_4(trained):
    """A gate that looks away: its plant survives, and prove says so instead of passing."""
    code = (
        "import sys\nfrom stackproof.contracts import kernel\nfrom stackproof.contracts.gate "
        "import passed\n"
        "from stackproof.cli import main\n"
        "def blind(limits, subject): return passed()\nblind.gate_id = 'kernel.parity'\n"
        "kernel.parity = blind\nmain(sys.argv[1:])"
    )
    done = trained("gates", "prove", "kernel.parity", "--run-dir", "blind", "--json", code=code)
    assert done.code == 4, done.err
    counts = json.loads(done.out.splitlines()[0])["counts"]
    assert counts["killed"] == 0 and counts["missed"] + counts["equivalent"] == 4


def test_backtest_replays_a_log(trained):
    log = trained.folder / "samples.jsonl"
    loop = "Budy Budy Budy Budy Budy Budy Budy Budy Budy"
    log.write_text("".join(json.dumps({"step": 1000 * n, "text": loop}) + "\n" for n in range(8)))
    done = trained("gates", "backtest", "samples.jsonl", "--json")
    assert done.code == 0 and done.json["first_fire_step"] == 4000 and done.json["records"] == 8
    assert (
        done.json["saved_steps"] == 3000
        and done.json["saved_frac"] == pytest.approx(3 / 7)
        and done.json["saved_s"] is None
    )
    said = trained("gates", "backtest", "samples.jsonl", "--seconds-per-step", "7.2").out
    assert "fires first at step 4000" in said and "saves 3000 steps (43%, 6 hours)" in said
    log.write_text("")
    assert trained("gates", "backtest", "samples.jsonl").code == 3
    assert trained("gates", "backtest", "samples.jsonl", "--gate", "loss.golden").code == 2


def test_evidence_add_show_verify_and_tampering(trained):
    (trained.folder / "evidence" / "ledger.jsonl").unlink(missing_ok=True)
    assert trained("evidence", "verify", "--json").code == 6, (
        "an empty ledger is not verified evidence"
    )
    added = trained("evidence", "add", "a", "--json")
    assert added.code == 0 and added.json["seq"] == 0, added.err
    assert trained("evidence", "add", "a").code == 6, "a record is added once"
    assert (
        trained("evidence", "show", added.json["record"][:22], "--json").json["id"]
        == added.json["record"]
    )
    assert trained("evidence", "verify", "--json").json["ok"] is True
    record = trained.folder / "evidence" / added.json["record"] / "metadata.json"
    honest = record.read_bytes()
    record.write_bytes(honest.replace(b'"exit_code":0', b'"exit_code":1'))
    broken = trained("evidence", "verify", "--json")
    assert broken.code == 6 and "changed after it was accepted" in broken.err
    record.write_bytes(honest)
    assert trained("evidence", "show", "nothing").code == 2


def test_evidence_archive_lists_moves_and_is_verified(stack, tmp_path):
    gone, stays = archived.build(tmp_path / "repo")
    stack.folder = tmp_path / "repo"
    shown = stack("evidence", "show", gone, "--json")
    assert shown.code == 0 and shown.json["id"] == gone
    assert stack("evidence", "verify", "--json").json | {"head": ""} == {
        "ok": True,
        "records": 6,
        "not_verified": 0,
        "head": "",
        "problems": [],
    }
    newer = archived.benchmark(stack.folder, 12)
    assert stack("evidence", "archive").code == 6, "the new record is not committed"
    small_repo.commit_all(stack.folder)
    plan = stack("evidence", "archive", "--dry-run", "--json").json
    assert plan["archived"] == [stays] and plan["dry_run"] and plan["bytes"] > 0
    assert plan["kept"][newer] == "newest of kind benchmark" and gone not in plan["kept"]
    done = stack("evidence", "archive")
    assert done.code == 0 and "1 record(s)" in done.out and "archived" in done.out
    assert not (stack.folder / "evidence" / stays).exists()
    assert stack("evidence", "show", stays, "--json").json["id"] == stays
    shutil.rmtree(stack.folder / ".git")
    bare = stack("evidence", "verify", "--json")
    assert bare.code == 0 and bare.json["ok"] is False and bare.json["not_verified"] == 2
    assert "2 archived record(s) or series not verified" in stack("evidence", "verify").out
    refused = stack("evidence", "show", gone)
    assert refused.code == 6 and "lacks the history" in refused.err


def test_same_seed_same_losses_and_diff_sees_only_clocks(trained):
    found = trained("evidence", "diff", "a", "b", "--json").json["differences"]
    clocks = (
        "metrics.tokens_per_s",
        "metrics.train_s",
        "metrics.preflight_s",
        "metrics.gates_overhead",
        "environment.allocator",  # states how much of the heap lies in large pages
        "command",
        "inputs",
    )
    assert all(d["key"].startswith(clocks) for d in found), found


def test_rerun_repeats_the_weights(trained):
    done = trained("evidence", "rerun", "a", "--run-dir", "again", "--json", code=NO_PREFLIGHT)
    assert done.code == 0, done.err
    assert done.json["ok"] and {c["what"] for c in done.json["compared"]} >= {
        "model.safetensors",
        "val_loss_nats",
    }


# The runs are forks of the command, without preflight: each would import torch for seconds.
CERTIFY = f"""
from stackproof.replay import certificate
from tests.processes import NO_PREFLIGHT, Forking
certificate.subprocess = Forking(NO_PREFLIGHT, light=True)
{STACK}
"""


def test_certify_resume_writes_a_certificate(stack, text_file):
    sets = tiny(text_file, eval__every="6", sample__every="12")
    sets = [
        s
        for pair in zip(sets[::2], sets[1::2])
        if "max_steps" not in pair[1] and "checkpoint.every" not in pair[1]
        for s in pair
    ]
    sets = [s for pair in zip(sets[::2], sets[1::2]) if "warmup" not in pair[1] for s in pair]
    done = stack(
        "evidence",
        "certify-resume",
        "pocket",
        "--steps",
        "24",
        "--kills",
        "1",
        *sets,
        "--run-dir",
        "cert",
        "--json",
        code=CERTIFY,
    )
    assert done.code == 0, done.err
    assert done.json["metrics"]["weights_equal"] == 1 and done.json["metrics"]["resumes"] == 1
    refused = stack("evidence", "certify-resume", "pocket", "--steps", "4")
    assert refused.code == 2 and "too few for" in refused.err


def test_doctor_says_what_is_needed(trained):
    done = trained("doctor", "--json")
    assert done.code == 0 and {f["what"] for f in done.json["findings"]} >= {
        "python",
        "torch",
        "free disk",
    }


def test_exit_codes_are_documented_once():
    assert set(EXIT_CODES) == {0, 1, 2, 3, 4, 5, 6, 7, 75, 130}


def test_light_install_needs_no_torch():
    """With torch, numpy, safetensors and tokenizers hidden, the reviewer's commands still run."""
    code = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'safetensors', 'tokenizers', 'hypothesis', 'pytest'): "
        "sys.modules[name] = None\n"
        "from stackproof.cli import main\n"
        "main(sys.argv[1:])"
    )
    for arguments in (
        ["gates", "list", "--json"],
        ["gates", "coverage", "--json"],
        ["train", "--dry-run", "--json"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)
    absent = subprocess.run(
        [sys.executable, "-c", code, "train"], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        absent.returncode == 7 and "[train]" in absent.stderr and "Traceback" not in absent.stderr
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "evidence", "verify", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 6) and "problems" in json.loads(done.stdout.splitlines()[0])
