"""The configuration: typed, frozen, traced to its origin, and read."""

import re
from pathlib import Path

import pytest

import stackproof
from stackproof.config import FilesSource, known_keys, load_config, validate
from stackproof.recipes import RECIPES, recipe
from stackproof.spec.errors import ConfigError

STACK = Path(stackproof.__file__).parent


def test_recipes_are_complete_and_survive_a_round_trip():
    for name in RECIPES:
        cfg = recipe(name)
        assert cfg.recipe == name and validate(cfg.to_dict()) == cfg


def test_file_then_sets_then_flags_and_each_origin_is_kept(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'recipe = "pocket"\nseed = 5\n[optim]\nlr = 1e-3\n[data.tokenizer]\nkind = "byte"\n'
    )
    cfg, overrides = load_config(
        recipe("pocket"),
        run_file=path,
        sets=("optim.lr=2e-3", "sample.prompt=hello there"),
        fixed={"device": ("cpu", "--device")},
    )
    assert (cfg.seed, cfg.optim.lr, cfg.data.tokenizer.kind, cfg.sample.prompt, cfg.device) == (
        5,
        2e-3,
        "byte",
        "hello there",
        "cpu",
    )
    assert [(o.key, o.source) for o in overrides][-3:] == [
        ("optim.lr", "--set optim.lr=2e-3"),
        ("sample.prompt", "--set sample.prompt=hello there"),
        ("device", "--device"),
    ]
    assert overrides[0].source == str(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optim.learning_rate=1", "optim.lr"),
        ("optim.lr='1e-3'", "valid number"),
        ("model.n_kv_heads=3", "must divide"),
        ("model.head_dim=31", "even"),
        ("train.tokens_per_step=100", "multiple of"),
        ("schedule.warmup_steps=100000", "below train.max_steps"),
        ("data.corpus.kind=web", "web"),
        ("data.corpus.paths=['a']", "not a configuration key|Extra|paths"),
        ("train.max_steps=0", "greater than or equal to 1"),
        ("checkpoint.signal_boundary=0", "greater than or equal to 1"),
        ("curriculum.warmup_steps=3", "set together"),
        ("curriculum.cap.wikitext=0.5", "curriculum.caps"),
        ("nonsense", "key=value"),
        ("model=3", "model"),
    ],
)
def test_what_cannot_be_is_refused_with_its_origin(text, says):
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(recipe("pocket"), sets=(text,))
    assert text in str(caught.value) or "the recipe" in str(caught.value)


def leaves() -> list[str]:
    """Names of all keys, also of those in the list of a mixture's sources."""
    return sorted({k.split(".")[-1] for k in known_keys()} | set(FilesSource.model_fields))


def unread(names: list[str]) -> list[str]:
    """Names that no line of the stack reads: neither `x.name`, nor a pattern `name=x`, nor the
    SETTINGS of an optimizer, nor the configuration's own checks.
    """
    is_config = lambda p: p.parent.name == "config"  # noqa: E731
    source = "\n".join(p.read_text() for p in STACK.rglob("*.py") if not is_config(p))
    config = "\n".join(p.read_text() for p in STACK.rglob("*.py") if is_config(p))
    read = r"\.{0}\b|\b{0}\s*=\s*\w+\)*(:| if )|SETTINGS = \([^)]*\"{0}\""
    names = [n for n in names if not re.search(read.format(n), source)]
    return [n for n in names if not re.search(rf"self\.{n}\b|self\.\w+\.{n}\b", config)]


def test_every_key_is_read_somewhere():
    """A key the stack never reads would be a promise without effect."""
    assert {"lr", "signal_boundary", "probe_every", "weight", "floor"} <= set(leaves())
    assert unread(leaves()) == [] and unread(["lr", "never_read_anywhere"]) == [
        "never_read_anywhere"
    ]


def test_waivers_must_name_a_gate_and_be_in_force(spec):
    from stackproof.contracts.keeper import Gatekeeper
    from stackproof.spec.records import Waiver

    with pytest.raises(ConfigError, match="no gate"):
        Gatekeeper(
            spec, waivers=[Waiver(id="no.gate", reason="because I say so", expires="2999-01-01")]
        )
    with pytest.raises(ConfigError, match="expired"):
        Gatekeeper(
            spec,
            waivers=[Waiver(id="loss.golden", reason="because I say so", expires="2020-01-01")],
        )


@pytest.mark.parametrize(
    ("sets", "what", "rest"),
    [
        (
            ("model.positions.kind=learned", "model.positions.scaling.kind=linear"),
            "another model.positions.kind",
            "--set model.positions.kind",
        ),
        (("model.depth.gate.kind=hard",), "another model.depth.kind", "--set model.depth.kind"),
        (
            ("optim.kind=adamw",),
            "optim.lr is missing: another optim.kind",
            "optim.kind from --set optim.kind=adamw",
        ),
        (
            ("model.attention.kind=diff",),
            "model.attention.kind: unknown kind",
            "differential, softmax",
        ),
        (("train.dtype=bfloat",), "train.dtype", "bfloat16, float32"),
    ],
)
def test_an_error_names_the_cause_and_what_there_is(sets, what, rest):
    with pytest.raises(ConfigError) as caught:
        load_config(recipe("pocket"), sets=sets)
    assert what in caught.value.what and rest in str(caught.value)


def test_an_error_between_keys_names_the_sources_of_those_keys_alone():
    with pytest.raises(ConfigError) as caught:
        load_config(recipe("pocket"), sets=("seed=7", "model.n_kv_heads=3", "eval.every=20"))
    assert caught.value.value == "from --set model.n_kv_heads=3"


def test_another_schedule_keeps_the_warm_up():
    cfg, _ = load_config(
        recipe("pocket"), sets=("schedule.warmup_steps=17", "schedule.kind=cosine")
    )
    assert (cfg.schedule.kind, cfg.schedule.warmup_steps) == ("cosine", 17)


def test_a_rule_between_two_keys_names_the_one_that_was_not_changed():
    with pytest.raises(ConfigError) as caught:
        load_config(recipe("tiny"), sets=("train.max_steps=15",))
    assert caught.value.next_step == "--set schedule.warmup_steps=… as well"
    with pytest.raises(ConfigError) as caught:
        load_config(recipe("tiny"), sets=("train.max_steps=15", "schedule.warmup_steps=20"))
    assert "--dry-run" in caught.value.next_step, "both are the user's"


def test_kernels_are_one_word_or_one_for_each_operation_named(tmp_path):
    """A word becomes the table it stands for as soon as one operation is named;
    old configurations have no key.
    """
    path = tmp_path / "run.toml"
    path.write_text('[train.kernels]\nattention = "triton"\nlinear = "auto"\n')
    of = lambda *sets, file=None: (  # noqa: E731
        load_config(recipe("pocket"), run_file=file, sets=sets)[0].train.kernels
    )
    assert of() == "auto" and of("train.kernels=torch") == "torch"
    assert of(file=path) == {"attention": "triton", "linear": "auto"}
    assert of('train.kernels={rope="torch"}', "train.kernels.swiglu=triton") == {
        "rope": "torch",
        "swiglu": "triton",
    }
    mixed = of("train.kernels=triton", "train.kernels.rope=torch")
    assert mixed["rope"] == "torch" and mixed["attention"] == "triton" and "linear" not in mixed
    tree = recipe("pocket").to_dict()
    del tree["train"]["kernels"]
    assert validate(tree).train.kernels == "auto"


@pytest.mark.parametrize(
    ("text", "what", "allowed"),
    [
        (
            "train.kernels=tirton",
            "there is no choice of kernels called tirton",
            "triton, auto, torch",
        ),
        ("train.kernels=3", "there is no choice of kernels called 3", "auto, torch, triton"),
        (
            "train.kernels.atention=triton",
            "atention is not an operation with kernels",
            "attention, linear",
        ),
        ("train.kernels.attention=cunks", "attention has no kernel cunks", "chunks, torch, triton"),
        ("train.kernels.linear=triton", "linear has no kernel triton", "torch, onednn"),
        ("train.kernels={rope=1}", "rope has no kernel 1", "torch, triton"),
    ],
)
def test_an_unknown_kernel_is_refused_with_the_nearest_name_first(text, what, allowed):
    with pytest.raises(ConfigError) as caught:
        load_config(recipe("pocket"), sets=(text,))
    assert caught.value.what == f"train.kernels: {what}" and caught.value.allowed.startswith(
        allowed
    )
    assert f"--set {text}" in str(caught.value.value)


@pytest.mark.parametrize("value", ["-1", "0", "foo", "1.5", "true"])
def test_all_that_shard_allows_is_stated(value):
    with pytest.raises(ConfigError, match="auto or a whole number of at least 1") as raised:
        load_config(recipe("pocket"), sets=(f"parallel.shard={value}",))
    assert str(raised.value).startswith("parallel.shard: ")
    for allowed in ("auto", 2):
        cfg, _ = load_config(recipe("pocket"), sets=(f"parallel.shard={allowed}",))
        assert cfg.parallel.shard == allowed
