"""Commands in processes of their own, forked from one that has imported the libraries: a child has
its own memory, signals and exit code.

Importing torch and all that hangs on it takes three to five seconds, and hashing the code of the
gates one: more than most of these commands.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver, get_context
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
STACK = "from stackproof.cli import main; main()"


def preflight_of(*gates: str) -> str:
    """`stack …` with these gates alone before step 1, and all later ones: preflight is most of the
    time that a run of seconds takes.
    """
    return f"""
from stackproof.spec.gates import load_spec
from stackproof.train import start
later = [g.id for g in load_spec().gates.values() if g.moment != "preflight"]
keeper, chosen = start.Gatekeeper, [*{gates}, *later]
start.Gatekeeper = lambda *given, only=None, **options: keeper(
    *given, only=chosen if only is None else only, **options  # ranks other than 0 have none
)
{STACK}
"""


# For what is claimed of the run itself.
NO_PREFLIGHT = preflight_of()
# The loss of step 5 is no number, so that a gate halts the run.
NAN_AT_STEP_5 = """
from stackproof.train import loop
take = loop.steps.train_step
def broken(state, batches):
    report = take(state, batches)
    if state.step == 5:
        report.loss_nats = float("nan")
    return report
loop.steps.train_step = broken
"""
# The longest command takes a minute in a short round, and half an hour in a long one.
HANGING_S = 3 * 3600 if os.environ.get("STRESS") else 1800
PRELOADED = [
    "torch._dynamo",
    "stackproof.cli",
    "stackproof.model.parallelize",
    "stackproof.train.start",
    "stackproof.museum.prove",
    "stackproof.evaluate.sampling",
    "tests.warm",
]


@dataclass
class Done:
    """What a command left: exit code (negative for a signal), and all it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@cache
def server():
    """The process that imports once, for commands and for pools of ranks.
    It computes nothing, so that its children inherit no thread and no random state in use.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # which it inherits
        forkserver.ensure_running()
    return context


class Command:
    """Python `code` begun in a folder, with `arguments` in sys.argv and one thread;
    `stack …` unless said otherwise. A `light` one is forked from this process, with what it has
    imported and read, and must not use torch.
    """

    def __init__(
        self,
        *arguments: str,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        code: str = STACK,
        light: bool = False,
    ):
        self.temporary = tempfile.TemporaryDirectory(prefix="stackproof-said-")
        self.said = Path(self.temporary.name)
        environment = {
            **(os.environ if environment is None else environment),
            "OMP_NUM_THREADS": "1",
        }
        self.process = (get_context("fork") if light else server()).Process(
            target=_become, args=(code, arguments, str(folder), environment, str(self.said))
        )
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float = HANGING_S) -> Done:
        """Raises TimeoutError if the command hangs; it is killed then."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"not done after {timeout} s: {(self.said / 'err').read_text()}")
        return Done(
            self.process.exitcode,
            *((self.said / name).read_text("utf-8") for name in ("out", "err")),
        )


@dataclass
class Forking:
    """Stands for `subprocess` in a module that starts `python -P -m stackproof …`: runs `code` with
    the same arguments in a fork. `light` is that of Command.
    """

    code: str = STACK
    light: bool = False

    def Popen(self, command: list[str], **streams) -> Command:
        assert command[:4] == [sys.executable, "-P", "-m", "stackproof"], command
        return Command(*command[4:], folder=Path.cwd(), code=self.code, light=self.light)

    def run(self, command: list[str], **streams) -> subprocess.CompletedProcess:
        done = self.Popen(command).wait()
        return subprocess.CompletedProcess(command, done.code, done.out, done.err)


def _become(
    code: str, arguments: tuple[str, ...], folder: str, environment: dict[str, str], said: str
) -> None:
    """In the child: be that command."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{said}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    # a fork inherits streams that a test runner has put in their place
    sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
    gc.freeze()  # what is inherited stays: no collection of garbage goes over it
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["stack", *arguments]
    exec(compile(code, "<command>", "exec"), {"__name__": "__main__"})
