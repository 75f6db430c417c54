"""Plants in exports: folders that load without complaint and are another model."""

from dataclasses import replace

import torch

from stackproof.export import huggingface, parity, reading
from stackproof.model import foreign, hugging_face
from stackproof.museum.plant import swap, touch


def shard_left_out():
    original = huggingface.write_weights

    def one_short(folder, kind, model, dtype, max_shard_bytes):
        original(folder, kind, model, dtype, 1 << 14)
        sorted(folder.glob("model-*.safetensors"))[1].unlink()

    with swap(huggingface, "write_weights", one_short):
        yield


def second_head():
    original = huggingface.tensorfile.write

    def with_head(path, tensors, metadata):
        head, embed = (f"{hugging_face.KINDS[0].modules[m]}.weight" for m in ("head", "embed"))
        extra = {head: tensors[embed] * 1.01} if embed in tensors else {}
        original(path, tensors | extra, metadata)

    with swap(huggingface.tensorfile, "write", with_head):
        yield


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


def rotary_base_forgotten():
    original = hugging_face.config_document

    def without_base(kind, cfg, vocab_size, eos_id, dtype):
        return original(kind, cfg, vocab_size, eos_id, dtype) | {"rope_theta": 500_000.0}

    with swap(hugging_face, "config_document", without_base):
        yield


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


def import_drops_a_head():
    original = reading.open_folder

    def tied(path, **options):
        folder = original(path, **options)
        return replace(folder, cfg=folder.cfg.model_copy(update={"tied_head": True}))

    def without_head(folder, places):
        return {n: p for n, p in places.items() if n != f"{folder.kind.modules['head']}.weight"}

    with swap(reading, "open_folder", tied), swap(reading, "_without_second_head", without_head):
        yield
