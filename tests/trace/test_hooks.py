"""Tracing shows what the model computes, changes nothing, and leaves nothing behind."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stackproof.kernels import dispatch
from stackproof.model import hugging_face
from stackproof.spec.architecture import FEED_FORWARD, Seen
from stackproof.spec.errors import UsageError
from stackproof.trace import trace
from stackproof.trace.hooks import hook_points
from stackproof.trace.maps import map_of
from stackproof.trace.points import OPERATIONS, READERS, Input, NameMap, Output, sites
from stackproof.trace.scratch import buffer_pool
from stackproof.trace.trace import logits_of
from tests.trace import models


def any_model(side, name):
    return models.ours(name) if side == "ours" else models.theirs(name)


ALL = [("ours", n) for n in models.OURS] + [("theirs", n) for n in models.THEIRS]


@pytest.mark.parametrize(("side", "name"), ALL)
def test_logits_are_the_same_to_the_bit_and_every_point_is_seen_once_in_order(side, name):
    model, ids, seen = any_model(side, name), models.ids(), []
    with torch.no_grad():
        plain = logits_of(model(ids))
        with hook_points(model, None, lambda point, x: seen.append(point)) as points:
            tapped = logits_of(model(ids))
        again = logits_of(model(ids))
    assert torch.equal(plain, tapped) and torch.equal(plain, again)
    assert sorted(p.name for p in seen) == sorted(p.name for p in points)
    assert [p.order for p in points] == list(range(len(points)))
    assert points[0].name == "embedding" and [p.name for p in points[-2:]] == [
        "final_norm",
        "logits",
    ]
    assert all(p.operation in OPERATIONS.values() for p in points)


@pytest.mark.parametrize("kind", FEED_FORWARD)
def test_every_point_of_a_feed_forward_has_an_operation_and_readers(kind):
    """A point without readers would have its wrong gradient reported at another place."""
    hidden = (Seen.SILU, Seen.NOWHERE)  # computed beside the model, or without a point
    for value in (v for v in FEED_FORWARD[kind].values if v.seen not in hidden):
        slot = value.slot if value.seen is Seen.ROUTING else f"ffn.{value.slot}"
        for table, name in ((OPERATIONS, "OPERATIONS"), (READERS, "READERS")):
            assert slot in table or value.slot in table, (
                f"stack/trace/points.py: {name} lacks {slot}"
            )


@pytest.mark.parametrize(
    ("side", "name"),
    [("ours", "plain"), ("ours", "experts"), ("theirs", "qwen3"), ("theirs", "gpt2")],
)
def test_nothing_stays_behind_also_after_an_exception(side, name):
    model, sdpa, ours = any_model(side, name), F.scaled_dot_product_attention, dispatch.attention

    def hooks():
        return sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in model.modules()
        )

    def stumble(point, x):
        if point.name == "layers.1.attention_out":
            raise RuntimeError("stumbled")

    before = hooks()
    with pytest.raises(RuntimeError, match="stumbled"), hook_points(model, None, stumble):
        assert hooks() > before
        model(models.ids())
    assert (
        hooks() == before and F.scaled_dot_product_attention is sdpa and dispatch.attention is ours
    )


def test_a_caught_exception_inside_does_not_shift_the_layers():
    model, seen = models.ours(), []

    def stumble(point, x):
        seen.append(point.name)
        if len(seen) == 20:
            raise RuntimeError

    with (
        torch.no_grad(),
        hook_points(model, ["layers.*.scores", "layers.*.ffn.out", "layers.*.q"], stumble),
    ):
        for _ in range(10):
            try:
                model(models.ids())
            except RuntimeError:
                seen.append("stumbled")
    whole = [f"layers.{i}.{s}" for i in range(2) for s in ("q", "scores", "ffn.out")]
    assert seen[-len(whole) :] == whole


@pytest.mark.parametrize("name", models.THEIRS)
def test_points_of_a_hugging_face_model_are_what_its_own_hooks_show(name):
    """Values by hooks that are written here, on modules named here; the attention function is
    called again from its own inputs.
    """
    model, ids, own, seen = models.theirs(name), models.ids(), {}, {}
    gpt2 = name.startswith("gpt2")
    paths = (
        ["transformer.h.1.mlp", "transformer.h.1.attn", "transformer.ln_f"]
        if gpt2
        else ["model.layers.1.mlp", "model.norm"]
    )
    modules = dict(model.named_modules())
    handles = [
        modules[p].register_forward_hook(lambda m, a, o, p=p: own.__setitem__(p, o)) for p in paths
    ]
    if not gpt2:
        attention = modules["model.layers.1.self_attn"]
        handles += [
            attention.q_proj.register_forward_hook(lambda m, a, o: own.__setitem__("q", o)),
            attention.o_proj.register_forward_pre_hook(lambda m, a: own.__setitem__("mixed", a[0])),
        ]
    with (
        torch.no_grad(),
        hook_points(model, None, lambda point, x: seen.__setitem__(point.name, x.clone())),
    ):
        states = model(ids, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    assert torch.equal(seen["embedding"], states[0]) and torch.equal(
        seen["layers.0.resid_out"], states[1]
    )
    assert torch.equal(seen["final_norm"], states[2]) and torch.equal(
        seen["final_norm"], own[paths[-1]]
    )
    assert torch.equal(seen["layers.1.ffn.out"], own[paths[0]])
    assert torch.equal(
        seen["layers.1.resid_mid"] + seen["layers.1.ffn.out"], seen["layers.1.resid_out"]
    )
    assert torch.equal(
        seen["layers.1.resid_mid"] - 0, seen["layers.0.resid_out"] + seen["layers.1.attention_out"]
    )
    if gpt2:
        assert torch.equal(seen["layers.1.attention_out"], own[paths[1]][0])
        return
    assert torch.equal(seen["layers.1.q"], own["q"]) and torch.equal(
        seen["layers.1.attention_mixed"].flatten(2), own["mixed"]
    )


@pytest.mark.parametrize("name", ["plain", "gpt2", "differential", "window", "qk-norm"])
def test_scores_and_entropy_are_those_of_the_softmax_written_out(name):
    """Written from the definition in float64; float32 chunks came within 6e-7 of it,
    relative to the largest.
    """
    model, ids, seen, calls = models.ours(name), models.ids(), {}, []
    original = dispatch.attention

    def noted(q, k, v, **options):
        calls.append((q.double(), k.double(), options))
        return original(q, k, v, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(dispatch, "attention", noted)
        with hook_points(
            model,
            ["layers.*.scores", "layers.*.entropy"],
            lambda p, x: seen.__setitem__(p.name, x.clone()),
        ):
            model(ids)
    for layer, (q, k, options) in enumerate(calls):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = q @ k.transpose(-1, -2) * (options.get("scale") or q.shape[-1] ** -0.5)
        index = torch.arange(ids.shape[1])
        window = options["window"] or ids.shape[1]
        visible = (index <= index[:, None]) & (index > index[:, None] - window)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        entropy = torch.special.entr(weights).sum(-1)
        top = scores.masked_fill(~visible, -torch.inf).amax(-1)
        for figure, wanted in (
            (f"layers.{layer}.scores", top),
            (f"layers.{layer}.entropy", entropy),
        ):
            torch.testing.assert_close(
                seen[figure].double(), wanted.transpose(1, 2), rtol=1e-5, atol=1e-5
            )


def test_chunks_of_scores_are_the_whole(monkeypatch):
    from stackproof.trace import scores

    model, ids = models.ours("window"), models.ids(tokens=40)
    names = ["layers.*.scores", "layers.*.entropy"]
    whole = trace(model, ids, names)
    monkeypatch.setattr(scores, "CHUNK", 500)
    for a, b in zip(whole.points, trace(model, ids, names).points):
        assert a.stat.mean == pytest.approx(
            b.stat.mean, rel=1e-6
        ) and a.stat.absmax == pytest.approx(b.stat.absmax, rel=1e-6)


@pytest.mark.parametrize(("side", "name"), [*ALL])
def test_every_point_can_be_replaced_and_what_is_put_there_flows_on(side, name):
    """Each value put back as it was gives the same logits; each changed gives others.
    What does not flow cannot be replaced.
    """
    model, ids = any_model(side, name), models.ids()
    with torch.no_grad():
        plain = logits_of(model(ids)).clone()
        with hook_points(model, None, lambda p, x: x.clone() if p.flows else None) as points:
            assert torch.equal(logits_of(model(ids)), plain)
        one = [p for p in points if p.layer in (None, 1)]
        for point in one:
            change = lambda p, x: x * 1.5 + 0.1  # noqa: E731
            if not point.flows:
                with (
                    pytest.raises(UsageError, match="cannot be replaced"),
                    hook_points(model, [point.name], change),
                ):
                    model(ids)
                continue
            with hook_points(model, [point.name], change):
                changed = logits_of(model(ids))
            if "experts" not in point.name:  # the expert may have been chosen by nobody
                assert not torch.equal(changed, plain), point.name
        assert torch.equal(logits_of(model(ids)), plain)


@pytest.mark.parametrize(("side", "name"), [("ours", "plain"), ("theirs", "llama-2")])
def test_the_residual_stream_is_replaced_as_a_whole(side, name):
    """The sum after attention is read twice; zero there leaves only what the
    feed-forward makes of zero.
    """
    model, ids, seen = any_model(side, name), models.ids(), {}

    def handler(point, x):
        seen[point.slot] = x.clone()
        return torch.zeros_like(x) if point.slot == "resid_mid" else None

    with (
        torch.no_grad(),
        hook_points(
            model, ["layers.1.resid_mid", "layers.1.ffn.out", "layers.1.resid_out"], handler
        ),
    ):
        model(ids)
    assert torch.equal(seen["resid_out"], seen["ffn.out"]) and seen["resid_mid"].any()


def test_a_replacement_of_another_shape_is_refused():
    model = models.ours()
    with (
        pytest.raises(UsageError, match="wrong shape"),
        hook_points(model, ["layers.0.q"], lambda p, x: x[:, :1]),
    ):
        model(models.ids())


def test_names_select_by_pattern_and_an_unknown_one_is_refused_with_the_nearest():
    model = models.ours()
    with hook_points(model, ["layers.*.ffn.swiglu", "logits"], lambda p, x: None) as points:
        assert [p.name for p in points] == ["layers.0.ffn.swiglu", "layers.1.ffn.swiglu", "logits"]
    with (
        pytest.raises(UsageError, match=r"layers\.1\.ffn\.swiglo") as error,
        hook_points(model, ["layers.1.ffn.swiglo"], lambda p, x: None),
    ):
        pass
    assert "layers.1.ffn.swiglu" in str(error.value)
    with (
        pytest.raises(UsageError, match="all experts in one tensor"),
        hook_points(models.theirs("mixtral"), ["layers.0.experts"], lambda p, x: None),
    ):
        pass


def test_attention_that_is_not_torchs_own_is_said_to_be_unseen():
    model = models.theirs("llama-2")
    model.set_attn_implementation("eager")
    assert "layers.0.attention_mixed" not in [
        t.point.name for t in trace(model, models.ids()).points
    ]
    with pytest.raises(UsageError, match="eager"):
        trace(model, models.ids(), ["layers.0.attention_mixed"])


class Own(nn.Module):
    """A model of somebody else."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.stages = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.read = nn.Linear(8, 11)

    def forward(self, ids):
        x = self.table(ids)
        for stage in self.stages:
            x = x + stage(x)
        return self.read(x)


def test_any_module_is_traced_by_a_map_of_names():
    torch.manual_seed(0)
    model, ids = Own(), torch.arange(10).view(2, 5)
    names = {
        "embedding": "table",
        "layers.{}.act": "stages.{}.1",
        "layers.{}.in": Input("stages.{}"),
        "logits": "read",
    }
    with pytest.raises(UsageError, match="there is no name map"):
        trace(model, ids)
    traced = trace(model, ids, where=names)
    assert [t.point.name for t in traced.points] == (
        ["embedding"] + [f"layers.{i}.{s}" for i in range(3) for s in ("act", "in")] + ["logits"]
    )
    assert traced["layers.2.act"].stat.absmax <= 1 and traced["layers.2.act"].point.layer == 2
    assert torch.equal(traced.logits, model(ids))
    with pytest.raises(UsageError, match=r"stagez\.\{\}\.1") as error:
        trace(model, ids, where=names | {"layers.{}.act": "stagez.{}.1"})
    assert "stages." in str(error.value)


def test_experts_are_ordered_one_after_the_other():
    model = models.ours("experts")
    found = [
        s.point.name
        for s in sites(model, map_of(model))
        if ".experts." in s.point.name and s.point.layer == 0
    ]
    inner = ("gate", "up", "silu", "swiglu", "out")
    assert found == [f"layers.0.experts.{e}.{s}" for e in range(4) for s in inner]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "mixtral-window"])
def test_router_choice_and_sum_of_experts_of_transformers_are_what_its_own_hooks_show(
    name, implementation
):
    model, ids, own, seen = models.theirs(name), models.ids(), {}, {}
    model.set_experts_implementation(implementation)
    block = model.model.layers[1].mlp
    handles = [
        m.register_forward_hook(lambda m, a, out, k=k: own.__setitem__(k, out))
        for k, m in (("gate", block.gate), ("experts", block.experts))
    ]
    with (
        torch.no_grad(),
        hook_points(
            model, ["layers.1.*"], lambda point, x: seen.__setitem__(point.slot, x.clone())
        ),
    ):
        model(ids)
    for handle in handles:
        handle.remove()
    logits_RE, weights_Rk, chosen_Rk = own["gate"]
    assert torch.equal(seen["router"][0], logits_RE) and torch.equal(
        seen["ffn.out"].flatten(0, 1), own["experts"]
    )
    assert torch.equal(seen["routing"][0].gather(1, chosen_Rk), weights_Rk)
    assert (seen["routing"] != 0).sum() == weights_Rk.numel()
    assert torch.allclose(seen["routing"].sum(-1), torch.ones(1, len(logits_RE)), atol=1e-6)
    assert not {"experts.0.out", "ffn.gate", "ffn.swiglu"} & set(seen)


@pytest.mark.parametrize(("side", "name"), [("ours", "experts"), ("theirs", "mixtral")])
def test_another_routing_is_put_in_its_place(side, name):
    """The same expert for every token: only it sees tokens, and all of them."""
    model, ids, rows = any_model(side, name), models.ids(), []

    def first_two(point, x):
        return torch.zeros_like(x).index_fill_(-1, torch.tensor([0, 1]), 0.5)

    given = (
        (lambda m, a: rows.append(a[0].shape[0]))
        if side == "ours"
        else (lambda m, a: rows.append(a[1].unique().tolist()))
    )
    experts = model.layers[1].ffn.experts if side == "ours" else [model.model.layers[1].mlp.experts]
    handles = [e.register_forward_pre_hook(given) for e in experts]
    with torch.no_grad(), hook_points(model, ["layers.1.routing"], first_two):
        model(ids)
    for handle in handles:
        handle.remove()
    assert rows == ([ids.numel(), ids.numel(), 0, 0] if side == "ours" else [[0, 1]])


def test_a_routing_function_is_put_back_after_an_exception():
    from stackproof.model import moe

    model, original = models.ours("experts"), moe.route

    def stumble(point, x):
        raise RuntimeError("stumbled")

    for names in (["layers.0.routing"], ["layers.0.router"], ["layers.1.experts.*.up"]):
        with (
            pytest.raises(RuntimeError, match="stumbled"),
            hook_points(model, [*names, "layers.*.routing"], stumble),
        ):
            model(models.ids())
        assert moe.route is original


def test_gradients_of_a_routing_are_those_of_its_weights():
    traced = trace(models.ours("experts"), models.ids(), ["layers.*.routing"], backward=True)
    assert [t.point.name for t in traced.points] == ["layers.0.routing", "layers.1.routing"]
    # two of four experts are chosen
    assert all(t.grad.absmax > 0 and t.grad.frac_zero >= 0.5 for t in traced.points)


def test_a_map_of_our_own_model_that_names_too_much_is_refused():
    model = models.ours()
    with pytest.raises(UsageError, match="no such module"):
        sites(model, NameMap("a map", {"x": Output("layers.7")}))


@pytest.mark.parametrize("name", ["llama-2", "gpt2", "qwen2-window", "mistral"])
def test_one_token_is_shown_like_many(name):
    """Of one token transformers lays heads out differently; shapes and
    figures must not depend on it.
    """
    model = models.theirs(name)
    seen = {}
    with (
        torch.no_grad(),
        hook_points(model, ["layers.0.*"], lambda p, x: seen.__setitem__(p.slot, x.clone())),
    ):
        model(models.ids()[:, :1])
        single = dict(seen)
        model(models.ids())
    assert all(single[s].shape[1] == 1 and single[s].shape[2:] == seen[s].shape[2:] for s in seen)
    first = {s: x[:, :1] for s, x in seen.items()}
    for slot in ("attention_mixed", "scores", "entropy"):
        torch.testing.assert_close(single[slot], first[slot], rtol=1e-4, atol=1e-5)


def test_all_kinds_of_hugging_face_are_covered():
    traced = {type(models.theirs(n)).__name__ for n in models.THEIRS}
    assert traced == {k.architecture for k in hugging_face.KINDS}


def test_derived_values_of_a_handler_that_keeps_them_are_its_own():
    """Only who says that it keeps nothing is shown memory that the next value is written to."""
    model, kept = models.ours(), {}
    with (
        torch.no_grad(),
        hook_points(model, ["*.ffn.silu", "*.ffn.gate"], lambda p, x: kept.__setitem__(p.name, x)),
    ):
        model(models.ids())
    for layer in range(2):
        assert torch.equal(
            kept[f"layers.{layer}.ffn.silu"], F.silu(kept[f"layers.{layer}.ffn.gate"])
        )
    shared = {}
    with (
        torch.no_grad(),
        hook_points(
            model,
            ["*.ffn.silu"],
            lambda p, x: shared.__setitem__(p.name, (x, x.clone())),
            scratch=True,
        ),
    ):
        model(models.ids())
    (first, then), (last, now) = shared.values()
    assert (
        torch.equal(last, now)
        and torch.equal(last, kept["layers.1.ffn.silu"])
        and torch.equal(then, kept["layers.0.ffn.silu"])
    )
    assert first.data_ptr() == last.data_ptr() and not torch.equal(first, then)


def test_two_threads_work_in_rooms_of_their_own():
    rooms = [buffer_pool("figures")]
    worker = threading.Thread(target=lambda: rooms.append(buffer_pool("figures")))
    worker.start()
    worker.join()
    assert (
        rooms[0] is buffer_pool("figures")
        and rooms[0] is not rooms[1]
        and buffer_pool("derived") is not rooms[0]
    )
