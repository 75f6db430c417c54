"""Clean runs of a recipe over seeds: how often does any gate fire although nothing is wrong?

python benchmarks/false_alarms.py --runs 20 --steps 60 [--recipe pocket] [--run-dir DIR]
Writes a record of kind benchmark. Exit code 0 if no gate fired, 4 if one did.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from spec.gates import load_spec
from stack.config import load_config
from stack.evidence.provenance import environment
from stack.evidence.record import RecordBuilder
from stack.recipes import recipe

CLAIM = "Clean runs over seeds: no gate fired."
NOT_COVERED = ("longer runs", "other recipes, devices and compute types")


def clean_run(name: str, seed: int, steps: int, folder: Path) -> dict:
    """Train with one seed; returns exit code and every gate that did not pass."""
    sets = [f"seed={seed}", f"train.max_steps={steps}", f"eval.every={max(2, steps // 4)}", f"sample.every={max(1, steps // 8)}"]
    sets.append(f"schedule.warmup_steps={max(1, steps // 6)}")
    command = [sys.executable, "-m", "stack", "train", name, "--run-dir", str(folder), "--json", *(a for s in sets for a in ("--set", s))]
    done = subprocess.run(command, capture_output=True, text=True)
    record = json.loads((folder / "metadata.json").read_text())
    fired = [g["id"] for g in record["gates"] if g["verdict"] != "pass"]
    return {"seed": seed, "exit_code": done.returncode, "fired": fired, "looks": sum(g["checks"] for g in record["gates"])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--recipe", default="pocket")
    parser.add_argument("--run-dir", type=Path)
    options = parser.parse_args()
    cfg, _ = load_config(recipe(options.recipe))
    builder = RecordBuilder(
        kind="benchmark", spec=load_spec(), config=cfg.to_dict(), claim=CLAIM, not_covered=NOT_COVERED, environment=environment()
    )
    builder.command = ["python", "benchmarks/false_alarms.py", *sys.argv[1:]]
    directory = options.run_dir or Path("runs") / builder.id
    directory.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for seed in range(1, options.runs + 1):
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(clean_run(options.recipe, seed, options.steps, Path(folder)))
        print(json.dumps(outcomes[-1]), flush=True)
    alarms = [o for o in outcomes if o["fired"] or o["exit_code"]]
    builder.metric("runs", len(outcomes), "runs")
    builder.metric("steps_per_run", options.steps, "steps")
    builder.metric("gate_looks", sum(o["looks"] for o in outcomes), "looks")
    builder.metric("false_alarms", len(alarms), "runs", n=len(outcomes), better="lower")
    builder.finish(
        directory,
        status="failed" if alarms else "completed",
        end_reason=f"{len(alarms)} of {len(outcomes)} clean runs had a gate that did not pass",
        exit_code=4 if alarms else 0,
    )
    print(directory / "metadata.json")
    return 4 if alarms else 0


if __name__ == "__main__":
    sys.exit(main())
