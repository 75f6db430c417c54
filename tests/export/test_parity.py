"""Both ways, every kind: the same logits, the same next tokens,
the same greedy text as transformers.
"""

import json

import pytest
import torch

from stackproof import tensorfile
from stackproof.config import ModelConfig
from stackproof.export import reading
from stackproof.model import hugging_face
from tests.export import models

# float32, other orders of summation; measured worst case 2.6e-6 on logits of about 4
TOLERANCE = 1e-5


def loaded(transformers, folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("name", models.THEIRS)
def test_a_model_of_theirs_computes_the_same_here(transformers, tmp_path, name):
    other = models.theirs(name)
    other.save_pretrained(tmp_path)
    folder = reading.open_folder(tmp_path)
    model = reading.load_weights(folder)
    assert (
        folder.kind.architecture.startswith(models.THEIRS[name][0])
        and model.vocab_size == models.VOCAB
    )
    assert max(models.differences(model, other).values()) <= TOLERANCE
    assert models.same_greedy_text(model, other)


@pytest.mark.parametrize("name", models.OURS)
def test_a_model_of_ours_computes_the_same_there(transformers, exported, name):
    model = models.ours(name, 257)
    folder, gates = exported(model)
    other = loaded(transformers, folder)
    assert type(other).__name__.startswith(models.OURS[name][0])
    assert max(models.differences(model, other).values()) <= TOLERANCE
    assert models.same_greedy_text(model, other)
    ours = [gates["export.logit-parity"].verdict, gates["export.folder"].verdict]
    assert ours == ["pass", "pass"]


@pytest.mark.parametrize("name", models.OURS)
def test_what_leaves_comes_back_bit_for_bit(exported, name):
    model = models.ours(name, 257)
    folder = reading.open_folder(exported(model)[0])
    back = reading.load_weights(folder)
    assert folder.cfg == model.cfg
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("name", ["plain", "experts", "gpt2"])
def test_shards_hold_the_same_as_one_file(transformers, exported, tmp_path, name):
    model = models.ours(name, 257)
    folder, _ = exported(model, max_shard_bytes=20_000)
    index = json.loads((folder / hugging_face.INDEX).read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == {f.name for f in files}
    for file in files:
        entries = tensorfile.read_header(file).tensors.values()
        assert sum(e.stop - e.start for e in entries) <= 20_000 or len(entries) == 1
    back = reading.load_weights(reading.open_folder(folder))
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True)
    )
    assert max(models.differences(model, loaded(transformers, folder)).values()) <= TOLERANCE


def test_bfloat16_is_the_rounded_model_and_says_what_rounding_changed(transformers, exported):
    model, exact = models.ours("plain", 257), models.ours("plain", 257)
    folder, gates = exported(model, dtype="bfloat16")
    other = loaded(transformers, folder)
    assert {
        e.dtype for e in tensorfile.read_header(folder / "model.safetensors").tensors.values()
    } == {"BF16"}
    assert all(
        torch.equal(a.bfloat16().float(), b) for a, b in zip(exact.parameters(), model.parameters())
    )
    assert max(models.differences(model, other).values()) <= TOLERANCE
    assert gates["export.logit-parity"].verdict == gates["export.folder"].verdict == "pass"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_without_a_second_rounding(transformers, tmp_path, dtype):
    other = models.theirs("smollm2").to(dtype)
    other.save_pretrained(tmp_path)
    model = reading.load_weights(reading.open_folder(tmp_path))
    # `other.float()` would keep the rotary frequencies it has rounded
    wide = loaded(transformers, tmp_path)
    assert max(models.differences(model, wide).values()) <= TOLERANCE


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_compiling_and_wrapping_change_nothing(exported, prefix):
    model = models.ours("plain", 257)
    folder, _ = exported(model)
    path = folder / "model.safetensors"
    tensors = {
        n: torch.from_numpy(tensorfile.memmap(path, n).copy())
        for n in tensorfile.read_header(path).tensors
    }
    inner = {prefix + n.replace("layers.0.", "layers.0._orig_mod."): t for n, t in tensors.items()}
    tensorfile.write(path, inner, {})
    back = reading.load_weights(reading.open_folder(folder))
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True)
    )


def test_names_without_the_outer_module_and_buffers_of_old_files_are_understood(
    transformers, tmp_path
):
    """The first GPT-2 files: no `transformer.` in front, and the causal mask among the weights."""
    other = models.theirs("gpt2")
    other.transformer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {
        n: torch.from_numpy(tensorfile.memmap(path, n).copy())
        for n in tensorfile.read_header(path).tensors
    }
    assert "wte.weight" in tensors
    tensorfile.write(
        path,
        tensors
        | {"h.0.attn.bias": torch.ones(1, 1, 40, 40), "h.1.attn.masked_bias": torch.zeros(1)},
        {},
    )
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "architectures": ["GPT2LMHeadModel"]
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = reading.load_weights(reading.open_folder(tmp_path))
    assert max(models.differences(model, other).values()) <= TOLERANCE


def test_a_tied_head_may_be_stored_too_if_it_is_the_same(exported):
    folder, _ = exported(models.ours("plain", 257))
    path = folder / "model.safetensors"
    tensors = {
        n: torch.from_numpy(tensorfile.memmap(path, n).copy())
        for n in tensorfile.read_header(path).tensors
    }
    tensorfile.write(
        path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, {}
    )
    assert not any(
        "head" in n for n in reading.load_weights(reading.open_folder(folder)).state_dict()
    )


@pytest.mark.parametrize("name", ["llama-3", "llama-linear", "qwen2", "mixtral"])
def test_old_and_new_keys_of_the_rotary_base_say_the_same(transformers, tmp_path, name):
    models.theirs(name).save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    rope = dict(new["rope_parameters"])
    old = {k: v for k, v in new.items() if k != "rope_parameters"} | {
        "rope_theta": rope.pop("rope_theta")
    }
    kind = rope.pop("rope_type")
    if kind != "default":
        old["rope_scaling"] = rope | {"type": kind}
    assert hugging_face.kind_of(old).read(old)[0] == hugging_face.kind_of(new).read(new)[0]


def test_a_shorter_context_computes_the_same_within_it(transformers, tmp_path):
    other = models.theirs("llama-2")
    other.save_pretrained(tmp_path)
    model = reading.load_weights(reading.open_folder(tmp_path, max_seq_len=16))
    ids = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), other(input_ids=ids).logits, rtol=0, atol=TOLERANCE)
    assert model.cfg.max_seq_len == 16


@pytest.mark.parametrize("name", ["mistral", "qwen2-window"])
def test_a_window_wider_than_the_context_is_none(transformers, tmp_path, name):
    """It hides nothing there; one that fits is kept."""
    other = models.theirs(name)
    other.save_pretrained(tmp_path)
    for length, window in ((7, 7), (6, None)):
        model = reading.load_weights(reading.open_folder(tmp_path, max_seq_len=length))
        ids = torch.arange(length)[None]
        assert (
            model.cfg.attention.window == window
            and ModelConfig.model_validate(model.cfg.model_dump()) == model.cfg
        )
        with torch.no_grad():
            torch.testing.assert_close(
                model(ids), other(input_ids=ids).logits, rtol=0, atol=TOLERANCE
            )
    document = json.loads((tmp_path / "config.json").read_text())
    wide = document | {"sliding_window": document["max_position_embeddings"] + 1}
    assert hugging_face.kind_of(wide).read(wide)[0].attention.window is None
