"""The other library as a witness: what it computes from a folder that it reads by itself.
The only place that imports transformers.

B batch, T tokens, V vocab
"""

import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stackproof.contracts.subject import Exported
from stackproof.data.tokenizer import END_OF_TEXT, Bpe, Chars, Tokenizer, _byte_alphabet
from stackproof.evaluate.bits_per_byte import evaluating
from stackproof.evaluate.sampling import generate
from stackproof.export.untrusted import require_data, require_described
from stackproof.model.transformer import Transformer
from stackproof.spec.canonical import sha256_file
from stackproof.spec.errors import CheckpointError, EnvironmentUnfit, StackproofError


def available() -> bool:
    """Whether the other library is installed."""
    return importlib.util.find_spec("transformers") is not None


def reads_gguf() -> bool:
    """Whether what the other library reads .gguf with is installed."""
    return importlib.util.find_spec("gguf") is not None


def version() -> str | None:
    """Version of the other library; None if it is not installed."""
    return importlib.metadata.version("transformers") if available() else None


def theirs(path: Path) -> Any:
    """The other library's own model of a folder or a .gguf file, float32, in eval mode,
    attention by torch's own function.

    Raises EnvironmentUnfit where the library, or the reader of .gguf, is not installed;
    CheckpointError where it cannot read the path, or would fill in weights that are not there.
    """
    if not available():
        raise EnvironmentUnfit(
            f"reading {path} needs transformers, which is not installed",
            next_step="pip install 'stackproof[hf]', then stack doctor",
        )
    if path.suffix == ".gguf" and not reads_gguf():
        raise EnvironmentUnfit(
            f"reading {path} needs the gguf library, which is not installed",
            next_step="pip install 'stackproof[gguf]', then stack doctor",
        )
    if not path.exists():
        raise CheckpointError(
            f"there is nothing at {path}", allowed="a folder of Hugging Face, or a .gguf file"
        )
    try:
        model, report = _read(path)
    except StackproofError:
        raise
    except Exception as e:  # whatever it raises, it has not read the model
        raise CheckpointError(
            f"transformers cannot read {path}", value=f"{type(e).__name__}: {str(e)[:300]}"
        ) from e
    if complaints := _complaints(report):
        raise CheckpointError(
            f"transformers reads only a part of {path}",
            value=complaints,
            next_step="take the folder as it was published",
        )
    return model.eval()


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    """A model, and what its reader reports. Without a prompt, a download or
    code of the folder."""
    import transformers

    n_weights = require_data(path, native=transformers.CONFIG_MAPPING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    is_gguf = path.suffix == ".gguf"
    folder, file = path.parent if is_gguf else path, {"gguf_file": path.name} if is_gguf else {}
    data_only = {"local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(folder, **file, **data_only)
    reader = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        require_described(path, reader.from_config(config, trust_remote_code=False), n_weights)
    return reader.from_pretrained(
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        **data_only,
        **(file or {"use_safetensors": True}),
    )


def _complaints(report: dict[str, Any]) -> str:
    return "; ".join(
        f"{kind.replace('_', ' ')} {', '.join(map(str, sorted(found, key=str)))[:200]}"
        for kind, found in report.items()
        if found
    )


@dataclass(frozen=True)
class Ours:
    """The model's side of the comparison."""

    model: Transformer

    def logits(self, ids_BT: Tensor, last: int) -> Tensor:
        return our_logits(self.model, ids_BT, last)

    def continuation(self, ids: Sequence[int], n_new: int) -> list[int]:
        return generate(self.model, ids, max_new_tokens=n_new, temperature=0.0)


@dataclass(frozen=True)
class Theirs:
    """The other library's model, as it has read a folder."""

    model: Any

    @torch.no_grad()
    def logits(self, ids_BT: Tensor, last: int) -> Tensor:
        last = min(last, ids_BT.shape[1])
        return self.model(input_ids=ids_BT, use_cache=False, logits_to_keep=last).logits

    @torch.no_grad()
    def continuation(self, ids: Sequence[int], n_new: int) -> list[int]:
        """Greedy, with the other library's own cache."""
        unread, past, made = torch.tensor([list(ids)]), None, []
        for _ in range(n_new):
            answer = self.model(input_ids=unread, past_key_values=past, use_cache=True)
            past, token = answer.past_key_values, int(answer.logits[0, -1].argmax())
            made.append(token)
            unread = torch.tensor([[token]])
        return made


@dataclass(frozen=True)
class Witness:
    """What the other library computes from a folder, in float32: its model (None where it could not
    read one), its complaints, and the hashes of the weight files it read.
    """

    model: Theirs | None
    complaints: str
    sha256: Mapping[str, str]


def witness(folder: Path) -> Witness:
    """Let the other library read a folder."""
    compared = {p.name: sha256_file(p) for p in sorted(folder.glob("*.safetensors"))}
    try:
        theirs, report = _read(folder)
    except Exception as e:  # whatever it raises, it has not read the model
        return Witness(None, f"{type(e).__name__}: {str(e)[:300]}", compared)
    return Witness(Theirs(theirs.eval()), _complaints(report), compared)


class Compared(Exported):
    """A model and the folder that the other library has read, where it is installed."""

    def __init__(self, model: Transformer, folder: Path):
        self.ours = Ours(model)
        self.max_length, self.vocab_size = model.cfg.max_seq_len, model.vocab_size
        if available():
            read = witness(folder)
            self.theirs, self.their_complaints = read.model, read.complaints
            self.compared_sha256 = read.sha256


class Written(Compared):
    """A folder that was written from a model, its weights in `dtype` as safetensors names it, and
    from a tokenizer.
    """

    def __init__(self, model: Transformer, folder: Path, dtype: str, tokenizer: Tokenizer):
        super().__init__(model, folder)
        self.folder, self.dtype, self.tokenizer = folder, dtype, tokenizer
        self.eos_id, self.pieces = tokenizer.eos_id, pieces(tokenizer)
        self.tokenizer_document = (
            json.loads(tokenizer.inner.to_str()) if isinstance(tokenizer, Bpe) else None
        )
        self.architecture = model.cfg.model_dump()
        self.live_shapes = [tuple(t.shape) for t in model.state_dict().values()]


def pieces(tokenizer: Tokenizer) -> dict[str, int]:
    """The id of each token under the text that stands for it in a file of the tokenizers
    library.
    """
    match tokenizer:
        case Bpe():
            return tokenizer.inner.get_vocab(with_added_tokens=True)
        case Chars():
            known = {symbol: i for i, symbol in enumerate(tokenizer.symbols)}
        case _:
            known = {shown: byte for byte, shown in _byte_alphabet().items()}
    return known | {END_OF_TEXT: tokenizer.eos_id}


def our_logits(model: Transformer, ids_BT: Tensor, last: int) -> Tensor:
    """Logits of the last positions, (B, ≤ last, V) float32."""
    with evaluating(model):
        return model.logits(model.hidden_states(ids_BT)[0][:, -last:])
