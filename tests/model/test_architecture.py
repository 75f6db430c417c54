"""The architecture table: its numbers, and that every variant of the configuration
is everywhere it must be.
"""

import ast
import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import pytest
import torch
from pydantic import Field

import stackproof.config.model as declared
from stackproof.config import ModelConfig
from stackproof.config.base import Frozen
from stackproof.contracts.declared import drawn_weights, initial_laws, parameter_shapes
from stackproof.contracts.oracle import oracle_logits
from stackproof.model.build import build_model
from stackproof.model.init import Linear, row_of
from stackproof.model.transformer import Transformer
from stackproof.spec import ROOT
from stackproof.spec.architecture import D_FF, D_MODEL, INPUT, TABLE, Matrix, Part, Seen, Value
from stackproof.spec.errors import IntegrityError
from stackproof.spec.formulas import flops_per_token, parameter_count, saved_per_token
from stackproof.trace.maps import ours
from stackproof.trace.points import sites
from tests.model import test_parity

VOCAB, SEED = test_parity.VOCAB_SIZE, test_parity.SEED

# --- numbers ----------------------------------------------------------------------------------


class Facts(NamedTuple):
    """Digests are of names with shapes, of names with laws and of trace points, each in order."""

    parameters: int
    flops_at_33: int
    saved_per_token: int
    shapes: str
    laws: str
    points: str
    last_weight_drawn: float


FACTS = {
    "softmax, rotary, SwiGLU": Facts(
        21728, 154752, 440, "e60c3904", "dbe50974", "359c3dc5", 3.633431e-02
    ),
    "QK-norm, biases, window 7": Facts(
        22176, 139020, 536, "27412a83", "46a9e6a0", "bde0ef41", 3.633431e-02
    ),
    "rotary, linear scaling": Facts(
        21728, 154752, 440, "e60c3904", "dbe50974", "359c3dc5", 3.633431e-02
    ),
    "rotary, llama3 scaling": Facts(
        21728, 154752, 440, "e60c3904", "dbe50974", "359c3dc5", 3.633431e-02
    ),
    "learned positions, LayerNorm, GELU": Facts(
        20752, 139392, 400, "d3179a7c", "1c41bda7", "77927ed1", 3.744792e-03
    ),
    "head of its own": Facts(23328, 154752, 440, "cedaa5c2", "75d07265", "359c3dc5", -3.556131e-01),
    "differential, paper": Facts(
        21920, 167424, 632, "b3de77c4", "a6fca2ef", "359c3dc5", -1.089911e-01
    ),
    "differential, scalar, QK-norm, window 5": Facts(
        21794, 140055, 728, "fc108e06", "56eb1b2e", "bde0ef41", 3.633431e-02
    ),
    "experts, auxiliary loss": Facts(
        45024, 202368, 768, "a376d2c3", "59446365", "6c455e3d", -1.251738e-01
    ),
    "experts, selection bias, GELU, top 1": Facts(
        30032, 140544, 508, "6e053116", "47c5cbee", "a011afc2", 8.385219e-02
    ),
    "depths, soft gate": Facts(
        21761, 154944, 536, "fbdbf519", "54d5fddd", "359c3dc5", -3.948662e-01
    ),
    "depths, hard capacity": Facts(
        21761, 108243, 536, "fbdbf519", "54d5fddd", "359c3dc5", -3.948662e-01
    ),
    "differential, depths, experts": Facts(
        45249, 215232, 1056, "e44fab2e", "b30d33f9", "6c455e3d", 1.221078e-01
    ),
}


def digest(rows: list) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:8]


@pytest.mark.parametrize("name", FACTS)
def test_the_numbers_of_a_variant(name):
    """The last entry of the last matrix in order changes if any draw
    before it is added or moved.
    """
    cfg = ModelConfig(**test_parity.SIZES | test_parity.VARIANTS[name])
    section, model, facts = cfg.model_dump(), build_model(cfg, VOCAB, seed=SEED), FACTS[name]
    assert parameter_count(section, VOCAB) == facts.parameters
    assert flops_per_token(section, VOCAB, 33) == facts.flops_at_33
    assert saved_per_token(section) == facts.saved_per_token
    assert digest([[n, *s] for n, s in parameter_shapes(section, VOCAB).items()]) == facts.shapes
    assert digest([[n, *law] for n, law in initial_laws(section, VOCAB).items()]) == facts.laws
    assert digest([site.point.name for site in sites(model, ours(cfg))]) == facts.points
    last = [p for p in model.parameters() if p.ndim == 2][-1][-1, -1]
    # rounding of a draw differs between processors; another draw differs in the first digit
    assert float(last.detach()) == pytest.approx(facts.last_weight_drawn, rel=1e-5)


# --- every variant, everywhere ----------------------------------------------------------------


def unions(cls: type[Frozen], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type]]:
    """(keys, class) of every member of every discriminated union below a configuration class."""
    for name, field in cls.model_fields.items():
        if field.discriminator:
            for member in get_args(field.annotation):
                yield (*at, name), member
                yield from unions(member, (*at, name, member.__name__))


def switched(cls: type) -> Iterator[dict[str, Any]]:
    """The defaults of a class, and each of its switches set otherwise."""
    needed = {"factor": 2.0} if cls is declared.LinearScaling else {}
    yield needed
    for name, field in cls.model_fields.items():
        if field.annotation is bool:
            yield {name: not field.default}
        elif get_origin(field.annotation) is Literal and name != "kind":
            yield from (
                {name: value} for value in get_args(field.annotation) if value != field.default
            )


def section_of(keys: tuple[str, ...], cls: type, switches: dict[str, Any]) -> dict[str, Any]:
    """A part of a `model` section that chooses a class at its keys, and the classes around it."""
    made: Any = cls(**switches)
    for i in range(len(keys) - 1, 0, -2):
        made = getattr(declared, keys[i - 1])(**{keys[i]: made})
    return {keys[0]: made}


VARIANTS = {
    f"{'.'.join(keys)}={cls.__name__}{switches or ''}": section_of(keys, cls, switches)
    for keys, cls in unions(ModelConfig)
    for switches in switched(cls)
}


@contextmanager
def names(file: str) -> Iterator[None]:
    """Turn an error into one that names the file in which the variant is left out."""
    try:
        yield
    except Exception as e:
        raise AssertionError(f"{file} lacks this variant: {type(e).__name__}: {e}") from e


def require_everywhere(cfg: ModelConfig) -> None:
    """A variant is in the table, in the model, in its initialisation,
    in tracing and in the oracle.
    """
    section = cfg.model_dump()
    with names("spec/architecture.py"):
        shapes, laws = parameter_shapes(section, VOCAB), initial_laws(section, VOCAB)
        assert flops_per_token(section, VOCAB, 33) > 0 and saved_per_token(section) > 0
        where = ours(cfg)
    with names("stack/model/variants.py"), torch.device("meta"):
        bare = Transformer(cfg, VOCAB)
    built = {name: tuple(t.shape) for name, t in bare.state_dict().items()}
    assert built == shapes, "spec/architecture.py and the module in stack/model differ in weights"
    with names("stack/model/init.py"):
        rows = {name: row_of(cfg, name) for name, _ in bare.named_parameters()}
    for name, row in rows.items():
        stated = (row.law, pytest.approx(row.value, rel=1e-12))
        assert laws[name] == stated, (
            f"spec/architecture.py and stack/model/init.py differ in {name}"
        )
    model = build_model(cfg, VOCAB, seed=SEED).double().eval()
    with names("spec/architecture.py"):
        assert sites(model, where)
    with names("contracts/declared.py"):
        weights = drawn_weights(shapes, torch.Generator().manual_seed(SEED))
    model.load_state_dict(weights)
    ids = torch.arange(17).repeat(2, 1)
    with names("contracts/oracle.py"), torch.no_grad():
        # rotary tables are float32; a choice of a router is far from a tie under these weights
        torch.testing.assert_close(
            model(ids), oracle_logits(ids, weights, section), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_everywhere_it_must_be(variant):
    require_everywhere(ModelConfig(**test_parity.SIZES | VARIANTS[variant]))


# --- what the backward keeps ------------------------------------------------------------------

WIDE = dict(
    d_model=64, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=160, max_seq_len=64, init_std=0.2
)


def kept_per_token(cfg: ModelConfig) -> float:
    """Floats per token that a forward pass saves for the backward; each storage counts once."""
    model, ids = build_model(cfg, VOCAB, seed=SEED).train(), torch.arange(128).view(2, 64) % VOCAB
    held = (*model.parameters(), *model.buffers())
    own, kept = {t.untyped_storage().data_ptr() for t in held}, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden_states(ids)
    n_bytes = sum(storage.nbytes() for at, storage in kept.items() if at not in own)
    return n_bytes / 4 / ids.numel()


def kept_over_declared(variant: dict[str, Any]) -> float:
    """What a block keeps for the backward, as a multiple of what the table declares. The
    difference of two depths leaves out embedding and final norm.
    """
    deep, flat = (ModelConfig(**WIDE | variant, n_layers=n) for n in (4, 2))
    measured = (kept_per_token(deep) - kept_per_token(flat)) / 2
    return measured / saved_per_token(deep.model_dump())


def kept_range(variant: dict[str, Any]) -> tuple[float, float]:
    """Allowed `kept_over_declared`. The table leaves out numbers per head and token, such as the
    normaliser of a softmax.
    """
    match variant:
        case {"attention": declared.DifferentialAttention()}:
            return 1.06, 1.13  # the table leaves out the halves that are padded
        case {"depth": declared.MixtureOfDepths(gate=declared.HardCapacity())}:
            return 0.6, 0.64  # declared as for a block that reads every token
        case {"depth": declared.MixtureOfDepths()}:
            return 0.88, 0.9  # declared is room for gathered tokens, which the soft gate has not
        case {"dropout": _}:
            # Dropout keeps bytes for two masks, the table declares a value.
            return 0.96, 0.98
    return 1.0, 1.02


KEEPING = VARIANTS | {"dropout": {"dropout": 0.1}}


@pytest.mark.parametrize("variant", KEEPING)
def test_the_table_declares_what_the_backward_keeps(variant):
    section = KEEPING[variant]
    least, most = kept_range(section)
    match section:
        case {"depth": declared.MixtureOfDepths() as depth}:
            section = {"depth": depth.model_copy(update={"every": 1})}
    assert least <= kept_over_declared(section) <= most


COPIES = [
    (key, kind, group, i)
    for key, kind in (("norm", "rmsnorm"), ("attention", "softmax"), ("ffn", "swiglu"))
    for group in ("values", "kernel")
    for i, value in enumerate(getattr(TABLE[key][kind], group, ()))
    if value.when is None and value.width.names
]


@pytest.mark.parametrize(("key", "kind", "group", "i"), COPIES)
def test_one_copy_more_is_found(monkeypatch, key, kind, group, i):
    """Of each value, scores and entropy of width 1 apart."""
    entry = TABLE[key][kind]
    values = list(getattr(entry, group))
    values[i] = replace(values[i], kept=values[i].kept + 1)
    monkeypatch.setitem(TABLE[key], kind, replace(entry, **{group: tuple(values)}))
    assert not 1.0 <= kept_over_declared({}) <= 1.02


def test_every_class_with_a_kind_is_in_a_union():
    """A class that is forgotten in the union of stack/config/model.py cannot be chosen."""
    known = {cls for _, cls in unions(ModelConfig)}
    classes = {cls for _, cls in inspect.getmembers(declared, inspect.isclass)}
    with_kind = {cls for cls in classes if issubclass(cls, Frozen) and "kind" in cls.model_fields}
    assert with_kind == known


def reads_the_table(path: Path) -> bool:
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    modules = {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    return any(
        str(module).endswith(("spec.architecture", "spec.resolved_model")) for module in modules
    )


def test_neither_the_model_nor_the_oracle_reads_the_table():
    """Then an error in the table, in the model or in the oracle differs from the other two."""
    independent = [ROOT / "contracts/oracle.py", *(ROOT / "stack/model").glob("*.py")]
    assert len(independent) > 10 and not [path for path in independent if reads_the_table(path)]
    assert reads_the_table(ROOT / "contracts/declared.py")
    assert reads_the_table(ROOT / "stack/trace/maps.py")


# --- what is left out is found ----------------------------------------------------------------

READERS = {
    "parameter_count": lambda cfg: parameter_count(cfg.model_dump(), VOCAB),
    "flops_per_token": lambda cfg: flops_per_token(cfg.model_dump(), VOCAB, 33),
    "saved_per_token": lambda cfg: saved_per_token(cfg.model_dump()),
    "parameter_shapes": lambda cfg: parameter_shapes(cfg.model_dump(), VOCAB),
    "initial_laws": lambda cfg: initial_laws(cfg.model_dump(), VOCAB),
    "trace map": ours,
}
WHOLE = {
    "ffn": declared.MixtureOfExperts(),
    "depth": declared.MixtureOfDepths(),
}
OF_WHOLE = {
    "positions": "rotary",
    "norm": "rmsnorm",
    "attention": "softmax",
    "ffn": "moe",
    "ffn.expert": "swiglu",
    "ffn.balance": "auxiliary-loss",
    "depth": "mixture-of-depths",
    "depth.gate": "soft",
}


# Positions take part in no matrix product.
READ = [(key, r) for key in TABLE for r in READERS if (key, r) != ("positions", "flops_per_token")]


@pytest.mark.parametrize(("key", "reader"), READ)
def test_a_missing_entry_is_refused_by_every_reader(monkeypatch, key, reader):
    cfg = ModelConfig(**test_parity.SIZES | WHOLE)
    READERS[reader](cfg)
    monkeypatch.delitem(TABLE[key], OF_WHOLE[key])
    with pytest.raises(
        IntegrityError, match=rf"spec/architecture.*model\.{key}\.kind = {OF_WHOLE[key]}"
    ):
        READERS[reader](cfg)


class Doubled(Frozen):
    """A feed-forward that exists nowhere: down(up(x)), without an activation."""

    kind: Literal["doubled"] = "doubled"


class WithDoubled(ModelConfig):
    ffn: Doubled = Field(Doubled())


class DoubledModule(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.up = Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.down = Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x_BTD, context=None):
        return self.down(self.up(x_BTD))


def test_an_incomplete_variant_is_named_file_by_file(monkeypatch):
    cfg = WithDoubled(**test_parity.SIZES)
    with pytest.raises(AssertionError, match=r"spec/architecture\.py lacks this variant"):
        require_everywhere(cfg)
    up, down = (
        Matrix(f"{name}.weight", shape, INPUT)
        for name, shape in (("up", (D_FF, D_MODEL)), ("down", (D_MODEL, D_FF)))
    )
    values = (Value("up", Seen.OUTPUT, "up", D_FF), Value("act", Seen.INPUT, "down", D_FF))
    monkeypatch.setitem(TABLE["ffn"], "doubled", Part((up,), values))
    with pytest.raises(AssertionError, match=r"stack/model/variants\.py lacks this variant"):
        require_everywhere(cfg)
    monkeypatch.setattr(
        "stackproof.model.transformer.make_feedforward", lambda cfg, ffn: DoubledModule(cfg)
    )
    with pytest.raises(AssertionError, match="differ in weights"):
        require_everywhere(cfg)
    monkeypatch.setitem(TABLE["ffn"], "doubled", Part((up, down), values))
    with pytest.raises(
        AssertionError, match=r"stack/model/init\.py differ in layers\.0\.ffn\.down\.weight"
    ):
        require_everywhere(cfg)
    down = TABLE["ffn"]["gelu"].weights[1]
    monkeypatch.setitem(
        TABLE["ffn"],
        "doubled",
        Part((up, down), (values[0], Value("act", Seen.INPUT, "dwon", D_FF))),
    )
    with pytest.raises(AssertionError, match=r"spec/architecture\.py lacks this variant.*dwon"):
        require_everywhere(cfg)
    monkeypatch.setitem(TABLE["ffn"], "doubled", Part((up, down), values))
    with pytest.raises(AssertionError, match=r"contracts/oracle\.py lacks this variant"):
        require_everywhere(cfg)
