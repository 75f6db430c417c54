"""A second decoder with every variant, vectorised, for tests of the gates that judge one:
hand-written, and no part of the stack.

B batch, T tokens, R = B·T tokens, D d_model, N query heads, K key/value heads, H head_dim, E
experts, k top_k, V vocab
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackproof.contracts import subject
from stackproof.contracts.model import in_mode

VOCAB_SIZE = 61


def route(
    logits_RE: Tensor, top_k: int, selection_bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(experts (R, k), weights (R, k), probabilities (R, E))."""
    probs_RE = logits_RE.softmax(-1)
    score_RE = (
        probs_RE.detach() if selection_bias_E is None else probs_RE.detach() + selection_bias_E
    )
    experts_Rk = score_RE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights_Rk = probs_RE.gather(1, experts_Rk)
    return experts_Rk, renormalised(weights_Rk), probs_RE


def renormalised(weights_Rk: Tensor) -> Tensor:
    return weights_Rk / weights_Rk.sum(-1, keepdim=True) if weights_Rk.shape[1] > 1 else weights_Rk


def balance(probs_RE: Tensor, experts_Rk: Tensor, row_R: Tensor | None = None) -> Tensor:
    if row_R is not None:
        inside = [row_R == row for row in row_R.unique()]
        return sum(balance(probs_RE[r], experts_Rk[r]) * r.sum() for r in inside) / len(row_R)
    share_E = F.one_hot(experts_Rk, probs_RE.shape[1]).to(probs_RE.dtype).mean((0, 1))
    return probs_RE.shape[1] * share_E @ probs_RE.mean(0)


def dispatch(
    x_RD: Tensor,
    experts_Rk: Tensor,
    weights_Rk: Tensor,
    experts,
    capacity: int | None,
    row_R: Tensor | None = None,
) -> tuple[Tensor, Tensor, int]:
    """(sum of weighted experts (R, D), tokens each took (E,), choices dropped);
    with `row_R` the capacity is each row's.
    """
    if row_R is not None:
        y_RD, loads, dropped = torch.zeros_like(x_RD), [], 0
        for r in (row_R == row for row in row_R.unique()):
            y_RD[r], load_E, left_out = dispatch(
                x_RD[r], experts_Rk[r], weights_Rk[r], experts, capacity
            )
            loads, dropped = [*loads, load_E], dropped + left_out
        return y_RD, sum(loads), dropped
    y_RD, loads = torch.zeros_like(x_RD), []
    for e, expert in enumerate(experts):
        token, choice = (experts_Rk == e).nonzero(as_tuple=True)
        token, choice = token[:capacity], choice[:capacity]
        y_RD = y_RD.index_add(0, token, expert(x_RD[token]) * weights_Rk[token, choice, None])
        loads.append(len(token))
    return y_RD, torch.tensor(loads), experts_Rk.numel() - sum(loads)


def update_selection_bias(model: nn.Module, loads_LE: Tensor, rate: float) -> None:
    layers = [m for m in model.modules() if isinstance(m, MixtureOfExperts)]
    for layer, load_E in zip(layers, loads_LE.double()):
        layer.selection_bias += rate * torch.sign(load_E.mean() - load_E).to(layer.selection_bias)


class MixtureOfExperts(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.declared = a["ffn"]
        self.router = nn.Linear(a["d_model"], self.declared["n_experts"], bias=False)
        self.experts = nn.ModuleList(
            feedforward(a, self.declared["expert"]) for _ in range(self.declared["n_experts"])
        )
        biased = self.declared["balance"]["kind"] == "selection-bias"
        self.register_buffer(
            "selection_bias", torch.zeros(self.declared["n_experts"]) if biased else None
        )
        self.found = None

    def forward(self, x: Tensor, reading=None) -> Tensor:
        x_RD, declared = x.flatten(0, -2), self.declared
        experts_Rk, weights_Rk, probs_RE = route(
            self.router(x_RD), declared["top_k"], self.selection_bias
        )
        capacity = None
        if self.training and declared["capacity_factor"]:
            capacity = math.ceil(
                declared["capacity_factor"] * x.shape[1] * declared["top_k"] / declared["n_experts"]
            )
        row_R = torch.arange(x.shape[0]).repeat_interleave(x.shape[1])
        y_RD, self.load_E, self.dropped = dispatch(
            x_RD, experts_Rk, weights_Rk, self.experts, capacity, row_R
        )
        self.found = probs_RE, experts_Rk
        return y_RD.view(x.shape)


class SwiGLU(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.gate, self.up = (nn.Linear(a["d_model"], a["d_ff"], bias=False) for _ in range(2))
        self.down = nn.Linear(a["d_ff"], a["d_model"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Gelu(nn.Module):
    def __init__(self, a, declared):
        super().__init__()
        self.approximate = declared["approximate"]
        self.up = nn.Linear(a["d_model"], a["d_ff"], bias=declared["bias"])
        self.down = nn.Linear(a["d_ff"], a["d_model"], bias=declared["bias"])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


def feedforward(a, declared) -> nn.Module:
    match declared["kind"]:
        case "swiglu":
            return SwiGLU(a)
        case "gelu":
            return Gelu(a, declared)
        case "moe":
            return MixtureOfExperts(a)


def rotary_tables(a) -> tuple[Tensor, Tensor] | None:
    if a["positions"]["kind"] == "learned":
        return None
    width, scaling = (
        a["head_dim"] // (2 if a["attention"]["kind"] == "differential" else 1),
        a["positions"]["scaling"],
    )
    rate = a["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    if scaling["kind"] == "linear":
        rate = rate / scaling["factor"]
    if scaling["kind"] == "llama3":
        wave, first = 2 * math.pi / rate, scaling["original_max_seq_len"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = ((first / wave - low) / (high - low)).clamp(0, 1)
        rate = (1 - smooth) * rate / scaling["factor"] + smooth * rate
    angle = torch.arange(a["max_seq_len"], dtype=torch.float64)[:, None] * rate
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Attention(nn.Module):
    def __init__(self, a, layer: int):
        super().__init__()
        self.a, self.declared, d, h = a, a["attention"], a["d_model"], a["head_dim"]
        self.q = nn.Linear(d, a["n_heads"] * h, bias=self.declared["qkv_bias"])
        self.k, self.v = (
            nn.Linear(d, a["n_kv_heads"] * h, bias=self.declared["qkv_bias"]) for _ in range(2)
        )
        self.out = nn.Linear(a["n_heads"] * h, d, bias=self.declared["out_bias"])
        self.differential = self.declared["kind"] == "differential"
        if self.declared["qk_norm"]:
            width = h // 2 if self.differential else h
            self.q_norm, self.k_norm = (
                nn.RMSNorm(width, a["norm_eps"]),
                nn.RMSNorm(width, a["norm_eps"]),
            )
        if self.differential and self.declared["form"] == "paper":
            self.start = 0.8 - 0.6 * math.exp(-0.3 * layer)
            for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
                self.register_parameter(name, nn.Parameter(torch.zeros(h // 2)))
            self.head_norm = nn.RMSNorm(h, a["norm_eps"])
        if self.differential and self.declared["form"] == "scalar":
            self.lambda_weight = nn.Parameter(torch.zeros(1))

    def forward(self, x_BTD: Tensor, position_BT: Tensor, mask_BTT: Tensor, tables) -> Tensor:
        h, split = self.a["head_dim"], 2 if self.differential else 1
        q, k, v = (
            part(x_BTD).unflatten(-1, (-1, h)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        q, k = (x.unflatten(-1, (split, -1)).movedim(-2, 0) for x in (q, k))
        if self.declared["qk_norm"]:
            q, k = self.q_norm(q), self.k_norm(k)
        if tables is not None:
            q, k = (
                rotate(x, *(t.to(x.dtype)[position_BT][:, None] for t in tables)) for x in (q, k)
            )
        maps = [self.mixed(q[i], k[i], v, mask_BTT) for i in range(split)]
        return self.out(self.joined(*maps).transpose(1, 2).flatten(2))

    def mixed(self, q, k, v, mask_BTT) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask_BTT[:, None], enable_gqa=q.shape[1] != k.shape[1]
        )

    def joined(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        if second is None:
            return first
        if self.declared["form"] == "scalar":
            return first - self.lambda_weight * second
        learned = (
            (self.lambda_q1 * self.lambda_k1).sum().exp()
            - (self.lambda_q2 * self.lambda_k2).sum().exp()
            + self.start
        )
        return self.head_norm(first - learned * second) * (1 - self.start)


def norm(a) -> nn.Module:
    return (nn.LayerNorm if a["norm"]["kind"] == "layernorm" else nn.RMSNorm)(
        a["d_model"], eps=a["norm_eps"]
    )


class Depth(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.router, self.gate = nn.Linear(a["d_model"], 1), a["depth"]["gate"]

    def forward(
        self, x_BTD: Tensor, position_BT: Tensor, mask_BTT: Tensor, tables, block
    ) -> Tensor:
        # equal tokens tie exactly
        score_BT = (
            (x_BTD.double() * self.router.weight[0].double()).sum(-1) + self.router.bias
        ).float()
        if self.gate["kind"] == "soft":
            return x_BTD + score_BT.sigmoid()[..., None].to(x_BTD) * (
                block(x_BTD, position_BT, mask_BTT, tables) - x_BTD
            )
        return torch.stack(
            [self.some(*row, tables, block) for row in zip(x_BTD, score_BT, position_BT, mask_BTT)]
        )

    def some(
        self, x_TD: Tensor, score_T: Tensor, position_T: Tensor, mask_TT: Tensor, tables, block
    ) -> Tensor:
        index_T = torch.arange(len(x_TD), device=x_TD.device)
        same_TT = (index_T - position_T)[:, None] == (index_T - position_T)[None, :]
        higher_T = (
            same_TT & (index_T[None, :] < index_T[:, None]) & (score_T[None, :] > score_T[:, None])
        ).sum(-1)
        read = higher_T < torch.ceil(self.gate["capacity_frac"] * (position_T + 1).double())
        x_RD = x_TD[read]
        y_RD = block(x_RD[None], position_T[None, read], mask_TT[read][:, read][None], tables)[0]
        changed_TD = x_TD.clone()
        changed_TD[read] = x_RD + score_T[read].sigmoid()[:, None].to(x_RD) * (y_RD - x_RD)
        return changed_TD


class Block(nn.Module):
    def __init__(self, a, layer: int):
        super().__init__()
        self.attention_norm, self.attention, self.ffn_norm = norm(a), Attention(a, layer), norm(a)
        self.ffn, self.dropout = feedforward(a, a["ffn"]), nn.Dropout(a["dropout"])
        if a["depth"]["kind"] == "mixture-of-depths" and (layer + 1) % a["depth"]["every"] == 0:
            self.depth = Depth(a)

    def forward(self, x_BTD: Tensor, *context) -> Tensor:
        return (
            self.depth(x_BTD, *context, self.plain)
            if hasattr(self, "depth")
            else self.plain(x_BTD, *context)
        )

    def plain(self, x_BTD: Tensor, *context) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), *context))
        return x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))


class Decoder(nn.Module):
    """Names and shapes of parameters as declared; `a` is the resolved `model` section."""

    def __init__(self, a, vocab_size: int, seed: int = 0):
        super().__init__()
        self.a, self.tables = a, rotary_tables(a)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(vocab_size, a["d_model"])
            if self.tables is None:
                self.positions = nn.Embedding(a["max_seq_len"], a["d_model"])
            self.layers = nn.ModuleList(Block(a, i) for i in range(a["n_layers"]))
            self.final_norm = norm(a)
            if not a["tied_head"]:
                self.head = nn.Linear(a["d_model"], vocab_size, bias=False)
            self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.ndim > 1 and "head.weight" not in name:
                p.normal_(0, self.a["init_std"] * (1 if "embed" in name or "up" in name else 2))
            elif "lambda_weight" in name:
                p.fill_(0.5)
            elif "lambda_" in name:
                p.normal_(0, 0.1)

    def context(self, documents_BT: Tensor):
        index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
        begins_BT = F.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0), value=True)
        start_BT = (index_T * begins_BT).cummax(1).values
        back_TT = index_T[:, None] - index_T
        window = self.a["attention"]["window"] or len(index_T)
        mask_BTT = (back_TT >= 0) & (back_TT < window) & (index_T >= start_BT[:, :, None])
        return index_T - start_BT, mask_BTT, self.tables

    def forward(self, ids_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        context = self.context(torch.zeros_like(ids_BT) if documents_BT is None else documents_BT)
        x_BTD = self.embed(ids_BT)
        if self.tables is None:
            x_BTD = x_BTD + self.positions(context[0])
        for layer in self.layers:
            x_BTD = layer(x_BTD, *context)
        return F.linear(
            self.final_norm(x_BTD), self.embed.weight if self.a["tied_head"] else self.head.weight
        )

    def attend(self, layer: int):
        def attention(x_BTD: Tensor, documents_BT: Tensor | None) -> Tensor:
            documents_BT = (
                torch.zeros(x_BTD.shape[:2], dtype=torch.int64)
                if documents_BT is None
                else documents_BT
            )
            return self.layers[layer].attention(x_BTD, *self.context(documents_BT))

        return attention


@dataclass(frozen=True)
class VariantDeclared(subject.Declared):
    architecture: dict

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in Decoder(self.architecture, VOCAB_SIZE).parameters())


@dataclass(frozen=True)
class VariantModel(subject.Model):
    a: dict
    seed: int = 3
    vocab_size: int = VOCAB_SIZE

    @cached_property
    def module(self) -> Decoder:
        return self.fresh()

    def fresh(self) -> Decoder:
        return Decoder(self.a, self.vocab_size, self.seed)

    @property
    def max_length(self) -> int:
        return self.a["max_seq_len"]

    def logits(self, ids_BT, mask_BT=None, labels_BT=None) -> Tensor:
        return self.packed_logits(ids_BT, None)

    def packed_logits(self, ids_BT, document_ids_BT) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.module(ids_BT, document_ids_BT)

    def training(self, mode: bool):
        return in_mode(self.module, mode)

    @property
    def embedding(self) -> nn.Module:
        return self.module.embed

    @property
    def rotary_tables(self):
        return self.module.tables

    @property
    def attention_layers(self):
        return [self.module.attend(i) for i in range(self.a["n_layers"])]


@dataclass(frozen=True)
class VariantTrainee(subject.Trainee):
    """Cross-entropy by torch, the balance loss by `balance`, clipping by torch."""

    model: Decoder
    optimizer: torch.optim.Optimizer

    def accumulate(self, batches) -> float:
        n_valid = sum(int((b.labels != -100).sum()) for b in batches)
        n_tokens = sum(b.input_ids.numel() for b in batches)
        self.optimizer.zero_grad()
        nats = balanced = 0.0
        for batch in batches:
            logits_BTV = self.model(batch.input_ids, batch.document_ids)
            nats = nats + F.cross_entropy(
                logits_BTV.flatten(0, 1), batch.labels.flatten(), reduction="sum"
            )
            found = [m.ffn.found for m in self.model.layers if isinstance(m.ffn, MixtureOfExperts)]
            balanced = balanced + sum(balance(*routed) * len(routed[0]) for routed in found)
        weight = self.model.a["ffn"].get("balance", {}).get("weight", 0.0)
        (nats / n_valid + weight * balanced / n_tokens).backward()
        return float(nats.detach()) / n_valid

    def update(self, batches) -> float:
        nats = self.accumulate(batches)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()
        return nats


class VariantTraining(subject.Training):
    def trainee_of(self, model, optimizer) -> VariantTrainee:
        return VariantTrainee(model, optimizer)

    def make_optimizer(self, model) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), weight_decay=0.1, betas=(0.9, 0.95))


class VariantTokenizer(subject.Tokenizer):
    special_ids = {"eos_token_id": (0, None)}


def subject_of(a, seed: int = 3) -> subject.Subject:
    """What the model's gates judge of a decoder of this declaration."""
    return subject.Subject(
        declared=VariantDeclared(a),
        model=VariantModel(a, seed),
        training=VariantTraining(),
        tokenizer=VariantTokenizer(),
    )
