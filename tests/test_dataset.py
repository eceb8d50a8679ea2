"""What turns the arrays of any reader into a `Dataset`: arguments, checks, binarization."""

import numpy as np
import pytest
from small_data import load_error, random_images

from gapjax.data import load_dataset

pytestmark = pytest.mark.usefixtures("no_default_directory")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"binarization": "round"}, ["binarization='round'", "threshold, stochastic, none"]),
        ({"threshold": 0.0}, ["threshold=0.0", "above 0"]),
        ({"threshold": 1.5}, ["threshold=1.5"]),
        ({"threshold": float("nan")}, ["threshold=nan"]),
        ({"threshold": "half"}, ["threshold='half'"]),
        ({"binarization_seed": -1}, ["binarization_seed=-1", "non-negative"]),
        ({"binarization_seed": 1.5}, ["binarization_seed=1.5"]),
        ({"binarization_seed": True}, ["binarization_seed=True"]),
        ({"levels": 1}, ["levels=1", "2 to 65536"]),
        ({"levels": 65537}, ["levels=65537"]),
        ({"levels": 16.0}, ["levels=16.0"]),
        ({"levels": 16}, ["levels=16", "'digits'", "17"]),
    ],
)
def test_unusable_arguments(arguments, words):
    message = load_error("digits", **arguments)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (np.full((4, 4), np.nan), ["'train'", "from nan"]),
        (np.full((4, 4), 1e39), ["'train'", "1e+39"]),
        (np.zeros((4, 4), complex), ["complex128"]),
        (np.full((4, 4), "a"), ["<U1"]),
        (np.full((4, 4), -1), ["-1"]),
        (np.full((4, 4), 2**63, np.uint64), [str(2**63)]),
        (np.zeros((0, 4), np.uint8), ["(0, 4)", "one image or more"]),
        (np.zeros((4, 0), np.uint8), ["(4, 0)", "one image or more"]),
        (np.zeros(4, np.uint8), ["(4,)", "[N, *event]"]),
        (np.zeros((), np.uint8), ["()", "[N, *event]"]),
        (np.zeros((4, 5), np.uint8), ["(5,)", "(4,)", "same"]),
        (np.zeros((4, 2, 2), np.uint8), ["(2, 2)", "(4,)"]),
    ],
)
def test_unusable_arrays(tmp_path, train, words):
    np.savez(tmp_path / "x.npz", train=train, test=np.ones((3, 4), np.uint8))
    message = load_error(tmp_path / "x.npz")
    assert all(word in message for word in words), message


def test_unusable_test_arrays_are_named(tmp_path):
    np.savez(tmp_path / "x.npz", train=np.ones((3, 4), np.uint8), test=np.ones((3, 4), complex))
    assert "'test'" in load_error(tmp_path / "x.npz")


COUNTS = np.array([[0, 3], [299, 7]])


@pytest.mark.parametrize(
    ("train", "dtype"),
    [
        (COUNTS, np.uint16),
        (COUNTS * 1000, np.int32),
        (COUNTS.astype(np.uint64), np.uint16),
        (COUNTS / 7, np.float32),
        (-COUNTS.astype(np.float32), np.float32),
        (COUNTS.astype(np.float16), np.float32),
    ],
)
def test_counts_and_floats_have_no_levels_and_keep_their_values(tmp_path, train, dtype):
    np.savez(tmp_path / "x.npz", train=train, test=train[:1])
    dataset = load_dataset(tmp_path / "x.npz")
    assert dataset.levels is None
    assert dataset.train.dtype == dataset.test.dtype == dtype
    np.testing.assert_array_equal(dataset.train, train.astype(dtype))
    for method in ("threshold", "stochastic"):
        assert "has no levels" in load_error(tmp_path / "x.npz", binarization=method)
    if dtype == np.uint16:
        wide = load_dataset(tmp_path / "x.npz", levels=300)
        assert wide.levels == 300 and wide.train.dtype == np.uint16
        assert "to 299; give integers from 0 to 255" in load_error(tmp_path / "x.npz", levels=256)
    elif dtype == np.float32:
        assert "give integers from 0 to 255" in load_error(tmp_path / "x.npz", levels=256)


def test_floats_may_be_given_a_likelihood_of_ones_own(tmp_path):
    """A file of floats and one of counts to an ELBO, with nothing in between."""
    import jax
    import jax.numpy as jnp
    import numpyro.distributions as dist

    import gapjax

    def encode(encoder, x):
        return dist.Normal(jnp.tanh(encoder @ x.astype(jnp.float32)), 1.0).to_event(1)

    for name, train, likelihood in (
        ("floats", COUNTS / 100, lambda z: dist.Normal(z, 1.0)),
        ("counts", COUNTS, lambda z: dist.Poisson(jnp.exp(z))),
    ):
        np.savez(tmp_path / f"{name}.npz", train=train, test=train)
        data = gapjax.load_dataset(tmp_path / f"{name}.npz")
        decode = lambda decoder, z, p=likelihood: p(decoder + z).to_event(1)
        prior = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
        vae = gapjax.VAE(lambda _: None, encode, decode, prior)
        params = gapjax.VAEParams(jnp.eye(2) / 300, jnp.ones(2))
        assert jnp.isfinite(gapjax.elbo(vae, params, jax.random.key(0), data.train[1]))


def test_checksum_is_of_values_and_shapes(tmp_path):
    train, test = random_images(12, shape=(4, 4)), random_images(8, 1, shape=(4, 4))

    def checksum(**arrays):
        np.savez(tmp_path / "x.npz", **arrays)
        return load_dataset(tmp_path / "x.npz").provenance["sha256"]

    first = checksum(train=train, test=test)
    assert checksum(x_test=test.astype(np.int64), x_train=np.asfortranarray(train)) == first
    assert checksum(train=train.reshape(12, 2, 8), test=test.reshape(8, 2, 8)) != first
    assert checksum(train=test, test=train) != first
    # The same bytes, but the border between the parts elsewhere.
    whole = np.concatenate([train, test])
    assert checksum(train=whole[:8], test=whole[8:]) != first
    changed = test.copy()
    changed[-1, -1, -1] ^= 1
    assert checksum(train=train, test=changed) != first


def test_stochastic_binarization_is_drawn_once_from_the_grey_levels():
    grey = load_dataset("grey_digits")
    dataset = load_dataset("digits", binarization="stochastic", binarization_seed=3)
    again = load_dataset("digits", binarization="stochastic", binarization_seed=3)
    other = load_dataset("digits", binarization="stochastic", binarization_seed=4)
    assert dataset.levels == 2
    assert dataset.provenance["binarization"] == "stochastic, seed 3"
    np.testing.assert_array_equal(dataset.train, again.train)
    np.testing.assert_array_equal(dataset.test, again.test)
    assert dataset.provenance["sha256"] != other.provenance["sha256"]
    for level in range(17):
        drawn = dataset.train[grey.train == level]
        if level in (0, 16):
            assert np.all(drawn == level // 16)
        else:
            error = np.sqrt(level / 16 * (1 - level / 16) / drawn.size)
            assert abs(drawn.mean() - level / 16) < 5 * error


def test_stochastic_binarization_draws_either_part_on_its_own(tmp_path):
    same = np.full((50, 16), 100, np.uint8)
    np.savez(tmp_path / "same.npz", train=same, test=same, levels=256)
    dataset = load_dataset(tmp_path / "same.npz", binarization="stochastic")
    assert not np.array_equal(dataset.train, dataset.test)


@pytest.mark.parametrize(
    ("threshold", "lowest"), [(0.5, 128), (1.0, 255), (100 / 255, 100), (1e-9, 1)]
)
def test_threshold_is_met_from_its_level_up(tmp_path, threshold, lowest):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.savez(tmp_path / "all.npz", train=levels, test=levels)
    dataset = load_dataset(tmp_path / "all.npz", binarization="threshold", threshold=threshold)
    np.testing.assert_array_equal(dataset.train, levels >= lowest)
    assert dataset.provenance["binarization"] == f"threshold {threshold:g}"


def test_what_is_binary_is_not_binarized_again(tmp_path):
    bits = random_images(10, shape=(4,), levels=2)
    np.savez(tmp_path / "bits.npz", train=bits, test=bits)
    for method in ("threshold", "stochastic"):
        assert "binary already" in load_error(tmp_path / "bits.npz", binarization=method)
        # Known without the data, so said without them.
        assert "binary already" in load_error("binarized_mnist", binarization=method)
    assert "'mnist'" in load_error("binary_mnist", binarization="none")


def test_contexts_come_with_the_examples(tmp_path):
    """One is an array, several are a dict; either goes into the provenance and the checksum."""
    path, x = tmp_path / "x.npz", random_images(7, shape=(3,))
    labels, rates = np.arange(7), np.linspace(0, 1, 14).reshape(7, 2)
    parts = {"x_train": x, "x_test": x[:2]}
    np.savez(path, **parts)
    plain = load_dataset(path)
    assert "contexts" not in plain.provenance and isinstance(plain.train, np.ndarray)

    np.savez(path, **parts, train_context=labels, test_context=labels[:2])
    one = load_dataset(path)
    assert one.event_shape == (3,) and one.provenance["num_test"] == 2
    assert one.train.context.dtype == np.int32 and one.levels == plain.levels
    np.testing.assert_array_equal(one.train.x, plain.train)
    np.testing.assert_array_equal(one.test.context, [0, 1])

    names = {"train_context_batch": labels, "test_context_batch": labels[5:].astype(np.uint8)}
    rates = {"train_context_rate": rates, "test_context_rate": rates[:2]}
    np.savez(path, **parts, **names, **rates, train_contexts=1, y_train=2)
    several = load_dataset(path)
    assert several.train.context.keys() == several.test.context.keys() == {"batch", "rate"}
    assert several.test.context["batch"].dtype == several.train.context["batch"].dtype == np.int32
    assert several.train.context["rate"].dtype == np.float32
    kinds = {"context_batch": "int32 []", "context_rate": "float32 [2]"}
    assert several.provenance["contexts"] == kinds
    np.savez(path, **parts, **{**names, "test_context_batch": labels[:2]}, **rates)
    changed = load_dataset(path)
    sums = {each.provenance["sha256"] for each in (plain, one, several, changed)}
    assert len(sums) == 4


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        ({"": [1, 2, 3]}, {}, ["test_context"]),
        ({"": [1, 2, 3], "_a": [1, 2, 3]}, {"": [1], "_a": [1]}, ["train_context_NAME"]),
        ({"_a": ["k", "l", "m"]}, {"_a": ["k"]}, ["train_context_a", "<U1", "numpy.unique"]),
        ({"": [1, 2]}, {"": [1]}, ["(2,)", "each of the 3 and 1"]),
        ({"": [[1], [2], [3]]}, {"": [[1, 2]]}, ["(1, 2)", "of one shape"]),
        ({"": [1, 2, 2**31]}, {"": [1]}, [str(2**31), "32 bits"]),
        ({"": [1, 2, np.nan]}, {"": [1.0]}, ["nan"]),
    ],
)
def test_unusable_contexts(tmp_path, train, test, words):
    named = {f"train_context{name}": x for name, x in train.items()}
    named |= {f"test_context{name}": x for name, x in test.items()}
    np.savez(tmp_path / "x.npz", train=np.ones((3, 2)), test=np.ones((1, 2)), **named)
    message = load_error(tmp_path / "x.npz")
    assert all(word in message for word in words), message
