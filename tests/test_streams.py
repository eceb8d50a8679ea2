"""Streams: each example once an epoch, in an order of its own, with little of it on the device."""

import jax
import numpy as np
import pytest
import scipy.sparse
from conftest import assert_same_bits

import gapjax
from gapjax import models, sources
from gapjax.fit import loop, step
from gapjax.fit.streams import LoadedSource, loaded
from gapjax.vae import Given

N, BATCH = 640, 40
COUNTS = np.random.default_rng(0).poisson(0.3, (N, 12)).astype(np.uint8)
COUNTS[:, 0] = np.arange(N) % 256  # tells the examples apart, with the next
COUNTS[:, 1] = np.arange(N) // 256
KEY = jax.random.key(3)


class _Sliced:
    """What a file gives that is read by slices alone; the larger slices it has been asked for."""

    def __init__(self, x):
        self.x, self.shape, self.dtype, self.asked = x, x.shape, x.dtype, []

    def __getitem__(self, rows):
        assert isinstance(rows, slice)
        self.asked.append(rows)
        return self.x[rows]


def _memory_map(tmp_path):
    np.save(tmp_path / "x.npy", COUNTS)
    return np.load(tmp_path / "x.npy", mmap_mode="r")


def _rows(source, epoch, first=0, number=N):
    found = loaded(source, jax.random.fold_in(KEY, epoch), first, number)
    assert isinstance(found, LoadedSource) and found.num_examples == N
    return jax.tree.map(np.asarray, found.chunk)


@pytest.mark.parametrize(
    "form", ["array", "memory map", "float csr", "csc", "sets", "slices", "context"]
)
@pytest.mark.parametrize("shard_size", [None, 100])
def test_an_epoch_has_every_example_once_however_it_is_cut(tmp_path, form, shard_size):
    held = {
        "array": lambda: COUNTS,
        "memory map": lambda: _memory_map(tmp_path),
        "float csr": lambda: scipy.sparse.csr_array(COUNTS * 1.0),
        "csc": lambda: scipy.sparse.csc_matrix(COUNTS),
        "sets": lambda: [COUNTS[:90], scipy.sparse.csr_matrix(COUNTS[90:])],
        "slices": lambda: _Sliced(COUNTS),
        "context": lambda: Given(COUNTS, {"row": np.arange(N, dtype=np.int32)}),
    }[form]()
    source = sources.stream_source(held, shard_size)
    assert source.num_examples == N
    first, second = (_rows(source, epoch) for epoch in (0, 1))
    cuts = [_rows(source, 0, start, 150) for start in (0, 150, 300, 450, 600)]
    whole = jax.tree.map(lambda *x: np.concatenate(x), *cuts)
    jax.tree.map(np.testing.assert_array_equal, whole, first)
    if form == "context":
        np.testing.assert_array_equal(first.x, COUNTS[first.context["row"]])
        first, second = first.x, second.x
    assert first.dtype == np.uint8
    rows, others = (x[:, 0] + 256 * x[:, 1].astype(int) for x in (first, second))
    for each, x in ((rows, first), (others, second)):
        np.testing.assert_array_equal(x, COUNTS[each])
        assert sorted(each) == list(range(N))
    assert (rows != others).any() and abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.99
    if shard_size and form != "sets":  # a shard is read through before the next, in another order
        shards = rows // shard_size
        assert (np.diff(shards) != 0).sum() == 6 and (np.diff(rows) != 1).mean() > 0.9
    if form == "slices":
        assert max(rows.stop - rows.start for rows in held.asked) == (shard_size or N)


@pytest.fixture
def vae():
    return models.count_vae(12, "poisson", latent_dim=2, hidden_sizes=(8,))


@pytest.fixture
def cells():
    return models.count_examples(COUNTS)


@pytest.fixture
def of_four_steps(monkeypatch):
    monkeypatch.setattr(loop, "_CHUNK_STEPS", 4)


def test_training_sees_the_epoch_in_its_order_and_resumes_within_it(vae, cells, of_four_steps):
    """As a source that has the whole epoch on the device; and bit for bit from any chunk."""
    kept = []
    copy = lambda progress: kept.append(jax.tree.map(np.asarray, progress))
    keep = lambda progress: copy(progress._replace(state=_data(progress.state)))
    options = {"batch_size": BATCH, "num_epochs": 2}
    source = sources.stream_source(cells, 100)
    state, curve = gapjax.train(vae, source, KEY, on_chunk=keep, **options)
    assert len(kept) == 8

    resumed = kept[5]._replace(state=_keys(kept[5].state))
    again = sources.stream_source(cells, 100)
    other, other_curve = gapjax.train(vae, again, resume=resumed, **options)
    assert_same_bits(_data(other), _data(state))
    assert other_curve == curve

    start = _keys(kept[3].state)  # after the first epoch
    plan_key = jax.random.split(jax.random.fold_in(start.rng_key, 1))[0]
    on_device = loaded(source, plan_key, 0, N)
    whole, _ = gapjax.train(vae, on_device, state=start, **options)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, whole.params, state.params)


def _data(state):
    return state._replace(rng_key=jax.random.key_data(state.rng_key))


def _keys(state):
    state = jax.tree.map(jax.numpy.asarray, state)
    return state._replace(rng_key=jax.random.wrap_key_data(state.rng_key))


def test_the_device_holds_one_part_of_the_epoch(vae, cells, of_four_steps, monkeypatch):
    """Four steps of sixteen, and the part before has been given up when the next is there."""
    source, seen, load = sources.stream_source(cells), [], step.load_steps
    sets = lambda: [array for array in jax.live_arrays() if array.shape[:1] >= (4 * BATCH,)]
    others = set(map(id, sets()))

    def watched(*args):
        found = load(*args)
        seen.append(sum(array.nbytes for array in sets() if id(array) not in others))
        return found

    monkeypatch.setattr(step, "load_steps", watched)
    gapjax.train(vae, source, KEY, num_epochs=3, batch_size=BATCH)
    assert seen == [4 * BATCH * (12 + 4)] * 12  # bytes of counts and library sizes


def test_a_refit_takes_a_mixture_with_a_stream_also_in_a_sweep(of_four_steps):
    vae = gapjax.mlp_vae((12,), latent_dim=2, hidden_sizes=(4,))
    params = vae.init(KEY)
    stream = sources.stream_source(scipy.sparse.csr_array(COUNTS > 0), 100)
    mixture = sources.mixture_source(sources.model_source(vae, params.decoder, N), stream, 0.5)
    keys = [KEY, jax.random.key(4)]
    members = [gapjax.Member(params, mixture, key) for key in keys]
    options = {"num_epochs": 1, "batch_size": BATCH}
    first, second = gapjax.refit_members(vae, members, **options)
    alone = gapjax.refit_encoder(vae, params, mixture, keys[0], **options)
    assert_same_bits(first.params.decoder, params.decoder)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, first.params, alone.params)
    assert first.curve.loss_bpd != second.curve.loss_bpd


def test_what_cannot_be_streamed_is_refused_in_a_line(vae, cells):
    for examples, error, words in (
        ([COUNTS, COUNTS[:, :3]], TypeError, r"\(640, 3\)"),
        (Given(COUNTS, np.zeros(3)), TypeError, "one event"),
        (np.float32(1), TypeError, r"\(\)"),
        ("x.npy", TypeError, "a str"),
        ([], ValueError, "empty"),
        (COUNTS[:0], ValueError, "empty"),
    ):
        with pytest.raises(error, match=words) as caught:
            sources.stream_source(examples)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="shard_size"):
        sources.stream_source(COUNTS, 0)
    stream = sources.stream_source(cells)
    kernel = gapjax.kernel(vae, stream, gapjax.adam(1e-3), batch_size=BATCH)
    with pytest.raises(TypeError, match="`train` and the refits alone"):
        kernel.step(kernel.init(vae.init(KEY), KEY))
    binary = gapjax.mlp_vae((12,), hidden_sizes=(4,))
    with pytest.raises(ValueError, match="outside of the support"):
        gapjax.train(binary, sources.stream_source(COUNTS), KEY, num_epochs=1)
