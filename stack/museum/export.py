"""Plants in exports: folders that load without complaint and are another model."""

from dataclasses import replace

import torch

from stackproof.export import huggingface, parity, reading
from stackproof.model import foreign, names
from stackproof.museum.plant import plant, swap, touch


@plant(
    "export.shard-left-out",
    gate="export.complete",
    title="One weight file of several stays behind",
    story=(
        "The folder is copied file by file and one copy fails. The index still names the missing "
        "file. Some loaders fill its tensors with fresh random numbers and a warning among a "
        "hundred lines of log."
    ),
    sources=("https://github.com/safetensors/safetensors/issues/265",),
)
def shard_left_out():
    original = huggingface.write_weights

    def one_short(folder, kind, model, dtype, max_shard_bytes):
        original(folder, kind, model, dtype, 1 << 14)
        sorted(folder.glob("model-*.safetensors"))[1].unlink()

    with swap(huggingface, "write_weights", one_short):
        yield


@plant(
    "export.second-head",
    gate="export.complete",
    title="A tied model leaves with another head",
    story=(
        "The configuration says that head and embedding are one, and the file holds both, because "
        "the head was copied before the last updates. A loader that follows the configuration "
        "ties them, one that follows the file does not. One of the two writes gibberish."
    ),
    sources=(
        "https://github.com/huggingface/transformers/issues/42612",
        "https://github.com/vllm-project/vllm/issues/51665",
    ),
)
def second_head():
    original = huggingface.tensorfile.write

    def with_head(path, tensors, metadata):
        head, embed = (f"{names.KINDS[0].modules[m]}.weight" for m in ("head", "embed"))
        extra = {head: tensors[embed] * 1.01} if embed in tensors else {}
        original(path, tensors | extra, metadata)

    with swap(huggingface.tensorfile, "write", with_head):
        yield


@plant(
    "export.rotary-pairs-interleaved",
    gate="export.logit-parity",
    title="Queries and keys leave in the other pairing",
    story=(
        "One library turns feature j with j + half, another feature 2j with 2j + 1. The exporter "
        "reorders the rows of queries and keys for a reader that does not expect it. Every shape "
        "fits, every norm is right, and the text is babble, worse with each position."
    ),
    sources=(
        "https://github.com/karpathy/nanochat/issues/264",
        "https://github.com/huggingface/transformers/issues/25199",
    ),
)
def rotary_pairs_interleaved():
    original = foreign.to_theirs

    def interleaved(row, tensors):
        tensor = original(row, tensors)
        if not row.ours[0].endswith(("attention.q.weight", "attention.k.weight")):
            return tensor
        touch()
        return torch.stack(tensor.chunk(2), 1).flatten(0, 1)

    with swap(huggingface, "to_theirs", interleaved):
        yield


@plant(
    "export.matrix-transposed",
    gate="export.logit-parity",
    title="A square matrix leaves transposed",
    story=(
        "One layout stores matrices as (in, out), another as (out, in). Where a matrix is square "
        "the shape says nothing, so the wrong one loads without a word."
    ),
    sources=(
        "https://github.com/huggingface/transformers/blob/main/src/transformers/pytorch_utils.py",
    ),
)
def matrix_transposed():
    original = foreign.to_theirs

    def turned(row, tensors):
        tensor = original(row, tensors)
        if row.ours[0].endswith("attention.out.weight") and tensor.shape[0] == tensor.shape[1]:
            touch()
            return tensor.T.contiguous()
        return tensor

    with swap(huggingface, "to_theirs", turned):
        yield


@plant(
    "export.rotary-base-forgotten",
    gate="export.logit-parity",
    title="The base of the rotary frequencies stays behind",
    story=(
        "The weights are right and one number of the configuration is not written, so the reader "
        "takes its own default. Short prompts look fine, because early positions hardly turn. "
        "Long ones do not."
    ),
    sources=("https://github.com/huggingface/transformers/issues/25199",),
)
def rotary_base_forgotten():
    original = names.config_document

    def without_base(kind, cfg, vocab_size, eos_id, dtype):
        return original(kind, cfg, vocab_size, eos_id, dtype) | {"rope_theta": 500_000.0}

    with swap(names, "config_document", without_base):
        yield


@plant(
    "export.narrowed-after-the-comparison",
    gate="export.compared-bytes",
    title="The small file was never compared",
    story=(
        "The full model is exported and compared, then narrowed to half its size for the release. "
        "The certificate is that of the large file, the users get the small one, and nobody has "
        "ever run it."
    ),
    sources=("founding note: the twenty-second training run",),
)
def narrowed_after_the_comparison():
    original = parity.witness

    def compared_then_narrowed(folder):
        witness = original(folder)
        for path in folder.glob("*.safetensors"):
            names = huggingface.tensorfile.read_header(path).tensors
            tensors = {
                n: torch.from_numpy(huggingface.tensorfile.memmap(path, n).copy()) for n in names
            }
            huggingface.tensorfile.write(
                path, {n: t.bfloat16().float() for n, t in tensors.items()}, {"format": "pt"}
            )
        return witness

    with swap(parity, "witness", compared_then_narrowed):
        yield


@plant(
    "export.import-pairs-interleaved",
    gate="export.logit-parity",
    title="Queries and keys are read in the other pairing",
    story=(
        "The importer knows that some libraries pair neighbouring features and reorders the rows "
        "of queries and keys. This folder was written by one that does not. Trained from scratch "
        "either pairing is right; read across, the model babbles."
    ),
    sources=(
        "https://github.com/karpathy/nanochat/issues/264",
        "https://github.com/huggingface/transformers/issues/39687",
    ),
)
def import_pairs_interleaved():
    original = foreign.to_ours

    def reordered(row, tensor, shapes):
        parts = original(row, tensor, shapes)
        for name in parts:
            if name.endswith(("attention.q.weight", "attention.k.weight")):
                touch()
                parts[name] = torch.stack(parts[name].chunk(2), 1).flatten(0, 1)
        return parts

    with swap(reading, "to_ours", reordered, counted=False):
        yield


@plant(
    "export.import-drops-a-head",
    gate="export.logit-parity",
    title="The importer ties what is not tied",
    story=(
        "Head and embedding are one in every model the importer was tested with, so it ties them, "
        "whatever the file says. The head that was trained is dropped without a word. Every shape "
        "fits, and the model writes gibberish."
    ),
    sources=(
        "https://github.com/vllm-project/vllm/issues/51665",
        "https://github.com/huggingface/transformers/issues/42612",
    ),
)
def import_drops_a_head():
    original = reading.open_folder

    def tied(path, **options):
        folder = original(path, **options)
        return replace(folder, cfg=folder.cfg.model_copy(update={"tied_head": True}))

    def without_head(folder, places):
        return {n: p for n, p in places.items() if n != f"{folder.kind.modules['head']}.weight"}

    with swap(reading, "open_folder", tied), swap(reading, "_without_second_head", without_head):
        yield
