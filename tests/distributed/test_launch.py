"""Starting a run on several processes: the command line, agents on two nodes, and the guide."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from stackproof.cli import main
from stackproof.config import ByteTokenizer, DataConfig, Files, load_config
from stackproof.data.prepare import prepare
from stackproof.distributed import launch, started
from stackproof.distributed.output import output_of
from stackproof.distributed.process_group import joined
from stackproof.recipes import recipe
from stackproof.spec.errors import UsageError
from tests.cli.conftest import tiny
from tests.distributed.jobs import CPU
from tests.processes import Command, Done

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
    assert "on 2 ranks: replicate 1 × shard 2 × tensor 1 (cpu, gloo)" in done.stderr
    (first,) = output_of(run_dir, 1).read_text().splitlines()
    assert first.startswith("--- rank 1, start 1")
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
    script = f'echo "$STACKPROOF_RESTARTS" >> {tmp_path}/starts\n{ending}'
    assert launched(tmp_path, script, max_restarts=2).code == code
    starts = (tmp_path / "starts").read_text().split()
    assert starts == [str(n) for n in range(n_starts)]


def launched(folder: Path, script: str, n_ranks: int = 1, max_restarts: int = 0) -> Done:
    """What a launcher leaves whose processes run a script of the shell, in place of ranks."""
    process = folder / "process"
    process.write_text(f"#!/bin/sh\n{script}\n")
    process.chmod(0o700)
    begin = (
        "import sys; from stackproof.distributed.launch import launch\n"
        "from stackproof.spec.errors import RankLost; from pathlib import Path\n"
        f"sys.executable = {str(process)!r}\n"
        f"given = dict(max_restarts={max_restarts}, note=print)\n"
        f"try: code = launch([], {n_ranks}, Path('run'), **given)\n"
        "except RankLost as e: print(e); code = e.exit_code\n"
        "import os; from stackproof.distributed import parent, started\n"
        "names = parent.LAUNCHER, started.RESTARTS, started.LOST_RANK\n"
        "assert not {*names} & {*os.environ}, 'other launchers would take them over'\n"
        "sys.exit(code)"
    )
    return Command(folder=folder, code=begin).wait()


# Rank 1 is killed in the first start, after which rank 0 states an error, as survivors do.
KILLED = """
test "$STACKPROOF_RESTARTS" = 1 && { echo "$STACKPROOF_LOST_RANK" > lost; exit 0; }
if test "$RANK" = 1; then echo $$ > .pid; mv .pid pid; kill -KILL $$; fi
until test -f pid; do sleep 0.01; done
while kill -0 $(cat pid) 2> /dev/null; do sleep 0.01; done
exit 7
"""


def test_a_killed_rank_is_named_with_its_signal_and_the_restart(tmp_path):
    done = launched(tmp_path, KILLED, n_ranks=2, max_restarts=2)
    pid = int((tmp_path / "pid").read_text())
    assert done.code == 0
    assert done.out == f"rank 1 (pid {pid}) was ended by SIGKILL; restart 1 of 2\n"
    lost = json.loads((tmp_path / "lost").read_text())
    assert lost == {"rank": 1, "pid": pid, "code": -9}


def test_a_killed_rank_is_named_without_a_restart(tmp_path):
    done = launched(tmp_path, KILLED, n_ranks=2)
    pid = (tmp_path / "pid").read_text().strip()
    assert done.code == 7
    assert done.out.startswith(f"rank 1 (pid {pid}) was ended by SIGKILL")


RANK = """
import os, signal, time
from stackproof.distributed.parent import end_with_launcher
end_with_launcher(int(os.environ["STACKPROOF_LAUNCHER"]))
with open("pids", "a") as file:
    file.write(f"{os.getpid()}\\n")
if os.environ["RANK"] == "1":
    os.kill(os.getppid(), signal.SIG%s)
time.sleep(30)
open("outlived", "w").close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends a rank")
@pytest.mark.parametrize(("name", "code"), [("TERM", 75), ("INT", 130)])
def test_a_signal_while_ranks_are_started_ends_those_that_have_begun(tmp_path, name, code):
    """Torch's agent forgets processes that it has started when the signal comes."""
    (tmp_path / "rank.py").write_text(RANK % name)
    done = launched(tmp_path, f"exec {sys.executable} rank.py", n_ranks=12, max_restarts=2)
    assert done.code == code
    pids = (tmp_path / "pids").read_text().split()
    assert pids
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.01)
    assert not (tmp_path / "outlived").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends a rank")
@pytest.mark.parametrize(("alive", "code"), [(True, 0), (False, -15)])
def test_a_rank_ends_before_its_imports_if_its_launcher_has_ended(alive, code):
    launcher = os.getpid() if alive else 1
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "stackproof", "--help"],
        env=environment(STACKPROOF_LAUNCHER=str(launcher)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr[-2000:]
    assert ("Usage" in done.stdout) == alive
    assert ("stackproof.cli" in done.stderr) == alive and "stackproof.distributed" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends a rank")
def test_the_kernel_ends_a_rank_with_its_launcher():
    shown = (
        "import ctypes; from stackproof.distributed.parent import end_with_launcher\n"
        "end_with_launcher(); number = ctypes.c_int()\n"
        "ctypes.CDLL(None).prctl(2, ctypes.byref(number)); print(number.value)"
    )
    command = [sys.executable, "-c", shown]
    assert subprocess.check_output(command, env=environment(), text=True) == "15\n"


@pytest.mark.parametrize(
    ("variables", "n", "command"),
    [
        ({}, None, "stack train --resume runs/a"),
        ({}, 2, "stack train --resume runs/a --nproc 2"),  # of the launcher
        (
            {"WORLD_SIZE": "2", "STACKPROOF_RESTARTS": "0"},
            None,
            "stack train --resume runs/a --nproc 2",
        ),
        ({"WORLD_SIZE": "8"}, None, "torchrun … -m stackproof train --resume runs/a"),
    ],
)
def test_the_next_command_starts_as_many_processes(monkeypatch, variables, n, command):
    for name in ("WORLD_SIZE", "STACKPROOF_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert started.resume_command(Path("runs/a"), n) == command


@pytest.mark.parametrize(
    ("devices", "arguments", "code", "told"),
    [
        (0, ("--device", "cuda", "--nproc", "2"), 7, "torch finds no CUDA device"),
        (1, ("--device", "cuda", "--nproc", "2"), 7, "2 ranks on this machine, 1 CUDA devices"),
        (2, ("--device", "cuda", "--nproc", "2"), None, ""),
        (0, ("--device", "cpu", "--nproc", "2"), None, ""),
        (0, ("--device", "cpu", "--nproc", "4"), None, "4 processes on 2 cores"),
        (0, ("--restarts", "3"), 2, "--restarts 3, --nproc 1"),
    ],
)
def test_what_the_machine_lacks_is_stated_before_processes_start(
    monkeypatch, tmp_path, capsys, devices, arguments, code, told
):
    launches = []
    monkeypatch.setattr(launch, "launch", lambda *given, **more: launches.append(given) or 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(SystemExit) as ended:
        main(["train", "pocket", *arguments, "--run-dir", str(tmp_path / "run")])
    assert ended.value.code == (code or 0) and len(launches) == (code is None)
    text = capsys.readouterr().err
    assert told in text if told else text == ""
    assert not (tmp_path / "run").exists()


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


# They stand for programs of SLURM: the ranks end with 1 after SIGTERM, or at once with 3.
STAND_INS = {
    "srun": 'touch begun; [ "$FAILS" ] && exit 3; until [ -e stopped ]; do sleep .1; done; exit 1',
    "scancel": 'test "$*" = "--signal=TERM 7" && touch stopped',
    "scontrol": 'test "$1" = show && echo node0 || echo "$@" >> requeued',
}


def begun_by_slurm(folder: Path, **more: str) -> subprocess.Popen:
    """The script of the guide, begun in a folder with programs that stand for those of SLURM."""
    (folder / "stackproof/bin").mkdir(parents=True)
    (folder / "stackproof/bin/activate").touch()
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o700)
    own = {"HOME": str(folder), "SLURM_JOB_ID": "7", "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.Popen(["bash", "-c", slurm_script()], cwd=folder, env=own | more)


def slurm_script() -> str:
    (script,) = [text for _, text in BLOCKS if text.startswith("#!/bin/bash")]
    return script


def test_the_slurm_script_queues_the_job_again_before_its_time_limit(tmp_path):
    job = begun_by_slurm(tmp_path)
    while not (tmp_path / "begun").exists():
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait() == 1
    assert (tmp_path / "stopped").exists() and (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_the_slurm_script_does_not_queue_a_job_again_that_has_failed(tmp_path):
    assert begun_by_slurm(tmp_path, FAILS="1").wait() == 3
    assert (tmp_path / "begun").exists() and not (tmp_path / "requeued").exists()


def test_the_slurm_script_starts_one_agent_on_each_node():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", slurm_script(), re.MULTILINE))
    assert options["ntasks-per-node"] == "1" and options["signal"].startswith("B:USR1@")
    assert f"--nproc-per-node {options['gpus-per-node']} " in slurm_script()
    assert {"requeue", "cpus-per-task", "time", "mem", "output"} <= options.keys()
    assert int(options["signal"].split("@")[1]) > number_in(slurm_script(), "shutdown-timeout")


def test_the_job_of_the_guide_is_a_job():
    service, claim, job = kubernetes()
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    arguments = " ".join(container["args"])
    assert (
        job["spec"]["completions"] == job["spec"]["parallelism"] == number_in(arguments, "nnodes")
    )
    endpoint = re.search(r"--rdzv-endpoint=(\S+)", arguments)[1]
    assert endpoint.startswith(f"{job['metadata']['name']}-0.{spec['subdomain']}:")
    assert service["metadata"]["name"] == spec["subdomain"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == number_in(
        arguments, "nproc-per-node"
    )
    assert spec["terminationGracePeriodSeconds"] > number_in(arguments, "shutdown-timeout")
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in spec["volumes"]}
    assert mounted["shm"] == "/dev/shm" and f"--run-dir {mounted['runs']}/" in arguments
    (runs,) = [v["persistentVolumeClaim"] for v in spec["volumes"] if v["name"] == "runs"]
    assert runs["claimName"] == claim["metadata"]["name"]


def kubernetes() -> list[dict]:
    (text,) = [text for language, text in BLOCKS if language == "yaml"]
    return list(yaml.safe_load_all(text))


def number_in(text: str, option: str) -> int:
    return int(re.search(rf"--{option}[= ](\d+)", text)[1])


@pytest.mark.parametrize("file", ["slurm", "kubernetes"])
def test_the_runs_of_the_guide_can_be_divided_among_their_ranks(in_process, data_set, file):
    if file == "slurm":
        command = slurm_script().replace("\\\n", " ")
        n_nodes = number_in(command, "nodes")
    else:
        (container,) = kubernetes()[-1]["spec"]["template"]["spec"]["containers"]
        command = " ".join([*container["command"], *container["args"]])
        n_nodes = number_in(command, "nnodes")
    (run,) = re.findall(r"torchrun .*-m stackproof (train .*?)(?:&|$)", command, re.MULTILINE)
    arguments = shlex.split(run)
    assert "--auto-resume" in arguments and "--run-dir" in arguments
    arguments[arguments.index("--data") + 1] = data_set
    n_ranks = n_nodes * number_in(command, "nproc-per-node")
    code, found = in_process(*arguments, "--nproc", n_ranks, "--dry-run")
    assert code == 0, found
    ranks = found["derived"]["ranks"]
    assert (ranks["world_size"], ranks["fits"]) == (16, True)
    assert in_process("train", "pocket", "--nproc", n_ranks, "--dry-run")[0] == 2


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """A small folder that `stack data build` has written, with the vocabulary of its recipe."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "t.txt").write_text("\n".join(f"line {n} of a small corpus" for n in range(60)))
    files = Files(paths=(str(folder / "t.txt"),), documents="line")
    cfg = DataConfig(corpus=files, tokenizer=ByteTokenizer())
    return str(prepare(cfg, cache_dir=folder / "cache").directory)


def test_the_settings_of_the_guide_are_those_of_the_configuration():
    import tomllib

    (text,) = [text for language, text in BLOCKS if language == "toml"]
    declared = tomllib.loads(text)["parallel"]
    fixed = {f"parallel.{name}": (value, "guide") for name, value in declared.items()}
    assert load_config(recipe("pocket"), fixed=fixed)[0] == recipe("pocket")
