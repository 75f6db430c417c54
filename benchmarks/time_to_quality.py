"""Seconds until ours is as good as nanoGPT's CPU recipe is at its end,
in bits per byte on the same held-out bytes.

    python benchmarks/time_to_quality.py [--text FILE] [--held-out FILE] [--recipe pocket] [--set
        KEY=VALUE ...] [--rounds 3]

nanoGPT's recipe for a small machine: 4 layers of 128, 4 heads, context 64, 12 rows, 2,000 updates,
AdamW 1e-3 to 1e-4 by a cosine after 100 updates, second beta 0.99, decay 0.1, clipping to 1.0, no
dropout, characters as tokens; of texts with more than 256 different characters, bytes. It ends at
some number of bits per byte. Ours is the real `stack train`, a recipe by name with `--set` values,
gates on; its checkpoints are judged afterwards, in order, until one is at least that good.

The text is a file, or else the documentation of the standard library. Both train on the same
characters and are scored on the same held-out ones: the last tenth of the text, or another file.
Every held-out byte is scored once, in windows of the model's own context that move by half of it,
so that each byte but the first ones has at least half a context before it. Before the first byte
nanoGPT's model sees the last character trained on, ours the end-of-text token.

Two clocks for both. `training` is the updates alone: for nanoGPT drawing and updating, for ours
everything between two updates but evaluating, sampling and saving, so with its gates and its log.
`everything` adds what each does at its own cadence: for nanoGPT its estimate on 20 batches of each
split and its checkpoint, every 250 updates; for ours held-out evaluation, audited samples and
checkpoints. Preflight and preparing the data (cutting, training a tokenizer) are shown apart, for
both. Rounds alternate, each with another seed.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import child
import held_out
import nanogpt
from side_by_side import Row, against, as_json, close_record, facts, open_record, show, write_json

from stackproof.evaluate.stopping import Decision
from stackproof.train.step import StepReport
from stackproof.train.trainer import Callback, RestartPoint, Sample, Trainer

OURS, NANOGPT = "ours", "nanogpt"
GOAL = 2.0
PACKAGES = ("torch", "numpy")
# nanoGPT's README ("I only have a macbook", CPU) over config/train_shakespeare_char.py.
LAYERS, D_MODEL, HEADS, CONTEXT, ROWS, UPDATES = 4, 128, 4, 64, 12, 2000
LR, MIN_LR, WARMUP, BETA2, DECAY, CLIP = 1e-3, 1e-4, 100, 0.99, 0.1, 1.0
EVALUATE_EVERY, EVALUATION_BATCHES = 250, 20


# ---- nanoGPT's side


def nanogpt_lr(update: int, updates: int) -> float:
    """Learning rate of an update counted from 0: linear warm-up,
    then a half cosine down to the least.
    """
    if update < WARMUP:
        return LR * (update + 1) / (WARMUP + 1)
    progress = min(1.0, (update - WARMUP) / max(1, updates - WARMUP))
    return MIN_LR + 0.5 * (1 + math.cos(math.pi * progress)) * (LR - MIN_LR)


def symbols(parts: held_out.Cut) -> tuple[list[int], list[int], list[int]]:
    """(ids trained on, ids held out, bytes behind each id): characters, or bytes where there are
    more than 256 different ones.
    """
    characters = sorted(set(parts.head + parts.tail))
    if len(characters) > 256:
        return list(parts.head.encode()), list(parts.tail.encode()), [1] * 256
    id_of = {c: i for i, c in enumerate(characters)}
    return (
        [id_of[c] for c in parts.head],
        [id_of[c] for c in parts.tail],
        [len(c.encode()) for c in characters],
    )


def train_nanogpt(parts: held_out.Cut, seed: int, updates: int, folder: Path) -> dict[str, Any]:
    """One run of the recipe; the seconds of its parts and where it ends."""
    import numpy as np
    import torch

    from stackproof.evaluate.bits_per_byte import evaluate_tokens

    prepared = time.perf_counter()
    head, tail, sizes = symbols(parts)
    data = torch.tensor(head)
    splits = {"train": data, "val": torch.tensor(tail)}
    torch.manual_seed(seed)
    model = nanogpt.NanoGPT(LAYERS, D_MODEL, HEADS, CONTEXT, len(sizes))
    optimizer = nanogpt.make_optimizer(model, lr=LR, beta2=BETA2, weight_decay=DECAY)

    def batch(tokens):
        starts = torch.randint(len(tokens) - CONTEXT, (ROWS,)).tolist()
        return torch.stack([tokens[i : i + CONTEXT] for i in starts]), torch.stack(
            [tokens[i + 1 : i + CONTEXT + 1] for i in starts]
        )

    @torch.no_grad()
    def estimate() -> None:
        model.eval()
        for tokens in splits.values():
            for _ in range(EVALUATION_BATCHES):
                ids_BT, labels_BT = batch(tokens)
                nanogpt.loss(model(ids_BT), labels_BT).item()
        model.train()

    begun = time.perf_counter()
    beside = 0.0
    for update in range(updates):
        if update % EVALUATE_EVERY == 0:
            started = time.perf_counter()
            estimate()
            if update:
                torch.save(
                    {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
                    folder / "ckpt.pt",
                )
            beside += time.perf_counter() - started
        for group in optimizer.param_groups:
            group["lr"] = nanogpt_lr(update, updates)
        ids_BT, labels_BT = batch(data)
        nanogpt.loss(model(ids_BT), labels_BT).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    everything = time.perf_counter() - begun
    context_first = [*head[-1:], *tail]
    score = evaluate_tokens(
        model, context_first, np.array(sizes), seq_len=CONTEXT, stride=CONTEXT // 2, batch_size=64
    )
    return {
        "bits_per_byte": score.bits_per_byte,
        "bytes": score.n_bytes,
        "training_s": everything - beside,
        "everything_s": everything,
        "prepare_s": begun - prepared,
        "tokens": updates * ROWS * CONTEXT,
        "vocab_size": len(sizes),
    }


# ---- our side


class Clock(Callback):
    """Notes when each step was taken, and how long evaluating,
    sampling and saving took since the first.
    """

    def __init__(self):
        self.opened_s, self.preflight_s, self.beside_s = 0.0, 0.0, 0.0
        self.now = time.perf_counter()
        self.begun: float | None = None
        self.trained_s: dict[int, float] = {}
        self.saved: list[dict[str, Any]] = []

    def lap(self) -> float:
        before, self.now = self.now, time.perf_counter()
        return self.now - before

    def on_phase(self, name: str) -> None:
        if name == "preflight":
            self.opened_s = self.lap()

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        now = time.perf_counter()
        if self.begun is None:
            self.begun = now - report.wall_s
            self.preflight_s = self.begun - self.now
        self.now = now
        self.trained_s[report.step] = now - self.begun - self.beside_s

    def on_evaluation(self, trainer: Trainer, report: StepReport, decision: Decision) -> None:
        self.beside_s += self.lap()

    def on_sample(self, trainer: Trainer, sample: Sample) -> None:
        self.beside_s += self.lap()

    def on_saved(self, trainer: Trainer, point: RestartPoint) -> None:
        self.beside_s += self.lap()
        clocks = {"training_s": self.trained_s[point.step], "everything_s": self.now - self.begun}
        self.saved.append({"step": point.step, "path": str(point.folder), **clocks})


def train_ours(
    parts: held_out.Cut, seed: int, name: str, sets: list[str], folder: Path
) -> dict[str, Any]:
    """One real run of a recipe on the same text; the seconds of its parts,
    and its checkpoints with the clocks at each.
    """
    from stackproof.config import load_config
    from stackproof.recipes import recipe
    from stackproof.train.loop import train
    from stackproof.train.start import fresh

    text = folder / "text.txt"
    text.write_text(parts.head, "utf-8")
    corpus = (
        "data.corpus.kind=files",
        f"data.corpus.paths={json.dumps([str(text)])}",
        "data.split.kind=tail",
    )
    keep_all = ("checkpoint.keep=1000000", "stop.kind=never", f"seed={seed}")
    cfg, overrides = load_config(recipe(name), sets=(*corpus, *keep_all, *sets))
    clock = Clock()
    record = train(fresh(cfg, overrides, folder / "run", [clock]))
    if record.status != "completed":
        raise SystemExit(f"our run ended as {record.status}: {record.end_reason}")
    apart = {"prepare_s": clock.opened_s, "preflight_s": clock.preflight_s}
    return apart | {"tokens_per_step": cfg.train.tokens_per_step, "checkpoints": clock.saved}


def first_as_good(
    checkpoints: list[dict], target: float, tail: str
) -> tuple[dict | None, list[tuple[int, float]]]:
    """The first checkpoint whose bits per byte are at most the target's, or None, and (step, bits
    per byte) of all looked at.
    """
    looked = []
    for point in sorted(checkpoints, key=lambda c: c["step"]):
        looked.append((point["step"], held_out.bits_per_byte_of(Path(point["path"]), tail)))
        if looked[-1][1] <= target:
            return point | {"bits_per_byte": looked[-1][1]}, looked
    return None, looked


# ---- the measurement


def contest(options: argparse.Namespace) -> dict[str, Any]:
    """What the process of one side does for one round."""
    held_out.use_threads(options.threads)
    parts, folder = held_out.cut(options.text, options.held_out), Path(options.scratch)
    if options.contestant == NANOGPT:
        return train_nanogpt(parts, options.seed, options.updates, folder)
    return train_ours(parts, options.seed, options.recipe, options.set, folder)


def one_side(name: str, options: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Run one side in a process of its own and return what it says."""
    folder.mkdir()
    arguments = ["--contestant", name, "--seed", str(seed), "--scratch", str(folder)]
    arguments += [
        "--recipe",
        options.recipe,
        "--updates",
        str(options.updates),
        "--threads",
        str(options.threads),
    ]
    arguments += [a for s in options.set for a in ("--set", s)]
    arguments += [
        a
        for flag, path in (("--text", options.text), ("--held-out", options.held_out))
        if path
        for a in (flag, str(path))
    ]
    process = child.Child(child.itself(*arguments), env={"STACKPROOF_CACHE": str(folder / "cache")})
    process.close()
    return process.ready


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds, each with both sides' figures and the checkpoint of ours that was first as good,
    or None.
    """
    tail, rounds = held_out.cut(options.text, options.held_out).tail, []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="stackproof-bench-") as name:
            folder = Path(name)
            theirs = one_side(NANOGPT, options, number + 1, folder / NANOGPT)
            ours = one_side(OURS, options, number + 1, folder / OURS)
            reached, looked = first_as_good(ours["checkpoints"], theirs["bits_per_byte"], tail)
            shutil.rmtree(folder / OURS)
        rounds.append({"nanogpt": theirs, "ours": ours, "reached": reached, "looked": looked})
        best = min(v for _, v in looked)
        at = (
            f"step {reached['step']} after {reached['training_s']:.1f} s"
            if reached
            else f"never; best {best:.4f}"
        )
        print(
            f"round {number + 1}: nanoGPT {theirs['bits_per_byte']:.4f} bits/byte in "
            f"{theirs['training_s']:.1f} s; ours {at}",
            flush=True,
        )
    return rounds


def rows_of(rounds: list[dict[str, Any]]) -> list[Row]:
    """Runs to that quality per hour by either clock, so that a ratio above 1 says that ours needs
    less time; none if ours fell short.
    """
    if any(r["reached"] is None for r in rounds):
        return [
            Row(f"{OURS}: {clock}", "per hour", (), "did not become as good in every round")
            for clock in ("training", "everything")
        ]
    rows = []
    for clock in ("training", "everything"):
        ours = Row(
            f"{OURS}: {clock}", "per hour", tuple(3600 / r["reached"][f"{clock}_s"] for r in rounds)
        )
        theirs = Row(
            f"{NANOGPT}: {clock}",
            "per hour",
            tuple(3600 / r["nanogpt"][f"{clock}_s"] for r in rounds),
            goal=GOAL,
        )
        rows += against(ours.name, [ours, theirs])
    return rows


def figures(rounds: list[dict[str, Any]]) -> dict[str, tuple[float, str]]:
    """Medians over the rounds of everything besides the ratios."""

    def median(of) -> float:
        return statistics.median(map(of, rounds))

    found = {
        "target_bits_per_byte": (median(lambda r: r["nanogpt"]["bits_per_byte"]), "bits per byte"),
        "held_out_bytes": (rounds[0]["nanogpt"]["bytes"], "bytes"),
        "rounds_reached": (sum(r["reached"] is not None for r in rounds), "rounds"),
        "best_bits_per_byte_ours": (
            median(lambda r: min(v for _, v in r["looked"])),
            "bits per byte",
        ),
        "prepare_s_nanogpt": (median(lambda r: r["nanogpt"]["prepare_s"]), "s"),
        "prepare_s_ours": (median(lambda r: r["ours"]["prepare_s"]), "s"),
        "preflight_s_ours": (median(lambda r: r["ours"]["preflight_s"]), "s"),
        "training_s_nanogpt": (median(lambda r: r["nanogpt"]["training_s"]), "s"),
        "everything_s_nanogpt": (median(lambda r: r["nanogpt"]["everything_s"]), "s"),
    }
    if all(r["reached"] for r in rounds):
        found["training_s_ours"] = (median(lambda r: r["reached"]["training_s"]), "s")
        found["everything_s_ours"] = (median(lambda r: r["reached"]["everything_s"]), "s")
        found["tokens_ours"] = (
            median(lambda r: r["reached"]["step"] * r["ours"]["tokens_per_step"]),
            "tokens",
        )
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text",
        type=Path,
        help="UTF-8 text to train on; default: the documentation of the standard library",
    )
    parser.add_argument(
        "--held-out", type=Path, help="UTF-8 text to score; default: the last tenth of --text"
    )
    parser.add_argument("--recipe", default="pocket")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of ours; checkpoint.every says how often it is judged",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--updates", type=int, default=UPDATES, help="of nanoGPT's recipe, schedule included"
    )
    parser.add_argument(
        "--run-dir", type=Path, help="leave a record of kind benchmark in this folder"
    )
    parser.add_argument("--json", type=Path)
    for hidden in ("--contestant", "--scratch"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parsed()
    if options.contestant:
        return child.serve(lambda: (contest(options), lambda question: {}))
    name = options.text.name if options.text else "the standard library's documentation"
    record = open_record(options, f"time to quality on {name}")
    rounds = measure(options)
    rows, found = rows_of(rounds), figures(rounds)
    show(f"time to nanoGPT's quality on {name}, {options.rounds} rounds in turn", rows)
    print(
        "\n" + "\n".join(f"{name:28}{value:12,.4f} {unit}" for name, (value, unit) in found.items())
    )
    machine = facts(PACKAGES)
    print(machine)
    write_json(options.json, {"machine": machine, "rows": as_json(rows), "rounds": rounds})
    close_record(record, options.run_dir, rows, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
