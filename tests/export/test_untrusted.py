"""What a foreign folder may not name or claim, without the library that would follow it."""

import json
import struct

import pytest
import torch

from stackproof.data.files import FREE_BYTES, MAX_RATIO, require_ratio
from stackproof.data.tokenizer_file import library_tokenizer
from stackproof.export import gguf, parity, untrusted
from stackproof.spec.errors import CheckpointError, DataError, EnvironmentUnfit
from stackproof.tensorfile import write
from stackproof.train import memory
from tests.export.test_refusals import LLAMA

NATIVE = ("llama",)


@pytest.fixture
def folder(tmp_path):
    import numpy as np

    write(tmp_path / "model.safetensors", {"a": np.zeros((300, 100), np.float32)}, {})
    return tmp_path


def look(folder, **changes):
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    untrusted.require_data(folder, NATIVE)


def test_a_folder_of_data_passes(folder):
    look(folder)
    look(folder, auto_map={"AutoConfig": "evil.C"}, rope_theta=10**7, eos_token_id=10**6)
    look(folder, _attn_implementation="sdpa", max_position_embeddings=2**20, num_hidden_layers=90)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "evil.M"}},
        {"quantization_config": {"quant_method": "gptq"}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
        {"_attn_implementation": "evil/kernel"},
        {"text_config": {"attn_implementation": {"": "flash_attention_2"}}},
        {"transformers_weights": "../x.safetensors"},
        {"num_hidden_layers": 10**9},
        {"text_config": {"num_experts": 10**6}},
        {"hidden_size": 10**12},
        {"max_position_embeddings": 10**12},
        {"num_labels": 16_000_000},
        {"attention_types": [[["global"], 10**9]]},
        {"attention_types": [[["global"] * 129, 1]]},
        {"vision": [{"num_hidden_layers": 10**9}]},
        {"unknown": [[2**20 + 1]]},
    ],
)
def test_a_configuration_that_names_code_or_impossible_sizes_is_refused(folder, changes):
    with pytest.raises(CheckpointError):
        look(folder, **changes)


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter of another model"):
        look(folder)


def test_weights_that_do_not_fit_into_memory_are_refused_with_both_numbers(folder, monkeypatch):
    monkeypatch.setattr(memory, "host_bytes", lambda: 119_999)
    with pytest.raises(EnvironmentUnfit, match="120000 bytes") as error:
        look(folder)
    assert "119999" in error.value.allowed
    monkeypatch.setattr(memory, "host_bytes", lambda: 120_000)
    look(folder)


def key(kind, value):
    return struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind) + value


def header_of(tmp_path, tensors=0, keys=0, rest=b"", version=3):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest)
    return gguf.read_header(path)


def test_a_gguf_header_is_read(tmp_path):
    values = key(4, struct.pack("<I", 7)) + struct.pack("<Q", 1) + b"l" + struct.pack("<I", 9)
    values += struct.pack("<IQ", 8, 2) + 2 * (struct.pack("<Q", 1) + b"t")
    tensor = struct.pack("<Q", 1) + b"w" + struct.pack("<IQQ", 2, 4, 5) + bytes(12)
    held = header_of(tmp_path, 1, 2, values + tensor)
    assert (held.numbers, held.n_tensors, held.n_weights) == ({"k": 7}, 1, 20)


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": 2**62},
        {"keys": 2**62},
        {"version": 9},
        {"keys": 1},
        {"keys": 1, "rest": key(8, struct.pack("<Q", 2**62))},
        {"keys": 1, "rest": key(9, struct.pack("<IQ", 4, 2**62))},
        {"keys": 1, "rest": key(9, struct.pack("<IQ", 4, 10**6))},
        {"keys": 1, "rest": key(9, struct.pack("<IQ", 9, 1) * 9)},
        {"keys": 1, "rest": key(99, b"")},
        {
            "tensors": 1,
            "rest": struct.pack("<Q", 1) + b"w" + struct.pack("<IQ", 1, 2**60) + bytes(12),
        },
    ],
)
def test_a_gguf_header_that_exceeds_its_file_or_a_limit_is_refused(tmp_path, changes):
    with pytest.raises(CheckpointError, match=r"header of .* is not valid"):
        header_of(tmp_path, **changes)


def test_a_compressed_file_may_expand_to_a_limit(tmp_path):
    packed = FREE_BYTES // MAX_RATIO * 2
    require_ratio(tmp_path, MAX_RATIO * packed, packed)
    require_ratio(tmp_path, FREE_BYTES, 1)
    for n_bytes, n_packed in ((MAX_RATIO * packed + 1, packed), (FREE_BYTES + 1, 1)):
        with pytest.raises(DataError, match="expands to more than"):
            require_ratio(tmp_path, n_bytes, n_packed)


def test_a_tokenizer_whose_steps_take_for_ever_or_multiply_is_refused(tmp_path):
    def read(**parts):
        model = {"type": "BPE", "vocab": {"a": 0, "<unk>": 1}, "merges": []}
        plain = dict.fromkeys(
            "truncation padding normalizer pre_tokenizer post_processor decoder".split()
        )
        document = {"version": "1.0", "added_tokens": [], "model": model} | plain | parts
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(document))
        return library_tokenizer(path)

    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    longer = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 8}
    twice = {"type": "Sequence", "normalizers": [longer, longer]}
    assert read(pre_tokenizer=split | {"pattern": {"Regex": r"\s+"}}, normalizer=twice)
    with pytest.raises(DataError, match="for ever"):
        read(pre_tokenizer=split | {"pattern": {"Regex": "(a+)+$"}})
    with pytest.raises(DataError, match="64 times as long"):
        read(normalizer={"type": "Sequence", "normalizers": [longer] * 3})


# As published: counts of tensors and weights are rounded.
PUBLISHED = {
    "a mixture of experts": (
        {"num_hidden_layers": 28, "num_experts": 64, "shared_expert_intermediate_size": 20480},
        5715,
        57 * 10**9,
    ),
    "its .gguf": ({"qwen2moe.expert_shared_feed_forward_length": 5632}, 400, 14 * 10**9),
    "a context by another name": ({"block_size": 2048, "n_layer": 12}, 150, 124 * 10**6),
    "a context of ten million, with images": (
        {"text_config.max_position_embeddings": 10_485_760, "boi_token_index": 200_080}
        | {"text_config.attention_chunk_size": 8192, "text_config.floor_scale": 8192}
        | {"text_config.num_local_experts": 16, "image_token_index": 200_092},
        1061,
        109 * 10**9,
    ),
    "a large vocabulary and window": (
        {"vocab_size": 262_208, "sliding_window": 131_072, "rope_theta": 10**6}
        | {"rope_local_base_freq": 10_000, "query_pre_attn_scalar": 256, "mm_tokens_per_image": 256}
        | {"image_token_index": 262_144, "max_window_layers": 70},
        444,
        43 * 10**8,
    ),
    "another name of the base": ({"rotary_emb_base": 10**7, "n_positions": 8192}, 200, 10**9),
    "kinds of layers": ({"attention_types": 16, "window_size": 256}, 388, 27 * 10**8),
    "many classes": ({"num_labels": 21_843}, 200, 10**8),
    "notes": (
        dict.fromkeys(("num_params", "n_params", "total_parameters"), 124_439_808)
        | {"num_training_tokens": 2 * 10**12, "created": 1_700_000_000},
        150,
        124 * 10**6,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_published_models_are_taken(name, tmp_path):
    numbers, n_tensors, n_weights = PUBLISHED[name]
    untrusted._refuse_sizes(tmp_path, numbers, n_tensors, n_weights)


@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "n_layer",
        "num_experts",
        "n_routed_experts",
        "llama.block_count",
        "num_params_layers",
    ],
)
def test_a_count_beyond_the_tensors_is_refused(key, tmp_path):
    with pytest.raises(CheckpointError, match="larger than its weights allow"):
        untrusted._refuse_sizes(tmp_path, {key: 10**6}, 5715, 57 * 10**9)


class Described:
    """A model with one parameter and one computed tensor of these numbers of elements."""

    def __init__(self, n_parameters, n_tables):
        self.sizes = n_parameters, n_tables

    def parameters(self):
        return [torch.empty(self.sizes[0], device="meta")]

    def buffers(self):
        return [torch.empty(self.sizes[1], dtype=torch.bool, device="meta")]


@pytest.mark.parametrize(
    ("taken", "refused", "why"),
    [
        ((4 * 2**20, 0), (4 * 2**20 + 1, 0), "more parameters than"),
        ((1, 2**28), (1, 2**28 + 1), "more bytes of tables than"),
    ],
)
def test_a_model_that_exceeds_its_files_is_refused(tmp_path, taken, refused, why):
    untrusted.require_described(tmp_path, Described(*taken), n_weights=1000)
    with pytest.raises(CheckpointError, match=why):
        untrusted.require_described(tmp_path, Described(*refused), n_weights=1000)


SMALL_KINDS = {
    "gpt_neo": {"num_layers": 1, "attention_types": [[["global"], 1]], "hidden_size": 8}
    | {"num_heads": 1, "vocab_size": 9},
    "gptj": {"n_layer": 1, "n_embd": 8, "n_head": 1, "rotary_dim": 8, "vocab_size": 9},
}


@pytest.mark.parametrize(
    ("kind", "key", "refused"),
    [("gpt_neo", "max_position_embeddings", 150_000), ("gptj", "n_positions", 2**24)],
)
def test_masks_and_tables_of_a_large_context_are_refused_before_they_are_made(
    tmp_path, kind, key, refused
):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **SMALL_KINDS[kind], **{key: 16})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert parity.theirs(tmp_path).config.vocab_size == 9
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | {key: refused}))
    with pytest.raises(CheckpointError, match="than its weights allow"):
        parity.theirs(tmp_path)


def test_a_declared_padding_or_truncation_of_a_tokenizer_has_no_effect(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.enable_padding(length=1000)
    made.enable_truncation(2)
    made.save(str(tmp_path / "tokenizer.json"))
    assert library_tokenizer(tmp_path / "tokenizer.json").encode("a a a").ids == [0, 0, 0]
