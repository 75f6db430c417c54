"""The clocks, the cut of the text, and when ours counts as being as good."""

from types import SimpleNamespace

import held_out
import pytest
import time_to_quality as ttq
from side_by_side import Row


def test_the_tail_of_a_text_or_another_file_is_held_out(tmp_path):
    text, other = tmp_path / "a.txt", tmp_path / "b.txt"
    text.write_text("ü" * 95 + "tail!")
    other.write_text("other")
    parts = held_out.cut(text, None)
    assert (len(parts.head), parts.tail, parts.tail_bytes) == (90, "üüüüütail!", 15)
    assert held_out.cut(text, other) == held_out.Cut(text.read_text(), "other")
    other.write_text("")
    with pytest.raises(SystemExit, match="nothing held out"):
        held_out.cut(text, other)


@pytest.mark.parametrize(
    "alphabet, expected", [("aéz", 3), ("".join(map(chr, range(0x4E00, 0x4F01))), 256)]
)
def test_characters_are_tokens_until_there_are_too_many_of_them(alphabet, expected):
    parts = held_out.Cut(alphabet * 3, alphabet[::-1])
    head, tail, sizes = ttq.symbols(parts)
    assert len(sizes) == expected
    assert sum(sizes[i] for i in tail) == parts.tail_bytes and sum(sizes[i] for i in head) == len(
        parts.head.encode()
    )


def test_the_rate_of_nanogpt_warms_up_to_its_peak_and_falls_to_its_tenth():
    rates = [ttq.nanogpt_lr(u, 2000) for u in range(2000)]
    assert max(rates) == rates[100] == 1e-3 and rates[0] == pytest.approx(1e-3 / 101)
    assert rates[1050] == pytest.approx(5.5e-4) and rates[1999] == pytest.approx(1e-4, rel=1e-4)
    assert rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:], reverse=True)


def test_the_clock_keeps_training_apart_from_what_is_done_beside_it(monkeypatch):
    now = iter([0.0, 3.0, 20.0, 22.0, 27.0, 28.0, 31.0, 33.0])
    monkeypatch.setattr(ttq.time, "perf_counter", lambda: next(now))
    clock = ttq.Clock()
    clock.on_phase("data")
    clock.on_phase("preflight")  # at 3
    # ends at 20, so it began at 18
    clock.on_step(None, SimpleNamespace(step=1, wall_s=2.0))
    clock.on_step(None, SimpleNamespace(step=2, wall_s=2.0))  # at 22
    clock.on_evaluation(None, None, None)  # until 27
    clock.on_saved(None, SimpleNamespace(step=2, folder="folder"))  # until 28
    clock.on_step(None, SimpleNamespace(step=3, wall_s=2.0))  # at 31
    clock.on_saved(None, SimpleNamespace(step=3, folder="next"))  # until 33
    assert (clock.opened_s, clock.preflight_s, clock.beside_s) == (3.0, 15.0, 8.0)
    assert clock.saved[0] == {"step": 2, "path": "folder", "training_s": 4.0, "everything_s": 10.0}
    assert clock.saved[1] == {
        "step": 3,
        "path": "next",
        "training_s": 31.0 - 18.0 - 6.0,
        "everything_s": 15.0,
    }


def test_the_first_checkpoint_that_is_at_least_as_good_counts(monkeypatch):
    scores = {"s10": 3.0, "s20": 2.5, "s30": 2.0, "s40": 2.4}
    monkeypatch.setattr(held_out, "bits_per_byte_of", lambda folder, text: scores[folder.name])
    points = [{"step": n, "path": f"s{n}"} for n in (40, 10, 30, 20)]
    reached, looked = ttq.first_as_good(points, 2.5, "")
    assert reached == {"step": 20, "path": "s20", "bits_per_byte": 2.5} and looked == [
        (10, 3.0),
        (20, 2.5),
    ]
    assert ttq.first_as_good(points, 1.9, "")[0] is None


def a_round(training_s: float, reached_s: float | None) -> dict:
    reached = (
        None if reached_s is None else {"training_s": reached_s, "everything_s": 2 * reached_s}
    )
    return {"nanogpt": {"training_s": training_s, "everything_s": training_s}, "reached": reached}


def test_the_ratio_is_their_time_over_ours_and_none_if_ours_fell_short_once():
    rows = {r.name: r for r in ttq.rows_of([a_round(60, 30), a_round(60, 20), a_round(60, 60)])}
    assert rows["nanogpt: training"].ratio == pytest.approx((2.0, 1.0, 3.0))
    assert rows["nanogpt: everything"].ratio == pytest.approx((1.0, 0.5, 1.5))
    short = ttq.rows_of([a_round(60, 30), a_round(60, None)])
    assert all(isinstance(r, Row) and not r.rates and "did not become" in r.missing for r in short)
