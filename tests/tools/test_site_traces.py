"""Heat maps of traces on hand-made points: what is odd is shaded and named, what is not is not."""

from types import SimpleNamespace

from tools.site_pages.traces import sections

STATS = {"mean": 0.1, "std": 0.5, "absmax": 2.0, "kurtosis": 3.0, "top_token_energy_frac": 0.1}


def world(rows):
    """A record with these lines in the series of its kind, or with several series by name."""
    held = rows if isinstance(rows, dict) else {"points.jsonl": rows, "plants.jsonl": rows}
    return SimpleNamespace(series=lambda record, name, *keys: held.get(name, []))


def blocks(kind, rows):
    return sections(world(rows), SimpleNamespace(kind=kind))


def point(layer, slot, z, std=0.5, **more):
    return {
        "point": f"layers.{layer}.{slot}",
        "layer": layer,
        "slot": slot,
        "stats": STATS | {"std": std},
        "robust_z": z,
    } | more


def test_a_profile_shades_what_stands_out_and_names_the_first():
    rows = [
        point(0, "ffn.swiglu", 0.1),
        point(1, "ffn.swiglu", 9.0, 7.5, anomalous=True, operation="gated product"),
        point(2, "ffn.swiglu", -1.3),
    ]
    text = blocks("trace", rows)
    assert "First point that stands out: <code>layers.1.ffn.swiglu</code>, gated product." in text
    assert '<span class="heat heat--hot">7.5</span>' in text and text.count("heat--warm") == 1
    assert "| 0 | 0.5 |" in text
    assert "No point stands out." in blocks("trace", rows[:1]) and "heat--" not in blocks(
        "trace", rows[:1]
    )


def test_a_comparison_is_shaded_by_what_a_point_adds_and_not_by_what_arrives():
    row = {"layer": 0, "cosine": 1.0, "nmse": 0.0, "bound": 1e-6}
    rows = [
        row | {"point": "layers.0.q", "slot": "q", "rel_err": 1e-7, "added_err": 1e-7},
        row | {"point": "layers.0.k", "slot": "k", "rel_err": 3e-6, "added_err": 3e-6},
        row | {"point": "layers.0.v", "slot": "v", "rel_err": 5e-2, "added_err": None},
        row | {"point": "layers.0.ffn.out", "slot": "ffn.out", "rel_err": 6e-2, "added_err": 4e-2},
    ]
    text = blocks("compare", rows)
    assert "First point that adds more than its bound: <code>layers.0.k</code>." in text
    assert (
        '<span class="heat heat--warm">3e-06</span>' in text
        and '<span class="heat heat--hot">0.06</span>' in text
    )
    assert text.count("heat--") == 2


def test_a_run_shows_its_points_over_the_steps_and_a_run_without_has_no_section():
    lines = [
        {"step": step} | point(layer, slot, None, std=step / 100)
        for step in range(10, 510, 10)
        for layer in (0, 1)
        for slot in ("resid_out", "scores", "entropy")
    ]
    text = blocks("train", lines)
    assert "step 10 |" in text and "step 500 |" in text and text.count("step ") == 4 * 10
    assert "| 1 | 0.1 |" in text and "<code>layers.1.entropy</code> | 0.1 |" in text
    assert blocks("train", []) == "" and blocks("evaluate", lines) == ""


def test_a_plant_that_was_named_wrongly_is_said_so():
    row = {
        "plant": "eps",
        "planted": "layers.1.q",
        "compared": "layers.1.q",
        "bisected": ["layers.1.q"],
        "runs": 9,
    }
    assert "another" not in blocks("benchmark", [row])
    assert "<code>layers.1.k</code> **another**" in blocks(
        "benchmark", [row | {"compared": "layers.1.k"}]
    )
    assert blocks("benchmark", []) == ""


def test_the_links_of_a_bisection_are_told_with_their_numbers():
    links = [
        {
            "id": "E1",
            "hypothesis": "something after layers.0.q is wrong",
            "verdict": "eliminated",
            "evidence": {"rel_err": 2e-7, "run": 3},
        },
        {
            "id": "E2",
            "hypothesis": "something up to layers.0.q is wrong",
            "verdict": "kept",
            "evidence": {"rel_err": 0.5, "run": 4},
        },
    ]
    text = blocks("compare", {"chain.jsonl": links})
    assert (
        "## Narrowing" in text
        and "| E1 | something after layers.0.q is wrong | eliminated | rel&#95;err 2e-07, run 3 |"
        in text
    )
    assert "Narrowing" not in blocks("compare", {})
