"""The run configuration: a frozen tree in which a variant is a type, and every value knows where it came from."""

import difflib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spec.errors import ConfigError
from spec.records import Override, Waiver


class Frozen(BaseModel):
    """Immutable; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StdlibDocs(Frozen):
    """Docstrings and `pydoc_data.topics` of the running interpreter."""

    kind: Literal["stdlib-docs"] = "stdlib-docs"


class StdlibCode(Frozen):
    """Source files of the running interpreter's standard library."""

    kind: Literal["stdlib-code"] = "stdlib-code"


class Files(Frozen):
    """Text or JSON-lines files or folders of them, also gzipped."""

    kind: Literal["files"] = "files"
    paths: tuple[str, ...] = Field(min_length=1, description="files, folders or globs")
    documents: Literal["file", "paragraph", "line"] = Field("file", description="what one document of a .txt file is")
    text_field: str = Field("text", description="key of the text in a .jsonl line")
    license: str = Field("unknown", description="licence of the text, for the record")


class HashSplit(Frozen):
    """A document's normalised hash decides its side, so equal documents can never be on both."""

    kind: Literal["document-hash"] = "document-hash"
    validation_frac: float = Field(0.05, gt=0, lt=1, description="share of documents held out (0-1)")


class TailSplit(Frozen):
    """The last part of every document is held out; for corpora of one or few documents."""

    kind: Literal["tail"] = "tail"
    validation_frac: float = Field(0.1, gt=0, lt=1, description="share of each document's characters held out (0-1)")


class BpeTokenizer(Frozen):
    """Byte-level BPE, trained on the training split only."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: int = Field(1024, ge=258, description="entries including 256 bytes and the end-of-text token")


class ByteTokenizer(Frozen):
    """256 bytes and an end-of-text token."""

    kind: Literal["byte"] = "byte"


class CharTokenizer(Frozen):
    """One entry per character of the training split and an end-of-text token; other characters are dropped and counted."""

    kind: Literal["char"] = "char"


class DataConfig(Frozen):
    corpus: Annotated[StdlibDocs | StdlibCode | Files, Field(discriminator="kind")] = StdlibDocs()
    split: Annotated[HashSplit | TailSplit, Field(discriminator="kind")] = HashSplit()
    tokenizer: Annotated[BpeTokenizer | ByteTokenizer | CharTokenizer, Field(discriminator="kind")] = BpeTokenizer()
    on_exhausted: Literal["wrap", "error"] = Field("wrap", description="begin another epoch, or end the run with exit code 3")
    verify: Literal["full", "size"] = Field("full", description="hash every shard at start, or only compare its size")


class ModelConfig(Frozen):
    d_model: int = Field(ge=8, description="width of the residual stream, features")
    n_layers: int = Field(ge=1, description="blocks")
    n_heads: int = Field(ge=1, description="query heads")
    n_kv_heads: int = Field(ge=1, description="key/value heads")
    head_dim: int = Field(ge=2, description="width of a head, features; even, for rotary pairs")
    d_ff: int = Field(ge=8, description="inner width of the feed-forward, features")
    max_seq_len: int = Field(ge=2, description="context length, tokens")
    rope_theta: float = Field(10_000.0, gt=1, description="base of the rotary frequencies")
    norm_eps: float = Field(1e-6, gt=0, description="added to the mean square in RMSNorm")
    tied_head: bool = Field(True, description="use the embedding as the output head")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of residual-branch activations dropped in training (0-1)")
    init_std: float = Field(0.02, gt=0, description="standard deviation of embedding and input projections at step 0")

    @model_validator(mode="after")
    def _consistent(self):
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"model.n_kv_heads ({self.n_kv_heads}) must divide model.n_heads ({self.n_heads})")
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim ({self.head_dim}) must be even: rotary positions turn pairs of features")
        return self


class TrainConfig(Frozen):
    max_steps: int = Field(ge=1, description="optimizer steps")
    tokens_per_step: int = Field(ge=1, description="tokens of one optimizer step, over all micro-steps and ranks")
    micro_batch_size: int = Field(ge=1, description="rows of one forward/backward")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="autocast type; weights stay float32")
    compile: bool = Field(False, description="run the model through torch.compile")
    log_every: int = Field(1, ge=1, description="steps between two lines of metrics.jsonl")


class AdamW(Frozen):
    """Decoupled weight decay (arXiv:1711.05101), applied to matrices only."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(gt=0, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="per unit of learning rate; norms are never decayed")
    max_grad_norm: float = Field(1.0, gt=0, description="global L2 norm to which gradients are clipped")


class Cosine(Frozen):
    """Linear warm-up, then a half cosine down to `final_lr_frac` of the peak."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: int = Field(ge=1, description="steps until the peak")
    final_lr_frac: float = Field(0.1, ge=0, le=1, description="learning rate of the last step over the peak (0-1)")


class EvalConfig(Frozen):
    every: int = Field(ge=1, description="steps between two evaluations on held-out data")
    batches: int = Field(16, ge=2, description="held-out batches, the same ones each time; the power check may raise it")
    batch_size: int = Field(8, ge=1, description="rows per held-out batch")


class Patience(Frozen):
    """Stop after `patience` evaluations without an improvement that stands out of the paired noise."""

    kind: Literal["patience"] = "patience"
    patience: int = Field(5, ge=2, description="evaluations to wait")
    min_epochs: int = Field(3, ge=1, description="evaluation rounds before a stop is possible")
    z: float = Field(2.0, gt=0, description="standard errors of the paired difference an improvement must exceed")
    min_delta_nats: float = Field(0.0, ge=0, description="smallest improvement that counts, nats per token")
    expected_gain_nats: float = Field(0.02, gt=0, description="gain per evaluation the held-out set must be able to see")


class NeverStop(Frozen):
    """Train all steps."""

    kind: Literal["never"] = "never"


class SampleConfig(Frozen):
    every: int = Field(ge=1, description="steps between two audited samples")
    prompt: str = Field("The ", description="text the sample continues")
    max_new_tokens: int = Field(96, ge=8)
    temperature: float = Field(0.8, ge=0, description="0 takes the most likely token")
    top_k: int = Field(50, ge=0, description="0 keeps all")
    language: Literal["en", "code", "any"] = Field("en", description="which word-likeness the coherence score uses")


class CheckpointConfig(Frozen):
    every: int = Field(ge=1, description="steps between two checkpoints")
    keep: int = Field(2, ge=1, description="latest checkpoints kept, besides the best")


class GatesConfig(Frozen):
    waive: tuple[Waiver, ...] = Field((), description="gates allowed to fail, each with reason and expiry; written into the record")


class RunConfig(Frozen):
    """Everything that decides what a run computes."""

    recipe: str = Field(description="name of the recipe this was built from")
    seed: int = Field(1337, ge=0, lt=2**31)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: DataConfig = DataConfig()
    model: ModelConfig
    train: TrainConfig
    optim: AdamW
    schedule: Cosine
    eval: EvalConfig
    stop: Annotated[Patience | NeverStop, Field(discriminator="kind")] = Patience()
    sample: SampleConfig
    checkpoint: CheckpointConfig
    gates: GatesConfig = GatesConfig()

    @property
    def tokens_per_micro_step(self) -> int:
        return self.train.micro_batch_size * self.model.max_seq_len

    def accumulation(self, world_size: int = 1) -> int:
        """Micro-steps of one optimizer step on each rank."""
        return self.train.tokens_per_step // (self.tokens_per_micro_step * world_size)

    @model_validator(mode="after")
    def _consistent(self):
        if self.train.tokens_per_step % self.tokens_per_micro_step:
            raise ValueError(
                f"train.tokens_per_step ({self.train.tokens_per_step}) must be a multiple of train.micro_batch_size × model.max_seq_len "
                f"({self.train.micro_batch_size} × {self.model.max_seq_len} = {self.tokens_per_micro_step})"
            )
        if self.schedule.warmup_steps >= self.train.max_steps:
            raise ValueError(f"schedule.warmup_steps ({self.schedule.warmup_steps}) must be below train.max_steps ({self.train.max_steps})")
        return self

    def to_dict(self) -> dict:
        """The resolved tree, JSON-ready."""
        return self.model_dump(mode="json")


def load_config(
    base: RunConfig, *, run_file: Path | None = None, sets: tuple[str, ...] = (), fixed: dict[str, tuple[Any, str]] | None = None
) -> tuple[RunConfig, list[Override]]:
    """A recipe's configuration, changed by a TOML file, then `--set a.b=v` in order, then values fixed by flags.

    Returns the configuration and the list of changed values with their origin.
    Raises ConfigError for an unknown key (naming the nearest), a wrong type, or an impossible combination.
    """
    tree, overrides = base.to_dict(), []
    changes: list[tuple[str, Any, str]] = []
    if run_file is not None:
        changes += [(key, value, f"{run_file}") for key, value in _flatten(read_run_file(run_file)) if key != "recipe"]
    changes += [(*_parse_set(text), f"--set {text}") for text in sets]
    changes += [(key, value, origin) for key, (value, origin) in (fixed or {}).items()]
    for key, value, origin in changes:
        _assign(tree, key, value, origin)
        overrides.append(Override(key=key, value=value, source=origin))
    return validate(tree, origins={o.key: o.source for o in overrides}), overrides


def validate(tree: dict, *, origins: dict[str, str] | None = None) -> RunConfig:
    """Build a RunConfig from a JSON-ready tree. Raises ConfigError in the project's form."""
    try:
        return RunConfig.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as e:
        error = e.errors()[0]
        key = ".".join(str(p) for p in error["loc"] if p not in _variant_tags())
        origin = next((o for k, o in (origins or {}).items() if key.startswith(k)), "the recipe")
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            raise unknown_key(key, origin) from e
        if error["type"] == "missing":
            raise ConfigError(f"{key} is missing", value=f"from {origin}", next_step=f"--set {key}=…") from e
        shown = f"{error.get('input')!r} from {origin}" if key else f"from {', '.join((origins or {}).values()) or origin}"
        raise ConfigError(f"{key}: {message}" if key else message, value=shown, next_step="stack train --dry-run shows every value") from e


def unknown_key(key: str, origin: str) -> ConfigError:
    """The error for a key that does not exist, naming the nearest that does."""
    near = difflib.get_close_matches(key, known_keys(), n=3, cutoff=0.5) or [
        k for k in known_keys() if k.endswith("." + key.split(".")[-1])
    ]
    return ConfigError(
        f"{key} is not a configuration key",
        value=f"from {origin}",
        allowed=f"nearest: {', '.join(near)}" if near else "stack train --dry-run lists all keys",
        next_step=f"--set {near[0]}=…" if near else "remove it",
    )


def known_keys() -> list[str]:
    """Every dotted key of the configuration, over all variants."""
    return sorted(set(_keys(RunConfig, "")))


def _keys(model: type[BaseModel], prefix: str) -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        variants = [v for v in (get_args(field.annotation) or (field.annotation,)) if isinstance(v, type) and issubclass(v, BaseModel)]
        nested = [v for v in variants if v is not Waiver]
        found += [k for v in nested for k in _keys(v, f"{prefix}{name}.")] if nested else [prefix + name]
    return found


def _variant_tags() -> set[str]:
    return {"stdlib-docs", "stdlib-code", "files", "document-hash", "tail", "bpe", "byte", "char", "patience", "never"}


def _assign(tree: dict, key: str, value: Any, origin: str) -> None:
    """Set a dotted key. Choosing another `kind` drops the values of the former variant."""
    *path, leaf = key.split(".")
    node = tree
    for part in path:
        if not isinstance(node.get(part), dict):
            raise unknown_key(key, origin)
        node = node[part]
    if key not in known_keys():
        raise unknown_key(key, origin)
    if leaf == "kind" and node.get("kind") != value:
        node.clear()
    node[leaf] = value


def _flatten(tree: dict, prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of a nested table in order, a table's `kind` first."""
    leaves = []
    for name, value in sorted(tree.items(), key=lambda item: item[0] != "kind"):
        key = f"{prefix}{name}"
        leaves += _flatten(value, key + ".") if isinstance(value, dict) else [(key, value)]
    return leaves


def _parse_set(text: str) -> tuple[str, Any]:
    """`a.b=v` with v read as TOML, or as a bare string where it is none."""
    key, separator, raw = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError("--set takes key=value", value=text, next_step="for example --set optim.lr=3e-4")
    try:
        return key.strip(), tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        return key.strip(), raw.strip()


def read_run_file(path: Path) -> dict:
    """The tree of a TOML run file. Raises ConfigError if it cannot be read."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as e:
        raise ConfigError(f"there is no run file {path}", next_step="give a recipe name or the path of a .toml file") from e
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read the run file {path}: {e}") from e
