"""Many devices compute what one does; a sweep computes what its members would alone."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import NUM_DEVICES, assert_same_bits, num_programs

import gapjax
from gapjax import checkpoints, parallel
from gapjax.fit import api, loop, step

EIGHT = jax.devices()[:8]
SGD_LIKE = gapjax.adam(2e-3)
needs_eight = pytest.mark.skipif(
    len(EIGHT) < 8, reason=f"{len(EIGHT)} devices; XLA_FLAGS was set from outside"
)
pytestmark = needs_eight


def _images(small):
    """130 images, in batches of 100: a whole one, and a ragged one of 30."""
    return np.concatenate([small.train_images, small.test_images])


def _close(first, second, atol=2e-5):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)


def _train(small, used, num_epochs=3, **options):
    return gapjax.train(
        small.vae, gapjax.data_source(_images(small)), num_epochs=num_epochs, batch_size=100,
        optimizer=SGD_LIKE, devices=used, **options,
    )  # fmt: skip


_SELF_CONSISTENT = {"num_epochs": 3, "batch_size": 100, "optimizer": SGD_LIKE}
_OPTIMAL = {
    "num_epochs": 8, "monitor_every": 2, "batch_size": 100, "optimizer": gapjax.adam(2e-2),
    "until": gapjax.Convergence(tolerance=2e-3, num_decays=1),
}  # fmt: skip


def _self_consistent(small, used, params=None, rng_key=None, alpha=0.5):
    return gapjax.self_consistent(
        small.vae, params or small.params, _images(small),
        jax.random.key(1) if rng_key is None else rng_key, alpha=alpha, devices=used,
        **_SELF_CONSISTENT,
    )  # fmt: skip


def _optimal(small, used, params=None, rng_key=None, **options):
    return gapjax.optimal_inference(
        small.vae, params or small.params, _images(small),
        jax.random.key(2) if rng_key is None else rng_key, devices=used, **{**_OPTIMAL, **options},
    )  # fmt: skip


def _self_consistent_members(small, all_params, keys, alphas, monitor=None):
    images, members = _images(small), []
    data = gapjax.data_source(images)
    for params, key, alpha in zip(all_params, keys, alphas, strict=True):
        model = gapjax.model_source(small.vae, params.decoder, len(images))
        source = gapjax.mixture_source(model, data, jnp.asarray(alpha))
        members.append(gapjax.Member(params, source, key, monitor))
    return members


# --- programs -----------------------------------------------------------------------------------


class Unhashable:
    """Equal to every other one, but without a hash."""

    def __init__(self, factor):
        self.factor = factor

    def __eq__(self, other):
        return isinstance(other, Unhashable)

    __hash__ = None


def test_programs_are_kept_for_equal_static_arguments():
    traced = []

    @parallel.on_one_device
    def scaled(x, *, by):
        traced.append(by)
        return x * jax.tree.leaves(by)[0]

    for by in (2.0, 2.0, {"by": 2.0}, {"by": 2.0}, np.full(2, 2.0), np.full(2, 2.0)):
        np.testing.assert_array_equal(scaled(jnp.ones(2), by=by), [2.0, 2.0])
    assert len(traced) == 3
    np.testing.assert_array_equal(scaled(jnp.ones(2), by=np.full(2, 3.0)), [3.0, 3.0])
    assert len(traced) == 4
    assert scaled.on(by=2.0) is scaled.on(by=2.0) is not scaled.on(by=3.0)


def test_static_arguments_without_a_hash_are_compared_by_identity():
    first, second = Unhashable(2.0), Unhashable(3.0)
    assert first == second
    assert parallel.Static({"of": first}) == parallel.Static({"of": first})
    assert hash(parallel.Static({"of": first})) == hash(parallel.Static({"of": first}))
    assert parallel.Static({"of": first}) != parallel.Static({"of": second})
    assert parallel.Static({"of": first}) != parallel.Static({"or": first})
    program = parallel.on_one_device(lambda x, *, of: of.factor * x)
    assert [float(program(1.0, of=of)) for of in (first, second, first)] == [2.0, 3.0, 2.0]


@pytest.mark.parametrize("over", ["one", "shards", "members"])
@pytest.mark.parametrize("count", [1, 2])
def test_programs_promote_dtypes_as_jax_does_by_default(over, count):
    """Whatever the user's setting: other libraries mix them."""

    def mixed(*arrays):
        return arrays[-1] + jnp.arange(3)

    program, devices = parallel.program(mixed, over=over), EIGHT[:count]
    x = jnp.full(3, 0.5)
    with jax.numpy_dtype_promotion("strict"):
        with pytest.raises(ValueError, match="strict"):
            mixed(x)
        if over == "members":
            stacked = parallel.split_members(jnp.stack([x] * 2), devices)
            nothing = parallel.split_members(jnp.zeros(2), devices)
            found = program.on(devices)(stacked, nothing, parallel.replicate(x, devices))
        else:
            found = program(x, devices=devices)
    for row in np.asarray(found).reshape(-1, 3):
        np.testing.assert_array_equal(row, [0.5, 1.5, 2.5])


# --- one run on many devices ------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(small):
    """What one device computes."""
    return {
        "train": _train(small, EIGHT[:1], rng_key=jax.random.key(3)),
        "self_consistent": _self_consistent(small, EIGHT[:1]),
        "optimal": _optimal(small, EIGHT[:1]),
    }


@pytest.mark.parametrize("count", [2, 3, 8])
def test_training_and_refits_do_not_depend_on_the_number_of_devices(small, alone, count):
    """100 is no multiple of 3 or of 8, and 30 of none."""
    used = EIGHT[:count]
    state, curve = _train(small, used, rng_key=jax.random.key(3))
    _close(state, alone["train"][0])
    np.testing.assert_allclose(curve.loss_bpd, alone["train"][1].loss_bpd, rtol=1e-5)
    for name, refit in (("self_consistent", _self_consistent), ("optimal", _optimal)):
        ours = refit(small, used)
        np.testing.assert_allclose(ours.curve.loss_bpd, alone[name].curve.loss_bpd, rtol=1e-4)
        np.testing.assert_allclose(ours.curve.monitor_bpd, alone[name].curve.monitor_bpd, rtol=1e-4)
        _close(ours.params.encoder, alone[name].params.encoder, atol=2e-4)
        assert_same_bits(ours.params.decoder, small.params.decoder)
        assert ours.num_steps == alone[name].num_steps


@pytest.mark.parametrize("count, batch_size", [(2, 100), (3, 100), (8, 100), (8, 3)])
def test_evaluation_does_not_depend_on_the_number_of_devices(small, count, batch_size):
    images = _images(small)
    one, many = (
        gapjax.evaluate(
            small.vae, small.params, jax.random.key(4), images, num_samples=3,
            batch_size=batch_size, devices=used,
        )
        for used in (EIGHT[:1], EIGHT[:count])
    )  # fmt: skip
    np.testing.assert_allclose(many.per_image, one.per_image, rtol=1e-5)
    assert many.per_image.shape == (len(images),)


def test_a_checkpoint_of_eight_devices_goes_on_on_one_and_the_reverse(small, tmp_path, alone):
    for first, second in ((EIGHT, EIGHT[:1]), (EIGHT[:1], EIGHT[:3])):
        state, _ = _train(small, first, num_epochs=1, rng_key=jax.random.key(3))
        checkpoints.save(tmp_path, 1, state, {})
        restored, _ = checkpoints.restore(tmp_path, 1, state)
        assert_same_bits(restored, state)
        state, _ = _train(small, second, state=restored)
        _close(state, alone["train"][0])


def test_a_step_is_one_all_reduce_and_never_visits_the_host(small):
    """Read off the compiled program of eight devices: the body of its loop."""
    source = gapjax.data_source(_images(small))
    optimizer = SGD_LIKE
    state = step.init_state(small.params, jax.random.key(0), optimizer)
    program = step.run_steps.on(
        EIGHT, vae=small.vae, optimizer=optimizer, batch_size=100, objective=gapjax.elbo,
        num_steps=2,
    )  # fmt: skip
    arguments = parallel.replicate((state, source), EIGHT)
    text = program.lower(*arguments).compile().as_text()
    assert len(re.findall(r" all-reduce(-start)?\(", text)) == 1
    for word in ("infeed", "outfeed", "host", "callback", " send(", " recv("):
        instructions = [line.split("metadata=")[0] for line in text.splitlines() if " = " in line]
        assert not [line for line in instructions if word in line], word
    # And the words are such as would be found.
    talkative = parallel.program(lambda shard, state: jax.debug.callback(print, state) or state)
    assert "callback" in talkative.on(EIGHT).lower(jnp.ones(())).compile().as_text()


def test_copies_are_where_their_originals_are():
    there = jax.device_put((jnp.ones(3), jax.random.key(0)), EIGHT[2])
    for tree in (there, parallel.replicate(there, EIGHT)):
        copied = parallel.copy(tree)
        assert [a.sharding for a in copied] == [a.sharding for a in tree]
        assert_same_bits(copied, tree)
        for a in copied:
            a.delete()
        assert not any(a.is_deleted() for a in tree)


def test_an_array_of_numpy_may_be_changed_after_it_was_put():
    memory = np.zeros(4096, np.uint8)  # JAX takes aligned memory as it is
    images = memory[-memory.ctypes.data % 64 :][:64]
    on_device = parallel.put(images)
    images[:] = 1
    assert not np.asarray(on_device).any()


@pytest.mark.parametrize("given", [[], (), ["cpu"], "cpu"])
def test_devices_are_devices(small, given):
    with pytest.raises(ValueError, match=r"devices is .*; give at least one of jax\.devices"):
        gapjax.evaluate(small.vae, small.params, jax.random.key(0), _images(small), devices=given)
    assert parallel.all_devices(EIGHT[3]) == parallel.all_devices(EIGHT[3:4]) == (EIGHT[3],)
    with parallel.use_devices(EIGHT[3]):
        assert parallel.all_devices() == (EIGHT[3],)


def test_devices_that_are_given_are_used(small):
    """The last one alone: neither the default nor the first."""
    state, _ = _train(small, EIGHT[7:], num_epochs=1, rng_key=jax.random.key(3))
    assert {d for leaf in jax.tree.leaves(state.params) for d in leaf.devices()} == {EIGHT[7]}
    assert len(jax.devices()) == NUM_DEVICES


# --- the cores of a CPU ------------------------------------------------------------------------

_DIVIDED = """
import os
import jax
from gapjax import parallel
told = []
for cores, flags in ((1, ""), (3, "--xla_force_host_platform_device_count=2"), (99, "")):
    os.environ["XLA_FLAGS"] = flags
    parallel._num_cores = lambda: cores
    told.append(len(parallel.expose_cpu_cores()))
print(told, len(jax.devices()), parallel.expose_cpu_cores())
"""


def test_a_cpu_is_divided_where_it_has_cores_and_jax_was_not_told_how_many():
    out = subprocess.run(
        [sys.executable, "-c", _DIVIDED], cwd=Path(__file__).parent.parent, check=True,
        text=True, capture_output=True,
    ).stdout  # fmt: skip
    assert out.strip() == f"[0, 0, {parallel._MOST_CORES}] {parallel._MOST_CORES} ()"


# --- many runs --------------------------------------------------------------------------------


def _several(small, number):
    """Checkpoints that differ, and a key for each."""
    all_params = [
        jax.tree.map(lambda p: p * (1 - 0.02 * index), small.params)  # noqa: B023
        for index in range(number)
    ]
    return all_params, [jax.random.fold_in(jax.random.key(5), i) for i in range(number)]


@pytest.mark.parametrize("count, sweep", [(1, "map"), (2, "map"), (3, "vmap")])
def test_a_sweep_is_its_members_alone(small, count, sweep):
    """Five checkpoints with an alpha each, on devices that do not divide five."""
    all_params, keys = _several(small, 5)
    alphas = [0.0, 0.25, 0.5, 0.75, 1.0]
    before = num_programs()
    members = _self_consistent_members(
        small, all_params, keys, alphas,
        monitor=lambda params: float(params.encoder["MLP_0"]["Dense_0"]["bias"].sum()),
    )  # fmt: skip
    swept = gapjax.refit_members(
        small.vae, members, sweep=sweep, monitor_every=2, devices=EIGHT[:count], **_SELF_CONSISTENT
    )
    # The pmap of JAX 0.7 traces this program twice, at equal arguments.
    most = 1 if jax.__version_info__ >= (0, 8) else 2
    assert num_programs() <= before + most
    assert len(swept) == 5
    for index in (0, 1, 4):
        single = _self_consistent(
            small, EIGHT[:1], all_params[index], keys[index], alpha=jnp.asarray(alphas[index])
        )
        ours = swept[index]
        _close(ours.params.encoder, single.params.encoder, atol=2e-4)
        _close(ours.averaged_params.encoder, single.averaged_params.encoder, atol=2e-4)
        np.testing.assert_allclose(ours.curve.loss_bpd, single.curve.loss_bpd, rtol=1e-4)
        assert_same_bits(ours.params.decoder, all_params[index].decoder)
        assert ours.curve.monitor_epoch == (0, 2, 3)


@pytest.mark.parametrize("count, sweep", [(1, "vmap"), (2, "auto")])
def test_members_converge_one_by_one(small, count, sweep):
    """What is finished stays as it was, however long the others go on."""
    all_params, keys = _several(small, 3)
    # A start that is good already, and two that are not.
    good = _optimal(small, EIGHT[:1], all_params[0], keys[0], until=None).params
    all_params = [good, *all_params[1:]]
    members = [
        api.optimal_member(small.vae, params, _images(small), key, devices=EIGHT[:1])
        for params, key in zip(all_params, keys, strict=True)
    ]
    swept = gapjax.refit_members(small.vae, members, sweep=sweep, devices=EIGHT[:count], **_OPTIMAL)
    ends = [refit.curve.monitor_epoch[-1] for refit in swept]
    assert len(set(ends)) > 1
    for params, key, ours in zip(all_params, keys, swept, strict=True):
        single = _optimal(small, EIGHT[:1], params, key)
        assert (ours.num_steps, ours.converged) == (single.num_steps, single.converged)
        np.testing.assert_allclose(ours.curve.monitor_bpd, single.curve.monitor_bpd, rtol=1e-4)
        _close(ours.params.encoder, single.params.encoder, atol=5e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_a_sweep_goes_on_where_it_was_interrupted(small, count):
    """From what `on_chunk` was given; also where one member has converged by then."""
    all_params, keys = _several(small, 3)
    good = _optimal(small, EIGHT[:1], all_params[0], keys[0], until=None).params
    members = [
        api.optimal_member(small.vae, params, _images(small), key, devices=EIGHT[:1])
        for params, key in zip([good, *all_params[1:]], keys, strict=True)
    ]
    kept = []

    def on_chunk(progress):
        copy = lambda each: each._replace(state=jax.tree.map(jnp.copy, each.state))
        kept.append([copy(each) for each in progress])

    sweep = lambda members, **options: gapjax.refit_members(
        small.vae, members, sweep="map", devices=EIGHT[:count], **_OPTIMAL, **options
    )
    straight = sweep(members, on_chunk=on_chunk)
    steps = [{int(each.state.step) for each in progress} for progress in kept]
    first = next(number for number, found in enumerate(steps) if len(found) > 1)
    # The last has members that converged at different steps, and none that goes on.
    for progress in (kept[0], kept[first], kept[-1]):
        resumed = sweep([m._replace(resume=p) for m, p in zip(members, progress, strict=True)])
        for ours, theirs in zip(resumed, straight, strict=True):
            assert ours.curve == theirs.curve and ours.num_steps == theirs.num_steps
            assert_same_bits(ours.params, theirs.params)
            assert_same_bits(ours.averaged_params, theirs.averaged_params)


def test_members_of_a_sweep_have_one_dtype(small):
    images, key = _images(small), jax.random.key(0)
    members = [
        gapjax.Member(small.params, gapjax.data_source(images.astype(dtype)), key)
        for dtype in (np.uint8, np.float32)
    ]
    with pytest.raises(ValueError, match="the sources of a sweep differ in more than the values"):
        gapjax.refit_members(small.vae, members, num_epochs=1)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small.params)
    members = [members[0], members[0]._replace(params=half)]
    with pytest.raises(ValueError, match="the states of a sweep differ in more than the values"):
        gapjax.refit_members(small.vae, members, num_epochs=1)


def test_what_all_members_share_is_there_once(small):
    data = gapjax.data_source(_images(small))
    sources = [
        gapjax.mixture_source(gapjax.model_source(small.vae, params.decoder, 130), data, 0.5)
        for params in _several(small, 4)[0]
    ]
    varying, shared, _ = loop._stack_sources(sources)
    assert any(leaf is data.images for leaf in shared.values())
    assert data.images.shape not in {leaf.shape[1:] for leaf in varying.values()}


def test_sweeps_that_cannot_be_are_refused(small):
    members = [
        gapjax.Member(small.params, gapjax.data_source(images), jax.random.key(0))
        for images in (small.train_images, small.test_images)
    ]
    with pytest.raises(ValueError, match="differ in more than the values"):
        gapjax.refit_members(small.vae, members, num_epochs=1, batch_size=5)


# --- several processes ------------------------------------------------------------------------

_WORKER = """
import os, sys
number, port = int(sys.argv[1]), sys.argv[2]
flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4"
import jax
from gapjax import jobs, parallel
jobs.join_processes(f"localhost:{port}", 2, number)
import numpy as np
import gapjax
from gapjax import checkpoints
from gapjax.fit.step import init_state
assert jobs.process() == (number, 2) and len(parallel.all_devices()) == 8
images = np.load(sys.argv[3])
vae = gapjax.mlp_vae((5, 5), "bernoulli", latent_dim=3, hidden_sizes=(32,))
options = dict(num_epochs=3, batch_size=100, optimizer=gapjax.adam(2e-3))
like = init_state(
    vae.init(jax.random.key(0)), jax.random.key(0), options["optimizer"])
state, _ = checkpoints.restore(sys.argv[4], 1, like)  # of one process
state, curve = gapjax.train(vae, gapjax.data_source(images), state=state, **options)
refit = gapjax.self_consistent(vae, state.params, images, jax.random.key(1), **options)
evaluation = gapjax.evaluate(vae, refit.params, jax.random.key(4), images, num_samples=3)
checkpoints.save(sys.argv[4], 3, state, {"loss_bpd": curve.loss_bpd + refit.curve.loss_bpd})
restored, _ = checkpoints.restore(sys.argv[4], 3, state)
assert int(restored.step) == 6
np.save(f"{sys.argv[3]}.{number}", evaluation.per_image)
"""


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_of_eight(small, tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    np.save(tmp_path / "images.npy", _images(small))
    store = tmp_path / "store"
    first, _ = _train(small, EIGHT, num_epochs=1, rng_key=jax.random.key(3))
    checkpoints.save(store, 1, first, {})
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(number), str(port),
             str(tmp_path / "images.npy"), str(store)],
            cwd=Path(__file__).parent.parent, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [worker.communicate(timeout=240) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs[0][1] + outputs[1][1]
    per_image, other = (np.load(tmp_path / f"images.npy.{number}.npy") for number in range(2))
    np.testing.assert_array_equal(per_image, other)

    state, curve = _train(small, EIGHT, state=first)
    refit = _self_consistent(small, EIGHT, state.params)
    restored, record = checkpoints.restore(store, 3, state)  # two processes to one
    _close(restored, state)
    np.testing.assert_allclose(record["loss_bpd"], curve.loss_bpd + refit.curve.loss_bpd, rtol=1e-4)
    evaluation = gapjax.evaluate(
        small.vae, refit.params, jax.random.key(4), _images(small), num_samples=3
    )
    np.testing.assert_allclose(per_image, evaluation.per_image, rtol=1e-3)
