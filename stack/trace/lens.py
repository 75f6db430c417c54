"""Logit lens and tuned lens: the residual stream after each layer,
read through final norm and head.

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
from stackproof.trace.points import Output, sites
from stackproof.trace.trace import Names, values_at

SCHEMA = "stackproof/lens/1"
STREAM = ("embedding", "resid_out")  # slots of the residual stream


@dataclass(frozen=True)
class LensRow:
    """The lens at one point. Means over all tokens, in nats; `loss_nats` is the next-token loss,
    None for one token.

    `kl_nats` is KL(model ‖ lens), `agrees_frac` the share of tokens with the
    same most likely next token.
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
        """Predicted stream after the last block, dtype of the input;
        unchanged for a point without a translator.
        """
        if point not in self.points:
            return h_BTD
        wide = h_BTD.float()
        return (wide + self.translators[_key(point)](wide)).to(h_BTD.dtype)


def _key(point: str) -> str:
    return point.replace(".", "/")


def unembedding(model: nn.Module, where: Names = None) -> Callable[[Tensor], Tensor]:
    """Final norm and head of the model as one function, (B, T, D) → (B, T, V).

    Raises UsageError if the name map has no modules for them.
    """
    if isinstance(model, Transformer):
        return lambda h_BTD: model.logits(model.final_norm(h_BTD))
    places = map_of(model, where).places
    found = [places.get(name) for name in ("final_norm", "logits")]
    if not all(isinstance(place, Output) and place.path for place in found):
        raise UsageError(
            "a lens needs the final norm and the head of the model",
            allowed="a name map in which final_norm and logits are modules",
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
    """The residual stream before the first block and after each, by point in order, and the logits;
    in the current mode.
    """
    return values_at(model, input_ids_BT, stream_points(model, where), where)


def stream_points(model: nn.Module, where: Names = None) -> list[str]:
    """Points of the residual stream, in order.
    Raises UsageError if the map has no `layers.{}.resid_out`.
    """
    found = [s.point for s in sites(model, map_of(model, where)) if s.point.slot in STREAM]
    if not any(p.slot == "resid_out" for p in found):
        raise UsageError(
            "a lens needs the stream after each layer",
            allowed="a name map with layers.{}.resid_out",
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
    """Lens rows of the stream in order, and the logits; the logit lens if `lens` is None.

    The last row is the model itself, bit for bit.
    """
    held, logits_BTV = stream(model, input_ids_BT, where)
    unembed, log_final = unembedding(model, where), logits_BTV.float().log_softmax(-1)
    labels, rows = input_ids_BT[:, 1:], []
    for name, h_BTD in held.items():
        log_probs = unembed(h_BTD if lens is None else lens(name, h_BTD)).float().log_softmax(-1)
        top = log_probs.topk(min(top_k, log_probs.shape[-1]), dim=-1)
        loss = None
        if labels.numel():
            loss = float(F.nll_loss(log_probs[:, :-1].flatten(0, 1), labels.flatten()))
        rows.append(
            LensRow(
                point=name,
                layer=int(name.split(".")[1]) if name.startswith("layers.") else None,
                loss_nats=loss,
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
    "the optimizer holds the parameters of the lens and no others",
)
@ensure(
    lambda result: any(p.numel() for g in result.param_groups for p in g["params"]),
    "a lens has parameters",
)
def make_optimizer(lens: TunedLens, lr: float) -> torch.optim.Optimizer:
    """Adam over the parameters of the lens. Raises ViolationError for a lens without parameters."""
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
    """Fit a lens for every point but the last to the distribution of the model, one batch of ids
    (B, T) a step.

    Minimises KL(model ‖ lens), averaged over tokens and summed over points, with a learning rate
    that falls linearly to 0. `tell` is called with step and mean KL over points. Raises UsageError
    for a model in training mode or too few batches, IntegrityError if the weights of the model
    changed.
    """
    if model.training:
        raise UsageError(
            "a lens is fitted to a model in evaluation mode",
            value="training mode",
            next_step="model.eval()",
        )
    before, unembed = weights_sha256(model), unembedding(model, where)
    source, lens, optimizer, done = iter(batches), None, None, 0
    for step in range(steps):
        ids = next(source, None)
        if ids is None:
            raise UsageError(
                "too few batches to fit a lens", value=step, allowed=f"{steps}, one a step"
            )
        held, logits_BTV = stream(model, ids, where)
        held.popitem()  # the last point is the model
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
    """One step; logits of one point at a time. Returns the mean KL over points, nats."""
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
    """sha256 over names, dtypes, shapes and bytes of the state dict."""
    whole = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return whole.hexdigest()


def save_lens(lens: TunedLens, path: Path, model: nn.Module) -> None:
    """Write a safetensors file with the hash of the model's weights."""
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
    """Read a lens file. Raises CheckpointError if it is not a lens or belongs to other weights."""
    try:
        header = tensorfile.read_header(path)
        points, d_model = header.metadata["points"].split(), int(header.metadata["d_model"])
    except (OSError, tensorfile.BadTensorFile, KeyError, ValueError) as e:
        raise CheckpointError(
            f"{path} is not a lens file: {e}", next_step="fit one: stack trace MODEL --lens tuned"
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
    shapes = {f"{p}.{n}": s for p in points for n, s in _shapes(d_model).items()}
    if {name: entry.shape for name, entry in header.tensors.items()} != shapes:
        raise CheckpointError(f"the tensors of the lens {path} are not those that it declares")
    lens = TunedLens(points, d_model)
    with torch.no_grad():
        for point in points:
            for name, parameter in lens.translators[_key(point)].named_parameters():
                parameter.copy_(torch.from_numpy(tensorfile.memmap(path, f"{point}.{name}").copy()))
    return lens


def _shapes(d_model: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a translator's tensors."""
    return {"weight": (d_model, d_model), "bias": (d_model,)}
