"""Two sides of one model, right and under a plant, in every way in which plants act: while the
model runs, when it is made or drawn, when a folder is written or read, and in an update.
"""

import copy
import tempfile
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch

from stackproof.config import AdamW, MixtureOfExperts, ModelConfig
from stackproof.export import huggingface, reading
from stackproof.kernels import chunked_attention, cross_entropy, dispatch
from stackproof.model import hugging_face
from stackproof.model.build import build_model, compile_hidden_states
from stackproof.model.forward_context import KVCache
from stackproof.museum.plant import swap
from stackproof.trace import variant
from stackproof.train import checkpoint
from stackproof.train import state as states
from stackproof.train import step as steps
from tests.export.models import stirred
from tests.trace import models

LAYERS = 3
BASE = models.BASE | {"n_layers": LAYERS, "tied_head": False}
EXPERTS = {"ffn": MixtureOfExperts(n_experts=4)}


@cache
def built(train: bool = False, **changes):
    """A clean model; whoever changes it copies it."""
    made = build_model(ModelConfig(**(BASE | changes)), models.VOCAB, seed=5)
    return stirred(made).train(train)


def running(plant, *, inputs=None, around=ExitStack, train=False, stir=None, **changes):
    """The plant acts while the model runs.
    `around` is in force on both sides, inside the plant on the wrong one.
    """

    @contextmanager
    def planted():
        with plant.apply(), around():
            yield

    pair = []
    for context in (around, planted):
        model = copy.deepcopy(built(train, **changes))
        if stir is not None:
            stir(model)
        pair.append(
            replace(
                variant(model),
                around=context,
                **({} if inputs is None else {"inputs": partial(inputs, model)}),
            )
        )
    return tuple(pair)


def made(plant, **options):
    """The plant acts when the model is made, and while it runs;
    the weights are then those of the right side.
    """
    good, bad = running(plant, **options)
    with plant.apply():
        model = build_model(good.model.cfg, models.VOCAB, seed=5).train(good.model.training)
    model.load_state_dict(good.model.state_dict())
    return good, replace(bad, model=model)


def drawn(plant):
    """The plant acts on weights as they are drawn, on both sides from one seed."""
    good = build_model(ModelConfig(**BASE), models.VOCAB, seed=5)
    with plant.apply():
        bad = build_model(ModelConfig(**BASE), models.VOCAB, seed=5)
    return variant(good.eval()), variant(bad.eval())


def documents(model):
    """Three documents in each row."""
    return {"document_ids_BT": torch.tensor([0] * 5 + [1] * 7 + [2] * 5).expand(2, -1)}


def prompt(model):
    """A cache that has read seven tokens."""
    held = KVCache(model.cfg)
    model(models.ids(tokens=7, seed=8), held)
    return {"cache": held}


@contextmanager
def seeded():
    """Dropout draws the same numbers on both sides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        yield


@contextmanager
def in_chunks():
    """Attention in chunks of eight queries, however short the rows."""
    with (
        dispatch.using(attention="chunks"),
        swap(chunked_attention, "LEAST_QUERIES", 1),
        swap(chunked_attention, "LEAST_ROWS", 1),
        swap(chunked_attention, "QUERIES", 8),
    ):
        yield


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def declared():
    """The precision of a run that declares float32, as training enters it."""
    return states.declared_autocast(run_config(), torch.device("cpu"))


@torch.no_grad()
def uneven(model):
    """Selection biases as training leaves them."""
    for layer in model.layers:
        layer.ffn.selection_bias.copy_(torch.tensor([0.2, -0.1, 0.05, -0.15]))


def compiled(plant):
    """The plant acts when the forward is compiled."""
    model, bad = built(), copy.deepcopy(built())
    with plant.apply():
        bad.hidden_states = compile_hidden_states(bad)
    return variant(model), variant(bad)


# ---- folders of another library


def imported(plant, name):
    """A folder of theirs, run by transformers and, read under the plant, here."""
    theirs = models.theirs(name)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        with plant.apply():
            ours = reading.load_weights(reading.open_folder(Path(folder)))
    return variant(theirs), variant(ours)


def exported(plant, **changes):
    """A model of ours, and its export under the plant as transformers runs it."""
    import transformers

    ours = built(**changes)
    with tempfile.TemporaryDirectory() as folder:
        kind = hugging_face.kind_for(ours.cfg)
        document = hugging_face.config_document(kind, ours.cfg, models.VOCAB, 0, "float32")
        huggingface._write_json(Path(folder) / "config.json", document)
        with plant.apply():
            huggingface.write_weights(
                Path(folder), kind, ours, "float32", huggingface.MAX_SHARD_BYTES
            )
        theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return variant(ours), variant(theirs)


# ---- updates


def run_config(dtype="float32", compiled=False, **changes):
    """A run of the small model."""
    from stackproof.recipes.pocket import pocket

    cfg = pocket()
    train = cfg.train.model_copy(update={"dtype": dtype, "compile": compiled})
    update = {
        "model": ModelConfig(**(BASE | changes)),
        "train": train,
        "optim": AdamW(lr=1e-2),
        "device": "cpu",
    }
    return cfg.model_copy(update=update)


def fresh(cfg):
    """A state at step 0 that draws from nothing."""
    sampler = SimpleNamespace(state_dict=dict, load_state_dict=lambda document: [])
    return states.state_around(
        cfg, models.VOCAB, SimpleNamespace(cursor=0, sampler=sampler), torch.device("cpu")
    )


def learn(state, n=2):
    """Updates on two micro-batches. The first of AdamW moves by signs alone;
    sizes show in the second.
    """
    ids = models.ids(rows=4, tokens=18, seed=9)
    batches = [
        SimpleNamespace(
            input_ids=x[:, :-1],
            labels=x[:, 1:].contiguous(),
            n_tokens=x[:, 1:].numel(),
            sample_ids=(0, 1),
            epoch=0,
            sources=(0, 0),
            epochs=(0, 0),
        )
        for x in ids.split(2)
    ]
    for _ in range(n):
        steps.train_step(state, batches)


@torch.no_grad()
def break_a_token(model):
    """A token that the second micro-batch has and the first has not is embedded as NaN."""
    first, second = (
        set(x.flatten().tolist()) for x in models.ids(rows=4, tokens=18, seed=9)[:, :-1].split(2)
    )
    model.embed.weight[min(second - first)] = torch.nan


def updated(plant, *, around=nullcontext, n=2, broken=False, **options):
    """Both sides after updates from the same state, taken under the plant on one of them."""
    pair = []
    for context in (nullcontext, plant.apply):
        with around(), context():
            state = fresh(run_config(**options))
            if broken:
                break_a_token(state.model)
            learn(state, n)
        pair.append(variant(state.model.eval()))
    return tuple(pair)


def resumed(plant, *, update=False):
    """A tied model that comes back from a checkpoint; `update` says whether it is
    trained on before it runs.
    """
    before = fresh(run_config(tied_head=True))
    learn(before)
    document = checkpoint.state_document(
        before,
        tokenizer_sha256="",
        vocab_size=models.VOCAB,
        gates={},
        record="train-20260101T000000Z-00000000",
    )
    model, tensors = checkpoint.tensors_of(before).values()
    loaded = SimpleNamespace(state=document, model=model, tensors=tensors)
    pair = []
    for context in (nullcontext, plant.apply):
        state = fresh(run_config(tied_head=True))

        @contextmanager
        def back(state=state, context=context):
            with context():
                with torch.no_grad():
                    checkpoint.restore(state, loaded)
                if update:
                    with torch.enable_grad():
                        learn(state)
                yield

        pair.append(replace(variant(state.model), around=back))
    return tuple(pair)


def uncompiled():
    """A graph is what it was made of: what a plant does around the compiler is done without one."""
    return swap(torch, "compile", lambda function, **options: function)


def small_chunks():
    """The head takes a few rows at a time, as it does with a large vocabulary."""
    return swap(cross_entropy, "HEAD_CHUNK_BYTES", 4 * models.VOCAB * 8)
