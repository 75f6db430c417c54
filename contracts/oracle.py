"""The decoder written out in float64 from its declaration and the papers: slow, plain,
one document and one head at a time.

B batch, T tokens of a row or of one document, Q of them with a query, R tokens in any order, D
d_model, H head_dim, S width of a rotated head or half-head, J = S/2 rotated pairs, F d_ff, E
experts, k top_k, V vocab
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Architecture = Mapping[str, Any]


@dataclass(frozen=True)
class Reading:
    """What the oracle found: logits (B, T, V) float64; and what the choices of routers were worth.

    `margin_BT` is the smallest relative margin of any choice that a token's logits depend on, inf
    where nothing was chosen. `balance` maps a layer to experts · Σ share of choices · mean
    probability over the tokens that reach it, shape (), times their share of all tokens of the
    call: with the capacity of depths a layer passes some by, and weighs that much less.
    """

    logits_BTV: Tensor
    margin_BT: Tensor
    balance: Mapping[int, Tensor]


@dataclass
class Notes:
    """What is written down while one document is read: a margin per token, and per layer all
    probabilities and choices so far.
    """

    margin_T: Tensor
    routed: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def margins(self, token_R: Tensor, margin_R: Tensor) -> None:
        self.margin_T[token_R] = torch.minimum(self.margin_T[token_R], margin_R.detach())


def oracle_logits(
    ids_BT: Tensor,
    weights: Weights,
    architecture: Architecture,
    document_ids_BT: Tensor | None = None,
) -> Tensor:
    """Logits (B, T, V) float64 of a decoder in evaluation mode.

    `weights` maps plain parameter names to tensors of any float dtype, as `state_dict()` gives
    them; `architecture` is the resolved `model` section. Each change of `document_ids_BT` along a
    row begins a document, which is read as if it stood alone. Raises ValueError for an
    unknown kind, KeyError for a missing weight.
    """
    return oracle_reading(ids_BT, weights, architecture, document_ids_BT).logits_BTV


def oracle_reading(
    ids_BT: Tensor,
    weights: Weights,
    architecture: Architecture,
    document_ids_BT: Tensor | None = None,
) -> Reading:
    """As `oracle_logits`, with margins and balance.
    Gradients reach those `weights` that require them.
    """
    wide = {name: weight.double().cpu() for name, weight in weights.items()}
    ids_BT, routed, logits, margins = ids_BT.cpu(), {}, [], []
    for row, places in documents(ids_BT.shape, document_ids_BT):
        notes = Notes(
            torch.full((places.stop - places.start,), math.inf, dtype=torch.float64), routed
        )
        logits.append(_decode(ids_BT[row, places], wide, architecture, notes))
        margins.append(notes.margin_T.cummin(0).values)
    balance = {}
    for layer, found in routed.items():
        probs_RE, experts_Rk = (torch.cat(parts) for parts in zip(*found))
        balance[layer] = balance_of(probs_RE, experts_Rk) * (len(probs_RE) / ids_BT.numel())
    return Reading(
        torch.cat(logits).view(*ids_BT.shape, -1), torch.cat(margins).view(ids_BT.shape), balance
    )


def oracle_attention(
    x_BTD: Tensor,
    layer_weights: Weights,
    architecture: Architecture,
    layer: int,
    document_ids_BT: Tensor | None = None,
) -> Tensor:
    """Output (B, T, D) float64 of the attention of `layer` (from 0) on its normalised input.

    `layer_weights` has the names below `layers.<layer>.attention.`: q.weight, …,
    as far as they are declared.
    """
    wide, x_BTD = _wide(layer_weights), x_BTD.double().cpu()
    parts = [
        _attention(
            x_BTD[row, places], wide, architecture, layer, torch.arange(places.stop - places.start)
        )
        for row, places in documents(x_BTD.shape[:2], document_ids_BT)
    ]
    return torch.cat(parts).view(x_BTD.shape)


def oracle_attention_at_end(
    x_TD: Tensor, layer_weights: Weights, architecture: Architecture, layer: int, last: int
) -> Tensor:
    """The last rows (last, D) of what `oracle_attention` gives for one document (T, D),
    at a cost that grows with T alone.
    """
    return _attention(
        x_TD.double().cpu(),
        _wide(layer_weights),
        architecture,
        layer,
        torch.arange(len(x_TD)),
        last,
    )


def _wide(weights: Weights) -> Weights:
    return {name: weight.double().cpu() for name, weight in weights.items()}


def below(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, named by the rest."""
    return {
        name.removeprefix(prefix): weight
        for name, weight in weights.items()
        if name.startswith(prefix)
    }


def documents(shape: tuple[int, int], document_ids_BT: Tensor | None) -> list[tuple[int, slice]]:
    """Row and places of every document, in row-major order; whole rows without ids."""
    rows, length = shape
    if document_ids_BT is None:
        return [(row, slice(0, length)) for row in range(rows)]
    found = []
    for row, ids in enumerate(document_ids_BT.tolist()):
        starts = [t for t in range(length) if t == 0 or ids[t] != ids[t - 1]]
        found += [(row, slice(start, stop)) for start, stop in zip(starts, [*starts[1:], length])]
    return found


# --- the decoder ----------------------------------------------------------------------------------


def _decode(ids_T: Tensor, w: Weights, a: Architecture, notes: Notes) -> Tensor:
    """Logits (T, V) of one document, which begins at position 0."""
    x_TD, token_T = w["embed.weight"][ids_T], torch.arange(len(ids_T))
    if a["positions"]["kind"] == "learned":
        x_TD = x_TD + w["positions.weight"][token_T]
    for layer in range(a["n_layers"]):
        x_TD = _layer(x_TD, below(w, f"layers.{layer}."), a, layer, token_T, notes)
    return (
        _norm(x_TD, below(w, "final_norm."), a)
        @ w["embed.weight" if a["tied_head"] else "head.weight"].T
    )


def _layer(
    x_TD: Tensor, w: Weights, a: Architecture, layer: int, token_T: Tensor, notes: Notes
) -> Tensor:
    """One block, behind its gate if there is one (arXiv:2404.02258)."""
    depth = a["depth"]
    if depth["kind"] == "full" or (layer + 1) % depth["every"]:
        return _block(x_TD, w, a, layer, token_T, notes)
    router_D, bias = w["depth.router.weight"][0], w["depth.router.bias"][0]
    score_T = x_TD @ router_D + bias
    match depth["gate"]["kind"]:
        case "soft":
            read_R = token_T
        case "hard":
            read, margin_T = readers(score_T, depth["gate"]["capacity_frac"])
            scale_T = router_D.norm() * x_TD.norm(dim=-1) / math.sqrt(len(router_D)) + bias.abs()
            notes.margins(token_T, margin_T / scale_T)
            read_R = torch.tensor(read)
        case other:
            raise ValueError(f"no oracle for model.depth.gate.kind = {other}")
    x_RD = x_TD[read_R]
    change_RD = _block(x_RD, w, a, layer, read_R, notes) - x_RD
    return x_TD.index_add(0, read_R, torch.sigmoid(score_T[read_R])[:, None] * change_RD)


def readers(score_T: Tensor, capacity_frac: float) -> tuple[list[int], Tensor]:
    """Tokens of a document that a block of hard capacity reads,
    and how far each score is (T,) from where that would change.

    Token t is read iff fewer than ceil(capacity_frac·(t+1)) tokens before it have a higher score.
    """
    read, margins = [], []
    for t, score in enumerate(score_T.tolist()):
        room, earlier = (
            math.ceil(capacity_frac * (t + 1)),
            sorted(score_T[:t].tolist(), reverse=True),
        )
        if sum(other > score for other in earlier) < room:
            read.append(t)
        margins.append(abs(score - earlier[room - 1]) if len(earlier) >= room else math.inf)
    return read, torch.tensor(margins, dtype=torch.float64)


def _block(
    x_TD: Tensor, w: Weights, a: Architecture, layer: int, token_T: Tensor, notes: Notes
) -> Tensor:
    x_TD = x_TD + _attention(
        _norm(x_TD, below(w, "attention_norm."), a), below(w, "attention."), a, layer, token_T
    )
    return x_TD + _feedforward(
        _norm(x_TD, below(w, "ffn_norm."), a), below(w, "ffn."), a, layer, token_T, notes
    )


def _norm(x_TD: Tensor, w: Weights, a: Architecture) -> Tensor:
    match a["norm"]["kind"]:
        case "rmsnorm":
            return _rms(x_TD, w["weight"], a["norm_eps"])
        case "layernorm":
            centred = x_TD - x_TD.mean(-1, keepdim=True)
            return (
                centred
                / torch.sqrt(centred.square().mean(-1, keepdim=True) + a["norm_eps"])
                * w["weight"]
                + w["bias"]
            )
        case other:
            raise ValueError(f"no oracle for model.norm.kind = {other}")


def _rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def _linear(x: Tensor, w: Weights, name: str, bias: bool) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if bias else y


# --- attention ------------------------------------------------------------------------------------


def rotary_rates(a: Architecture) -> list[float]:
    """Angle per position of each rotated pair, radians; halves of a differential head are rotated
    apart. [] without rotation.
    """
    if a["positions"]["kind"] == "learned":
        return []
    pairs = a["head_dim"] // (4 if a["attention"]["kind"] == "differential" else 2)
    rates, scaling = (
        [a["rope_theta"] ** (-j / pairs) for j in range(pairs)],
        a["positions"]["scaling"],
    )
    match scaling["kind"]:
        case "none":
            return rates
        case "linear":
            return [rate / scaling["factor"] for rate in rates]
        case "llama3":
            return [_llama3_rate(rate, scaling) for rate in rates]
        case other:
            raise ValueError(f"no oracle for model.positions.scaling.kind = {other}")


def _llama3_rate(rate: float, scaling: Mapping[str, Any]) -> float:
    """Long waves are divided by the factor, short ones kept, those between blended by how often
    they fit into the first context.
    """
    turns = scaling["original_max_seq_len"] * rate / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = min(1.0, max(0.0, (turns - low) / (high - low)))
    return kept * rate + (1 - kept) * rate / scaling["factor"]


def rotary_angles(a: Architecture, position_T: Tensor) -> Tensor:
    """Position times rate, (T, J) float64."""
    return position_T.double()[:, None] * torch.tensor(rotary_rates(a), dtype=torch.float64)


def _rotated(x_TS: Tensor, angle_TJ: Tensor) -> Tensor:
    """Turn the complex number (feature j) + i·(feature j + S/2) by its angle (arXiv:2104.09864)."""
    half = x_TS.shape[1] // 2
    turned = torch.complex(x_TS[:, :half], x_TS[:, half:]) * torch.polar(
        torch.ones_like(angle_TJ), angle_TJ
    )
    return torch.cat((turned.real, turned.imag), -1)


def _attention(
    x_TD: Tensor, w: Weights, a: Architecture, layer: int, position_T: Tensor, last: int = 0
) -> Tensor:
    """Attention of tokens of one document at their positions: one query head at a time,
    a table of allowed pairs.

    With `last`, only so many tokens at the end have a query: Q of T.
    """
    declared, h, group = a["attention"], a["head_dim"], a["n_heads"] // a["n_kv_heads"]
    q, k, v = (
        _linear(x, w, name, declared["qkv_bias"])
        for x, name in ((x_TD[-last:], "q"), (x_TD, "k"), (x_TD, "v"))
    )
    back_QT = position_T[-last:, None] - position_T[None, :]
    allowed_QT = (back_QT >= 0) & (back_QT < (declared["window"] or math.inf))
    heads = []
    for n in range(a["n_heads"]):
        mine, theirs = slice(n * h, (n + 1) * h), slice(n // group * h, (n // group + 1) * h)
        heads.append(
            _head(q[:, mine], k[:, theirs], v[:, theirs], w, a, layer, position_T, allowed_QT)
        )
    return _linear(torch.cat(heads, -1), w, "out", declared["out_bias"])


def _head(
    q_QH,
    k_TH,
    v_TH,
    w: Weights,
    a: Architecture,
    layer: int,
    position_T: Tensor,
    allowed_QT: Tensor,
) -> Tensor:
    """Output (Q, H) of one head."""

    def weights_QT(q_QS: Tensor, k_TS: Tensor) -> Tensor:
        if a["attention"]["qk_norm"]:
            q_QS, k_TS = (
                _rms(q_QS, w["q_norm.weight"], a["norm_eps"]),
                _rms(k_TS, w["k_norm.weight"], a["norm_eps"]),
            )
        if a["positions"]["kind"] == "rotary":
            angle_TJ = rotary_angles(a, position_T)
            q_QS, k_TS = _rotated(q_QS, angle_TJ[-len(q_QS) :]), _rotated(k_TS, angle_TJ)
        return (
            (q_QS @ k_TS.T / math.sqrt(q_QS.shape[1]))
            .masked_fill(~allowed_QT, -math.inf)
            .softmax(-1)
        )

    match a["attention"]:
        case {"kind": "softmax"}:
            return weights_QT(q_QH, k_TH) @ v_TH
        case {"kind": "differential", "form": form}:
            s = a["head_dim"] // 2
            first_QT, second_QT = (
                weights_QT(q_QH[:, :s], k_TH[:, :s]),
                weights_QT(q_QH[:, s:], k_TH[:, s:]),
            )
            if form == "scalar":
                return (first_QT - w["lambda_weight"] * second_QT) @ v_TH
            start = lambda_init(layer)
            learned = (
                torch.exp(w["lambda_q1"] @ w["lambda_k1"])
                - torch.exp(w["lambda_q2"] @ w["lambda_k2"])
                + start
            )
            return _rms(
                (first_QT - learned * second_QT) @ v_TH, w["head_norm.weight"], a["norm_eps"]
            ) * (1 - start)
        case other:
            raise ValueError(f"no oracle for model.attention.kind = {other['kind']}")


def lambda_init(layer: int) -> float:
    """Where λ of a differential layer starts; layers are counted from 0 here, from 1 in the paper
    (arXiv:2410.05258, eq. 3).
    """
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


# --- feed-forward ---------------------------------------------------------------------------------


def _feedforward(
    x_TD: Tensor, w: Weights, a: Architecture, layer: int, token_T: Tensor, notes: Notes
) -> Tensor:
    if a["ffn"]["kind"] != "moe":
        return _expert(x_TD, w, a["ffn"])
    routed = oracle_experts(x_TD, w, a["ffn"])
    notes.margins(token_T, routed.margin_R)
    notes.routed.setdefault(layer, []).append((routed.probs_RE, routed.experts_Rk))
    return routed.y_RD


def _expert(x_RD: Tensor, w: Weights, declared: Mapping[str, Any]) -> Tensor:
    """One feed-forward, (R, D)."""
    match declared["kind"]:
        case "swiglu":
            gate_RF = _linear(x_RD, w, "gate", False)
            return _linear(
                gate_RF * torch.sigmoid(gate_RF) * _linear(x_RD, w, "up", False), w, "down", False
            )
        case "gelu":
            u_RF = _linear(x_RD, w, "up", declared["bias"])
            inner = math.sqrt(2 / math.pi) * (u_RF + 0.044715 * u_RF**3)
            share_RF = (
                torch.tanh(inner)
                if declared["approximate"] == "tanh"
                else torch.erf(u_RF / math.sqrt(2))
            )
            return _linear(u_RF * (1 + share_RF) / 2, w, "down", declared["bias"])
        case other:
            raise ValueError(f"no oracle for model.ffn.kind = {other}")


@dataclass(frozen=True)
class Routed:
    """What became of R tokens among E experts.
    Choices are ordered by score; `dropped` counts those an expert had no room for.
    """

    y_RD: Tensor
    probs_RE: Tensor
    experts_Rk: Tensor
    weights_Rk: Tensor
    margin_R: Tensor
    load_E: Tensor
    dropped: int


def oracle_experts(
    x_RD: Tensor, w: Weights, declared: Mapping[str, Any], capacity: int | None = None
) -> Routed:
    """A mixture of experts, one token after another; `capacity` is how many tokens an expert takes,
    the rest is dropped.
    """
    probs_RE = (x_RD @ w["router.weight"].T).softmax(-1)
    experts_Rk, weights_Rk, margin_R = choices(probs_RE, declared["top_k"], w.get("selection_bias"))
    n_experts, dropped = declared["n_experts"], 0
    parts = [below(w, f"experts.{e}.") for e in range(n_experts)]
    load, rows = [0] * n_experts, []
    for x_D, chosen, weights_k in zip(x_RD, experts_Rk.tolist(), weights_Rk):
        y_D = torch.zeros_like(x_D)
        for e, weight in zip(chosen, weights_k):
            if capacity is not None and load[e] >= capacity:
                dropped += 1
                continue
            load[e] += 1
            y_D = y_D + weight * _expert(x_D[None], parts[e], declared["expert"])[0]
        rows.append(y_D)
    return Routed(
        torch.stack(rows), probs_RE, experts_Rk, weights_Rk, margin_R, torch.tensor(load), dropped
    )


def choices(
    probs_RE: Tensor, top_k: int, selection_bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(experts (R, k) int64 by falling score, weights (R, k), relative margin (R,) to the first
    expert that was not chosen).

    The score is the probability, plus the bias if there is one; equal scores go to the lower id.
    Weights are probabilities, divided by their sum if top_k > 1. The margin is that of the scores,
    over the probability of the last chosen.
    """
    experts, margins = [], []
    for p_E in probs_RE.detach():
        score = (p_E if selection_bias_E is None else p_E + selection_bias_E).tolist()
        order = sorted(range(len(score)), key=lambda e: (-score[e], e))
        experts.append(order[:top_k])
        last, out = order[top_k - 1], order[top_k:]
        margins.append((score[last] - score[out[0]]) / float(p_E[last]) if out else math.inf)
    experts_Rk = torch.tensor(experts)
    chosen_Rk = probs_RE.gather(1, experts_Rk)
    weights_Rk = chosen_Rk / chosen_Rk.sum(-1, keepdim=True) if top_k > 1 else chosen_Rk
    return experts_Rk, weights_Rk, torch.tensor(margins, dtype=torch.float64)


def balance_of(probs_RE: Tensor, experts_Rk: Tensor) -> Tensor:
    """Experts · Σ_e (share of all choices that went to e) · (mean probability of e), shape (); 1
    when even (arXiv:2101.03961).
    """
    n_experts = probs_RE.shape[1]
    share_E = (
        torch.bincount(experts_Rk.flatten(), minlength=n_experts).double() / experts_Rk.numel()
    )
    return n_experts * (share_E * probs_RE.double().mean(0)).sum()


def room(declared: Mapping[str, Any], n_tokens: int) -> int | None:
    """How many of a micro-batch's tokens an expert takes in training; None without a limit."""
    factor = declared["capacity_factor"]
    return (
        None
        if factor is None
        else math.ceil(factor * n_tokens * declared["top_k"] / declared["n_experts"])
    )
