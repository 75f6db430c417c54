"""Gates of the vocabulary, the optimizer and the saved weights of any trainer."""

from collections import Counter
from types import SimpleNamespace

from stackproof.contracts.gate import Verdict, decide, decides
from stackproof.contracts.subject import Subject


@decides("optim.ownership")
def ownership(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Each trainable parameter stands in the optimizer once, and nothing stands there that is
    no parameter of the model.
    """
    named_parameters, param_groups = subject.training.live_optimizer
    count = Counter(id(p) for g in param_groups for p in g["params"])
    names = {id(p): n for n, p in named_parameters}
    missing = [n for n, p in named_parameters if p.requires_grad and id(p) not in count]
    twice = [names.get(i, "?") for i, n in count.items() if n > 1]
    strangers = [i for i in count if i not in names]
    text = [
        f"{what}: {', '.join(found[:4])}"
        for what, found in (("not in the optimizer", missing), ("in the optimizer twice", twice))
        if found
    ]
    text += (
        [f"{len(strangers)} tensor(s) in the optimizer belong to no parameter of the model"]
        if strangers
        else []
    )
    return decide(
        not text,
        "; ".join(text),
        missing=len(missing),
        twice=len(twice),
        strangers=len(strangers),
        owned=len(count),
    )


@decides("optim.decay-groups")
def decay_groups(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Where groups differ in decay, biases and gains of norms are in those without it."""
    named_parameters, param_groups = subject.training.live_optimizer
    names = {id(p): n for n, p in named_parameters}
    rows = [
        (names.get(id(p), "?"), p.ndim, g.get("weight_decay", 0.0))
        for g in param_groups
        for p in g["params"]
    ]
    decays = {decay for _, _, decay in rows}
    decayed = [n for n, ndim, decay in rows if ndim < 2 and decay > 0]
    text = (
        f"weight decay pulls {len(decayed)} bias(es) or gain(s) to zero: {', '.join(decayed[:4])}"
    )
    ok = len(decayed) <= limits.decayed_vectors_max or (
        len(decays) == 1 and max(decays) <= limits.uniform_decay_max
    )
    return decide(
        ok,
        text,
        decayed_vectors=len(decayed),
        groups=len(param_groups),
        weight_decay=max(decays, default=0.0),
    )


@decides("checkpoint.reload")
def reload(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """A saved model, loaded again, has the live tensors bit for bit, and one head and embedding
    where the live model has one.
    """
    live, reloaded = subject.saved.live_checksums, subject.saved.reloaded_checksums
    live_tied, reloaded_tied = subject.saved.tied
    differing = sorted(n for n in live.keys() | reloaded.keys() if live.get(n) != reloaded.get(n))
    text = (
        f"saved and loaded again, {len(differing)} tensor(s) are others: {', '.join(differing[:4])}"
    )
    if live_tied != reloaded_tied:
        text = (
            f"embedding and head are {'one tensor' if live_tied else 'two tensors'}, loaded again "
            f"they are not; {text}"
        )
    return decide(
        len(differing) <= limits.differing_max and live_tied == reloaded_tied,
        text,
        differing=len(differing),
        compared=len(live),
        live_tied=live_tied,
        reloaded_tied=reloaded_tied,
    )
