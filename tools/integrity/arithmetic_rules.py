"""Rules about figures that follow from others: those of a record, and those of each logged step."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stackproof.spec import formulas
from stackproof.spec.records import Record
from tools.integrity.core import (
    LOG,
    At,
    Messages,
    Repo,
    each_record,
    number,
    rule,
    stated_count,
)

# Of the last place of a 64-bit float, for sums that may be added in another order.
EXACT = 1e-12
MAX_EXPONENT = 709.0  # exp of more overflows 64 bits
MEAN_DECAY = 0.98  # of the running mean of the training loss


@rule(
    "PPL",
    title="Perplexity is exp of the loss",
    why="Two figures of one quantity must agree.",
    hint="supersede the record with a true one",
    over=each_record,
)
def ppl(repo: Repo, record: Record) -> Messages:
    for name in (name for name in record.metrics if name.endswith("_ppl")):
        stated, loss = number(record, name), number(record, f"{name[:-4]}_loss_nats")
        truth = math.inf if loss is None or loss > MAX_EXPONENT else math.exp(loss)
        if loss is not None and not _equal(stated, truth):
            yield f"{name} = {stated:.9g}, exp of the loss is {truth:.9g}"


@rule(
    "TOKENS",
    title="Tokens are steps × batch × length × accumulation × data ranks",
    why="A token count that does not close hides what was trained.",
    hint="supersede the record with a true one",
    over=each_record,
)
def tokens(repo: Repo, record: Record) -> Messages:
    config, steps = repo.config_of(record), number(record, "steps")
    if record.kind != "train" or "tokens_seen" not in record.metrics or config is None:
        return
    length, train = config["model"]["max_seq_len"], config["train"]
    # Ranks of a tensor group read the same rows. Records of one process state no mesh.
    mesh = [stated_count(record, f"mesh_{name}", 1) or 1 for name in ("replicate", "shard")]
    n_data_ranks, rows = math.prod(mesh), train["tokens_per_step"] // length
    batch = math.gcd(rows // n_data_ranks, train["micro_batch_size"])
    accumulation = rows // (n_data_ranks * batch)
    per_step = formulas.tokens_seen(1, batch, length, accumulation, n_data_ranks)
    seen = number(record, "tokens_seen")
    if steps is None or seen != steps * per_step:
        yield f"tokens_seen = {seen:.0f}, the arithmetic gives {steps} × {per_step}"


@rule(
    "DERIVED",
    title="Figures of a record that follow from others are those",
    why="A figure that was edited apart from those it is computed from is a false claim.",
    hint="supersede the record with a true one",
    over=each_record,
)
def derived(repo: Repo, record: Record) -> Messages:
    for name, value in _derived(repo, record):
        if name in record.metrics and not _equal(number(record, name), value):
            yield f"{name} = {number(record, name):.12g}, the other figures give {value:.12g}"


def _derived(repo: Repo, record: Record) -> Iterator[tuple[str, float]]:
    """Metrics that other metrics and their sample counts give."""
    match record.kind:
        case "train":
            yield from _of_training(repo, record)
        case "evaluate":
            nats, n_bytes, n_chars, n_tokens = (
                number(record, name) for name in ("total_nats", "bytes", "chars", "tokens")
            )
            if nats is not None and n_bytes and n_chars and n_tokens:
                yield "bits_per_byte", formulas.bits_per_byte(nats, n_bytes)
                yield "bits_per_char", formulas.bits_per_byte(nats, n_chars)
                yield "loss_nats", nats / n_tokens


def _of_training(repo: Repo, record: Record) -> Iterator[tuple[str, float]]:
    seen, unique, n_params, vocab_size = (
        number(record, name) for name in ("tokens_seen", "unique_tokens", "n_params", "vocab_size")
    )
    if seen is not None and unique and n_params:
        yield "epochs", seen / unique
        yield "tokens_per_parameter", seen / n_params
    if vocab_size is not None and 1 <= vocab_size < math.inf:
        yield "random_loss_nats", math.log(vocab_size)
        if config := repo.config_of(record):
            yield "n_params", formulas.parameter_count(config["model"], int(vocab_size))
    loss, bits = (record.metrics.get(f"val_{name}") for name in ("loss_nats", "bits_per_byte"))
    if loss is not None and bits is not None and loss.n and bits.n:
        nats = float(loss.value) * loss.n
        yield "val_bits_per_byte", formulas.bits_per_byte(nats, bits.n)


@rule(
    "LOG-ARITHMETIC",
    title="Logged tokens and, where every step is logged, running means follow from the steps",
    why="A curve that was smoothed or invented has to close with tokens, means and rates as well.",
    hint="supersede the record with a true one",
    over=each_record,
)
def log_arithmetic(repo: Repo, record: Record) -> Messages:
    if record.kind == "train" and (config := repo.config_of(record)):
        path, per_step = repo.record_file(record.id, LOG), config["train"]["tokens_per_step"]
        for text in _log_problems(repo.series(record, LOG), per_step):
            yield At(text, path=path)


def _log_problems(lines: Sequence[Mapping[str, Any]], per_step: int) -> Iterator[str]:
    for line in lines:
        seen = line.get("tokens_seen")
        if seen is not None and seen != line["step"] * per_step:
            yield f"step {line['step']} has seen {seen} tokens, at {per_step} per step"
            break
    for line, mean in _means(lines):
        if not _equal(float(line["ema_loss_nats"]), mean):
            yield (
                f"the running mean of step {line['step']} is {line['ema_loss_nats']}, the losses "
                f"give {mean:.12g}"
            )
            break


def _means(lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], float]]:
    """Each line with the running mean of the loss, as far as every step from 1 on is logged."""
    mean = 0.0
    for expected, line in enumerate(lines, start=1):
        if line["step"] != expected or None in (line.get("loss_nats"), line.get("ema_loss_nats")):
            return
        loss = float(line["loss_nats"])
        mean = loss if expected == 1 else MEAN_DECAY * mean + (1 - MEAN_DECAY) * loss
        yield line, mean


def _equal(stated: float | None, value: float) -> bool:
    """Equal to rounding; NaN equals NaN."""
    if stated is None or math.isnan(value):
        return stated is not None and math.isnan(stated)
    return math.isclose(stated, value, rel_tol=EXACT)
