"""Calls a live model and leaves it bit for bit as it was.

B batch, T tokens, V vocab
"""

import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.optim import leaves

IDS = ("input_ids", "idx", "ids", "tokens", "token_ids", "x", "input", "inputs")
LABELS = ("labels", "targets", "target", "y")
MASK = "attention_mask"
MAX_LENGTH = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "block_size",
    "n_ctx",
    "context_length",
)
TRIED = (2, 4, 8, 12, 16, 24, 32, 48, 64)


def world_size() -> int:
    """The number of processes that train together."""
    group = torch.distributed
    return group.get_world_size() if group.is_available() and group.is_initialized() else 1


def unwrapped(model: nn.Module) -> nn.Module:
    """The original of a compiled model or of a wrapper for several processes; other models are
    returned as they are.
    """
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


@contextmanager
def untouched(*modules: nn.Module) -> Iterator[None]:
    """Restore modes, buffers, gradients and every random stream (Python, numpy, torch, each GPU) at
    the end, also after an error.
    """
    modes = [(m, m.training) for root in modules for m in root.modules()]
    buffers = [(b, b.detach().clone()) for root in modules for b in root.buffers()]
    gradients = [(p, p.grad) for root in modules for p in root.parameters()]
    with random_kept():
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, kept in buffers:
                    buffer.copy_(kept)
            for parameter, gradient in gradients:
                parameter.grad = gradient


@contextmanager
def random_kept() -> Iterator[None]:
    """Restore all random streams at the end."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    other = numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(
        devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    ):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy:
                numpy.random.set_state(other)


def logits_of(output: Any) -> Tensor | None:
    """The (B, T, V) tensor in what a model returned: itself, `.logits`, ["logits"],
    or the first of that shape in a tuple.
    """
    return _tensor_in(output, "logits", lambda t: t.ndim == 3 and t.is_floating_point())


def loss_of(output: Any) -> Tensor | None:
    """The scalar loss in what a model returned, if it returned one."""
    return _tensor_in(output, "loss", lambda t: t.ndim == 0)


def _tensor_in(output: Any, name: str, fits: Callable[[Tensor], bool]) -> Tensor | None:
    named = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    found = output if named is None else named
    parts = found if isinstance(found, (tuple, list)) else [found]
    return next((t for t in parts if isinstance(t, Tensor) and fits(t)), None)


def is_ids(value: Any) -> bool:
    """Whether a value is a batch of token ids (B, T)."""
    integers = (torch.int64, torch.int32)
    return isinstance(value, Tensor) and value.ndim == 2 and value.dtype in integers


def arguments_of(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of one call by name; positional ones that have no name are left out."""
    try:
        bound = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        bound = dict(kwargs)
    return {
        k: v
        for name, value in bound.items()
        for k, v in (value.items() if isinstance(value, dict) else [(name, value)])
    }


def ids_of(named: Mapping[str, Any]) -> Tensor | None:
    """The ids (B, T) among named values: under one of the usual names, else the first that has the
    form of ids and the name of neither labels, a mask nor positions.
    """
    found = {k: v for k, v in named.items() if is_ids(v)}
    others = (k for k in found if k not in LABELS and "mask" not in k and "position" not in k)
    return next((found[k] for k in (*IDS, *others) if k in found), None)


def labels_of(named: Mapping[str, Any]) -> Tensor | None:
    """The labels (B, T) among named values."""
    return next((named[name] for name in LABELS if is_ids(named.get(name))), None)


def config_of(model: nn.Module) -> Any:
    """The text part of a model's configuration, or None."""
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def max_length_of(model: nn.Module) -> int:
    """The number of positions that a model declares, else that of its shortest table that is named
    after positions, else 0.
    """
    config = config_of(model)
    found = next(filter(None, (getattr(config, name, None) for name in MAX_LENGTH)), 0)
    if isinstance(found, int) and found:
        return found
    tables = [(n, m.weight) for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    tables += [(n, p) for n, p in model.named_parameters() if p.ndim >= 2 and "." not in n]
    named = ((n.rpartition(".")[2].lower(), table.shape[-2]) for n, table in tables)
    return min((rows for name, rows in named if "pos" in name or name == "wpe"), default=0)


def embedding_of(model: nn.Module) -> nn.Module | None:
    """The module that looks up tokens, as the model declares it, else its first embedding."""
    if hasattr(model, "get_input_embeddings"):
        try:
            return model.get_input_embeddings()
        except (NotImplementedError, AttributeError):
            pass
    return next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)


def embedding_rows(model: nn.Module) -> int:
    """The number of ids that the model can look up, 0 if no embedding was found."""
    embedding = embedding_of(model)
    return 0 if embedding is None else int(embedding.weight.shape[0])


def head_of(model: nn.Module) -> nn.Module | None:
    """The output head, if the model names it."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


class Probe:
    """A model as a function from ids and mask to logits on the CPU, in float32. `refusal` is the
    reason why it cannot be called like that, or empty.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        names = inspect.signature(model.forward).parameters
        self.ids_name = next((n for n in (*IDS, *names) if n in names), "")
        self.labels_name = next((n for n in LABELS if n in names), "")
        self.takes_mask, self.takes_labels = MASK in names, bool(self.labels_name)
        self.options = {"use_cache": False} if "use_cache" in names else {}
        self.max_length = max_length_of(model)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.refusal = self._refusal()

    def _refusal(self) -> str:
        """The error of one small forward pass, or empty."""
        if embedding_rows(self.model) < 2:
            return "no embedding was found in the model"
        with untouched(self.model), torch.no_grad():
            try:
                self.logits(torch.zeros(1, 2, dtype=torch.long))
                self._learn_length()
            except Exception as e:
                first_line = next(iter(str(e).splitlines()), "")
                kind = type(e).__name__
                return f"the model cannot be called with ids alone: {kind}: {first_line}"
        return ""

    def _learn_length(self) -> None:
        """Set the longest length of `TRIED` that a model without a declared length accepts. Only on
        a CPU, where a row that is too long does no harm.
        """
        for length in TRIED if not self.max_length and self.device.type == "cpu" else ():
            try:
                self.logits(torch.zeros(1, length, dtype=torch.long))
            except Exception:
                return
            self.max_length = length

    def logits(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, labels_BT: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) in float32 on the CPU, with the same random numbers in every call.
        Raises TypeError for a model that returns none.
        """
        given = {self.ids_name: ids_BT, MASK: mask_BT, self.labels_name: labels_BT}
        kwargs = {name: t.to(self.device) for name, t in given.items() if name and t is not None}
        with random_kept():
            torch.manual_seed(0)
            output = self.model(**kwargs, **self.options)
        logits = logits_of(output)
        if logits is None or logits.shape[:2] != ids_BT.shape:
            raise TypeError("the model returns no logits of shape (rows, tokens, vocabulary)")
        return logits.detach().float().cpu()

    def leaves(self) -> list[Tensor]:
        """Every tensor that the logits of a small batch give a gradient to, but for activations."""
        ids = torch.zeros(3, 5, dtype=torch.long, device=self.device)
        with untouched(self.model), torch.enable_grad():
            logits = logits_of(self.model(**{self.ids_name: ids}, **self.options))
            found = [] if logits is None else leaves(logits)
        return [t for t in found if t.shape[:2] != ids.shape]

    @contextmanager
    def training(self, mode: bool) -> Iterator[None]:
        """Put the whole model in one mode; everything is restored at the end."""
        with untouched(self.model):
            self.model.train(mode)
            yield
