"""The choice of a kernel for each operation on a device, its origin, and its form in a record.

A choice has one of five origins: a key of the configuration, a shipped record (`MEASURED`), a
comparison on this machine, the record of the run that is resumed or repeated, or the default,
torch's own kernel.
"""

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from stackproof.kernels import parity
from stackproof.kernels.measured import Measurement
from stackproof.kernels.table import (
    CHUNKS,
    ONEDNN,
    OPERATIONS,
    TORCH,
    TRITON,
    Operation,
    by_operation,
)
from stackproof.spec.errors import EnvironmentUnfit

Origin = Literal["key", "shipped", "measured-here", "recorded", "default"]


@dataclass(frozen=True)
class Choice:
    """A kernel by name, the origin of the choice, and the reason as text."""

    kernel: str
    reason: str
    origin: Origin


@dataclass(frozen=True)
class Fastest:
    """The fastest kernel on one kind of device, and the id of its benchmark record."""

    kernel: str
    record: str


def cpu_maker() -> str:
    """The vendor of the processor in /proc/cpuinfo; on other systems its family."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")),
        platform.machine(),
    )


CPU_NAME = f"{cpu_maker()} {torch.backends.cpu.get_cpu_capability()}"
# (name of the device, operation) -> winner. Edit this table after recording a benchmark.
MEASURED: dict[tuple[str, str], Fastest] = {
    ("AuthenticAMD AVX512", "linear"): Fastest(ONEDNN, "benchmark-20261122T091225Z-f056d3d8"),
    ("AuthenticAMD AVX512", "attention"): Fastest(CHUNKS, "benchmark-20261122T091225Z-f056d3d8"),
    ("AuthenticAMD AVX512", "linear_cross_entropy"): Fastest(
        ONEDNN, "benchmark-20261122T091225Z-f056d3d8"
    ),
}


def device_name(device: torch.device) -> str:
    """The name of a GPU in torch; for a processor, its vendor and the widest instructions that
    torch uses.
    """
    if device.type == "cpu":
        return CPU_NAME
    return (
        torch.cuda.get_device_properties(device).name if torch.cuda.is_available() else device.type
    )


def by_default(op: str, device: torch.device) -> Choice:
    """The winner of the shipped record for this device; torch's own without a record, or if the
    winner cannot run.
    """
    if device.type not in ("cpu", "cuda"):
        return Choice(TORCH, f"no kernel of our own for {device.type}", "default")
    fastest = MEASURED.get((device_name(device), op))
    if fastest is None:
        return Choice(TORCH, f"not measured on {device_name(device)} yet", "default")
    if unfit := OPERATIONS[op].kernels[fastest.kernel].why_not(device):
        return Choice(
            TORCH, f"{fastest.kernel} is faster on this device but absent: {unfit}", "default"
        )
    return Choice(
        fastest.kernel, f"fastest on {device_name(device)}, record {fastest.record}", "shipped"
    )


def of_config(
    setting: str | Mapping[str, str],
    device: torch.device,
    *,
    dtype: str = "float32",
    compiled: bool = False,
    measurement: Measurement | None = None,
) -> dict[str, Choice]:
    """The choice of a fresh run by priority: `train.kernels`, the shipped record, `measurement`,
    torch's own.

    `measurement` compares isolated kernels, so it is not used under torch.compile. Raises
    EnvironmentUnfit if a named kernel cannot run on `device`, IntegrityError for a Triton kernel
    whose source has not passed its parity tests.
    """
    named = by_operation(setting)
    found = {}
    for op in OPERATIONS.values():
        if op.name in named:
            require(op, named[op.name], device, 'choose another, or train.kernels = "auto"')
            found[op.name] = Choice(named[op.name], f"train.kernels names {named[op.name]}", "key")
            continue
        choice = by_default(op.name, device)
        if choice.origin == "default" and measurement is not None and not compiled:
            choice = _measured_here(op, choice, device, dtype, measurement)
        found[op.name] = choice
    return found


def _measured_here(
    op: Operation, choice: Choice, device: torch.device, dtype: str, found: Measurement
) -> Choice:
    """The winner of the comparison on this machine if it is still valid, else `choice` with the
    reason.
    """
    winner = found.winners.get(dtype, {}).get(op.name)
    if winner is None or winner not in op.kernels:
        return choice
    stale = found.why_stale(op, device_name(device)) or op.kernels[winner].why_not(device)
    if not stale and op.kernels[winner].is_triton:
        stale = parity.why_not(op.name)
    if stale:
        return replace(choice, reason=f"the comparison of {found.made_at} is void: {stale}")
    return Choice(
        winner,
        f"fastest on {found.device} in {dtype}, compared here at {found.made_at}",
        "measured-here",
    )


def require(op: Operation, name: str, device: torch.device, next_step: str) -> None:
    """Raise EnvironmentUnfit if a kernel cannot run on `device`, IntegrityError for Triton source
    without passed parity tests.
    """
    kernel = op.kernel(name)
    if unfit := kernel.why_not(device):
        raise EnvironmentUnfit(
            f"{op.name}: the kernel {name} cannot run on {device.type}",
            value=unfit,
            allowed=", ".join(n for n, k in op.kernels.items() if not k.why_not(device)),
            next_step=next_step,
        )
    if kernel.is_triton:
        parity.require(op.name)


# ---- choices in records


def document(
    choices: Mapping[str, Choice],
    device: torch.device,
    *,
    compiled: bool = False,
    dtype: str = "float32",
) -> dict[str, str]:
    """Kernel of every operation with reason and origin, JSON-ready, for the environment of a
    record.

    `<operation>` describes the computation in this precision; `<operation>_name` is the choice.
    """
    found = {"device": device_name(device)}
    for op in OPERATIONS.values():
        choice = choices[op.name]
        kernel, reason = op.kernels[choice.kernel], choice.reason
        found |= {f"{op.name}_name": choice.kernel, f"{op.name}_origin": choice.origin}
        if compiled and choice.kernel == TORCH and op.fused:
            found |= {
                op.name: "torch.compile",
                f"{op.name}_reason": "the compiler is given the formula",
            }
            continue
        if dtype not in kernel.dtypes:
            kernel, reason = op.kernels[TORCH], f"{choice.kernel} is for float32, this is {dtype}"
        found |= {op.name: kernel.title, f"{op.name}_reason": reason}
        if kernel.is_triton:
            found[f"{op.name}_parity"] = (
                parity.why_not(op.name) or f"passed on {parity.passed()[op.name]['passed_on']}"
            )
    if choices["attention"].kernel != TRITON:
        found["document_attention"] = f"{found['attention']}, boolean mask"
    return found


def of_record(
    environment: Mapping[str, object], device: torch.device, next_step: str
) -> dict[str, Choice]:
    """The choice in the environment of a record, for a resume or a repetition.

    An operation without an entry gets the default, never a comparison on this machine. Raises
    EnvironmentUnfit if a kernel is unknown, cannot run here, or was chosen for other CPU
    instructions.
    """
    found = {}
    for op in OPERATIONS.values():
        name, reason = _recorded(op, environment)
        if not name:
            found[op.name] = by_default(op.name, device)
            continue
        if name not in op.kernels:
            raise EnvironmentUnfit(
                f"{op.name}: the run used the kernel {name}, which is not part of this version",
                allowed=", ".join(op.kernels),
                next_step=next_step,
            )
        require(op, name, device, next_step)
        _require_instructions(op.name, name, environment, device, next_step)
        found[op.name] = Choice(name, reason, "recorded")
    return found


def _recorded(op: Operation, environment: Mapping[str, object]) -> tuple[str, str]:
    """Name and reason of an operation's kernel in the environment of a record; empty without an
    entry.

    Older records hold the title in place of the name, or, in half precision, the title of torch's
    own with the chosen kernel in the reason.
    """
    title = str(environment.get(f"kernel_{op.name}", ""))
    reason = str(environment.get(f"kernel_{op.name}_reason", ""))
    if name := environment.get(f"kernel_{op.name}_name"):
        return str(name), reason
    chosen, sign, _ = reason.partition(" is for float32, this is ")
    if sign or title == "torch.compile":
        return (chosen if sign else TORCH), reason
    return next(
        (name for name, kernel in op.kernels.items() if kernel.title == title), title
    ), reason


def _require_instructions(
    op: str, name: str, environment: Mapping[str, object], device: torch.device, next_step: str
) -> None:
    """Raise EnvironmentUnfit for a CPU kernel other than torch's own that was chosen for other
    instructions, because its order of summation differs.
    """
    of_reason = re.match(
        r"fastest on (.+), record ", str(environment.get(f"kernel_{op}_reason", ""))
    )
    then = str(environment.get("kernel_device") or (of_reason[1] if of_reason else ""))
    if name == TORCH or device.type != "cpu" or not then:
        return
    before, now = then.rpartition(" ")[2], CPU_NAME.rpartition(" ")[2]
    if before != now:
        raise EnvironmentUnfit(
            f"{op}: the run's kernel {name} was chosen for another processor",
            value=CPU_NAME,
            allowed=f"a processor with the instructions of {then}",
            next_step=next_step,
        )
