"""Results of probing a model: a lens by layer, effects of ablation and patching, the first NaN."""

from markupsafe import Markup

from stackproof.spec.records import Record
from tools.site_pages.render import render
from tools.site_pages.world import World

POSITIONS = 12  # columns shown of a lens
FACTS = "kind what op module layer point phase derivative forward_op".split()
COLUMNS = "name held shape dtype min max mean std n n_nan n_posinf n_neginf".split()
EFFECTS = ("loss_nats", "delta_nats", "kl_nats", "restored_frac")


def probes(world: World, record: Record) -> Markup:
    """The sections of a record's page about probes; empty if it has none."""
    return render(
        "probes.md.j2",
        lenses=world.series(record, "lens.jsonl", "lens", "tokens", "points"),
        effects=world.series(record, "effects.jsonl", "baseline", "effects"),
        nonfinite=world.series(record, "nonfinite.jsonl", "first_nonfinite", "operations"),
        positions=POSITIONS,
        effect_columns=EFFECTS,
        facts=FACTS,
        columns=COLUMNS,
    )
