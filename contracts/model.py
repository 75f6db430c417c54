"""Gates of the model: initial weights, causality, packed documents, equality with a float64 oracle, and the ability to learn one batch.

B batch, T tokens, D d_model, N query heads, K key/value heads, H head_dim, J = H/2, V vocab
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from contracts.gate import Verdict, decide, decides, failed

IGNORE = -100
LENGTHS = (2, 17, 64, 65, 129, 2048)
ORACLE_TOKENS = 40
PACKED_LENGTHS = (17, 129)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _draw_ids(shape: tuple[int, ...], vocab_size: int, seed: int) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# --- initial weights ------------------------------------------------------------------------------------------------


@decides("model.init-law")
def init_law(
    limits: SimpleNamespace,
    *,
    model: nn.Module,
    declared_init: Mapping[str, tuple[str, float]],
    declared_parameter_count: int,
    declared_architecture: Mapping[str, Any],
    rotary_tables: tuple[Tensor, Tensor],
    embedding_weight: Tensor,
    head_weight: Tensor,
) -> Verdict:
    """Each parameter's mean and spread lie where a sample of its size must; gains are exactly 1; buffers equal a fresh computation.

    `declared_init` maps every parameter name to ("normal", std) or ("ones", 0).
    """
    parameters = dict(model.named_parameters())
    if odd := sorted(parameters.keys() ^ declared_init.keys()):
        return failed(f"parameters without a declared law, or the reverse: {', '.join(odd)}", undeclared=len(odd))
    n_entries = sum(p.numel() for p in parameters.values())
    tensors = [*parameters.values(), *model.buffers()]
    infinite = sum(int((~t.isfinite()).sum()) for t in tensors if t.is_floating_point())
    if infinite:
        return failed("weights or buffers are not finite", not_finite=infinite)
    z = {name: _law_z(p.detach(), *declared_init[name]) for name, p in parameters.items()}
    worst = max(z, key=z.get)
    buffer_error = max(float((a.double().cpu() - b).abs().max()) for a, b in zip(rotary_tables, _rotary(declared_architecture)))
    shared = embedding_weight.data_ptr() == head_weight.data_ptr()
    wrong = [
        text
        for ok, text in (
            (z[worst] <= limits.z_max, f"{worst} does not follow its declared law"),
            (buffer_error <= limits.buffer_abs_error_max, "the rotary tables differ from a fresh computation"),
            (shared == declared_architecture["tied_head"], "the head is tied where it should not be, or not where it should"),
            (n_entries == declared_parameter_count, f"{n_entries} parameters, {declared_parameter_count} by the formula"),
        )
        if not ok
    ]
    return decide(not wrong, "; ".join(wrong), z=z[worst], worst=worst, buffer_abs_error=buffer_error, n_parameters=n_entries)


def _law_z(values: Tensor, law: str, std: float) -> float:
    """How many standard errors mean or spread of a sample lie from the declared law; infinite for gains that are not 1."""
    if law == "ones":
        return 0.0 if bool((values == 1).all()) else math.inf
    n, wide = values.numel(), values.double()
    of_mean = abs(float(wide.mean())) * math.sqrt(n) / std
    of_spread = abs(float(wide.square().mean().sqrt()) / std - 1) * math.sqrt(2 * n)
    return max(of_mean, of_spread)


def _rotary(declared: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Cosine and sine by the definition, position by position, (T, J) float64."""
    half = declared["head_dim"] // 2
    rates = [declared["rope_theta"] ** (-j / half) for j in range(half)]
    angles = torch.tensor([[t * r for r in rates] for t in range(declared["max_seq_len"])], dtype=torch.float64)
    return torch.cos(angles), torch.sin(angles)


@decides("model.initial-loss")
@torch.no_grad()
def initial_loss(limits: SimpleNamespace, *, model: nn.Module, loss_batch: tuple[Tensor, Tensor], vocab_size: int) -> Verdict:
    """Before the first update the model knows nothing: its loss is that of guessing, ln V. `loss_batch` is (input_ids, labels)."""
    ids, labels = (t.to(_device(model)) for t in loss_batch)
    loss = _mean_nats(_in_eval(model, ids), labels)
    gap = abs(loss - math.log(vocab_size))
    return decide(
        gap <= limits.abs_gap_nats_max,
        f"the first loss is {loss:.4g} nats, guessing gives ln {vocab_size} = {math.log(vocab_size):.4g}",
        gap_nats=gap,
        loss_nats=loss,
    )


def _mean_nats(logits_BTV: Tensor, labels_BT: Tensor) -> float:
    """Mean −log p of the labels that are not −100, in float64."""
    chosen = labels_BT != IGNORE
    log_p = logits_BTV.double().log_softmax(-1)[chosen]
    return -float(log_p.gather(1, labels_BT[chosen][:, None]).mean())


def _in_eval(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Logits with dropout off; the modes of all modules are put back."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    logits = model(ids_BT)
    for module, training in modes:
        module.training = training
    return logits


# --- causality ------------------------------------------------------------------------------------------------------


@decides("model.causality")
@torch.no_grad()
def causality(limits: SimpleNamespace, *, model: nn.Module, vocab_size: int, max_seq_len: int) -> Verdict:
    """Changing one token changes no logit before it, and changing one row changes no other, bit for bit; in eval and in train mode.

    Lengths lie around the tile sizes of fused kernels. In train mode both forwards draw the same dropout masks.
    """
    worst_leak, worst_row, deaf, where = 0.0, 0.0, 0, ""
    was_training = model.training
    for training in (False, True):
        model.train(training)
        for length in sorted({min(n, max_seq_len) for n in LENGTHS}):
            ids = _draw_ids((2, length), vocab_size, seed=length).to(_device(model))
            before = _same_dropout(model, ids)
            for position in sorted({1, length // 2, length - 1}):
                after = _same_dropout(model, _with_other_token(ids, position, vocab_size))
                leak = float((after - before)[:, :position].abs().max())
                deaf += bool(torch.equal(after[:, position], before[:, position]))
                if leak > worst_leak:
                    worst_leak, where = leak, f"position {position} of {length}, {'train' if training else 'eval'} mode"
            rows = ids.clone()
            rows[0] = (rows[0] + 1) % vocab_size
            worst_row = max(worst_row, float((_same_dropout(model, rows) - before)[1].abs().max()))
    model.train(was_training)
    if deaf:
        return failed("changing a token does not change its own logits, so this check sees nothing", deaf=deaf)
    ok = worst_leak <= limits.leak_abs_max and worst_row <= limits.row_abs_max
    text = f"earlier logits see a later token ({where})" if worst_leak > limits.leak_abs_max else "one row of a batch sees another"
    return decide(ok, text, leak_abs=worst_leak, row_abs=worst_row)


def _same_dropout(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Logits with the same random numbers in every call; the caller's random state is untouched."""
    with torch.random.fork_rng(devices=[ids_BT.device] if ids_BT.is_cuda else []):
        torch.manual_seed(0)
        return model(ids_BT)


def _with_other_token(ids_BT: Tensor, position: int, vocab_size: int) -> Tensor:
    other = ids_BT.clone()
    other[:, position] = (other[:, position] + 1) % vocab_size
    return other


# --- packed documents -----------------------------------------------------------------------------------------------


@decides("model.document-isolation")
def document_isolation(
    limits: SimpleNamespace,
    *,
    model: nn.Module,
    packed_logits: Callable[[Tensor, Tensor], Tensor],
    embedding: nn.Module,
    vocab_size: int,
    max_seq_len: int,
) -> Verdict:
    """Documents packed into a row have the logits they have alone, and neither logits nor gradients pass between them; dropout is off.

    `packed_logits(input_ids_BT, document_ids_BT)` runs `model` on packed rows; `embedding` is its module that looks up tokens.
    """
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    found = []
    for length in sorted({min(n, max_seq_len) for n in PACKED_LENGTHS}):
        documents = packing(length).to(_device(model))
        ids = _draw_ids((2, length), vocab_size, seed=length).to(_device(model))
        ids[1, documents[1] == documents[1, -1]] = 0
        logits = _logits_between(model, packed_logits, ids, documents, vocab_size)
        found.append((*logits, *_gradients_between(packed_logits, embedding, ids, documents)))
    for module, training in modes:
        module.training = training
    rel_error, leak, deaf, gradient, unlearned = torch.tensor(found, dtype=torch.float64).amax(0).tolist()
    if deaf or unlearned:
        return failed("a document's tokens do not move its own logits, so this check sees nothing", deaf=deaf, unlearned=unlearned)
    ok = rel_error <= limits.rel_error_max and leak <= limits.leak_abs_max and gradient <= limits.gradient_abs_max
    text = "packed documents are not kept apart (logits against those alone, effect on neighbours, or gradient at their tokens)"
    return decide(ok, text, rel_error=rel_error, leak_abs=leak, gradient_abs=gradient)


def packing(length: int) -> Tensor:
    """Document ids (2, T): row 0 begins with a document of one token and is full; row 1 has one inside and ends in padding."""
    cuts = ((1, length // 3), (length // 4, length // 4 + 1, 7 * length // 8))
    return torch.tensor([[sum(cut <= t for cut in row) for t in range(length)] for row in cuts])


def _each_document(documents_BT: Tensor) -> list[tuple[int, Tensor]]:
    """Row and places (T,) bool of every document."""
    return [(b, documents_BT[b] == i) for b in range(len(documents_BT)) for i in documents_BT[b].unique()]


@torch.no_grad()
def _logits_between(
    model: nn.Module, packed_logits: Callable, ids_BT: Tensor, documents_BT: Tensor, vocab_size: int
) -> tuple[float, float, int]:
    """(worst relative error of a token's logits against those alone, largest effect on other documents, documents without effect)."""
    packed, errors, leaks, deaf = packed_logits(ids_BT, documents_BT), [], [], 0
    for row, own_T in _each_document(documents_BT):
        alone = model(ids_BT[row, own_T][None])[0].double()
        errors.append(((packed[row, own_T] - alone).norm(dim=-1) / alone.norm(dim=-1)).max())
        other = ids_BT.clone()
        other[row, own_T] = (other[row, own_T] + 1) % vocab_size
        moved_BT = (packed_logits(other, documents_BT) - packed).abs().amax(-1)
        deaf += not bool(moved_BT[row, own_T].all())
        moved_BT[row, own_T] = 0
        leaks.append(moved_BT.max())
    return float(torch.stack(errors).max()), float(torch.stack(leaks).max()), deaf


def _gradients_between(packed_logits: Callable, embedding: nn.Module, ids_BT: Tensor, documents_BT: Tensor) -> tuple[float, int]:
    """(largest gradient of a document's loss at the embeddings of other documents, documents without one at their own)."""
    leaves: list[Tensor] = []
    hook = embedding.register_forward_hook(lambda _, __, x_BTD: leaves.append(x_BTD.detach().requires_grad_()) or leaves[-1])
    loss_BT = packed_logits(ids_BT, documents_BT).log_softmax(-1)[..., 0]
    hook.remove()
    foreign, unlearned = [], 0
    for row, own_T in _each_document(documents_BT):
        (gradient_BTD,) = torch.autograd.grad(loss_BT[row, own_T].sum(), leaves, retain_graph=True, materialize_grads=True)
        unlearned += not bool(gradient_BTD[row, own_T].any(-1).all())
        gradient_BTD[row, own_T] = 0
        foreign.append(gradient_BTD.abs().max())
    return float(torch.stack(foreign).max()), unlearned


# --- an independent oracle ------------------------------------------------------------------------------------------


@decides("model.reference-differential")
@torch.no_grad()
def reference_differential(
    limits: SimpleNamespace,
    *,
    model: nn.Module,
    attention_layers: Sequence[tuple[Callable[[Tensor], Tensor], Mapping[str, Tensor]]],
    oracle_weights: Mapping[str, Any],
    declared_architecture: Mapping[str, Any],
    rotary_tables: tuple[Tensor, Tensor],
    vocab_size: int,
) -> Verdict:
    """Attention on activations of scale 3, and whole logits, equal an oracle written out in float64; tables do so at full length.

    `attention_layers` holds per layer (x_BTD ↦ y_BTD of the run's own module, its weights q k v out as (out, in) matrices);
    `oracle_weights` holds embed, final_norm, head and layers with attention_norm q k v out ffn_norm gate up down.
    """
    a = declared_architecture
    length = min(ORACLE_TOKENS, a["max_seq_len"])
    tables = _rotary(a)
    table_error = max(float((mine.double().cpu() - fresh).abs().max()) for mine, fresh in zip(rotary_tables, tables))
    draw = torch.Generator().manual_seed(11)
    width = attention_layers[0][1]["q"].shape[1]
    x_BTD = 3 * torch.randn(2, length, width, generator=draw)
    errors = []
    for attend, weights in attention_layers:
        expected = _oracle_attention(x_BTD.double(), weights, a, tables)
        errors.append(_rel(attend(x_BTD.to(_device(model))), expected))
    ids = _draw_ids((2, length), vocab_size, seed=12)
    logit_error = _rel(_in_eval(model, ids.to(_device(model))), _oracle_logits(ids, oracle_weights, a, tables))
    ok = max(errors) <= limits.rel_error_max and logit_error <= limits.rel_error_max and table_error <= limits.table_abs_error_max
    layer = max(range(len(errors)), key=errors.__getitem__)
    return decide(
        ok,
        f"the model differs from the float64 oracle (attention of layer {layer}, whole logits, or rotary tables)",
        attention_rel_error=errors[layer],
        logit_rel_error=logit_error,
        table_abs_error=table_error,
    )


def _rel(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in float64."""
    expected = expected.cpu()
    return float((got.double().cpu() - expected).norm() / expected.norm())


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().double().cpu()


def _oracle_attention(x_BTD: Tensor, weights: Mapping[str, Tensor], a: Mapping[str, Any], tables: tuple[Tensor, Tensor]) -> Tensor:
    """Attention by the definition: one query head at a time, scores divided by √H once, a table of allowed pairs."""
    length, h, group = x_BTD.shape[1], a["head_dim"], a["n_heads"] // a["n_kv_heads"]
    q, k, v = (x_BTD @ _wide(weights[name]).T for name in ("q", "k", "v"))
    forbidden = torch.arange(length)[None, :] > torch.arange(length)[:, None]
    mixed = []
    for n in range(a["n_heads"]):
        mine, theirs = slice(n * h, (n + 1) * h), slice(n // group * h, (n // group + 1) * h)
        scores = _turned(q[..., mine], tables) @ _turned(k[..., theirs], tables).transpose(1, 2) / math.sqrt(h)
        mixed.append(scores.masked_fill(forbidden, -math.inf).softmax(-1) @ v[..., theirs])
    return torch.cat(mixed, -1) @ _wide(weights["out"]).T


def _turned(x_BTH: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the complex number (feature j) + i·(feature j + H/2) by its position's angle."""
    length, half = x_BTH.shape[1], x_BTH.shape[2] // 2
    turned = torch.complex(x_BTH[..., :half], x_BTH[..., half:]) * torch.complex(tables[0][:length], tables[1][:length])
    return torch.cat((turned.real, turned.imag), -1)


def _oracle_logits(ids_BT: Tensor, weights: Mapping[str, Any], a: Mapping[str, Any], tables: tuple[Tensor, Tensor]) -> Tensor:
    """The whole decoder in float64: pre-norm blocks of attention and silu(gate)·up, then norm and head."""

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + a["norm_eps"]) * _wide(gain)

    x = _wide(weights["embed"])[ids_BT]
    for layer in weights["layers"]:
        x = x + _oracle_attention(norm(x, layer["attention_norm"]), layer, a, tables)
        y = norm(x, layer["ffn_norm"])
        gate = y @ _wide(layer["gate"]).T
        x = x + (gate * torch.sigmoid(gate) * (y @ _wide(layer["up"]).T)) @ _wide(layer["down"]).T
    return norm(x, weights["final_norm"]) @ _wide(weights["head"]).T


# --- learning one batch ---------------------------------------------------------------------------------------------


@decides("model.overfit-one-batch")
def overfit_one_batch(
    limits: SimpleNamespace,
    *,
    build_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    train_on: Callable[[nn.Module, torch.optim.Optimizer, Any], float],
    overfit_batch: Any,
    overfit_lr: float,
    eos_id: int,
) -> Verdict:
    """The run's own model, optimizer, loss and clipping learn one small batch by heart, end-of-text tokens included.

    `train_on(model, optimizer, batch)` makes one update and returns the mean loss in nats. `overfit_batch` has input_ids and
    labels (B, T); its tokens recur with different successors, so that only a model that sees its context can learn it.
    The loss is also measured here, without the stack's loss function. Dropout is off, so that the limit means the same everywhere.
    """
    if not ambiguous(overfit_batch.input_ids, overfit_batch.labels):
        return failed("every token of the batch has one successor, so learning it shows nothing about context", ambiguous_tokens=0)
    model = build_model().eval()
    optimizer = make_optimizer(model)
    reported, steps, ok = math.inf, 0, False
    while steps < limits.steps_max and not ok:
        for group in optimizer.param_groups:
            group["lr"] = overfit_lr * (1 - steps / limits.steps_max)
        reported, steps = train_on(model, optimizer, overfit_batch), steps + 1
        if reported <= limits.loss_nats_max / 4 or steps == limits.steps_max:
            loss, accuracy, eos_accuracy = _by_heart(model, overfit_batch, eos_id)
            ok = max(loss, reported) <= limits.loss_nats_max and min(accuracy, eos_accuracy) >= limits.accuracy_min
    return decide(
        ok,
        f"after {steps} updates on one batch the loss is {loss:.3g} nats (reported {reported:.3g}), {accuracy:.0%} of labels are predicted",
        loss_nats=loss,
        reported_nats=reported,
        accuracy=accuracy,
        eos_accuracy=eos_accuracy,
        steps=steps,
    )


@torch.no_grad()
def _by_heart(model: nn.Module, batch: Any, eos_id: int) -> tuple[float, float, float]:
    """Mean loss in nats, share of labels predicted, and share of end-of-text labels predicted."""
    ids, labels = batch.input_ids.to(_device(model)), batch.labels.to(_device(model))
    logits, chosen = model(ids), labels != IGNORE
    right, ends = logits.argmax(-1)[chosen] == labels[chosen], labels[chosen] == eos_id
    return _mean_nats(logits, labels), float(right.double().mean()), float(right[ends].double().mean()) if bool(ends.any()) else 0.0


def ambiguous(ids_BT: Tensor, labels_BT: Tensor) -> int:
    """How many tokens of a batch have more than one kind of label; shows that a batch asks for context."""
    followers: dict[int, set[int]] = {}
    for token, label in zip(ids_BT.flatten().tolist(), labels_BT.flatten().tolist()):
        followers.setdefault(token, set()).add(label)
    return sum(len(labels - {IGNORE}) > 1 for labels in followers.values())
