"""A small training script with its own model, loss and loop, none of it the stack's. Plants of
foreign trainers change it. Started by a launcher in several processes, it divides the rows of each
epoch among them.

B batch, T tokens, D width, V vocab
"""

import copy
import os
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from stackproof.contracts.callbacks.plain import Gate, gated
from stackproof.contracts.gate import Verdict

VOCAB, WIDTH, PAD, EOS, STEPS, MICRO, ROWS = 48, 16, 0, 1, 8, 2, 12
LETTERS = "abcd"
PIECES = ["".join(p) for n in (1, 2, 3) for p in product(LETTERS, repeat=n)][: VOCAB - 2]
INPUTS = ("input_ids", "attention_mask", "position_ids")


class Small(nn.Module):
    """One layer of causal attention with dropout, and a head that is the embedding."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(
            tie_word_embeddings=True, max_seq_len=24, pad_token_id=PAD, eos_token_id=EOS
        )
        self.embed, self.place = nn.Embedding(VOCAB, WIDTH), nn.Embedding(24, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(WIDTH, VOCAB, bias=False)
        for p in (self.embed.weight, self.place.weight):
            nn.init.normal_(p, std=0.2)
        self.head.weight = self.embed.weight
        self.place.weight.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        places = torch.arange(input_ids.shape[1]) if position_ids is None else position_ids
        x_BTD = self.drop(self.embed(input_ids) + self.place(places))
        q, k, v = self.qkv(self.norm(x_BTD)).chunk(3, -1)
        seen = visible(input_ids, attention_mask)
        mixed_BTD = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.head(x_BTD + self.out(mixed_BTD))


def visible(ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """What each token may look at: (B, T, T) bool."""
    past = torch.ones(ids_BT.shape[1], ids_BT.shape[1], dtype=torch.bool).tril()
    return (
        past[None]
        if mask_BT is None
        else past[None] & (mask_BT[:, None, :] > 0) | torch.eye(ids_BT.shape[1], dtype=torch.bool)
    )


def texts(n: int, seed: int) -> list[list[int]]:
    """`n` rows of ids of drawn letters, each ended by EOS."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(16, 23, (n,), generator=draw).tolist()
    letters = torch.randint(len(LETTERS), (n, 3 * max(lengths)), generator=draw).tolist()
    rows = (encode("".join(LETTERS[i] for i in row)) for row in letters)
    return [[*row[:length], EOS] for row, length in zip(rows, lengths)]


def encode(text: str) -> list[int]:
    """The ids of the longest pieces, from the left."""
    ids, at = [], 0
    while at < len(text):
        piece = next(text[at : at + n] for n in (3, 2, 1) if text[at : at + n] in PIECES)
        ids.append(2 + PIECES.index(piece))
        at += len(piece)
    return ids


def held_out() -> list[list[int]]:
    return texts(9, seed=5)


def order_of(epoch: int) -> list[int]:
    return torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch)).tolist()


def batches() -> Iterator[dict[str, Tensor]]:
    """Three rows at a time, epoch after epoch without end."""
    rows, epoch = texts(ROWS, seed=4), 0
    while True:
        order, epoch = share_of(order_of(epoch)), epoch + 1
        for first in range(0, len(order), 3):
            yield collate([rows[i] for i in order[first : first + 3]])


def join() -> None:
    """Join the other processes of this run, if a launcher has started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")


def n_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def share_of(order: list[int]) -> list[int]:
    """The rows of this rank."""
    return order[rank() :: n_ranks()]


def reduced(model: nn.Module) -> nn.Module:
    """The model with gradients that are averaged over the ranks."""
    return DistributedDataParallel(model) if n_ranks() > 1 else model


def of_all(n_tokens: int) -> int:
    """The sum over all ranks."""
    total = torch.tensor(n_tokens)
    if n_ranks() > 1:
        dist.all_reduce(total)
    return int(total)


def collate(rows: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    padded = [
        (r + [PAD] * (longest - len(r)), [1] * len(r) + [0] * (longest - len(r))) for r in rows
    ]
    ids, mask = (torch.tensor(part) for part in zip(*padded))
    places = torch.arange(longest).expand(len(rows), -1)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": places,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in INPUTS if name in batch}


def tokens_in(batches: list[dict[str, Tensor]]) -> int:
    return sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)


def loss_of(logits_BTV: Tensor, batch: dict[str, Tensor], n_tokens: int) -> Tensor:
    logits, labels = logits_BTV[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    return F.cross_entropy(logits, labels, reduction="sum") / n_tokens


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2]},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)


def rate_at(update: int) -> float:
    return 1.0 / (1 + update)


def evaluate(model: nn.Module, batch: dict[str, Tensor]) -> float:
    model.eval()
    with torch.no_grad():
        loss = loss_of(model(**inputs_of(batch)), batch, tokens_in([batch]))
    model.train()
    return float(loss)


def make_tokenizer() -> Any:
    class Words:
        pad_token_id, eos_token_id, bos_token_id = PAD, EOS, None
        all_special_ids = (PAD, EOS)

        def __len__(self) -> int:
            return VOCAB

        def encode(self, text: str, **kwargs) -> list[int]:
            return encode(text)

        def decode(self, ids: list[int], **kwargs) -> str:
            return "".join(PIECES[i - 2] for i in ids)

    return Words()


def saved(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def loaded(kept: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])


def verdict_of(gate_id: str) -> tuple[Verdict, int | None]:
    """The verdict of one gate on a run of the script, and the step at which it was first red."""
    gate, _ = run((gate_id,))
    return gate.verdicts()[gate_id], gate.first_failures().get(gate_id)


def run(gate_ids: tuple[str, ...] | None) -> tuple[Gate, nn.Module]:
    """Train once under some gates, or all with None: their verdicts, and the trained model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        join()
        model = Small()
        trained = reduced(model)
        optimizer = make_optimizer(model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rate_at(i))
        with gated(
            trained,
            optimizer,
            scheduler=scheduler,
            tokenizer=make_tokenizer(),
            max_grad_norm=1.0,
            settings={"learning_rate": 1e-3, "weight_decay": 0.1},
            mode="log",
            only=gate_ids,
        ) as gate:
            _train(gate, trained, optimizer, scheduler)
            _reload(gate, model, optimizer)
        if dist.is_initialized():
            dist.destroy_process_group()
        return gate, model


def _train(gate: Gate, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    drawn, scored = batches(), collate(held_out())
    for _ in range(STEPS):
        micro_batches = [next(drawn) for _ in range(MICRO)]
        n_tokens = of_all(tokens_in(micro_batches))
        for batch in micro_batches:
            gate.batch(batch)
            # Gradients are averaged over the ranks, and are to be summed.
            (n_ranks() * loss_of(model(**inputs_of(batch)), batch, n_tokens)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        model.zero_grad()
        evaluate(model, scored)


def _reload(gate: Gate, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state, kept = gate.state_dict(), saved(model, optimizer)
    other = Small()
    loaded(kept, other, make_optimizer(other))
    gate.reloaded(other)
    loaded(kept, model, optimizer)
    gate.load_state_dict(state)
