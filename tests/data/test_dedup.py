"""Repeats, near repeats and shared runs of words, each against a plain oracle."""

import random
import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stackproof.contracts.corpus import SENTENCES
from stackproof.data import dedup
from stackproof.data.dedup import (
    GRAM_WORDS,
    SIGNATURE,
    first_of_each,
    gram_set,
    near_repeats,
    runs,
    shares_gram,
    signatures,
    word_hashes,
)

VOCABULARY = [
    f"{a}{b}"
    for a in "ka lo mi nu pe ra so ti vu wa".split()
    for b in "b d f g k l m n p r s t v x z".split()
]


def words(text):
    return re.findall(r"\w+", text.casefold())


# --- exact repeats --------------------------------------------------------------------------------

VALUES = st.lists(
    st.lists(st.one_of(st.integers(-3, 3), st.integers(-(2**63), 2**63 - 1)), max_size=12),
    max_size=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(VALUES, st.sampled_from([1, 3, 2**24]))
def test_first_of_each_is_what_a_loop_over_a_set_keeps(monkeypatch, values, rows_in_memory):
    """Over any number of buckets, empty arrays and both signs."""
    monkeypatch.setattr(dedup, "ROWS_IN_MEMORY", rows_in_memory)
    seen, wanted = set(), []
    for row in values:
        wanted.append([v not in seen and not seen.add(v) for v in row])
    assert [
        k.tolist() for k in first_of_each([np.array(row, np.int64) for row in values])
    ] == wanted


def test_buckets_bound_what_is_held_at_once(monkeypatch):
    """A thousand values in buckets of about a hundred: never much more than that is gathered."""
    monkeypatch.setattr(dedup, "ROWS_IN_MEMORY", 100)
    gathered, gather = [], dedup._gather
    monkeypatch.setattr(dedup, "_gather", lambda *a: gathered.append(gather(*a)) or gathered[-1])
    values = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 1000)
    assert all(k.all() for k in first_of_each([values[:400], values[400:]]))
    sizes = [len(value) for value, _ in gathered]
    # 91 expected each, 9 of deviation
    assert len(sizes) == 11 and sum(sizes) == 1000 and max(sizes) < 150


# --- near repeats ---------------------------------------------------------------------------------


def random_words(draw, n):
    return [draw.choice(VOCABULARY) for _ in range(n)]


def altered(draw, text, n_changed):
    """A text in which a stretch of words is another."""
    at = draw.randrange(len(text) - n_changed)
    return [*text[:at], *random_words(draw, n_changed), *text[at + n_changed :]]


def shingles(text, n=5):
    """The word runs of a text as a set, in plain Python."""
    found = words(text)
    n = min(n, max(1, len(found)))
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def jaccard(a, b):
    a, b = shingles(a), shingles(b)
    return len(a & b) / len(a | b) if a | b else 1.0


def struck(texts, similarity_min, parts=1):
    """Which texts repeat an earlier one, their signatures lying in some parts."""
    made = signatures(texts, 5)
    cut = np.array_split(np.arange(len(texts)), parts)
    return np.concatenate(
        near_repeats([made[c] for c in cut], [np.ones(len(c), bool) for c in cut], similarity_min)
    ).tolist()


def corpus_of_pairs(seed, n=60):
    """Texts of 100 words and, for each, one in which 1 to 40 words in a row are others."""
    draw = random.Random(seed)
    texts = []
    for _ in range(n):
        text = random_words(draw, 100)
        texts += [" ".join(text), " ".join(altered(draw, text, draw.choice([1, 3, 8, 15, 25, 40])))]
    return texts


def test_signatures_estimate_the_jaccard_similarity():
    """128 values: an error of at most 0.044 each, so within 4.5 of them in 600 pairs,
    and unbiased over all.
    """
    errors = []
    for seed in range(10):
        texts = corpus_of_pairs(seed)
        made = signatures(texts, 5)
        for i in range(0, len(texts), 2):
            errors.append(float((made[i] == made[i + 1]).mean()) - jaccard(texts[i], texts[i + 1]))
    assert len(errors) == 600 and max(map(abs, errors)) < 0.2
    assert abs(np.mean(errors)) < 4 * 0.044 / np.sqrt(600)


def test_near_repeats_are_those_of_exact_similarity():
    """Far from the threshold on either side nobody is missed or struck wrongly;
    of two alike the first stays.
    """
    texts, judged = corpus_of_pairs(3), 0
    found = struck(texts, 0.7)
    for i in range(0, len(texts), 2):
        similarity = jaccard(texts[i], texts[i + 1])
        assert not found[i]
        if abs(similarity - 0.7) > 0.15:  # 3.4 deviations of the estimate
            assert found[i + 1] == (similarity > 0.7), similarity
            judged += 1
    assert judged >= 40 and 10 < sum(found) < 50


def test_near_repeats_are_those_that_datasketch_finds():
    """The same texts through MinHashLSH with the same bands, its candidates judged by exact
    similarity: no candidate pair is missed.
    """
    datasketch = pytest.importorskip("datasketch")
    texts, similarity_min = corpus_of_pairs(8), 0.7
    index, wanted = datasketch.MinHashLSH(params=(16, 8), num_perm=128), []
    for number, text in enumerate(texts):
        sketch = datasketch.MinHash(num_perm=128, seed=1)
        sketch.update_batch([" ".join(s).encode() for s in shingles(text)])
        wanted.append(
            any(jaccard(text, texts[other]) >= similarity_min for other in index.query(sketch))
        )
        if not wanted[-1]:
            index.insert(number, sketch)
    found = struck(texts, similarity_min)
    unlike = [i for i, (a, b) in enumerate(zip(found, wanted)) if a != b]
    assert sum(wanted) > 20
    # Both estimate; they may differ on pairs within 0.15 (3.4 deviations) of the
    # threshold and on no other.
    assert (
        all(abs(jaccard(texts[i - 1], texts[i]) - similarity_min) < 0.15 for i in unlike)
        and len(unlike) < 10
    )


def test_candidates_of_a_similarity_are_found_as_often_as_sixteen_bands_of_eight_find_them():
    """One minus (1 - s^8)^16: 0.94 of the pairs at 0.8 are compared, 0.06 at 0.5."""
    draw, hits, pairs = random.Random(5), {}, {}
    for _ in range(300):
        text = random_words(draw, 60)
        for n_changed in (4, 20):
            a, b = " ".join(text), " ".join(altered(draw, text, n_changed))
            made = signatures([a, b], 5)
            bands = [dedup._one_band(made, band, 16) for band in range(dedup._bands(0.8))]
            same = [one == other for one, other in bands]
            bucket = round(jaccard(a, b), 1)
            hits[bucket], pairs[bucket] = hits.get(bucket, 0) + any(same), pairs.get(bucket, 0) + 1
            assert all(same) == bool((made[0] == made[1]).all())
    for similarity, n in pairs.items():
        if n > 100:
            low, high = (1 - (1 - (similarity + d) ** 8) ** 16 for d in (-0.06, 0.06))
            # four deviations of 300 draws
            assert low - 0.1 < hits[similarity] / n < high + 0.1, similarity


@pytest.mark.parametrize("similarity_min", [0.5, 0.6, 0.7, 0.8])
def test_most_of_what_is_a_little_above_the_limit_is_found(similarity_min):
    """Of pairs 0.03 to 0.08 above it at least 0.75, at any limit; the estimate itself errs by
    0.044. Of pairs 0.2 below it hardly any.
    """
    draw, texts, above = random.Random(11), [], []
    while len(above) < 200:
        text = random_words(draw, 120)
        pair = [" ".join(text), " ".join(altered(draw, text, draw.randrange(1, 60)))]
        if (
            0.03 <= (distance := jaccard(*pair) - similarity_min) <= 0.08
            or -0.25 <= distance <= -0.2
        ):
            texts += pair
            above.append(distance > 0)
    found = np.array(struck(texts, similarity_min)[1::2])
    assert found[np.array(above)].mean() >= 0.75 and found[~np.array(above)].mean() <= 0.02


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 30), st.sampled_from([0.5, 0.8, 0.9]))
def test_near_repeats_are_those_of_going_through_the_documents_in_order(seed, n, similarity_min):
    """Struck is who shares a band with, and is like, an earlier document that is kept; chains of
    likeness strike nobody by themselves.
    """
    draw = np.random.default_rng(seed)
    made = [draw.integers(0, 2**32, SIGNATURE, np.uint32)]
    while len(made) < n:
        changed, at = (
            made[draw.integers(len(made))].copy(),
            draw.random(SIGNATURE) < draw.choice([0.05, 0.12, 0.2, 1.0]),
        )
        changed[at] = draw.integers(0, 2**32, int(at.sum()), np.uint32)
        made.append(changed)
    matrix, bands = np.array(made), 16 if similarity_min >= 0.8 else 32
    banded, kept, expected = matrix.reshape(n, bands, -1), [], []
    for i in range(n):
        near = [
            k
            for k in kept
            if (banded[i] == banded[k]).all(1).any()
            and (matrix[i] == matrix[k]).mean() >= similarity_min
        ]
        expected.append(bool(near))
        kept += [i] * (not near)
    assert near_repeats([matrix], [np.ones(n, bool)], similarity_min)[0].tolist() == expected


def test_texts_without_words_are_like_themselves_alone():
    texts = ["∀∃∈ ⊂⊃∩ ∑∏∫ ≤≥≠ ±×÷ ∞√∂", "♔♕♖ ♗♘♙ ♚♛♜ ♝♞♟ ☀☁☂ ☃☄★", "∀∃∈ ⊂⊃∩ ∑∏∫ ≤≥≠ ±×÷ ∞√∂"]
    assert struck(texts, 0.8) == [False, False, True]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5))
def test_the_parts_that_signatures_lie_in_do_not_matter(seed, parts):
    texts = corpus_of_pairs(seed, n=8)
    assert struck(texts, 0.7, parts) == struck(texts, 0.7)


def test_of_a_chain_only_what_is_like_a_kept_one_is_struck():
    """Exact repeats are taken out before: they strike nobody, and what is only like them stays."""
    draw = random.Random(1)
    first = random_words(draw, 100)
    a, b = " ".join(first), " ".join(altered(draw, first, 2))
    made = signatures([a, b, b], 5)
    assert near_repeats([made], [np.array([True, True, True])], 0.7)[0].tolist() == [
        False,
        True,
        True,
    ]
    assert near_repeats([made], [np.array([False, True, True])], 0.7)[0].tolist() == [
        False,
        False,
        True,
    ]


def test_texts_shorter_than_a_run_are_compared_as_one_run():
    assert struck(["one", "one two", "One!", "one two three four", "two one"], 0.8) == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert signatures(["", "-- !! --", "one"], 5).shape == (3, SIGNATURE)


def test_near_repeats_see_through_case_marks_and_line_ends():
    text = " ".join(SENTENCES[:6])
    assert struck([text, text.upper().replace(",", ";\n").replace(".", "!")], 1.0) == [False, True]


def test_nothing_gives_nothing():
    assert near_repeats([], [], 0.8) == [] and first_of_each([]) == [] and len(gram_set([])) == 0


# --- runs of words --------------------------------------------------------------------------------

TEXT = st.lists(st.sampled_from(["a", "B", "c", "d,", "e\n", "F.", "é", "'"]), max_size=45).map(
    " ".join
)


def grams(text):
    found = words(text)
    return {tuple(found[i : i + GRAM_WORDS]) for i in range(len(found) - GRAM_WORDS + 1)}


@settings(max_examples=300)
@given(st.lists(TEXT, max_size=3), TEXT, st.booleans(), st.integers(0, 30))
def test_sharing_a_run_is_what_sets_of_tuples_say(evaluation, text, hide, at):
    """Also with a passage of the evaluation set put into the text."""
    if hide and evaluation:
        text = f"{text} {' '.join(words(evaluation[0])[at : at + GRAM_WORDS]).upper()} {text}"
    shared = any(grams(text) & grams(e) for e in evaluation)
    assert shares_gram(text, gram_set(evaluation)) == shared
    assert len(gram_set(evaluation)) == len(set().union(*map(grams, evaluation)))


@pytest.mark.parametrize(("n", "found"), [(12, False), (13, True)])
def test_thirteen_words_are_a_run_and_twelve_are_none(n, found):
    exam = " ".join(VOCABULARY[:30])
    assert shares_gram(f"before {' '.join(VOCABULARY[5 : 5 + n])} after", gram_set([exam])) is found


@given(st.lists(st.sampled_from(VOCABULARY[:4]), max_size=40), st.integers(1, 16))
def test_runs_are_equal_where_their_words_are(text, length):
    made = runs(word_hashes(" ".join(text)), length).tolist()
    plain = [tuple(text[i : i + length]) for i in range(len(text) - length + 1)]
    assert len(made) == len(plain)
    assert {(a, b) for a, b in zip(made, plain)} == set(dict(zip(made, plain)).items()) and len(
        set(made)
    ) == len(set(plain))


def test_ways_to_write_a_word_do_not_matter():
    plain = "the café of the naïve élève was not far from the old harbour of the town"
    for written in (
        unicodedata.normalize("NFD", plain),
        plain.replace("old", "_old_"),
        plain.upper(),
        plain.replace("of", "*of*,"),
    ):
        assert (
            written != plain
            and shares_gram(f"before {written} after", gram_set([plain]))
            and struck([plain, written], 0.8) == [False, True]
        )


def test_the_order_of_words_matters():
    a, b = (runs(word_hashes(t), 3)[0] for t in ("one two three", "three two one"))
    assert a != b


def test_hashes_are_the_same_in_every_process():
    """Python salts its own hash of a text; words of the evaluation sets and of the
    corpus meet across processes.
    """
    code = (
        "from stackproof.data.dedup import *; print(gram_set(['{0}'])[:3].tolist(), "
        "signatures(['{0}'], 5)[0, :4].tolist())"
    ).format(" ".join(VOCABULARY[:20]))
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and len(outputs.pop()) > 60
