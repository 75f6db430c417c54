"""Masks are a function of places, with the law of independent draws."""

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stackproof.config import MixtureOfDepths, ModelConfig
from stackproof.config.model import HardCapacity
from stackproof.model import dropout as masks
from stackproof.model.build import build_model, compile_hidden_states
from stackproof.model.dropout import Dropout, DropoutStream, Places, keep_mask, philox

STREAM = DropoutStream(0x0123456789ABCDEF)
ROWS, TOKENS, WIDTH = 4, 64, 128
P, KEPT = 0.1, round(0.9 * 65536)
# A normal variable is further out than this many standard deviations with probability 2e-9.
Z_MAX = 6.0
CFG = ModelConfig(
    d_model=36, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=40, max_seq_len=48, dropout=P
)


def places(step=1, rows=range(ROWS), tokens=TOKENS, stream=STREAM):
    return Places(stream.of_rows(step, rows), torch.arange(tokens)[None])


def mask(site=0, **changes):
    return keep_mask(places(**changes), site, WIDTH, KEPT)


# --- the generator --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_words_of_its_authors(counter, key, words):
    """The vectors of the paper's code, Random123 (kat_vectors, philox4x32 with ten rounds)."""
    found = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, found)) == words


@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_philox_is_that_of_unbounded_integers(drawn):
    *counter, k0, k1 = drawn
    a, b, c, d = counter
    for _ in range(masks.ROUNDS):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ k0, q % 2**32, (p >> 32) ^ d ^ k1, p % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, drawn[4:])))
    assert tuple(map(int, words)) == (a, b, c, d)


# --- the law of masks -----------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_the_kept_share_is_the_declared_one(p):
    """2**21 independent elements: the share is off by Z_MAX standard deviations with probability
    2e-9, and a rate that is off by 65536ths is not seen.
    """
    found = keep_mask(places(rows=range(16), tokens=1024), 3, WIDTH, round((1 - p) * 65536))
    n = found.numel()
    z = (float(found.double().mean()) - (1 - p)) / math.sqrt(p * (1 - p) / n)
    assert abs(z) <= Z_MAX
    per_feature = (found.double().mean((0, 1)) - (1 - p)) / math.sqrt(p * (1 - p) / (16 * 1024))
    assert float(per_feature.abs().max()) <= Z_MAX


def test_masks_of_other_places_are_uncorrelated():
    """Each pair agrees as often as independent draws do, within Z_MAX standard deviations; equal
    masks would be 70 of them away.
    """
    of_rows = {f"row {row}": mask(rows=[row])[0] for row in range(3)}
    found = of_rows | {
        "next step": mask(step=2, rows=[0])[0],
        "far step": mask(step=1 + 2**20, rows=[0])[0],
        "other branch": mask(site=1, rows=[0])[0],
        "other layer": mask(site=2, rows=[0])[0],
        "other seed": mask(stream=DropoutStream(STREAM.seed + 1), rows=[0])[0],
        "other half of the seed": mask(stream=DropoutStream(STREAM.seed ^ 1 << 40), rows=[0])[0],
        "next position": mask(rows=[0], tokens=TOKENS + 1)[0, 1:],
        "next feature": mask(rows=[0])[0].roll(1, 1),
        "next block": mask(rows=[0])[0].roll(8, 1),
    }
    share = KEPT / 65536
    chance, n = share**2 + (1 - share) ** 2, TOKENS * WIDTH
    spread = math.sqrt(chance * (1 - chance) / n)
    for (a, one), (b, other) in combinations(found.items(), 2):
        z = (float((one == other).double().mean()) - chance) / spread
        assert abs(z) <= Z_MAX, (a, b, z)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1))
def test_a_mask_depends_on_its_place_alone(step, row, site):
    """Not on the rows beside it, the slice of positions, or the width that is cut off."""
    whole = keep_mask(places(step=step, rows=[row, 7, 9], tokens=8), site, 40, KEPT)
    alone = keep_mask(places(step=step, rows=[row], tokens=8).between(3, 8), site, 13, KEPT)
    assert alone[0].equal(whole[0, 3:, :13])
    chosen = torch.tensor([[6, 1]])
    assert keep_mask(places(step, [row], 8).at(chosen), site, 40, KEPT)[0].equal(whole[0, [6, 1]])


# --- the module -----------------------------------------------------------------------------------


def test_kept_elements_are_scaled_and_others_are_zero():
    x_BTD = torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    module = Dropout(P, layer=3)
    y_BTD, kept_BTD = module(x_BTD, masks.FEED_FORWARD, places()), mask(site=7)
    assert y_BTD.equal(x_BTD * (65536 / KEPT) * kept_BTD)
    assert bool((y_BTD[~kept_BTD] == 0).all()) and not bool(kept_BTD.all())
    assert not y_BTD.equal(module(x_BTD, masks.ATTENTION, places()))
    x_BTD[0] = torch.nan
    assert bool(module(x_BTD, masks.ATTENTION, places())[0].isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_masks_do_not_depend_on_the_type(dtype):
    ones = torch.ones(ROWS, TOKENS, WIDTH, dtype=dtype)
    y_BTD = Dropout(P, layer=0)(ones, masks.ATTENTION, places())
    assert y_BTD.dtype == dtype and (y_BTD != 0).equal(mask())


@pytest.mark.parametrize("module", [Dropout(0.0, 0), Dropout(P, 0).eval()], ids=["p = 0", "eval"])
def test_nothing_is_dropped_without_a_rate_or_in_evaluation(module):
    x_BTD = torch.randn(1, 2, 3)
    assert module(x_BTD, masks.ATTENTION, None) is x_BTD
    with pytest.raises(AssertionError, match="places"):
        Dropout(P, 0)(x_BTD, masks.ATTENTION, None)


# --- the model ------------------------------------------------------------------------------------


def model_of(**changes):
    return build_model(CFG.model_copy(update=changes), 61, seed=5)


def gradients(model, ids_BT, row_B4, features=None):
    """Output and gradients of one forward and backward."""
    model.zero_grad()
    x_BTD, _ = (features or model.hidden_states)(ids_BT, None, None, row_B4)
    x_BTD.square().sum().backward()
    return [x_BTD.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def drawn_ids(n_rows=ROWS):
    draws = torch.Generator().manual_seed(2)
    return torch.randint(61, (n_rows, CFG.max_seq_len), generator=draws)


def test_rows_and_step_decide_and_the_random_state_does_not():
    model, ids_BT = model_of(), drawn_ids()
    state = torch.get_rng_state()
    first = gradients(model, ids_BT, STREAM.of_rows(1, range(ROWS)))
    torch.rand(3)
    again = gradients(model, ids_BT, STREAM.of_rows(1, range(ROWS)))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    torch.set_rng_state(state)
    gradients(model, ids_BT, STREAM.of_rows(1, range(ROWS)))
    assert torch.get_rng_state().equal(state)
    for other in (STREAM.of_rows(2, range(ROWS)), STREAM.of_rows(1, range(1, ROWS + 1))):
        assert not gradients(model, ids_BT, other)[0].equal(first[0])


def test_without_rows_masks_are_drawn_from_the_random_state():
    model, ids_BT = model_of(), drawn_ids()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, second = gradients(model, ids_BT, None)[0], gradients(model, ids_BT, None)[0]
        torch.manual_seed(3)
        assert gradients(model, ids_BT, None)[0].equal(first)
    assert not second.equal(first)
    with torch.random.fork_rng():
        state = torch.get_rng_state()
        model_of(dropout=0.0).hidden_states(ids_BT)
        model.eval().hidden_states(ids_BT)
        assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("depth", [None, MixtureOfDepths(every=1, gate=HardCapacity())], ids=str)
def test_a_row_has_one_mask_in_any_micro_batch(depth):
    """Hidden states differ by rounding of other shapes alone: float64, measured 4e-15."""
    model = model_of(**({"depth": depth} if depth else {})).double()
    ids_BT, row_B4 = drawn_ids(), STREAM.of_rows(1, range(ROWS))
    whole = model.hidden_states(ids_BT, None, None, row_B4)[0]
    for row in range(ROWS):
        alone = model.hidden_states(ids_BT[[row]], None, None, row_B4[[row]])[0]
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=1e-12)
    swapped = model.hidden_states(ids_BT, None, None, row_B4.flip(0))[0]
    assert float((swapped - whole).detach().abs().max()) > 1e-3


def test_activation_checkpointing_gives_the_same_bits():
    model, ids_BT, row_B4 = model_of(), drawn_ids(), STREAM.of_rows(1, range(ROWS))
    plain = gradients(model, ids_BT, row_B4)
    model.activation_checkpointing = True
    found = gradients(model, ids_BT, row_B4)
    assert all(a.equal(b) for a, b in zip(plain, found, strict=True))


def test_a_compiled_forward_has_the_same_masks():
    """float64, so that another mask is no rounding; two steps, one graph."""
    model, ids_BT = model_of().double(), drawn_ids()
    compiled = compile_hidden_states(model)
    for step in (1, 2):
        row_B4 = STREAM.of_rows(step, range(ROWS))
        wanted = gradients(model, ids_BT, row_B4)
        found = gradients(model, ids_BT, row_B4, compiled)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("width", [13, 128])
def test_a_compiled_mask_is_bit_equal(width):
    def of_positions(row_B4, tokens):
        inside = Places(row_B4, torch.arange(tokens)[None])
        return keep_mask(inside, 5, width, KEPT)

    compiled = torch.compile(of_positions, fullgraph=True)
    row_B4 = places().row_B4
    assert compiled(row_B4, TOKENS).equal(of_positions(row_B4, TOKENS))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU")
def test_a_gpu_has_the_masks_of_the_cpu():
    here = places()
    there = replace(here, row_B4=here.row_B4.cuda(), position_BT=here.position_BT.cuda())
    assert keep_mask(there, 5, WIDTH, KEPT).cpu().equal(keep_mask(here, 5, WIDTH, KEPT))
