"""The plateau rule: one for Python floats, arrays and traced arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gapjax
from gapjax.fit import plateau
from gapjax.fit.plateau import PlateauState

RULE = gapjax.Convergence(tolerance=0.1, decay=0.5, num_decays=1)
#         better, too little but best, worse,  not a number, better
VALUES = [1.0, 1.05, 0.7, float("nan"), 2.0]
BEST = [1.0, 1.05, 1.05, 1.05, 2.0]
PLATEAUS = [0, 1, 2, 3, 3]
FACTORS = [1.0, 0.5, 0.5, 0.5, 1.0]
IS_BEST = [True, True, False, False, True]


@pytest.mark.parametrize("as_value", [float, jnp.float32], ids=["float", "array"])
def test_values_are_judged_by_the_best_before_them(as_value):
    state = PlateauState(as_value(0.0), 0)
    judge = jax.jit(plateau.judge, static_argnums=0) if as_value is not float else plateau.judge
    for value, best, plateaus, factor, is_best in zip(
        VALUES, BEST, PLATEAUS, FACTORS, IS_BEST, strict=True
    ):
        before = state
        state, judgement = judge(RULE, state, as_value(value))
        assert float(state.best) == pytest.approx(best)
        assert (int(state.num_plateaus), float(judgement.factor)) == (plateaus, factor)
        assert bool(judgement.is_best) == is_best
        np.testing.assert_allclose(judgement.improvement, value - before.best, rtol=1e-5)
        assert plateau.is_finished(RULE, state.num_plateaus) == (plateaus > 1)


def test_python_floats_stay_float64():
    state, judgement = plateau.judge(RULE, PlateauState(1.0, 0), 1.0 + 1e-12)
    assert float(judgement.improvement) == 1.0 + 1e-12 - 1.0
    assert float(state.best) == 1.0 + 1e-12


def test_the_rule_of_a_posterior_search_is_this_one():
    search = gapjax.PosteriorSearch(tolerance=0.1, decay=0.5, num_decays=1)
    for value in VALUES:
        assert str(plateau.judge(search, PlateauState(1.0, 0), value)) == str(
            plateau.judge(RULE, PlateauState(1.0, 0), value)
        )
