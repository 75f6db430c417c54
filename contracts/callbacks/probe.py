"""Calls a live model and leaves it bit for bit as it was.

B batch, T tokens, V vocab
"""

import inspect
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
    everything = [m for root in modules for m in root.modules()]
    modes = [(m, m.training) for m in everything]
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
    if isinstance(output, Tensor):
        return output if output.ndim == 3 and output.is_floating_point() else None
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is not None:
        return logits_of(found) if isinstance(found, Tensor) else None
    if isinstance(output, (tuple, list)):
        return next(
            (t for t in output if isinstance(t, Tensor) and t.ndim == 3 and t.is_floating_point()),
            None,
        )
    return None


def loss_of(output: Any) -> Tensor | None:
    """The scalar loss in what a model returned, if it returned one."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if found is None and isinstance(output, (tuple, list)):
        found = next((t for t in output if isinstance(t, Tensor) and t.ndim == 0), None)
    return found if isinstance(found, Tensor) and found.ndim == 0 else None


def is_ids(value: Any) -> bool:
    """Whether a value is a batch of token ids (B, T)."""
    return (
        isinstance(value, Tensor) and value.ndim == 2 and value.dtype in (torch.int64, torch.int32)
    )


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
    """The ids (B, T) among named values: under one of the usual names, else the first that looks
    like ids and is no label or mask.
    """
    for name in IDS:
        if is_ids(named.get(name)):
            return named[name]
    return next(
        (
            v
            for k, v in named.items()
            if is_ids(v) and k not in LABELS and "mask" not in k and "position" not in k
        ),
        None,
    )


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
    found = next(
        (getattr(config, name, None) for name in MAX_LENGTH if getattr(config, name, None)), 0
    )
    if isinstance(found, int) and found:
        return found
    named = [
        (n.rpartition(".")[2].lower(), m.num_embeddings)
        for n, m in model.named_modules()
        if isinstance(m, nn.Embedding)
    ]
    named += [
        (n.rpartition(".")[2].lower(), p.shape[-2])
        for n, p in model.named_parameters(recurse=True)
        if p.ndim >= 2 and "." not in n
    ]
    return min((rows for name, rows in named if "pos" in name or name == "wpe"), default=0)


def embedding_of(model: nn.Module) -> nn.Module | None:
    """The module that looks up tokens: the model's own answer, else the embedding with most rows
    that the first parameters belong to.
    """
    if hasattr(model, "get_input_embeddings"):
        try:
            return model.get_input_embeddings()
        except (NotImplementedError, AttributeError):
            pass
    return next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)


def head_of(model: nn.Module) -> nn.Module | None:
    """The output head, if the model names it."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def dropout_names(model: nn.Module) -> list[str]:
    """Names of modules that drop something in training mode."""
    return [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0
    ]


class Probe:
    """A model as a function from ids and mask to logits on the CPU, in float32. `refusal` is the
    reason why it cannot be called like that, or empty.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        names = inspect.signature(model.forward).parameters
        self.ids_name = next((n for n in IDS if n in names), next(iter(names), ""))
        self.labels_name = next((n for n in LABELS if n in names), "")
        self.takes_mask, self.takes_labels = MASK in names, bool(self.labels_name)
        self.takes_cache = "use_cache" in names
        self.max_length = max_length_of(model)
        embedding = embedding_of(model)
        self.vocab_size = int(embedding.weight.shape[0]) if embedding is not None else 0
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.refusal = "" if self.vocab_size > 1 else "no embedding was found in the model"
        if not self.refusal:
            self._try()

    def _try(self) -> None:
        """One small forward pass; sets `refusal` on an error."""
        with untouched(self.model), torch.no_grad():
            try:
                self.logits(torch.zeros(1, 2, dtype=torch.long))
                self._learn_length()
            except Exception as e:
                self.refusal = (
                    f"the model cannot be called with ids alone: {type(e).__name__}: "
                    f"{str(e).splitlines()[0] if str(e) else ''}"
                )

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
        Raises TypeError if there are none.
        """
        given = {MASK: mask_BT, self.labels_name: labels_BT}
        kwargs = {name: t.to(self.device) for name, t in given.items() if name and t is not None}
        kwargs |= {"use_cache": False} if self.takes_cache else {}
        with random_kept():
            torch.manual_seed(0)
            output = self.model(**{self.ids_name: ids_BT.to(self.device)}, **kwargs)
        logits = logits_of(output)
        if logits is None or logits.shape[:2] != ids_BT.shape:
            raise TypeError("the model returns no logits of shape (rows, tokens, vocabulary)")
        return logits.detach().float().cpu()

    @contextmanager
    def training(self, mode: bool) -> Iterator[None]:
        """Put the whole model in one mode; everything is restored at the end."""
        with untouched(self.model):
            self.model.train(mode)
            yield

    @torch.no_grad()
    def drops(self) -> bool:
        """Whether two forwards in training mode differ: dropout, or noise of another kind."""
        ids = torch.arange(8)[None] % self.vocab_size
        ids = ids[:, : self.max_length] if self.max_length else ids
        with self.training(True):
            kwargs = {self.ids_name: ids.to(self.device)} | (
                {"use_cache": False} if self.takes_cache else {}
            )
            first, second = (logits_of(self.model(**kwargs)) for _ in range(2))
        return not torch.equal(first, second)
