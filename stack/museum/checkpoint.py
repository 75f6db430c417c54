"""Plants in saving, loading and resuming."""

import time
from dataclasses import replace

import torch

from stackproof import tensorfolder
from stackproof.model import transformer
from stackproof.museum.plant import swap
from stackproof.spec.errors import CheckpointError
from stackproof.train import checkpoint

PATIENCE_S = 5.0  # a slow disk; enough for one update of a small model


def live_tensor_changed():
    original = checkpoint.model_tensors

    def averaged(model):
        tensors = original(model)
        first = next(iter(tensors))
        return tensors | {first: tensors[first] * 0.999}

    with swap(checkpoint, "model_tensors", averaged):
        yield


def snapshot_aliases_live():
    write = checkpoint.write

    def late(root, snapshot):
        live = snapshot.content.tensors
        moments = live["state.safetensors"]
        seen, began = {n: t.clone() for n, t in moments.items()}, time.monotonic()
        while (
            all(torch.equal(t, seen[n]) for n, t in moments.items())
            and time.monotonic() - began < PATIENCE_S
        ):
            time.sleep(0.001)
        by_then = {
            file: {n: t.clone() for n, t in tensors.items()} for file, tensors in live.items()
        }
        return write(root, replace(snapshot, content=replace(snapshot.content, tensors=by_then)))

    with swap(checkpoint, "copies", lambda tensors: tensors), swap(checkpoint, "write", late):
        yield


def rng_not_saved():
    with swap(checkpoint, "default_rng_state", lambda: {}):
        yield


def tensor_dropped():
    original = checkpoint.model_tensors

    def one_short(model):
        tensors = original(model)
        tensors.pop(sorted(tensors)[-1])
        return tensors

    with swap(checkpoint, "model_tensors", one_short):
        yield


def torn_write():
    original = checkpoint.save

    def in_place(root, state, document):
        root.mkdir(parents=True, exist_ok=True)
        folder = root / f"step-{state.step:08d}"
        (root / "latest").write_text(folder.name)
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_bytes(b"{}")
        return original(root, state, document)

    with swap(checkpoint, "save", in_place):
        yield


def disk_full_swallowed():
    original = checkpoint.save

    def swallowing(root, state, document):
        try:
            return original(root, state, document)
        except CheckpointError:
            return root

    with swap(checkpoint, "save", swallowing):
        yield


def hash_not_checked():
    with swap(tensorfolder, "verify_file", lambda path, entry, *, by_tensor: None):
        yield


def missing_keys_ignored():
    original = checkpoint._read_json

    def forgiving(path):
        document = original(path)
        return (
            dict.fromkeys(checkpoint.STATE_KEYS) | document
            if path.name == "state.json"
            else document
        )

    with swap(checkpoint, "_read_json", forgiving):
        yield


def rng_lost():
    with swap(checkpoint, "set_default_rng_state", lambda states: None):
        yield


def batch_order_restarted():
    original = checkpoint.restore

    def from_the_start(state, loaded):
        original(state, loaded)
        state.reader.cursor = 0

    with swap(checkpoint, "restore", from_the_start):
        yield


def step_off_by_one():
    original = checkpoint.restore

    def one_less(state, loaded):
        original(state, loaded)
        state.step -= 1

    with swap(checkpoint, "restore", one_less):
        yield


def moments_lost():
    def forget(state, tensors):
        state.optimizer.state.clear()

    with swap(checkpoint, "_restore_optimizer", forget):
        yield


def loss_scale_lost():
    original = checkpoint.restore

    def default_scale(state, loaded):
        original(state, loaded)
        state.scaler = torch.amp.GradScaler(state.device.type, enabled=True, init_scale=2.0**10)

    with swap(checkpoint, "restore", default_scale):
        yield


def memory_lost():
    original = checkpoint.restore

    def forgetful(state, loaded):
        stopper, best = state.stopper.state_dict(), dict(state.best)
        dropped = original(state, loaded)
        state.stopper.load_state_dict(stopper)
        state.best, state.ema_loss_nats = best, None
        return dropped

    with swap(checkpoint, "restore", forgetful):
        yield


def tie_broken_on_load():
    original, shared = checkpoint.restore, transformer.Transformer.head_weight
    copies = {}

    def untied(state, loaded):
        dropped = original(state, loaded)
        copies[id(state.model)] = state.model.embed.weight.detach().clone()
        return dropped

    head = property(lambda self: copies.get(id(self), shared.fget(self)))
    with swap(checkpoint, "restore", untied), swap(transformer.Transformer, "head_weight", head):
        yield


def prefix_ignored():
    def not_strict(model, tensors):
        wrapped = {f"wrapped.{name}": tensor for name, tensor in tensors.items()}
        own = checkpoint.model_tensors(model)
        for name in own.keys() & wrapped.keys():
            own[name].copy_(wrapped[name])

    with swap(checkpoint, "load_model", not_strict):
        yield


def average_left_in():
    original = checkpoint.save

    def averaging(root, state, document):
        with torch.no_grad():
            for tensor in checkpoint.model_tensors(state.model).values():
                tensor.mul_(0.999)
        return original(root, state, document)

    with swap(checkpoint, "save", averaging):
        yield


def decay_restored_wrong():
    original = checkpoint.restore

    def of_the_constructor(state, loaded):
        dropped = original(state, loaded)
        for group in state.optimizer.param_groups:
            group["weight_decay"] *= 0.5
        return dropped

    with swap(checkpoint, "restore", of_the_constructor):
        yield
