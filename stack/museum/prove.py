"""Proves gates: green on the clean stack, red on every plant, by the gate that is named and by no crash."""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from contracts.gate import Verdict, call_check, not_run
from contracts.keeper import Gatekeeper
from spec.errors import ConfigError, GateFailed
from spec.gates import Gate, load_spec
from spec.records import GateResult, Kill, Record
from stack.config import load_config
from stack.data.prepare import prepare
from stack.data.tokenizer import Bytes
from stack.evidence.provenance import environment
from stack.evidence.record import RecordBuilder
from stack.export import huggingface
from stack.model.build import build_model
from stack.museum import script
from stack.museum.collection import exportable, museum_config, write_texts
from stack.museum.plant import Plant, load_museum, touches
from stack.train import session
from stack.train.listener import Listener
from stack.train.preflight import gather

CLAIM = "Each gate named here turned red on its plant and was green on the same stack without it."
NOT_COVERED = (
    "bugs that no plant stands for",
    "GPU kernels and more than one process: the proof runs on one CPU process, eagerly but for the gate of the compiled graph",
    "other configurations than the museum's own small one",
)


@contextmanager
def workshop() -> Iterator[Path]:
    """A temporary folder with the museum's texts and a data cache of its own; one thread, so that small models run fast."""
    threads, former = torch.get_num_threads(), os.environ.get("STACKPROOF_CACHE")
    with tempfile.TemporaryDirectory(prefix="stackproof-museum-") as folder:
        root = Path(folder)
        write_texts(root)
        torch.set_num_threads(1)
        try:
            yield root
        finally:
            torch.set_num_threads(threads)
            _set_cache(former)


def _set_cache(path: str | Path | None) -> None:
    if path is None:
        os.environ.pop("STACKPROOF_CACHE", None)
    else:
        os.environ["STACKPROOF_CACHE"] = str(path)


class Prover:
    """Runs one gate at a time on the museum's configuration, with or without a plant."""

    def __init__(self, root: Path):
        self.root, self.spec = root, load_spec()
        self.cfg = museum_config(root)
        self._runs = 0

    def control(self, gates: list[Gate]) -> dict[str, str]:
        """Outcome by gate on the clean stack: all in one run, and each that asks for another configuration under that one."""
        _set_cache(self.root / "cache")
        outcomes: dict[str, str] = {}
        together = [g for g in gates if "train" in g.kinds and not g.when]
        if together:
            try:
                record = session.start(self.cfg, (), self._run_dir(), Listener(), only=tuple(g.id for g in together))
            except GateFailed as e:
                record = e.record
            outcomes |= {g.id: g.verdict for g in record.gates}
        for gate in (g for g in gates if g not in together):
            try:
                outcomes[gate.id] = self._run(gate)[0].outcome
            except GateFailed:
                outcomes[gate.id] = "fail"
        return outcomes

    def planted(self, gate: Gate, plant: Plant) -> tuple[str, Verdict, str]:
        """(outcome, verdict, latency) of one gate on one plant. Data are prepared under the plant where the gate judges data."""
        _set_cache(self.root / (plant.id if gate.subsystem in ("corpus", "data", "tokenizer") else "cache"))
        before = touches()
        try:
            with plant.apply():
                verdict, latency = self._run(gate)
        except GateFailed as e:
            named = e.gate_id == gate.id
            return ("killed" if named else "missed"), e.verdict or not_run(str(e)), _latency(e) if named else f"{e.gate_id} fired instead"
        except Exception as e:
            return "crashed", not_run(f"{type(e).__name__}: {e}"), ""
        if verdict.outcome == "fail":
            return "killed", verdict, latency
        return ("missed" if touches() > before else "equivalent"), verdict, latency

    def _run(self, gate: Gate) -> tuple[Verdict, str]:
        if gate.kinds == ("foreign",):
            return script.ask(gate.id)
        cfg, _ = load_config(self.cfg, fixed={k: (v, f"gate {gate.id}") for k, v in (gate.when | gate.museum).items()})
        if gate.moment == "preflight":
            dataset = prepare(cfg.data)
            _, ingredients = gather(cfg, dataset, torch.device("cpu"))
            return call_check(gate, ingredients), "before step 1"
        if "export" in gate.kinds:
            result = self._export([gate.id])[0]
            return Verdict(result.verdict, result.message, result.measured), "before the folder was in place"
        record = session.start(cfg, (), self._run_dir(), Listener(), only=(gate.id,))
        result = next(g for g in record.gates if g.id == gate.id)
        return Verdict(result.verdict, result.message, result.measured), f"step {result.first_failure_step}"

    def _export(self, gate_ids: Iterable[str]) -> list[GateResult]:
        """Verdicts on an export of a small model; a red gate raises."""
        model = build_model(exportable(self.cfg.model), Bytes().vocab_size, seed=self.cfg.seed)
        keeper = Gatekeeper(self.spec, kind="export", only=gate_ids)
        huggingface.export(model, Bytes(), self._run_dir(), keeper, card=lambda made: "")
        return keeper.results()

    def _run_dir(self) -> Path:
        self._runs += 1
        return self.root / "runs" / str(self._runs)


def _latency(error: GateFailed) -> str:
    result = next((g for g in error.record.gates if g.id == error.gate_id), None) if getattr(error, "record", None) else None
    return f"step {result.first_failure_step}" if result else "before step 1"


def selection(gate_ids: Iterable[str]) -> list[Gate]:
    """The gates to prove; all with an empty selection. Raises ConfigError for an unknown id."""
    spec = load_spec()
    wanted = list(gate_ids) or list(spec.gates)
    if unknown := [g for g in wanted if g not in spec.gates]:
        raise ConfigError(
            f"there is no gate {unknown[0]}", allowed="stack gates list", next_step="stack gates prove without ids proves all"
        )
    return [spec.gates[g] for g in wanted]


def prove(gate_ids: Iterable[str], on_kill: Callable[[Kill], None] = lambda kill: None) -> list[Kill]:
    """Control and every plant of the chosen gates. A plant nobody built is `awaiting`, never killed."""
    gates, plants = selection(gate_ids), load_museum()
    kills = []
    with workshop() as root:
        prover = Prover(root)
        controls = prover.control(gates)
        for gate in gates:
            for plant_id in gate.plants:
                kill = _prove_one(prover, gate, plants.get(plant_id), plant_id, controls.get(gate.id, "not_run"))
                kills.append(kill)
                on_kill(kill)
    return kills


def _prove_one(prover: Prover, gate: Gate, plant: Plant | None, plant_id: str, control: str) -> Kill:
    started = time.perf_counter()
    fingerprint = prover.spec.fingerprint(gate.id)
    if plant is None:
        return Kill(
            gate=gate.id,
            fingerprint=fingerprint,
            plant=plant_id,
            plant_sha256="0" * 64,
            outcome="awaiting",
            control=control,
            latency="",
            seconds=0.0,
        )
    outcome, verdict, latency = prover.planted(gate, plant)
    return Kill(
        gate=gate.id,
        fingerprint=fingerprint,
        plant=plant.id,
        plant_sha256=plant.sha256,
        outcome=outcome,
        control=control,
        latency=latency,
        seconds=round(time.perf_counter() - started, 3),
        measured={k: str(v) if isinstance(v, float) and v != v else v for k, v in verdict.measured.items()},
        message=verdict.message,
    )


def falsification_record(kills: list[Kill], builder: RecordBuilder, directory: Path) -> Record:
    """Write the record of a proof. Its status is completed only if every plant was killed and every control was green."""
    counts = Counter(k.outcome for k in kills)
    builder.kills = kills
    builder.metric("plants", len(kills), "plants")
    for outcome in ("killed", "missed", "crashed", "equivalent", "awaiting"):
        builder.metric(outcome, counts.get(outcome, 0), "plants", better="higher" if outcome == "killed" else "lower")
    builder.metric("gates", len({k.gate for k in kills}), "gates")
    builder.metric("controls_green", len({k.gate for k in kills if k.control == "pass"}), "gates", better="higher")
    bad = [f"{k.plant} {k.outcome}" for k in kills if k.outcome != "killed"] + sorted(
        {f"control of {k.gate} {k.control}" for k in kills if k.control != "pass"}
    )
    return builder.finish(
        directory,
        status="failed" if bad else "completed",
        end_reason="; ".join(bad) if bad else "every plant killed, every control green",
        exit_code=4 if bad else 0,
    )


def open_builder() -> RecordBuilder:
    """A record of kind falsification, opened before the proof runs."""
    return RecordBuilder(
        kind="falsification",
        spec=load_spec(),
        config=museum_config(Path()).to_dict(),
        claim=CLAIM,
        not_covered=NOT_COVERED,
        environment=environment(),
    )
