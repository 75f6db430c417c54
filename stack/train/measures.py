"""What a finished run states about itself: every metric of a train record."""

import torch

from stackproof.evaluate.baselines import bigram_bits_per_byte, unigram_bits_per_byte
from stackproof.spec.formulas import parameter_count, perplexity
from stackproof.train.run import Run


def state_metrics(run: Run, *, with_baselines: bool) -> None:
    """Put all metrics into the record builder; baselines only for a run that ended well."""
    _plan_metrics(run)
    if run.line:
        _training_metrics(run)
    if run.last_val is not None:
        _held_out_metrics(run)
    if with_baselines:
        _baseline_metrics(run)


def _plan_metrics(run: Run) -> None:
    state, metric, dataset = run.state, run.builder.metric, run.dataset
    vocab_size = dataset.tokenizer.vocab_size
    n_params = parameter_count(run.cfg.model.model_dump(), vocab_size)
    metric("n_params", n_params, "parameters")
    metric("vocab_size", vocab_size, "tokens")
    metric("steps", state.step, "steps")
    metric("tokens_seen", state.tokens_seen, "tokens")
    metric("unique_tokens", dataset.train.n_tokens, "tokens")
    metric("epochs", state.tokens_seen / dataset.train.n_tokens, "epochs")
    metric("tokens_per_parameter", state.tokens_seen / n_params, "tokens per parameter")
    metric("random_loss_nats", run.random_loss_nats, "nats per token")


def _training_metrics(run: Run) -> None:
    state, metric = run.state, run.builder.metric
    metric(
        "train_loss_nats",
        run.line["loss_nats"],
        "nats per token",
        n=run.cfg.train.tokens_per_step,
        better="lower",
    )
    metric("ema_loss_nats", state.ema_loss_nats, "nats per token", better="lower")
    metric("min_ema_loss_nats", state.min_ema_loss_nats, "nats per token", better="lower")
    metric("train_s", round(state.wall_s, 3), "s", better="lower")
    metric("tokens_per_s", state.tokens_seen / state.wall_s, "tokens/s", better="higher")
    gate_s = sum(
        seat.seconds for seat in run.keeper.seats.values() if seat.gate.moment == "runtime"
    )
    metric("gates_overhead_frac", gate_s / (run.process_s or state.wall_s), "1", better="lower")
    if run.trace_s:
        metric(
            "trace_overhead_frac",
            run.trace_s / (run.process_s or state.wall_s),
            "1",
            better="lower",
        )
    if run.device.type == "cuda":
        metric(
            "peak_device_memory_bytes",
            torch.cuda.max_memory_allocated(run.device),
            "bytes",
            better="lower",
        )


def _held_out_metrics(run: Run) -> None:
    val, best, metric = run.last_val, run.state.best, run.builder.metric
    metric(
        "val_loss_nats",
        val.loss_nats,
        "nats per token",
        n=val.n_tokens,
        stderr=val.stderr_nats,
        better="lower",
    )
    metric("val_ppl", perplexity(val.loss_nats), "1", n=val.n_tokens, better="lower")
    metric("val_bits_per_byte", val.bits_per_byte, "bits per byte", n=val.n_bytes, better="lower")
    metric("val_batches", len(run.held_out), "batches")
    if best:  # none where no evaluation was called and the gate that says so is waived
        metric("best_val_loss_nats", best["val_loss_nats"], "nats per token", better="lower")
        metric("best_step", best["step"], "steps")


def _baseline_metrics(run: Run) -> None:
    dataset, metric = run.dataset, run.builder.metric
    parts = (dataset.train, dataset.validation, dataset.tokenizer)
    n_bytes = dataset.validation.n_bytes
    metric(
        "baseline_unigram_bits_per_byte",
        unigram_bits_per_byte(*parts),
        "bits per byte",
        n=n_bytes,
        better="lower",
    )
    metric(
        "baseline_bigram_bits_per_byte",
        bigram_bits_per_byte(*parts),
        "bits per byte",
        n=n_bytes,
        better="lower",
    )
