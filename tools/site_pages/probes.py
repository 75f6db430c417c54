"""What a trace has found, as tables: the first NaN, a lens by layer,
the effects of ablation and patching.
"""

from stackproof.spec.records import Record
from tools.site_pages.markup import bullets, code, esc, number, optional, table
from tools.site_pages.world import World

POSITIONS = 12  # columns shown of a lens


def probes(world: World, record: Record) -> list[str]:
    """Blocks for whatever of this the record has beside it."""
    return [*_lens(world, record), *_effects(world, record), *_nonfinite(world, record)]


def _lens(world: World, record: Record) -> list[str]:
    """One row for each point of the stream, one column for each of the last positions:
    its likeliest next token.
    """
    blocks = []
    for found in world.series(record, "lens.jsonl", "lens", "tokens", "points"):
        heads = [f"after {code(t)}" for t in found["tokens"][-POSITIONS:]]
        rows = [
            [
                code(p["point"]),
                optional(p["loss_nats"]),
                number(p["kl_nats"]),
                number(p["agrees_frac"]),
            ]
            + [
                f"{code(at[0]['token'])} {number(round(at[0]['prob'], 3))}"
                for at in p["top"][-POSITIONS:]
            ]
            for p in found["points"]
        ]
        blocks += [
            f"## {esc(found['lens'].capitalize())} lens",
            "What the stream says after each layer: mean loss and distance to the model in nats "
            "per token, the share of tokens on which both agree, and the likeliest next token "
            "with its probability. The last row is the model.",
            table(["point", "loss", "KL", "agrees", *heads], rows),
        ]
        if compared := found.get("held_out"):
            columns = [k for k in compared[0] if k != "point"]
            rows = [[code(r["point"]), *(number(r[k]) for k in columns)] for r in compared]
            blocks += ["On held-out text:", table(["point", *map(code, columns)], rows)]
    return blocks


def _effects(world: World, record: Record) -> list[str]:
    blocks = []
    for found in world.series(record, "effects.jsonl", "baseline", "effects"):
        keys = ("loss_nats", "delta_nats", "kl_nats", "restored_frac")
        rows = [
            [
                code(e["target"]),
                *(optional(e[k]) for k in keys),
                *(code(e[k]["token"]) for k in ("top_before", "top_after")),
            ]
            for e in found["effects"]
        ]
        blocks += [
            "## Effects",
            (
                f"Each target by itself, replaced by {esc(found['baseline'])}. Sum of "
                f"`delta_nats`: {optional(found['sum_delta_nats'])}."
            ),
            table(["target", *map(code, keys), "next token before", "after"], rows),
            bullets(
                f"without {code(s['without'] or 'nothing')}: {esc(s['text'])}"
                for s in found.get("samples", [])
            ),
        ]
    return blocks


def _nonfinite(world: World, record: Record) -> list[str]:
    blocks = []
    for found in world.series(record, "nonfinite.jsonl", "first_nonfinite", "operations"):
        first = found["first_nonfinite"]
        blocks.append("## The first value that is not finite")
        if first is None:
            blocks.append(f"All values of {number(found['operations'])} operations are finite.")
            continue
        source = first["source"] or {}
        facts = {
            k: optional(first[k])
            for k in (
                "kind",
                "what",
                "op",
                "module",
                "layer",
                "point",
                "phase",
                "derivative",
                "forward_op",
            )
        }
        facts |= {
            "step": optional(found["step"]),
            "line": f"{source.get('file')}:{source.get('number')}",
            "text": source.get("text"),
        }
        columns = (
            "name",
            "held",
            "shape",
            "dtype",
            "min",
            "max",
            "mean",
            "std",
            "n",
            "n_nan",
            "n_posinf",
            "n_neginf",
        )
        rows = [
            [way, *(optional(_flat(v[c])) for c in columns)]
            for way in ("inputs", "outputs")
            for v in first[way]
        ]
        blocks += [
            table(["", ""], [[k, code(v)] for k, v in facts.items()]),
            table(["", *columns], rows),
        ]
    return blocks


def _flat(value: object) -> object:
    return "×".join(map(str, value)) if isinstance(value, list) else value
