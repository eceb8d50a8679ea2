"""Bits-back coding: `codec/stack`, `codec/schedule`, `codec/container`, `codec/coding`."""

import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from conftest import random_params

import gapjax
from gapjax import Refiner, compress, decompress, models, parallel
from gapjax.codec import coding, container, stack
from gapjax.codec.coding import ENCODER
from gapjax.codec.stack import CodecError
from gapjax.codec.tables import describe
from gapjax.infer import newton
from gapjax.vae import sample_model

pytest.importorskip("constriction", reason="the extra 'codec' is not installed")


@pytest.fixture(scope="module")
def grey():
    """A model of images with 20 levels, in blocks of five of which the last level is no level."""
    vae = gapjax.mlp_vae((2, 3), "discretized_logistic", latent_dim=2, hidden_sizes=(8,), levels=18)
    return vae, random_params(vae)


def _binary(small):
    return small.vae, small.params


def _images(kind, count, shape, levels):
    if kind == "noise":
        return np.random.default_rng(0).integers(0, levels, (count, *shape)).astype(np.uint8)
    return np.full((count, *shape), {"zeros": 0, "ones": levels - 1}[kind], np.uint8)


def _same(decoded, images):
    assert decoded.dtype == np.uint8 and decoded.shape == images.shape
    np.testing.assert_array_equal(decoded, images)


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("kind", ["zeros", "ones", "noise"])
def test_any_images_come_back(small, grey, kind, count):
    for model, shape, levels in ((_binary(small), (5, 5), 2), (grey, (2, 3), 18)):
        images = _images(kind, count, shape, levels)
        _same(decompress(*model, compress(*model, images)), images)


@pytest.mark.parametrize("refiner", [Refiner(num_steps=2), Refiner("adam", 3, 2, 2, 0.05)], ids=str)
def test_refined_posteriors_are_found_again(small, refiner):
    images, model = small.test_images, _binary(small)
    content = compress(*model, images, refiner, num_chains=3)  # 40 images: the last row is ragged
    header, streams = container.parse(content)
    assert len(streams) == 3 and header.refiner.num_steps == refiner.num_steps
    _same(decompress(*model, content), images)
    assert content == compress(*model, images, refiner, num_chains=3)


@pytest.fixture(scope="module")
def compressed(small):
    images = np.tile(small.test_images, (25, 1, 1))
    return images, compress(*_binary(small), images, num_chains=8)


def test_the_length_is_the_negative_elbo(small, compressed):
    """To 1 %, and 64 bits for the start of each chain; the header is less than 80 bytes."""
    images, content = compressed
    nats = gapjax.evaluate(
        small.vae, small.params, jax.random.key(0), small.test_images, num_samples=300
    )
    bits = nats.bpd * images.size
    _, streams = container.parse(content)
    size = 32 * sum(map(len, streams))
    assert abs(size - 8 * 64 - bits) < 0.01 * bits
    assert 8 * len(content) - size < 8 * 80
    _same(decompress(*_binary(small), content), images)


def test_levels_that_a_model_expects_cost_little(grey):
    """Samples of the model cost their information; noise costs more."""
    vae, params = grey
    draw = jax.vmap(lambda key: sample_model(vae, params.decoder, key))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 300))).astype(np.uint8)
    noise = _images("noise", 300, (2, 3), 18)
    sizes = [len(compress(vae, params, images, num_chains=8)) for images in (drawn, noise)]
    assert sizes[0] < 0.8 * sizes[1]


def _corrupt(content, rng):
    """One of the ways in which files get damaged."""
    place, number = rng.integers(len(content)), int(rng.integers(1, 9))
    changed = bytearray(content)
    way = rng.integers(5)
    if way == 0:
        changed[place] ^= 1 << rng.integers(8)
    elif way == 1:
        changed[place : place + number] = rng.bytes(number)
    elif way == 2:
        del changed[place:]
    elif way == 3:
        del changed[place : place + number]
    else:
        changed[place:place] = rng.bytes(number)
    return bytes(changed)


def test_every_corruption_is_detected(small, compressed):
    rng, (_, content) = np.random.default_rng(0), compressed
    damaged = {_corrupt(content, rng) for _ in range(1000)} - {content}
    # Most damage is in the streams, which are long; these have it in the header.
    damaged |= {_corrupt(content[:80], rng) + content[80:] for _ in range(200)} - {content}
    assert len(damaged) > 900
    for each in damaged:
        with pytest.raises(CodecError):
            decompress(*_binary(small), each)


def test_streams_that_a_checksum_was_made_for_do_not_decode_to_other_images(small):
    """Whoever changes a file and mends its CRC: the images' checksum and the start still hold."""
    content = compress(*_binary(small), small.test_images)
    header, (stream,) = container.parse(content)
    rng = np.random.default_rng(1)
    for _ in range(20):
        changed = stream.copy()
        changed[rng.integers(len(changed))] ^= np.uint32(1) << np.uint32(rng.integers(32))
        if not changed[-1]:
            changed[-1] = 1
        with pytest.raises(CodecError, match="does not decode"):
            decompress(*_binary(small), container.pack(header, [changed]))
    for forged in (
        header._replace(left_out=0), header._replace(images=bytes(8)), header._replace(count=39)
    ):  # fmt: skip
        with pytest.raises(CodecError, match="does not decode"):
            decompress(*_binary(small), container.pack(forged, [stream]))
    ends_in_zero = np.append(stream, np.uint32(0))
    with pytest.raises(CodecError, match="ends in a zero"):
        decompress(*_binary(small), container.pack(header, [ends_in_zero]))


def test_random_streams_are_refused(grey):
    """They decode to something, among it the 19th and 20th of 18 levels, which fill up a block."""
    vae, params = grey
    header, _ = container.parse(compress(vae, params, np.zeros((1, 2, 3), np.uint8)))
    rng = np.random.default_rng(0)
    for _ in range(10):
        stream = rng.integers(1, 2**32, 40, dtype=np.uint32)
        with pytest.raises(CodecError, match="does not decode"):
            decompress(vae, params, container.pack(header, [stream]))


def test_another_model_or_arithmetic_is_refused(small, monkeypatch):
    images, model = small.test_images[:3], _binary(small)
    content = compress(*model, images)
    other = small.params._replace(encoder=jax.tree.map(lambda x: x * 1.001, small.params.encoder))
    with pytest.raises(CodecError, match="made with another model"):
        decompress(small.vae, other, content)
    wide = gapjax.mlp_vae((5, 6), "bernoulli", latent_dim=3, hidden_sizes=(32,))
    with pytest.raises(CodecError, match=r"shape \(5, 5\) with 2 levels; the model is for \(5, 6"):
        decompress(wide, random_params(wide), content)
    monkeypatch.setattr(stack, "library_version", lambda: "0.0.1")
    with pytest.raises(
        CodecError, match=r"arithmetic: other versions .* or another kind of device"
    ):
        decompress(*model, content)


def test_the_probe_sees_a_program_that_computes_otherwise(small, monkeypatch):
    """As on a machine of the same name whose matrix products round in another order."""
    model = _binary(small)
    content = compress(*model, small.test_images[:3])
    decode = lambda params, z: small.vae.decode(params, z * (1 + 1e-7))
    with pytest.raises(CodecError, match="arithmetic: other flags of JAX or XLA, or"):
        decompress(small.vae._replace(decode=decode), small.params, content)


def test_latents_are_samples_of_the_posterior():
    """Popped from bits of no meaning: moments to 1 %, and none far away, however many there are."""
    count, loc = 4000, np.float32([0.3, -700.2, 900.0, 5.5])
    scale = np.float32([6.0, 0.5, 128.0, 30.0])
    bits = stack.Stack(np.random.default_rng(0).integers(1, 2**32, 4 * count, dtype=np.uint32))
    before = bits.words()
    drawn = [bits.pop_latents(loc, scale) for _ in range(count)]
    standard = (np.array(drawn) - loc) / scale
    np.testing.assert_allclose(standard.mean(0), 0.0, atol=0.06)
    np.testing.assert_allclose(standard.std(0), [1, (1 + 1 / 12 / 0.25) ** 0.5, 1, 1], rtol=0.04)
    assert np.abs(standard).max() < 12
    for indices in reversed(drawn):
        bits.push_latents(indices, loc, scale)
    np.testing.assert_array_equal(bits.words(), before)
    with pytest.raises(CodecError, match="does not decode"):
        bits.push_latents(drawn[0] + np.int32([0, 40, 0, 0]), loc, scale)


_SIZE, _SLOPE = 4, 0.8
_NOISE = (1 - _SLOPE**2) ** 0.5
_WEIGHT = 0.2 * np.random.default_rng(0).normal(size=(24, _SIZE)).astype(np.float32)


def _normal(loc, scale=1.0):
    return dist.Normal(loc, jnp.full(_SIZE, scale)).to_event(1)


def _beside(name):
    return lambda z: _normal(_SLOPE * z[name], _NOISE)


_CHAIN = {"z3": _normal(jnp.zeros(_SIZE)), "z2": _beside("z3"), "z1": _beside("z2")}


def _infer(params, x):
    """Up to the third order of the weights the posterior: the likelihood is nearly Gaussian."""
    precision = 1.0 + (params**2).sum(0) / 4
    loc = params.T @ (x.astype(jnp.float32) - 0.5) / precision
    first = dist.Normal(loc, precision**-0.5).to_event(1)
    return models.Chain({"z1": first, "z2": _beside("z1"), "z3": _beside("z2")})


def _chain_vae(prior=_CHAIN, see=lambda z: z["z1"], infer=_infer):
    def decode(params, z):
        assert sorted(z) == sorted(prior)
        return dist.Bernoulli(logits=params @ see(z)).to_event(1)

    return gapjax.VAE(None, infer, decode, models.Chain(prior))


@pytest.fixture(scope="module")
def hierarchy():
    """Three layers, each standard Gaussian by itself, and images drawn from it."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(700, _SIZE)) @ _WEIGHT.T
    images = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.uint8)
    return _chain_vae(), gapjax.VAEParams(*map(jnp.asarray, (_WEIGHT, _WEIGHT))), images


def test_a_hierarchy_costs_its_elbo_and_bit_swap_starts_from_fewer_bits(hierarchy):
    """q is nearly exact, so that the ELBO is log p(x)."""
    vae, params, images = hierarchy
    logits = np.random.default_rng(2).normal(size=(10_000, _SIZE)) @ _WEIGHT.T
    log_probs = images @ logits.T - np.logaddexp(0, logits).sum(1)
    bits = -np.log2(np.exp(log_probs).mean(1)).sum()
    model = describe(vae, params)
    assert list(model.orders) == ["bits_back", "bit_swap"]
    start, initial = len(stack.start(0, 3 * _SIZE)), {}
    for order in model.orders:
        content = compress(vae, params, images, num_chains=2, order=order)
        header, streams = container.parse(content)
        assert header.order == order
        _same(decompress(vae, params, content), images)
        initial[order] = 32 * (start - header.left_out)
        net = sum(32 * len(stream) - initial[order] for stream in streams)
        assert abs(net - bits) < 0.01 * bits
    assert content == compress(vae, params, images, num_chains=2)
    # A grid of 128 points for the prior's scale takes about 7 bits for each latent.
    assert initial["bit_swap"] <= initial["bits_back"] - 64 and initial["bits_back"] <= 7 * 32


def test_bit_swap_needs_markov_chains(hierarchy):
    _, params, images = hierarchy
    skip = {**_CHAIN, "z1": lambda z: _normal(0.5 * (z["z2"] + z["z3"]), _NOISE)}

    def from_image(params, x):
        links = _infer(params, x).links
        return models.Chain({**links, "z2": lambda z: _normal(_SLOPE * z["z1"] + x[0] / 9.0)})

    def downwards(params, x):
        links = _infer(params, x).links
        return models.Chain({"z3": links["z1"], "z2": _beside("z3"), "z1": _beside("z2")})

    others = [
        {"prior": skip}, {"see": lambda z: z["z1"] + z["z3"]}, {"infer": from_image},
        {"infer": downwards},
    ]  # fmt: skip
    for other in others:
        vae = _chain_vae(**other)
        assert list(describe(vae, params).orders) == ["bits_back"]
        with pytest.raises(ValueError, match="it can be 'bits_back', as q is no Markov chain"):
            compress(vae, params, images, order="bit_swap")
    content = compress(vae, params, images[:9], num_chains=2)
    _same(decompress(vae, params, content), images[:9])
    header, streams = container.parse(content)
    with pytest.raises(CodecError, match="cannot have been coded in its way"):
        decompress(vae, params, container.pack(header._replace(order="bit_swap"), streams))


def test_layers_of_networks_come_back(hierarchy):
    orders = {
        "non_centred": [""],
        "bottom_up": ["bits_back", "bit_swap"],
        "top_down": ["bits_back"],
    }
    images = hierarchy[2][:10].reshape(-1, 4, 6)
    for form, expected in orders.items():
        vae = models.hierarchical_vae((4, 6), latent_dims=(3, 2), hidden_sizes=(4,), form=form)
        params = random_params(vae)
        assert list(describe(vae, params).orders) == expected
        if form != "bottom_up":
            _same(decompress(vae, params, compress(vae, params, images)), images)
    with pytest.raises(TypeError, match="take the hierarchy in its non-centred form"):
        compress(vae, params, images, Refiner())


def test_a_forged_order_is_refused(hierarchy):
    vae, params, images = hierarchy
    header, streams = container.parse(compress(vae, params, images[:40], num_chains=2))
    forged = container.pack(header._replace(order="bits_back"), streams)
    with pytest.raises(CodecError, match="does not decode"):
        decompress(vae, params, forged)
    changed = container.pack(header, streams).replace(
        b"\x00\x00\x01" + header.model, b"\x00\x00\x02" + header.model
    )
    with pytest.raises(CodecError, match="order of coding 2"):
        container.parse(changed)


@pytest.fixture(scope="module")
def colour():
    vae = models.conv_vae(
        (4, 4, 3), "colour", latent_dim=2, num_channels=(8,), levels=18, uniform_weight=0.2
    )
    params = jax.tree.map(lambda p: 0.6 * p, random_params(vae))
    draw = jax.jit(jax.vmap(lambda key: sample_model(vae, params.decoder, key)))
    return vae, params, np.asarray(draw(jax.random.split(jax.random.key(0), 150)), np.uint8)


def test_colours_of_convolutions_cost_their_elbo_in_any_number_of_chains(colour):
    """The channels are coded in turn; a file's programs have one size of batch, also for few."""
    vae, params, images = colour
    nats = jax.jit(jax.vmap(lambda key, x: gapjax.elbo(vae, params, key, x, num_samples=30)))
    elbo = nats(jax.random.split(jax.random.key(1), len(images)), images).sum()
    for chains in (1, 4):
        content = compress(vae, params, images, num_chains=chains)
        _same(decompress(vae, params, content), images)
        size = 32 * sum(map(len, container.parse(content)[1])) - 64 * chains
        assert abs(size + elbo / np.log(2)) < -0.01 * elbo / np.log(2)
        some = compress(vae, params, images[: chains + 1], num_chains=chains)
        _same(decompress(vae, params, some), images[: chains + 1])


def test_what_has_no_table_or_context_is_refused_by_name(small, hierarchy):
    counts = models.count_examples(np.ones((2, 3), int))
    vae = models.count_vae(3, "poisson", latent_dim=2, hidden_sizes=(4,))
    with pytest.raises(TypeError, match="a file does not hold their contexts"):
        compress(vae, random_params(vae), counts)
    bound = vae.at({"library": jnp.array(5)})
    with pytest.raises(TypeError, match="Poisson has no table of levels"):
        compress(bound, random_params(vae), counts.x)
    mixed = models.with_prior(small.vae, models.MixturePrior(3, 2))
    with pytest.raises(TypeError, match=r"the prior is MixtureSameFamily .* diagonal Gaussian"):
        compress(mixed, random_params(mixed), small.test_images)
    flat = lambda params, x: _normal(jnp.zeros(_SIZE))
    with pytest.raises(TypeError, match=r"the posterior is Normal; .* both must be"):
        compress(_chain_vae(infer=flat), *hierarchy[1:])
    other = lambda params, x: models.Chain({"z1": flat(params, x)})
    with pytest.raises(
        TypeError, match=r"a Chain over \['z1'\] and the prior over \['z3', 'z2', 'z1'"
    ):
        compress(_chain_vae(infer=other), *hierarchy[1:])


_SMALL = container.Header(2, (5, 5), 8, ENCODER, b"m" * 8, b"n" * 8, b"i" * 8, 0)


def test_a_header_survives(grey):
    refiner = Refiner("adam", 300, 2, 3, 0.5)
    header = _SMALL._replace(levels=256, event_shape=(300, 2), count=1000, refiner=refiner)
    streams = [np.arange(n, dtype=np.uint32) for n in (0, 200, 1)]
    content = container.pack(header, streams)
    found, words = container.parse(content)
    assert found == header
    assert all(map(np.array_equal, words, streams))
    layers = header._replace(order="bit_swap", left_out=300)
    assert container.parse(container.pack(layers, streams))[0] == layers
    # 804 bytes for 8 images each; fewer bytes are filled up.
    small = container.pack(header._replace(event_shape=(1,), count=100_000), streams[:1])
    assert len(small) > 100_000 / 8


@pytest.mark.parametrize(
    "change, words",
    [
        ({"event_shape": (2**20, 2**11)}, "images of shape"),
        ({"event_shape": (0, 5)}, "images of shape"),
        ({"count": 2**40}, "1099511627776 images of shape"),
        ({"count": 2}, "8 chains of 2 images"),
        ({"count": 10**6}, "wrong checksum"),
        ({"event_shape": (1,) * 9}, "9 axes"),
        ({"refiner": Refiner(num_steps=10**9)}, "steps of refinement"),
        ({"refiner": Refiner(num_samples=10**9)}, "refinement with"),
        ({"refiner": Refiner("adam", 1, num_samples=129)}, "8 chains of 8 images, with"),
        ({"refiner": Refiner("adam", 1000, num_samples=128)}, "wrong checksum"),
        ({"refiner": Refiner("adam", learning_rate=np.nan)}, "refinement with"),
        ({"levels": 1}, "1 levels"),
    ],
    ids=str,
)
def test_what_would_cost_too_much_is_refused_before_any_work(monkeypatch, change, words):
    with monkeypatch.context() as unchecked:
        unchecked.setattr(container, "_check_sizes", lambda *_: None)
        unchecked.setattr(container, "_padding", lambda *_: 0)
        content = container.pack(_SMALL._replace(**change), [np.ones(2, np.uint32)] * 8)
    with pytest.raises(CodecError, match=words):
        container.parse(content)


def test_work_is_bounded_by_the_length_of_the_file():
    """A file whose header asks for much must be long; more chains than memory are refused."""
    length = lambda refiner: len(container.pack(_SMALL._replace(refiner=refiner), [_WORD] * 8))
    assert length(Refiner()) == length(Refiner("adam", 10)) < 100
    assert length(Refiner("adam", 1000, 128)) > 8 * 128_000 / 256
    assert length(Refiner(num_steps=1000, num_judged=128)) > 8 * 8 * 128_000 / 256
    assert container.most_chains(Refiner(num_judged=2000)) == 0


_WORD = np.ones(1, np.uint32)


def test_what_needs_no_refinement_is_compared_before_any_is_computed(small, monkeypatch):
    """Nor does a file without refinement compile any."""
    model, images = _binary(small), small.test_images[:8]
    content = compress(*model, images, Refiner(num_steps=1))
    header, streams = container.parse(content)

    def never(*args):
        raise AssertionError("refined")

    parallel._compiled.cache_clear()
    monkeypatch.setattr(newton, "_newton", never)
    forged = header._replace(numerics=b"????" + header.numerics[4:])
    with pytest.raises(CodecError, match="another arithmetic"):
        decompress(*model, container.pack(forged, streams))
    _same(decompress(*model, compress(*model, images)), images)
    with pytest.raises(AssertionError, match="refined"):
        decompress(*model, content)
    monkeypatch.undo()
    _same(decompress(*model, content), images)
    with pytest.raises(CodecError, match="another arithmetic"):
        forged = header._replace(numerics=header.numerics[:4] + b"????")
        decompress(*model, container.pack(forged, streams))


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError(), "too little memory"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: of 9 bytes"), "RESOURCE_EXHAUSTED: of 9"),
    ],
    ids=["numpy", "xla"],
)
def test_too_little_memory_is_said_in_one_line(small, monkeypatch, error, words):
    model, images = _binary(small), small.test_images[:1]
    content = compress(*model, images)

    def exhausted(*args):
        raise error

    monkeypatch.setattr(coding, "numerics", exhausted)
    for use in (lambda: compress(*model, images), lambda: decompress(*model, content)):
        with pytest.raises(CodecError, match=words):
            use()
    error = RuntimeError("of another kind")
    with pytest.raises(RuntimeError, match="of another kind"):
        decompress(*model, content)


def test_a_model_in_several_spellings_makes_one_file(small):
    """Every pixel of an expanded likelihood is coded; a scale need not have the latents' shape."""

    def spelled(expand):
        write = lambda q: q.expand([3]).to_event(1) if expand else q.to_event(1)
        full = (lambda shape, value: value) if expand else jnp.full
        encode = lambda params, x: write(dist.Normal(full((3,), x[0, 0] / 9.0), full((3,), 0.5)))
        bernoulli = lambda z: dist.Bernoulli(full((2, 3), jax.nn.sigmoid(z.sum())))
        decode = lambda params, z: bernoulli(z).expand([2, 3]).to_event(2)
        prior = write(dist.Normal(full((3,), 0.0), full((3,), 1.0)))
        return gapjax.VAE(None, encode, decode, prior)

    images = _images("noise", 4, (2, 3), 2)
    for refiner in (ENCODER, Refiner(num_steps=1)):
        files = [compress(spelled(e), gapjax.VAEParams({}, {}), images, refiner) for e in (0, 1)]
        for file, expand in zip(files, (0, 1), strict=True):
            _same(decompress(spelled(expand), gapjax.VAEParams({}, {}), file), images)
        words = [container.parse(file)[1][0] for file in files]
        assert len(words[0]) == len(words[1])


def test_foreign_files_are_named_as_such():
    content = container.pack(_SMALL, [np.ones(3, np.uint32)])
    for foreign in (b"", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n" + bytes(100)):
        with pytest.raises(CodecError, match="not a file of gapjax's codec"):
            container.parse(foreign)
    for version in (1, 9):
        with pytest.raises(CodecError, match=f"version {version} of the format"):
            container.parse(content[:4] + bytes([version]) + content[5:])
    for size in range(1, len(content)):
        with pytest.raises(CodecError, match="truncated"):
            container.parse(content[:size])
    endless = content[:6] + b"\x01" + b"\xff" * 40
    with pytest.raises(CodecError, match="too many bytes"):
        container.parse(endless)
    head = content[:-16]
    assert zlib.crc32(content[-12:], zlib.crc32(head)) == int.from_bytes(content[-16:-12], "little")


@pytest.mark.parametrize(
    "images, words",
    [
        (np.zeros((2, 4, 5), np.uint8), r"shape \(2, 4, 5\); the model takes \[N, 5, 5\]"),
        (np.full((2, 5, 5), 2, np.uint8), "values from 2 to 2"),
        (np.full((2, 5, 5), -1), "values from -1"),
        (np.zeros((2, 5, 5), np.float32), "dtype float32"),
        (np.uint8(0), "shape"),
    ],
)
def test_images_of_another_kind_are_refused(small, images, words):
    with pytest.raises(CodecError, match=words):
        compress(*_binary(small), images)


def test_a_model_that_cannot_code_is_refused(small, linear):
    images = small.test_images[:1]
    with pytest.raises(TypeError, match="Normal has no table of levels"):
        compress(linear.vae, linear.exact, np.zeros((1, 6), np.uint8))
    full = gapjax.mlp_vae((5, 5), latent_dim=2, hidden_sizes=(4,), posterior="full_covariance")
    with pytest.raises(TypeError, match="MultivariateNormal"):
        describe(full, random_params(full))
    not_finite = jax.tree.map(lambda x: x * jnp.nan, small.params)
    with pytest.raises(CodecError, match="not finite"):
        compress(small.vae, not_finite, images)
    with pytest.raises(ValueError, match="num_chains is 0"):
        compress(small.vae, small.params, images, num_chains=0)
    with pytest.raises(ValueError, match=r"num_chains is 2\.0; it must be an integer"):
        compress(small.vae, small.params, images, num_chains=2.0)


def test_a_prior_of_another_scale_is_coded_on_its_own_grid(small):
    """The same model with latents that are shifted and ten times as large."""
    factor, shift = 10.0, 3.0
    prior = dist.Normal(jnp.full(3, shift), jnp.full(3, factor)).to_event(1)

    def encode(params, x):
        q = small.vae.encode(params, x).base_dist
        return dist.Normal(q.loc * factor + shift, q.scale * factor).to_event(1)

    decode = lambda params, z: small.vae.decode(params, (z - shift) / factor)
    vae = small.vae._replace(prior=prior, encode=encode, decode=decode)
    content = compress(vae, small.params, small.test_images)
    _same(decompress(vae, small.params, content), small.test_images)
    plain = compress(*_binary(small), small.test_images)
    assert abs(len(content) - len(plain)) <= 0.05 * len(plain)


def test_without_constriction_the_extra_is_named(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(CodecError, match=r"gapjax\[codec\]"):
        compress(*_binary(small), small.test_images[:1])
