"""The call site of an operation: module, source line, and phase (forward, backward or update)."""

import linecache
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from stackproof.spec import ROOT

Phase = Literal["forward", "backward", "update"]
HIDDEN = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<frozen", "<string>")
ENGINE = "_engine_run_backward"
CALLERS = 4


@dataclass(frozen=True)
class Line:
    """A line of source: short file name, line number from 1, function, and text."""

    file: str
    number: int
    function: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number} in {self.function}"


@dataclass(frozen=True)
class CallSite:
    """Where an operation ran. `module` is the dotted path of the innermost running module,
    "" outside of modules.

    `node` is autograd's name of the derivative and `of` its forward operation; both are "" in a
    forward. For a derivative without Python code, `frames` are those of the forward operation.
    """

    phase: Phase
    module: str
    frames: tuple[tuple[Any, int], ...]
    node: str = ""
    of: str = ""

    @property
    def layer(self) -> int | None:
        """The first number in the module's path."""
        found = re.search(r"(?:^|\.)(\d+)(?=\.|$)", self.module)
        return int(found[1]) if found else None

    @property
    def lines(self) -> tuple[Line, ...]:
        """The innermost line of the project or of user code, then its callers."""
        return tuple(_line(code, number) for code, number in self.frames)


def _line(code: Any, number: int) -> Line:
    return Line(
        _shown(code.co_filename),
        number,
        code.co_qualname,
        linecache.getline(code.co_filename, number).strip(),
    )


def _shown(file: str) -> str:
    """The path relative to the project or to site-packages."""
    path = Path(file)
    if "site-packages" in path.parts:
        return "/".join(path.parts[path.parts.index("site-packages") + 1 :])
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else file


@dataclass
class CallSites:
    """Tracks which module runs, and to which forward operation each derivative belongs.

    Autograd's sequence number during a forward operation is that of its derivative.
    """

    names: Mapping[int, str]
    running: list[str] = field(default_factory=list)
    updating: int = 0
    recorded: dict[int, tuple[CallSite, str]] = field(default_factory=dict)

    def current(self, op: str) -> CallSite:
        """The call site of the running operation. Call it once per operation, in order."""
        frames, below_engine = _frames()
        node = torch._C._current_autograd_node()
        module = self.running[-1] if self.running else ""
        if node is None:
            here = CallSite("update" if self.updating else "forward", module, frames)
            self.recorded.setdefault(torch.autograd._get_sequence_nr() - 1, (here, op))
            return here
        forward, of = self.recorded.get(node._sequence_nr(), (None, ""))
        if forward is None:
            return CallSite("backward", module, frames, node.name(), of)
        return CallSite(
            "backward",
            module or forward.module,
            frames if below_engine else forward.frames,
            node.name(),
            of,
        )


def _frames() -> tuple[tuple[tuple[Any, int], ...], bool]:
    """Code and line of the innermost frames outside torch; and whether the first is a
    derivative written in Python.
    """
    found: list[tuple[Any, int]] = []
    below, frame = False, sys._getframe(1)
    while frame is not None and len(found) < 1 + CALLERS:
        if frame.f_code.co_name == ENGINE:
            below = bool(found)
            if below:
                break
        elif not frame.f_code.co_filename.startswith(HIDDEN):
            found.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(found), below


@contextmanager
def track_call_sites(models: Mapping[str, nn.Module]) -> Iterator[CallSites]:
    """Track modules and optimizer steps while the block runs; all hooks are removed on exit.

    Modules of `models` are named by key and dotted path, other modules by class.
    """
    names = {
        id(m): ".".join(filter(None, (key, path)))
        for key, model in models.items()
        for path, m in model.named_modules()
    }
    here = CallSites(names)

    def enter(module: nn.Module, inputs: Any) -> None:
        here.running.append(names.get(id(module), type(module).__name__))

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        if here.running:
            here.running.pop()

    def begin(*_: Any) -> None:
        here.updating += 1

    def end(*_: Any) -> None:
        here.updating -= 1

    with ExitStack() as stack:
        for handle in (
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
            register_optimizer_step_pre_hook(begin),
            register_optimizer_step_post_hook(end),
        ):
            stack.callback(handle.remove)
        yield here
