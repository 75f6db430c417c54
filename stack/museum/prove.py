"""Proves gates: green on the clean stack, red on every plant,
by the gate that is named and by no crash.
"""

import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stackproof.config import RunConfig, load_config
from stackproof.contracts.callbacks.digest import of_tensors
from stackproof.contracts.gate import Verdict, call_check, not_run
from stackproof.contracts.keeper import Gatekeeper
from stackproof.contracts.subject import Subject
from stackproof.data.prepare import prepare
from stackproof.data.tokenizer import Bytes
from stackproof.export import huggingface, parity, reading
from stackproof.model.build import build_model
from stackproof.museum import commands, ranks, script
from stackproof.museum.collection import exportable, museum_config, write_texts
from stackproof.museum.observe import Clock, fruits_of_run, moment_of, watching
from stackproof.museum.plant import Plant, Trainer, load_museum
from stackproof.museum.ranks import RankPool, pool
from stackproof.spec.building import RecordBuilder
from stackproof.spec.canonical import canonical_lines, sha256_file, sha256_json
from stackproof.spec.errors import GateFailed
from stackproof.spec.failures import load_catalogue
from stackproof.spec.files import write_atomically
from stackproof.spec.gates import Gate, load_spec
from stackproof.spec.records import OUTCOMES, GateResult, Kill, Record
from stackproof.subject.assemble import subject_of
from stackproof.train.device import kernels_of
from stackproof.train.loop import train
from stackproof.train.start import fresh

CLAIM = "Each gate named here turned red on its plant and was green on the same stack without it."
NOT_COVERED = (
    "bugs that no plant stands for",
    (
        "GPU kernels and more than one process: the proof runs on one CPU process, eagerly but "
        "for the gate of the compiled graph"
    ),
    "other configurations than the museum's own small one",
)
MATRIX = "matrix.jsonl"
JUDGES_DATA = ("corpus", "data", "tokenizer")


@contextmanager
def workshop() -> Iterator[Path]:
    """A temporary folder with the museum's texts and a data cache of its own; one thread,
    so that small models run fast.
    """
    threads, former = torch.get_num_threads(), os.environ.get("STACKPROOF_CACHE")
    with tempfile.TemporaryDirectory(prefix="stackproof-museum-") as folder:
        root = Path(folder)
        write_texts(root)
        torch.set_num_threads(1)
        try:
            yield root
        finally:
            torch.set_num_threads(threads)
            use_cache(former)


def use_cache(path: str | Path | None) -> None:
    """Where prepared data are kept from now on; None: where the user has them."""
    if path is None:
        os.environ.pop("STACKPROOF_CACHE", None)
    else:
        os.environ["STACKPROOF_CACHE"] = str(path)


class Seen(NamedTuple):
    """What was seen of one gate on one plant."""

    outcome: str
    verdict: Verdict
    latency: str = ""
    steps: int | None = None
    touches: int = 0


class Control(NamedTuple):
    """A gate on the clean stack, with the worst it measured there."""

    outcome: str
    measured: dict[str, Any]


UNASKED = Control("not_run", {})
Controls = dict[tuple[str, Trainer], Control]


def trainers_of(gate: Gate) -> tuple[Trainer, ...]:
    """The trainers in which a gate is proven: our own, and the script for those of other
    trainers.
    """
    script_too: tuple[Trainer, ...] = ("script",) if "foreign" in gate.kinds else ()
    return script_too if gate.kinds == ("foreign",) else ("stack", *script_too)


class Prover:
    """Runs one gate at a time on the museum's configuration, with or without a plant. `command`
    performs the command lines that gates of commands need.
    """

    def __init__(self, root: Path, command: commands.Perform | None = None):
        self.root, self.spec, self.catalogue = root, load_spec(), load_catalogue()
        self.command, self._trained = command, root / "runs" / "trained"
        self.cfg = museum_config(root)
        self._runs = 0
        self._open = ExitStack()
        self._ranks: RankPool | None = None
        self._fruits: dict[str, Any] = {}
        self._controls: dict[str, Control] = {}

    def close(self) -> None:
        """End the processes that proofs on several ranks have started."""
        self._open.close()

    def control(self, gates: list[Gate]) -> Controls:
        """Every gate without a plant, in each trainer it is for. In our trainer one run serves all
        gates but those that need another configuration.
        """
        use_cache(self.root / "cache")
        found: Controls = {}
        alone = [g for g in gates if "train" in g.kinds and g.min_ranks == 1]
        if together := [g for g in alone if not (g.when or g.needs)]:
            with watching() as worst:
                try:
                    record = train(
                        fresh(self.cfg, (), self.run_dir(), only=tuple(g.id for g in together))
                    )
                except GateFailed as e:
                    record = e.record
            for g in record.gates:
                measured = dict(g.measured) | worst.get(g.id, {})
                found[g.id, "stack"] = Control(g.verdict, measured)
        for gate in gates:
            for trainer in trainers_of(gate):
                if (gate.id, trainer) not in found:
                    found[gate.id, trainer] = self._control(gate, trainer)
        return found

    def config(self, gate: Gate, plant: Plant | None = None) -> RunConfig:
        """The configuration under which a gate, or one of its plants, is proven."""
        settings = gate.when | gate.museum | (dict(plant.museum) if plant else {})
        settings = ranks.SETTINGS | settings if gate.min_ranks > 1 else settings
        fixed = {key: (value, f"gate {gate.id}") for key, value in settings.items()}
        return load_config(self.cfg, fixed=fixed)[0]

    def control_of(self, gate: Gate, plant: Plant) -> Control:
        """The gate on the clean stack, under the configuration of one of its plants."""
        key = sha256_json([gate.id, dict(plant.museum)])
        if key not in self._controls:
            use_cache(self.root / "cache")
            self._controls[key] = self._control(gate, plant.trainer, plant)
        return self._controls[key]

    def _control(self, gate: Gate, trainer: Trainer, plant: Plant | None = None) -> Control:
        with watching() as worst:
            try:
                verdict, _ = self._run(gate, trainer, plant)
            except GateFailed as e:
                verdict = e.verdict or Verdict("fail", str(e))
        return Control(verdict.outcome, dict(verdict.measured) | worst.get(gate.id, {}))

    def planted(self, gate: Gate, plant: Plant, control: Control = UNASKED) -> Seen:
        """One gate on one plant, in the trainer that the plant changes; `control` is the gate in
        that trainer. Data are prepared under the plant where the gate judges data.

        Killed is only what the gate itself turned red on, in time,
        and only if the planted line ran.
        """
        if commands.is_of_command(gate):
            self.trained()
        self.use_cache_of(gate, plant)
        clock = Clock()
        try:
            with plant.apply():
                verdict, step = self._run(gate, plant.trainer, plant, clock)
        except GateFailed as e:
            if e.gate_id != gate.id:
                red = e.verdict or not_run(str(e))
                return Seen("missed", red, f"{e.gate_id} fired instead", touches=clock.ran())
            verdict, step = e.verdict or Verdict("fail", str(e)), _step_of(e, gate, self.cfg)
        except Exception as e:
            raised = not_run(f"{type(e).__name__}: {e}")
            return Seen("crashed", raised, touches=clock.ran())
        if not (ran := clock.ran()):
            never = f"the planted line never ran; {verdict.message}"
            return Seen("equivalent", replace(verdict, message=never))
        if verdict.outcome == "fail":
            return self._judged(gate, plant, verdict, step, clock, ran)
        same = dict(verdict.measured) == control.measured and not self._differs(gate, plant)
        return Seen("equivalent" if same else "missed", verdict, touches=ran)

    def _judged(
        self, gate: Gate, plant: Plant, verdict: Verdict, step: int | None, clock: Clock, ran: int
    ) -> Seen:
        """A red gate: a kill if it is not later than the catalogue states."""
        moment, (_, allowed) = moment_of(gate), self.catalogue.deadline(gate, plant.id)
        steps = None if step is None or gate.moment != "runtime" else clock.lived(step)
        if allowed is not None and steps is not None and steps > allowed:
            late = f"red {steps} steps after it began, at most {allowed} are stated"
            late = f"{late}; {verdict.message}"
            return Seen("missed", replace(verdict, message=late), f"step {step}", steps, ran)
        return Seen("killed", verdict, moment if steps is None else f"step {step}", steps, ran)

    def _differs(self, gate: Gate, plant: Plant) -> bool:
        """Whether the outputs of a run or an export differ from those without the plant.
        An error is a difference.
        """
        kind = "export" if "export" in gate.kinds else plant.trainer
        if kind not in self._fruits:
            self._fruits[kind] = self._brought_forth(kind)
        try:
            with plant.apply():
                return self._brought_forth(kind) != self._fruits[kind]
        except Exception:
            return True

    def _brought_forth(self, kind: str) -> Any:
        if kind == "script":
            return of_tensors(script.run(())[1].state_dict())
        if kind == "export":
            folder = self._write_folder(Gatekeeper(self.spec, kind="export", only=()), tied=True)
            return {p.name: sha256_file(p) for p in folder.iterdir()}
        run_dir = self.run_dir()
        return fruits_of_run(train(fresh(self.cfg, (), run_dir, only=())), run_dir)

    def use_cache_of(self, gate: Gate, plant: Plant) -> None:
        """Prepare data under the plant if the gate judges data; else take those of all plants."""
        use_cache(self.root / (plant.id if gate.subsystem in JUDGES_DATA else "cache"))

    def verdict_of(self, gate: Gate) -> Verdict:
        """The gate's verdict on the stack as it is now.
        Raises GateFailed where a red gate halts.
        """
        return self._run(gate, "stack")[0]

    def _run(
        self, gate: Gate, trainer: Trainer, plant: Plant | None = None, clock: Clock | None = None
    ) -> tuple[Verdict, int | None]:
        """The gate's verdict in one trainer, under the configuration of a plant, and the step at
        which it turned red in a run.
        """
        if commands.is_of_command(gate):
            return self._by_command(gate, clock)
        planted = plant.id if plant and clock else None
        if trainer == "script" and gate.min_ranks > 1:
            return self._on_ranks(gate, clock, "judge_script", (gate.id,), planted)
        if trainer == "script":
            return script.verdict_of(gate.id)
        cfg = self.config(gate, plant)
        if gate.min_ranks > 1:
            job = cfg, (gate.id,), planted, self.root / "cache", self.run_dir()
            return self._on_ranks(gate, clock, "judge", *job)
        if gate.moment == "preflight":
            dataset, device = prepare(cfg.data), torch.device("cpu")
            with kernels_of(cfg, device):
                return call_check(gate, subject_of(cfg, dataset, device)), None
        if "export" in gate.kinds:
            result = self._export(gate)
            if "import" in gate.kinds and result.verdict == "pass":
                result = self._import(gate)
        else:
            watching = (clock,) if clock else ()
            record = train(fresh(cfg, (), self.run_dir(), watching, only=(gate.id,)))
            result = next(g for g in record.gates if g.id == gate.id)
        return Verdict(result.verdict, result.message, result.measured), result.first_failure_step

    def trained(self) -> Path:
        """A run of the museum without gates, for commands that read one."""
        if not self._trained.exists():
            train(fresh(self.cfg, (), self._trained, only=()))
        return self._trained

    def _by_command(self, gate: Gate, clock: Clock | None) -> tuple[Verdict, None]:
        """The gate's verdict in the command that it belongs to."""
        assert self.command is not None, f"{gate.id} is proven by a command line"
        done = commands.perform(gate, self.trained(), self.run_dir(), self.command)
        if clock:
            clock.elsewhere += done.touches
        if done.error is not None:
            raise done.error
        if done.gate_id != gate.id:
            raise GateFailed(done.gate_id, done.verdict, what=done.verdict.message)
        return done.verdict, None

    def _on_ranks(
        self, gate: Gate, clock: Clock | None, job: str, *arguments: Any
    ) -> tuple[Verdict, int | None]:
        """The gate's verdict in a job on several processes, each of which applies the plant."""
        if self._ranks is None:
            self._ranks = self._open.enter_context(pool())
        answers = self._ranks.run(f"{ranks.__name__}:{job}", *arguments, n_ranks=gate.min_ranks)
        judged = [answer.value for answer in answers if answer.value is not None]
        if clock:
            clock.elsewhere += sum(one.touches for one in judged)
            clock.began = min((one.began for one in judged if one.began), default=None)
        for one in judged:
            if gate.id in one.verdicts:
                return one.verdicts[gate.id]
        errors = [answer.raised or answer.value.error for answer in answers]
        reasons = [error.strip().splitlines()[-1] for error in errors]
        raise RuntimeError(f"no rank has a verdict: {' / '.join(reasons)}")

    def _export(self, gate: Gate) -> GateResult:
        """Verdict on an export of a small model; a red one raises."""
        keeper = Gatekeeper(self.spec, kind="export", only=[gate.id])
        self._write_folder(keeper, tied=True)
        return keeper.results()[0]

    def _import(self, gate: Gate) -> GateResult:
        """Verdict on a folder of a model with a head of its own that is read back;
        a red one raises.
        """
        keeper = Gatekeeper(self.spec, kind="import", only=[gate.id])
        unjudged = Gatekeeper(self.spec, kind="export", only=())
        source = reading.open_folder(self._write_folder(unjudged, tied=False))
        model = reading.load_weights(source)
        with huggingface.readable(source) as readable:
            keeper.artifact(Subject(exported=parity.Compared(model, readable)))
        return keeper.results()[0]

    def _write_folder(self, keeper: Gatekeeper, *, tied: bool) -> Path:
        cfg = exportable(self.cfg.model).model_copy(update={"tied_head": tied})
        folder = self.run_dir()
        model = build_model(cfg, Bytes().vocab_size, seed=self.cfg.seed)
        huggingface.export(model, Bytes(), folder, keeper, card=lambda folder, made: None)
        return folder

    def run_dir(self) -> Path:
        """A fresh folder of the workshop, not made yet."""
        self._runs += 1
        return self.root / "runs" / str(self._runs)


def _step_of(error: GateFailed, gate: Gate, cfg: RunConfig) -> int | None:
    """The step at which a run was halted; its last one for a gate that was missed only then."""
    if gate.moment != "runtime":
        return None
    results = error.record.gates if getattr(error, "record", None) else ()
    step = next((g.first_failure_step for g in results if g.id == gate.id), None)
    return cfg.train.max_steps if step is None else step


def selection(gate_ids: Iterable[str]) -> list[Gate]:
    """The gates to prove; all with an empty selection. Raises ConfigError for an unknown id."""
    spec = load_spec()
    return [spec.gate(g) for g in list(gate_ids) or spec.gates]


def prove(
    gate_ids: Iterable[str],
    command: commands.Perform,
    on_kill: Callable[[Kill], None] = lambda kill: None,
) -> list[Kill]:
    """Control and every plant of the chosen gates; `command` performs a command line.
    A plant that is not in the museum is `awaiting`, never killed.
    """
    gates, plants = selection(gate_ids), load_museum()
    kills = []
    with workshop() as root, closing(Prover(root, command)) as prover:
        controls = prover.control(gates)
        for gate in gates:
            for plant_id in gate.plants:
                kill = _prove_one(prover, gate, plants.get(plant_id), plant_id, controls)
                kills.append(kill)
                on_kill(kill)
    return kills


def _prove_one(
    prover: Prover, gate: Gate, plant: Plant | None, plant_id: str, controls: Controls
) -> Kill:
    started = time.perf_counter()
    outcomes = [controls.get((gate.id, t), UNASKED).outcome for t in trainers_of(gate)]
    control = controls.get((gate.id, plant.trainer), UNASKED) if plant else UNASKED
    if plant and plant.museum:
        control = prover.control_of(gate, plant)
        outcomes.append(control.outcome)
    if plant is None:
        seen = Seen("awaiting", not_run("the plant is not in the museum"))
    else:
        seen = prover.planted(gate, plant, control)
    return Kill(
        gate=gate.id,
        fingerprint=prover.spec.fingerprint(gate.id),
        plant=plant_id,
        plant_sha256="0" * 64 if plant is None else plant.sha256,
        outcome=seen.outcome,
        control=next((o for o in outcomes if o != "pass"), "pass"),
        latency=seen.latency,
        seconds=round(time.perf_counter() - started, 3),
        measured=plain(seen.verdict.measured),
        message=seen.verdict.message,
        control_measured=plain(control.measured),
        moment=moment_of(gate) if seen.outcome == "killed" else "",
        latency_steps=seen.steps,
        touches=seen.touches,
    )


def plain(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Measurements for a record: non-finite numbers become text."""
    return {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
        for k, v in measured.items()
    }


def falsification_record(
    kills: list[Kill], builder: RecordBuilder, directory: Path, matrix: list[dict] | None = None
) -> Record:
    """Write the record of a proof. Its status is completed only if every plant was killed
    and every control was green.

    Failures of the catalogue that await a part of the stack are counted as such, and are neither
    killed nor a defect. Rows of a `matrix` become a series beside the record.
    """
    counts, catalogue, metric = Counter(k.outcome for k in kills), load_catalogue(), builder.metric
    builder.kills = kills
    metric("failures", len(catalogue.failures), "failures")
    metric("failures_awaiting", len(catalogue.awaiting()), "failures")
    if matrix is not None:
        write_atomically(directory / MATRIX, canonical_lines(matrix))
        seconds = round(sum(row["seconds"] for row in matrix), 1)
        metric("matrix_s", seconds, "s", better="lower")
    metric("plants", len(kills), "plants")
    for outcome in OUTCOMES:
        better = "higher" if outcome == "killed" else "lower"
        metric(outcome, counts[outcome], "plants", better=better)
    metric("gates", len({k.gate for k in kills}), "gates")
    green = len({k.gate for k in kills if k.control == "pass"})
    metric("controls_green", green, "gates", better="higher")
    bad = [f"{k.plant} {k.outcome}" for k in kills if k.outcome != "killed"] + sorted(
        {f"control of {k.gate} {k.control}" for k in kills if k.control != "pass"}
    )
    return builder.finish(
        directory,
        status="failed" if bad else "completed",
        end_reason="; ".join(bad) if bad else "every plant killed, every control green",
        exit_code=4 if bad else 0,
        series=(MATRIX,),
    )
