"""The declared order out of configuration and sources."""

import numpy as np
import pytest

from stackproof.config import BanditCurriculum, StaticCurriculum
from stackproof.data.curriculum import make_sampler
from stackproof.data.sampler import ShuffledSampler, Source
from stackproof.spec.errors import ConfigError, DataError
from tests.data.test_sampler import ARMS, A


@pytest.mark.parametrize("cfg", [StaticCurriculum, BanditCurriculum])
def test_names_that_are_no_source_are_refused(cfg):
    for options in (
        {"weights": {"zz": 1}},
        {"caps": {"zz": 1}},
        {"floors": {"zz": 0}},
        {"warmup_steps": 1, "warmup_sources": ("zz",)},
    ):
        key = "warmup_sources" if "warmup_steps" in options else next(iter(options))
        with pytest.raises(ConfigError, match=rf"curriculum\.{key}[\s\S]*zz[\s\S]*a, b, c"):
            make_sampler(cfg(**options), ARMS, seed=1, rows_per_step=4)


@pytest.mark.parametrize("cfg", [StaticCurriculum, BanditCurriculum])
def test_a_source_without_windows_is_refused_unless_its_cap_is_zero(cfg):
    arms = [*ARMS, Source("empty", 1370, 0, 1.0, 1.0, 0.0)]
    with pytest.raises(
        DataError, match=r"source empty holds no window[\s\S]*curriculum\.caps\.empty=0"
    ):
        make_sampler(cfg(), arms, seed=1, rows_per_step=4)
    order = make_sampler(cfg(caps={"empty": 0}), arms, seed=1, rows_per_step=4)
    order.decide(0, 500)
    assert 3 not in order.at(np.arange(500)).sources


@pytest.mark.parametrize("cfg", [StaticCurriculum, BanditCurriculum])
def test_values_of_the_curriculum_go_before_those_of_the_mixture(cfg):
    order = make_sampler(
        cfg(weights={"a": 7}, caps={"b": 0.5}, floors={"c": 0.1}), ARMS, seed=1, rows_per_step=4
    )
    assert [(s.weight, s.cap, s.floor) for s in order.sources] == [
        (7, 1, 0),
        (1, 0.5, 0),
        (1, 1, 0.1),
    ]
    with pytest.raises(ConfigError, match="floors of a, b"):
        make_sampler(cfg(floors={"a": 0.6, "b": 0.6}), ARMS, seed=1, rows_per_step=4)


def test_one_source_needs_no_mixing():
    assert isinstance(
        make_sampler(StaticCurriculum(), [A], seed=1, rows_per_step=4), ShuffledSampler
    )
