"""Starting a run on several processes: the command line, agents on two nodes, and the guide."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stackproof.config import load_config
from stackproof.distributed.output import output_of
from stackproof.distributed.process_group import joined
from stackproof.recipes import recipe
from stackproof.spec.errors import UsageError
from tests.cli.conftest import tiny
from tests.distributed.jobs import CPU
from tests.processes import Command

ROOT = Path(__file__).parents[2]
TRAIN = (sys.executable, "-m", "stackproof", "train", "pocket")
BLOCKS = re.findall(
    r"^```(\w+)[^\n]*\n(.*?)^```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL | re.MULTILINE
)


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def test_one_command_trains_on_two_processes_under_all_gates(tmp_path, text_file):
    run_dir = tmp_path / "run"
    arguments = tiny(text_file, parallel__compare_every="8")
    done = subprocess.run(
        [*TRAIN, "--nproc", "2", *arguments, "--run-dir", str(run_dir), "--json"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((run_dir / "metadata.json").read_text())
    assert record["status"] == "completed" and record["environment"]["world_size"] == 2
    verdicts = {gate["id"]: gate["verdict"] for gate in record["gates"]}
    assert sum(name.startswith("distributed.") for name in verdicts) == 8
    assert set(verdicts.values()) == {"pass"}, verdicts
    assert json.loads(done.stdout)["record"] == record["id"]  # one document, of rank 0
    # Progress comes from rank 0 alone, and nothing else comes to the terminal.
    progress = [line for line in done.stderr.splitlines() if line.startswith("step 24/24")]
    assert len(progress) == 1 and "Warning" not in done.stderr, done.stderr
    (started,) = output_of(run_dir, 1).read_text().splitlines()
    assert started.startswith("--- rank 1, start 1")
    assert not output_of(run_dir, 0).exists()
    assert "ranks_communication_frac" in record["metrics"]


def test_a_refused_mesh_starts_no_process(tmp_path):
    done = subprocess.run(
        [*TRAIN, "--nproc", "3", "--run-dir", str(tmp_path / "run")],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "train.tokens_per_step" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("ending", "code", "n_starts"),
    [
        ("exit 0", 0, 1),
        ("exit 75", 75, 1),
        ("exit 4", 4, 1),
        ("exit 2", 2, 1),
        ("kill -TERM $$", 75, 1),
        ("exit 7", 7, 3),
        ("exit 1", 1, 3),
        ("kill -KILL $$", 7, 3),
        ('test "$STACKPROOF_RESTARTS" = 1 || exit 7', 0, 2),
    ],
)
def test_only_a_lost_process_is_started_again(tmp_path, ending, code, n_starts):
    """Processes that only end, in place of those of a run."""
    process = tmp_path / "process"
    process.write_text(f'#!/bin/sh\necho "$STACKPROOF_RESTARTS" >> {tmp_path}/starts\n{ending}\n')
    process.chmod(0o700)
    begin = (
        "import sys; from stackproof.distributed.launch import launch\n"
        "from stackproof.spec.errors import RankLost; from pathlib import Path\n"
        f"sys.executable = {str(process)!r}\n"
        "try: code = launch([], 1, Path('run'), max_restarts=2)\n"
        "except RankLost as e: code = e.exit_code\n"
        "sys.exit(code)"
    )
    assert Command(folder=tmp_path, code=begin).wait().code == code
    starts = (tmp_path / "starts").read_text().split()
    assert starts == [str(n) for n in range(n_starts)]


def test_agents_on_two_nodes_start_their_ranks_again_together(tmp_path):
    """Only the agent of the killed rank counts a restart."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node"]
    agent += ["1", "--max-restarts", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test"]
    agent += ["--rdzv-endpoint", f"localhost:{port}", "-m", "tests.distributed.node", str(tmp_path)]
    nodes = [subprocess.Popen(agent, env=environment(), cwd=ROOT) for _ in range(2)]
    assert [node.wait() for node in nodes] == [0, 0]
    texts = sorted(path.read_text() for path in tmp_path.iterdir())
    assert texts == ["3, 0 counted", "3, 1 counted"]


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_that_are_not_connected_are_refused(monkeypatch, variable):
    monkeypatch.setenv(variable, "2")
    with pytest.raises(UsageError, match="not connected"), joined(recipe("pocket"), CPU):
        pass
    monkeypatch.setenv(variable, "1")
    with joined(recipe("pocket"), CPU) as ranks:
        assert ranks.sizes.world_size == 1


def test_the_slurm_script_of_the_guide_is_a_script():
    (script,) = [text for _, text in BLOCKS if text.startswith("#!/bin/bash")]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert "--ntasks-per-node=1" in script and "torchrun" in script
    assert commands(script) == ["train pocket"]


def test_the_job_of_the_guide_is_a_job():
    (text,) = [text for language, text in BLOCKS if language == "yaml"]
    service, job = yaml.safe_load_all(text)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    nodes = next(a for a in container["args"] if a.startswith("--nnodes="))
    assert job["spec"]["completions"] == int(nodes.split("=")[1]) == job["spec"]["parallelism"]
    endpoint = next(a for a in container["args"] if a.startswith("--rdzv-endpoint="))
    assert endpoint.split("=")[1].startswith(f"{job['metadata']['name']}-0.")
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"]
    assert commands(" ".join([*container["command"], *container["args"]])) == ["train pocket"]


def test_the_settings_of_the_guide_are_those_of_the_configuration():
    import tomllib

    (text,) = [text for language, text in BLOCKS if language == "toml"]
    declared = tomllib.loads(text)["parallel"]
    fixed = {f"parallel.{name}": (value, "guide") for name, value in declared.items()}
    assert load_config(recipe("pocket"), fixed=fixed)[0] == recipe("pocket")


def commands(text: str) -> list[str]:
    """Verb and recipe of each run of the stack in a script."""
    return [" ".join(found) for found in re.findall(r"-m stackproof (\w+) (\w+)", text)]
