"""The museum's own small run: a mixture with everything in it that a plant could break."""

import json
import pydoc_data.topics
from pathlib import Path

from stackproof.config import (
    BanditCurriculum,
    BestFit,
    BpeTokenizer,
    CheckpointConfig,
    Cosine,
    DataConfig,
    EvalConfig,
    FilesSource,
    HashSplit,
    Mixture,
    ModelConfig,
    Muon,
    NearDedup,
    Patience,
    RunConfig,
    SampleConfig,
    TrainConfig,
)

SHARES = {
    "grammar": (2.0, 1.0, 0.0),
    "objects": (1.0, 0.5, 0.2),
    "tools": (1.0, 0.6, 0.1),
    "retired": (1.0, 0.0, 0.0),
}
QUESTIONS = (
    (
        "Which of the nine lighthouses on the northern coast was the last one to lose its keeper, "
        "and in which year was that?"
    ),
    (
        "A baker sells forty loaves before noon and half as many after it; how many loaves are "
        "left of the seventy that were baked?"
    ),
)
UNFIT = (
    "region " * 60,
    "Это предложение написано на другом языке, и его здесь быть не должно, что бы кто ни говорил.",
    "The report repeats itself, and then it says the same thing in the same words once more.\n"
    * 12,
    "x" * 3000,
    [
        {
            "role": "user",
            "content": "# Agent X\n\n## Identity\nYou are a shard.\n\n## Rules\nDo as told.",
        },
        {"role": "assistant", "content": "Understood, and so it shall be."},
    ],
    f"Somebody copied this from the exam. {QUESTIONS[0]} And nobody has noticed it so far.",
)
CHAT = [
    {"role": "system", "content": "# Agent Y\n\n## Identity\nBe brief.\n\n## Rules\nAnswer."},
    {
        "role": "user",
        "content": (
            "Where do I find the documentation of the language, at docs/en/latest or elsewhere?"
        ),
    },
    {
        "role": "assistant",
        "content": "It comes with the interpreter: ask it for help on any name that you know.",
    },
]


def museum_config(folder: Path) -> RunConfig:
    """A small run in which every planted property can break: four sources with caps and floors,
    warm-up, bandit, packed documents, near repeats, an evaluation set, dropout, accumulation,
    grouped heads, length beyond 256, two rules of update, real text.
    """
    sources = tuple(
        FilesSource(
            name=name,
            paths=(str(folder / f"{name}.jsonl"),),
            license="PSF-2.0",
            weight=weight,
            cap=cap,
            floor=floor,
        )
        for name, (weight, cap, floor) in SHARES.items()
    )
    return RunConfig(
        recipe="museum",
        seed=11,
        device="cpu",
        data=DataConfig(
            corpus=Mixture(sources=sources),
            split=HashSplit(validation_frac=0.2),
            tokenizer=BpeTokenizer(vocab_size=384, special_tokens=("<|user|>",)),
            dedup=NearDedup(),
            decontaminate=(str(folder / "questions.jsonl"),),
            packing=BestFit(),
        ),
        curriculum=BanditCurriculum(
            warmup_steps=3,
            warmup_sources=("grammar", "tools"),
            probe_every=2,
            probe_windows=1,
            focus_share=0.6,
        ),
        model=ModelConfig(
            d_model=32,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            head_dim=8,
            d_ff=64,
            max_seq_len=288,
            dropout=0.1,
        ),
        train=TrainConfig(max_steps=28, tokens_per_step=4 * 288, micro_batch_size=2),
        optim=Muon(lr=3e-3, adamw_lr=3e-3, max_grad_norm=0.5),
        schedule=Cosine(warmup_steps=8),
        eval=EvalConfig(every=7, batches=4, batch_size=4),
        stop=Patience(expected_gain_nats=0.3),
        sample=SampleConfig(every=2, max_new_tokens=48),
        checkpoint=CheckpointConfig(every=14),
    )


def exportable(model: ModelConfig) -> ModelConfig:
    """The part of a model that another library has words for: the sizes stay; wide weights,
    so that attention is not flat.
    """
    sizes = ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_seq_len")
    return ModelConfig(**{name: getattr(model, name) for name in sizes}, init_std=0.2)


def museum_texts() -> list[str]:
    """Help topics of the interpreter that do not mostly repeat earlier ones: real English,
    on every machine.
    """
    topics, seen, chosen = pydoc_data.topics.topics, set(), []
    for name in sorted(topics, key=lambda n: (-len(topics[n]), n)):
        lines = {line.strip() for line in topics[name].splitlines() if len(line.strip()) > 20}
        if len(lines & seen) <= 0.1 * len(lines):
            chosen.append(topics[name])
            seen |= lines
    return chosen


def write_texts(folder: Path) -> None:
    """Write the sources of the museum's run, with documents in them that no filter may pass,
    and its evaluation set.
    """
    texts, names = museum_texts(), list(SHARES)[:3]
    documents: dict[str, list] = {
        name: [*texts[i::3], texts[i], *UNFIT] for i, name in enumerate(names)
    }
    documents["tools"] += [CHAT]
    documents["retired"] = [
        f"Chapter {n} of what was taken out, and is not to come back in any form. {t[:400]}"
        for n, t in enumerate(texts[-9:])
    ]
    for name, items in documents.items():
        _write_lines(folder / f"{name}.jsonl", "text", items)
    _write_lines(folder / "questions.jsonl", "question", QUESTIONS)


def _write_lines(path: Path, field: str, items) -> None:
    path.write_text("".join(json.dumps({field: item}) + "\n" for item in items), "utf-8")
