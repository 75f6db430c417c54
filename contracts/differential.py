"""The gates that hold the run's own model and its gradients against the float64 oracle: B batch, T
tokens, D d_model, V vocab.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackproof.contracts.causality import packing
from stackproof.contracts.declared import (
    chooses,
    drawn_weights,
    kind_of,
    kinds,
    parameter_shapes,
    silent_kinds,
)
from stackproof.contracts.gate import (
    Verdict,
    decide,
    decide_all,
    decides,
    failed,
    least,
    worst,
    worst_at,
)
from stackproof.contracts.loss import IGNORE, gradient_errors
from stackproof.contracts.model import device_of, in_eval, table_error
from stackproof.contracts.oracle import (
    below,
    oracle_attention,
    oracle_attention_at_end,
    oracle_reading,
)
from stackproof.contracts.subject import MicroBatch, Subject

ORACLE_TOKENS, ORACLE_ROWS = 40, 4
ASKING_AT_END = 3  # tokens at the end of a row of full length


@decides("model.reference-differential")
@torch.no_grad()
def reference_differential(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Attention on activations of scale 3, and whole logits, equal an oracle written out in
    float64; tables do so at full length.

    Logits are compared under the run's own weights, and in a fresh model under drawn ones: at
    step 0 biases are 0, gains are 1 and gates are even, so that much of a model has no effect.
    """
    a, model, vocab_size = (
        subject.declared.architecture,
        subject.model.module,
        subject.model.vocab_size,
    )
    shapes, weights = parameter_shapes(a, vocab_size), dict(model.state_dict())
    attention_layers = subject.model.attention_layers
    if odd := sorted(
        {n for n, _ in shapes.items() ^ {(n, tuple(w.shape)) for n, w in weights.items()}}
    ):
        return failed(
            f"names or shapes of weights are not the declared ones: {', '.join(odd)}",
            undeclared=len(odd),
        )
    errors = [_attention_error(attend, weights, a, i) for i, attend in enumerate(attention_layers)]
    layer = worst_at(dict(enumerate(errors)))
    ids_BT = _distinct_ids(
        ORACLE_ROWS if chooses(a) else 2,
        min(ORACLE_TOKENS, a["max_seq_len"], vocab_size),
        vocab_size,
    )
    own_error, own_judged = _logit_error(limits, model, ids_BT, weights, a)
    twin = subject.model.fresh().eval()
    twin.load_state_dict(drawn_weights(shapes, torch.Generator().manual_seed(13)))
    drawn_error, drawn_judged = _logit_error(limits, twin, ids_BT, twin.state_dict(), a)
    effects = {
        kind: _effect(twin, ids_BT, kind, shapes)
        for kind in sorted(kinds(shapes))
        if kind not in silent_kinds(a)
    }
    weakest = worst_at({kind: -effect for kind, effect in effects.items()})
    effect = effects[weakest]
    far = worst(_error_at_end(attend, weights, a, i) for i, attend in enumerate(attention_layers))
    with subject.model.precision():
        ends = [_error_at_end(attend, weights, a, i) for i, attend in enumerate(attention_layers)]
    half_far = worst(ends)
    tables_off = table_error(subject.model.rotary_tables, a)
    judged = least((own_judged, drawn_judged))
    beyond = sum(_beyond_window(attend, a, device_of(model)) for attend in attention_layers)
    most = limits.rel_error_max
    return decide_all(
        [
            not errors[layer] <= most
            and f"attention of layer {layer} differs from the float64 oracle",
            not far <= most
            and f"the last tokens of {a['max_seq_len']} do not attend as the float64 oracle does",
            not half_far <= limits.half_rel_error_max
            and f"the last tokens of {a['max_seq_len']} do not attend in the precision of the run "
            "as the float64 oracle does",
            not worst((own_error, drawn_error)) <= most and "logits differ from the float64 oracle",
            not tables_off <= limits.table_abs_error_max
            and "rotary tables differ from the definition",
            bool(beyond) and f"{beyond} layers do not attend to exactly the keys of their window",
            not effect >= limits.effect_min and f"{weakest} hardly changes the logits",
            not judged >= limits.judged_frac_min
            and "the choices of too many tokens are within rounding of a tie",
        ],
        attention_rel_error=errors[layer],
        full_length_rel_error=far,
        half_full_length_rel_error=half_far,
        logit_rel_error=own_error,
        drawn_rel_error=drawn_error,
        table_abs_error=tables_off,
        weakest=weakest,
        weakest_effect=effect,
        judged_frac=judged,
    )


def _rel(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in float64."""
    got, expected = got.double().cpu(), expected.double().cpu()
    return float((got - expected).norm() / expected.norm())


def _distinct_ids(rows: int, length: int, vocab_size: int) -> Tensor:
    """No token twice in a row: a router that reads embeddings alone scores repeated tokens alike,
    and rounding would break the tie.
    """
    draw = torch.Generator().manual_seed(12)
    return torch.stack([torch.randperm(vocab_size, generator=draw)[:length] for _ in range(rows)])


def _attention_error(
    attend: Callable, weights: Mapping[str, Tensor], a: Mapping[str, Any], layer: int
) -> float:
    """Worse of the errors on whole and on packed rows."""
    own, length = below(weights, f"layers.{layer}.attention."), min(ORACLE_TOKENS, a["max_seq_len"])
    x_BTD, device = (
        3 * torch.randn(2, length, a["d_model"], generator=torch.Generator().manual_seed(11)),
        own["q.weight"].device,
    )
    whole = _rel(attend(x_BTD.to(device), None), oracle_attention(x_BTD, own, a, layer))
    packed_BT = packing(length)
    packed = _rel(
        attend(x_BTD.to(device), packed_BT.to(device)),
        oracle_attention(x_BTD, own, a, layer, packed_BT),
    )
    return worst((whole, packed))


def _error_at_end(
    attend: Callable, weights: Mapping[str, Tensor], a: Mapping[str, Any], layer: int
) -> float:
    """Worse of the errors of the last tokens of a row of full length: in one document, and in one
    that begins after a document of one token, so that its positions are almost as large.
    """
    own, length = below(weights, f"layers.{layer}.attention."), a["max_seq_len"]
    x_BTD, device = (
        3 * torch.randn(1, length, a["d_model"], generator=torch.Generator().manual_seed(19)),
        own["q.weight"].device,
    )
    errors, first = [], 1
    for start, own_BT in ((0, None), (first, (torch.arange(length) >= first).long()[None])):
        last = min(ASKING_AT_END, length - start)
        got_TD = attend(x_BTD.to(device), None if own_BT is None else own_BT.to(device))[0, -last:]
        errors.append(_rel(got_TD, oracle_attention_at_end(x_BTD[0, start:], own, a, layer, last)))
    return worst(errors)


def _beyond_window(attend: Callable, a: Mapping[str, Any], device: torch.device) -> bool:
    """Whether a window too wide for the oracle's rows is not kept: the first query past it reads
    the first key, or the last in it does not.
    """
    window = a["attention"]["window"]
    if window is None or not ORACLE_TOKENS <= window < a["max_seq_len"]:
        return False
    x_BTD = 3 * torch.randn(
        1, window + 1, a["d_model"], generator=torch.Generator().manual_seed(15)
    )
    other_BTD = torch.cat((-x_BTD[:, :1], x_BTD[:, 1:]), 1)
    before, after = (attend(x.to(device), None) for x in (x_BTD, other_BTD))
    return not torch.equal(before[:, window], after[:, window]) or torch.equal(
        before[:, window - 1], after[:, window - 1]
    )


def _logit_error(
    limits: SimpleNamespace,
    model: nn.Module,
    ids_BT: Tensor,
    weights: Mapping[str, Tensor],
    a: Mapping[str, Any],
) -> tuple[float, float]:
    """(relative error of the logits of tokens that no choice within rounding of a tie has touched,
    share of these tokens).
    """
    reading = oracle_reading(ids_BT, weights, a)
    clear_BT = reading.margin_BT >= limits.choice_margin_min
    got_BTV = in_eval(model, ids_BT.to(device_of(model))).cpu()
    return _rel(got_BTV[clear_BT], reading.logits_BTV[clear_BT]), float(clear_BT.double().mean())


def _effect(
    twin: nn.Module, ids_BT: Tensor, kind: str, shapes: Mapping[str, tuple[int, ...]]
) -> float:
    """By how much of their norm logits change when every weight of one kind is drawn again."""
    live, ids_BT = twin.state_dict(), ids_BT[:2].to(device_of(twin))
    drawn = drawn_weights(
        {n: s for n, s in shapes.items() if kind_of(n) == kind}, torch.Generator().manual_seed(14)
    )
    kept, before = {n: live[n].clone() for n in drawn}, twin(ids_BT)
    _put(drawn, live)
    after = twin(ids_BT)
    _put(kept, live)
    return _rel(after, before)


def _put(values: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        live[name].copy_(value)


# --- gradients ------------------------------------------------------------------------------------


@decides("model.gradient")
def gradient(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The gradient of the mean loss of every parameter is the one that autograd takes through the
    oracle, under drawn weights and with dropout off.

    Each row is a micro-batch; some are packed, and some labels masked. Where routers choose, there
    are twice as many, and a row ends before its first token that depends on a choice within
    rounding of a tie. The loss is compared without the balance loss, the gradients with it.
    """
    a, vocab_size = subject.declared.architecture, subject.model.vocab_size
    model = subject.model.fresh().eval()
    model.load_state_dict(
        drawn_weights(parameter_shapes(a, vocab_size), torch.Generator().manual_seed(16))
    )
    leaves = {n: p.detach().double().cpu().requires_grad_() for n, p in model.named_parameters()}
    rows = _labelled_rows(min(ORACLE_TOKENS, a["max_seq_len"], vocab_size - 1), vocab_size)[
        : ORACLE_ROWS if chooses(a) else 2
    ]
    nats, objective, read = _oracle_objective(limits, rows, leaves | dict(model.named_buffers()), a)
    judged = _n_tokens(read) / _n_tokens(rows)
    if judged < limits.judged_frac_min:
        return failed(
            "the choices of too many tokens are within rounding of a tie", judged_frac=judged
        )
    wanted = dict(
        zip(leaves, torch.autograd.grad(objective, list(leaves.values()), materialize_grads=True))
    )
    trainee = subject.training.trainee_of(model, torch.optim.SGD(model.parameters(), lr=0.0))
    got_nats = trainee.accumulate(read)
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    errors = _errors(got, wanted, a)
    where = worst_at(errors)
    loss_error = abs(got_nats - nats) / nats
    return decide(
        worst((errors[where], loss_error)) <= limits.rel_error_max,
        f"the gradient of {where} differs by {errors[where]:.2g} from the oracle's, the loss by "
        f"{loss_error:.2g}",
        rel_error=errors[where],
        loss_rel_error=loss_error,
        worst=where,
        gradients=len(wanted),
        judged_frac=judged,
    )


def _labelled_rows(length: int, vocab_size: int) -> list[MicroBatch]:
    """Micro-batches of one row, whole and packed by turns; every seventh label is masked."""
    ids_BT = _distinct_ids(ORACLE_ROWS, length + 1, vocab_size)
    labels_BT = ids_BT[:, 1:].clone()
    labels_BT[:, 3::7] = IGNORE
    documents = [own for packed in packing(length).split(1) for own in (None, packed)]
    return [
        MicroBatch(ids[None, :-1], labels[None], own)
        for ids, labels, own in zip(ids_BT, labels_BT, documents)
    ]


def _oracle_objective(
    limits: SimpleNamespace,
    rows: Sequence[MicroBatch],
    weights: Mapping[str, Tensor],
    a: Mapping[str, Any],
) -> tuple[float, Tensor, list[MicroBatch]]:
    """(mean loss in nats, that and the balance term with its weight as a tensor with a graph, the
    rows as far as choices are clear).
    """
    nats, balance, read = (
        torch.zeros((), dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
        [],
    )
    for row in rows:
        reading = oracle_reading(row.input_ids, weights, a, row.document_ids)
        unclear_T = (reading.margin_BT[0] < limits.choice_margin_min).nonzero()
        if len(unclear_T):
            row = _cut(row, int(unclear_T[0]))
            if not row.input_ids.numel():
                continue
            reading = oracle_reading(row.input_ids, weights, a, row.document_ids)
        nats = nats + F.cross_entropy(
            reading.logits_BTV[0], row.labels[0], ignore_index=IGNORE, reduction="sum"
        )
        balance = balance + row.input_ids.numel() * sum(reading.balance.values())
        read.append(row)
    n_valid, n_tokens = sum(int((r.labels != IGNORE).sum()) for r in read), _n_tokens(read)
    mean = nats / max(n_valid, 1)
    return float(mean.detach()), mean + _balance_weight(a) * balance / max(n_tokens, 1), read


def _cut(batch: MicroBatch, length: int) -> MicroBatch:
    """The first tokens of every row."""
    parts = (batch.input_ids, batch.labels, batch.document_ids)
    return MicroBatch(*(None if t is None else t[:, :length] for t in parts))


def _n_tokens(batches: Sequence[MicroBatch]) -> int:
    return sum(batch.input_ids.numel() for batch in batches)


def _balance_weight(a: Mapping[str, Any]) -> float:
    return a["ffn"].get("balance", {}).get("weight", 0.0)


def _errors(
    got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], a: Mapping[str, Any]
) -> dict[str, float]:
    """Relative errors by name. A gradient that must be 0 is compared with the norm of all
    gradients, and all λ count as one tensor.

    An expert that no token chose has a gradient of 0 or none. The gradient of one λ is a sum over
    all positions that may cancel to almost nothing, and then is rounding alone.
    """
    got = {n: torch.zeros_like(g) for n, g in wanted.items() if not g.any()} | got
    silent = {n for n in wanted if kind_of(n) in silent_kinds(a)}
    whole = math.hypot(*(float(g.norm()) for g in wanted.values()))
    errors = gradient_errors(_lambdas_joined(got, silent), _lambdas_joined(wanted, silent))
    return errors | {
        n: float(got[n].double().norm()) / whole if n in got else math.inf for n in silent
    }


def _lambdas_joined(gradients: Mapping[str, Tensor], without: set[str]) -> dict[str, Tensor]:
    kept = {n: g.double().cpu() for n, g in gradients.items() if n not in without}
    lambdas = [n for n in kept if ".lambda_" in n]
    joined = (
        {"every lambda": torch.cat([kept.pop(n).flatten() for n in lambdas])} if lambdas else {}
    )
    return kept | joined
