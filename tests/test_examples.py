"""`examples`: sets of x as arrays, dicts and with contexts."""

import jax.numpy as jnp
import numpy as np
import pytest

from gapjax import examples
from gapjax.fit.sources import data_source, draw_examples, mixture_source
from gapjax.model.checks import check_array
from gapjax.vae import Given

X = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
BOTH = {"image": X, "length": np.arange(4.0, dtype=np.float32)}


@pytest.mark.parametrize(
    ("set_of_x", "event_shape", "num_bytes"),
    [(X, (2, 3), 6), (BOTH, (7,), 10), (Given(X, np.zeros((4, 5), np.float32)), (2, 3), 26)],
)
def test_the_size_of_an_example_is_that_of_its_x(set_of_x, event_shape, num_bytes):
    one = examples.shape_of_one(set_of_x)
    assert examples.count(set_of_x) == 4
    assert examples.event_shape(one) == event_shape
    assert examples.num_bytes(one) == num_bytes
    check_array("images", set_of_x)


def test_arrays_of_several_lengths_and_lists_are_refused():
    with pytest.raises(TypeError, match="one leading axis"):
        check_array("images", Given(X, np.zeros(3)))
    with pytest.raises(TypeError, match="images is of type list"):
        check_array("images", [X, X])


def test_a_mixture_of_dicts_widens_each_array_by_itself():
    as_float = {"image": X.astype(np.float32) + 0.5, "length": BOTH["length"]}
    mixture = mixture_source(data_source(as_float), data_source(BOTH), jnp.asarray(0.5))
    keys = examples.on_device(np.arange(8, dtype=np.uint32).reshape(4, 2))
    plan = mixture.begin_epoch(keys[0])
    drawn = draw_examples(mixture, plan, keys, jnp.arange(4))
    assert drawn["image"].dtype == jnp.float32
    assert drawn["image"].shape == (4, 2, 3) and drawn["length"].shape == (4,)
    is_half = np.asarray(drawn["image"] % 1).reshape(4, -1).mean(1)
    np.testing.assert_array_equal(is_half, np.where(plan[0], 0.5, 0.0))
