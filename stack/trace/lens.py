"""What a model would say after each layer: its residual stream through final norm and head,
as it is or translated.

B batch, T tokens, D d_model, V vocab, k tokens shown
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackproof import tensorfile
from stackproof.contracts.conditions import ensure
from stackproof.model.transformer import Transformer
from stackproof.spec.errors import CheckpointError, IntegrityError, UsageError
from stackproof.trace.maps import map_of
from stackproof.trace.points import NameMap, Output, Place, sites
from stackproof.trace.tap import tap
from stackproof.trace.trace import logits_of

SCHEMA = "stackproof/lens/1"
STREAM = ("embedding", "resid_out")  # slots that hold what later blocks add to
Names = NameMap | Mapping[str, str | Place] | None


@dataclass(frozen=True)
class LensRow:
    """What one point of the stream says.
    Means over all tokens, in nats; `loss_nats` is that of the next token, None for one token.

    `kl_nats` is KL(model's own distribution ‖ lens), `agrees_frac` the share of tokens whose
    likeliest token is the model's.
    """

    point: str
    layer: int | None
    loss_nats: float | None
    kl_nats: float
    entropy_nats: float
    agrees_frac: float
    top_ids_BTk: Tensor
    top_probs_BTk: Tensor


class TunedLens(nn.Module):
    """An affine map h + h·Aᵀ + b for each point of the stream but the last, in float32;
    A and b are zero at first.

    Source: arXiv:2303.08112.
    """

    def __init__(self, points: Iterable[str], d_model: int):
        super().__init__()
        self.points, self.d_model = tuple(points), d_model
        self.translators = nn.ModuleDict(
            {_key(p): nn.Linear(d_model, d_model) for p in self.points}
        )
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, point: str, h_BTD: Tensor) -> Tensor:
        """The stream as the last block would leave it, dtype of the input.
        What has no translator is returned as it is.
        """
        if point not in self.points:
            return h_BTD
        wide = h_BTD.float()
        return (wide + self.translators[_key(point)](wide)).to(h_BTD.dtype)


def _key(point: str) -> str:
    return point.replace(".", "/")


def unembedding(model: nn.Module, where: Names = None) -> Callable[[Tensor], Tensor]:
    """The model's own final norm and head as one function, (B, T, D) → (B, T, V).

    Raises UsageError where the map of names does not say which modules these are.
    """
    if isinstance(model, Transformer):
        return lambda h_BTD: model.logits(model.final_norm(h_BTD))
    places = map_of(model, where).places
    found = [places.get(name) for name in ("final_norm", "logits")]
    if not all(isinstance(place, Output) and place.path for place in found):
        raise UsageError(
            "a lens needs the final norm and the head of the model",
            allowed="a map of names in which final_norm and logits are modules",
            next_step=(
                "where={'final_norm': 'path.of.norm', 'logits': 'path.of.head', "
                "'layers.{}.resid_out': 'path.of.blocks.{}'}"
            ),
        )
    norm, head = (model.get_submodule(place.path) for place in found)
    return lambda h_BTD: head(norm(h_BTD))


def stream(
    model: nn.Module, input_ids_BT: Tensor, where: Names = None
) -> tuple[dict[str, Tensor], Tensor]:
    """The residual stream before the first block and after each, by point in order, and the model's
    logits; in the mode it is in.
    """
    held: dict[str, Tensor] = {}
    with (
        torch.no_grad(),
        tap(
            model,
            stream_points(model, where),
            lambda p, x: held.update({p.name: x.clone()}),
            where=where,
        ),
    ):
        logits_BTV = logits_of(model(input_ids_BT))
    return held, logits_BTV


def stream_points(model: nn.Module, where: Names = None) -> list[str]:
    """Names of the points of the residual stream, in order.
    Raises UsageError where the map has no `layers.{}.resid_out`.
    """
    found = [s.point for s in sites(model, map_of(model, where)) if s.point.slot in STREAM]
    if not any(p.slot == "resid_out" for p in found):
        raise UsageError(
            "a lens reads the stream after each layer",
            allowed="a map of names with layers.{}.resid_out",
        )
    return [p.name for p in found]


@torch.no_grad()
def read_lens(
    model: nn.Module,
    input_ids_BT: Tensor,
    *,
    lens: TunedLens | None = None,
    top_k: int = 5,
    where: Names = None,
) -> tuple[list[LensRow], Tensor]:
    """What each point of the stream says, in order, and the model's logits.
    Without `lens` the stream is read as it is.

    The last row is the model itself: its logits are the model's, bit for bit.
    """
    held, logits_BTV = stream(model, input_ids_BT, where)
    unembed, log_final = unembedding(model, where), logits_BTV.float().log_softmax(-1)
    labels, rows = input_ids_BT[:, 1:], []
    for name, h_BTD in held.items():
        log_probs = unembed(h_BTD if lens is None else lens(name, h_BTD)).float().log_softmax(-1)
        top = log_probs.topk(min(top_k, log_probs.shape[-1]), dim=-1)
        loss = (
            F.nll_loss(log_probs[:, :-1].flatten(0, 1), labels.flatten())
            if labels.numel()
            else None
        )
        rows.append(
            LensRow(
                point=name,
                layer=int(name.split(".")[1]) if name.startswith("layers.") else None,
                loss_nats=None if loss is None else float(loss),
                kl_nats=float(divergence(log_final, log_probs)),
                entropy_nats=float(-(log_probs.exp() * log_probs).sum(-1).mean()),
                agrees_frac=float((log_probs.argmax(-1) == log_final.argmax(-1)).double().mean()),
                top_ids_BTk=top.indices,
                top_probs_BTk=top.values.exp(),
            )
        )
    return rows, logits_BTV


def divergence(log_p_BTV: Tensor, log_q_BTV: Tensor) -> Tensor:
    """Mean over tokens of KL(p ‖ q) in nats, shape ()."""
    return (log_p_BTV.exp() * (log_p_BTV - log_q_BTV)).sum(-1).mean()


@ensure(
    lambda result, lens: (
        {id(p) for g in result.param_groups for p in g["params"]}
        == {id(p) for p in lens.parameters()}
    ),
    "the optimizer moves the lens and nothing else",
)
@ensure(
    lambda result: any(p.numel() for g in result.param_groups for p in g["params"]),
    "a lens has something to train",
)
def make_optimizer(lens: TunedLens, lr: float) -> torch.optim.Optimizer:
    """Adam over every parameter of the lens. Raises ViolationError if there is none."""
    return torch.optim.Adam([{"params": list(lens.parameters())}], lr=lr)


def train_lens(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    steps: int,
    lr: float = 1e-3,
    where: Names = None,
    tell: Callable[[int, float], None] = lambda step, kl_nats: None,
) -> TunedLens:
    """Fit a lens for every point but the last to the model's own distribution, one batch of ids (B,
    T) a step.

    Minimises KL(model ‖ lens), averaged over tokens and summed over points; the rate falls linearly
    to 0. `tell` hears the mean over points. The model keeps its weights and gradients. Raises
    UsageError for a model in training mode or too few batches, IntegrityError if a weight of the
    model changed all the same.
    """
    if model.training:
        raise UsageError(
            "a lens is fitted to a model that does not change",
            value="training mode",
            next_step="model.eval()",
        )
    before, unembed = weights_sha256(model), unembedding(model, where)
    source, lens, optimizer, done = iter(batches), None, None, 0
    for step in range(steps):
        ids = next(source, None)
        if ids is None:
            raise UsageError(
                "there are too few batches to fit a lens",
                value=step,
                allowed=f"{steps}, one a step",
            )
        held, logits_BTV = stream(model, ids, where)
        held.popitem()  # the last point is the model itself
        if lens is None:
            lens = TunedLens(held, next(iter(held.values())).shape[-1]).to(ids.device)
            optimizer = make_optimizer(lens, lr)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        tell(step + 1, _fit(lens, held, unembed, logits_BTV.float().log_softmax(-1), optimizer))
        done += 1
    if weights_sha256(model) != before:
        raise IntegrityError(
            "the model changed while a lens was fitted to it",
            value=f"after {done} steps",
            next_step="report this",
        )
    return lens


def _fit(
    lens: TunedLens,
    held: Mapping[str, Tensor],
    unembed: Callable,
    log_final: Tensor,
    optimizer: torch.optim.Optimizer,
) -> float:
    """One step; the logits of one point at a time. Returns the mean KL over points, nats."""
    total = 0.0
    for point, h_BTD in held.items():
        kl = divergence(log_final, unembed(lens(point, h_BTD)).float().log_softmax(-1))
        own = list(lens.translators[_key(point)].parameters())
        for parameter, gradient in zip(own, torch.autograd.grad(kl, own)):
            parameter.grad = gradient
        total += float(kl.detach())
    optimizer.step()
    return total / len(held)


def weights_sha256(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of every parameter and lasting buffer."""
    whole = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return whole.hexdigest()


def save_lens(lens: TunedLens, path: Path, model: nn.Module) -> None:
    """Write a sidecar: safetensors, with the hash of the weights it belongs to."""
    tensors = {
        f"{p}.{n}": t.detach().cpu()
        for p in lens.points
        for n, t in lens.translators[_key(p)].named_parameters()
    }
    metadata = {
        "schema": SCHEMA,
        "base_sha256": weights_sha256(model),
        "points": " ".join(lens.points),
        "d_model": str(lens.d_model),
    }
    tensorfile.write(path, tensors, metadata)


def load_lens(path: Path, model: nn.Module) -> TunedLens:
    """Read a sidecar. Raises CheckpointError for a file that is none or
    belongs to other weights.
    """
    try:
        header = tensorfile.read_header(path)
        points, d_model = header.metadata["points"].split(), int(header.metadata["d_model"])
    except (OSError, tensorfile.BadTensorFile, KeyError, ValueError) as e:
        raise CheckpointError(
            f"{path} is no lens: {e}", next_step="stack trace MODEL --lens tuned makes one"
        ) from e
    if header.metadata.get("schema") != SCHEMA or header.metadata.get(
        "base_sha256"
    ) != weights_sha256(model):
        raise CheckpointError(
            f"the lens {path} was fitted to other weights",
            value=f"sha256 {header.metadata.get('base_sha256', '')[:12]}…",
            allowed=f"sha256 {weights_sha256(model)[:12]}…, {SCHEMA}",
            next_step="stack trace MODEL --lens tuned makes one for these",
        )
    lens = TunedLens(points, d_model)
    with torch.no_grad():
        for point in points:
            for name, parameter in lens.translators[_key(point)].named_parameters():
                parameter.copy_(torch.from_numpy(tensorfile.memmap(path, f"{point}.{name}").copy()))
    return lens
