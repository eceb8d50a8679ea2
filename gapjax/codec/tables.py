"""The compiled programs that the two directions share, and the fingerprints of what they compute.

A decoder must find the very probabilities that the encoder coded with. So both directions run the
same programs on arrays of the same shapes, and the file says what the programs gave on a probe.
"""

import hashlib
import importlib.metadata
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from gapjax import parallel
from gapjax.codec import schedule, stack
from gapjax.codec.schedule import VECTOR, Steps
from gapjax.codec.stack import GRID
from gapjax.infer.newton import Refiner, diagonal_normal, refine_one
from gapjax.model.chain import Chain
from gapjax.model.distributions import DiscretizedLogistic, innermost, type_name
from gapjax.model.free import written_out
from gapjax.models.colour import ColourLogistic
from gapjax.vae import VAE, VAEParams, prior_of, sample

SEED = 0  # of the points or samples of the refinement, and of the samples of the prior
_LIBRARIES = ("jax", "jaxlib", "numpyro", "optax")
_PRIOR_SAMPLES = 256
_ROOM = 8  # of a chain's grid, whose steps may be fine beside the spread of a latent

Latents = dict[str, Any]  # by name, indices of the grid int32 [L, Z]
Table = tuple[Any, Any]  # a mean and a scale [L, Z] for each latent, in steps of its grid


class Model(NamedTuple):
    """What the codec must know of a model; `fingerprint` is of all this and of the parameters."""

    event_shape: tuple[int, ...]
    levels: int
    channels: int  # of a pixel that are coded in turn; 0 where they are independent
    sizes: dict[str, int]  # of each latent, in the order of the prior
    grid: dict[str, Any]  # of a chain, see `_grid`; a single vector lies on the prior's own
    orders: dict[str, Steps]  # in which it can be coded, the one with fewest initial bits last
    fingerprint: bytes

    @property
    def latent_dim(self) -> int:
        """The number of all latents of an image."""
        return sum(self.sizes.values())

    @property
    def room(self) -> int:
        """How many times as wide as that of a single vector the grid is."""
        return _ROOM if self.grid else 1


class Programs(NamedTuple):
    """What is computed for L images at once, one of each chain of a file."""

    # by name; (params, images uint8 [L, *event], latents, grid) to q of one latent
    infer: dict[str, Any]
    # by name; the same arguments to p of one latent
    prior: dict[str, Any]
    # (params, latents, grid) to p(x given z) and the probabilities of its blocks [L, D, A]
    blocks: Any
    # (p(x given z), its blocks, levels int32 [L, *event], channel) to both of this channel alone
    channel: Any
    # (p(x given z), blocks int32 [L, D]) to the probabilities of their levels [L, D, B]
    within: Any


def describe(vae: VAE, params: VAEParams) -> Model:
    """The model that is coded with."""
    prior: Any = prior_of(vae, params.decoder)
    grid: dict[str, Any] = {}
    z: Any
    if isinstance(prior, Chain):
        grid = held = _grid.on(vae=vae)(params.decoder)
        z = {name: grid[name][0] for name in prior.links}
        shapes = sizes = {name: len(loc) for name, loc in z.items()}
    else:
        held = z, _ = diagonal_normal(prior, "the prior")
        shapes, sizes = z.shape, {VECTOR: len(z)}
    likelihood = jax.eval_shape(vae.decode, params.decoder, jax.tree.map(jnp.zeros_like, z))
    levels, event_shape = num_levels(likelihood), tuple(likelihood.event_shape)
    image = jax.ShapeDtypeStruct(event_shape, jnp.uint8)
    if grid:
        orders = schedule.of_chain(vae, params, image, sizes)
    else:
        orders = schedule.of_vector()
        infer = lambda x: diagonal_normal(vae.encode(params.encoder, x), "the posterior")
        jax.eval_shape(infer, image)
    digest = hashlib.sha256(f"{event_shape} {levels} {shapes}".encode())
    # Not the prior's own leaves: NumPyro orders them by hashes, which differ among processes.
    for path, leaf in jax.tree_util.tree_flatten_with_path((params, held))[0]:
        leaf = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    channels = event_shape[-1] if isinstance(innermost(likelihood), ColourLogistic) else 0
    fingerprint = digest.digest()[:8]
    return Model(event_shape, levels, channels, sizes, grid, orders, fingerprint)


def programs(vae: VAE, model: Model, refiner: Refiner) -> Programs:
    """The programs of a model; each is compiled for the shapes that it is called with."""
    infer = {name: _infer.on(vae=vae, refiner=refiner, name=name) for name in model.sizes}
    prior = {name: _prior.on(vae=vae, name=name) if model.grid else _itself for name in model.sizes}
    channel = _channel.on() if model.channels else _whole
    return Programs(infer, prior, _blocks.on(vae=vae), channel, _within.on())


@parallel.on_one_device
def _grid(decoder, *, vae) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Middle and unit [Z] of the grid of each latent of a chain; a step is unit / `GRID`.

    The unit is about the scale of a latent given those above it, the geometric mean over samples
    of the prior, but at least a quarter of the scale of its marginal. It is a power of two, so that
    a point of the grid is exact.
    """

    def one(rng_key: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        prior: Any = prior_of(vae, decoder)
        links = prior.links_at(sample(prior, rng_key))
        return {name: diagonal_normal(link, f"the prior's {name}") for name, link in links.items()}

    def of_one(loc: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        given, marginal = jnp.exp(jnp.log(scale).mean(0)), jnp.sqrt(loc.var(0) + (scale**2).mean(0))
        exponent = jnp.round(jnp.log2(jnp.maximum(given, marginal / 4)))
        unit = jnp.ldexp(jnp.ones_like(given), exponent.astype(jnp.int32))
        return jnp.round(loc.mean(0) / unit) * unit, unit

    links = jax.vmap(one)(jax.random.split(jax.random.key(SEED), _PRIOR_SAMPLES))
    return {name: of_one(*link) for name, link in links.items()}


def _points(vae: VAE, params: VAEParams, grid: dict[str, Any]) -> Callable[[Latents], Any]:
    """The function from indices of the grid, of one image, to z."""

    def point(own: Table, index: jax.Array) -> jax.Array:
        middle, unit = own
        return middle + unit * (index.astype(jnp.float32) / GRID)

    if not grid:
        own = diagonal_normal(prior_of(vae, params.decoder), "the prior")
        return lambda latents: point(own, latents[VECTOR])
    return lambda latents: {name: point(grid[name], index) for name, index in latents.items()}


def _in_steps(distribution: Any, own: Table, room: int = 1) -> Table:
    """Mean and scale of a diagonal Gaussian on a grid, within what can be coded."""
    loc, scale = diagonal_normal(distribution, "the posterior")
    middle, unit = own
    step = unit / GRID
    loc = jnp.clip((loc - middle) / step, -room * stack.MAX_LOC, room * stack.MAX_LOC)
    scale = jnp.clip(scale / step, 0.01, room * stack.MAX_SCALE)
    return loc.astype(jnp.float32), scale.astype(jnp.float32)


@parallel.on_one_device
def _infer(params, images, latents, grid, *, vae, refiner, name) -> Table:
    if grid:
        points = _points(vae, params, grid)

        def link(x: jax.Array, latents: Latents) -> Table:
            q: Any = vae.encode(params.encoder, x)
            return _in_steps(q.link_at(name, points(latents)), grid[name], _ROOM)

        return jax.vmap(link)(images, latents)
    own = diagonal_normal(prior_of(vae, params.decoder), "the prior")

    def one(x: jax.Array) -> Table:
        q = refine_one(vae, params, jax.random.key(SEED), x, refiner).posteriors
        return _in_steps(q, own)

    return jax.vmap(one)(images)


@parallel.on_one_device
def _prior(params, images, latents, grid, *, vae, name) -> Table:
    del images
    points = _points(vae, params, grid)

    def link(latents: Latents) -> Table:
        p: Any = prior_of(vae, params.decoder)
        return _in_steps(p.link_at(name, points(latents)), grid[name], _ROOM)

    return jax.vmap(link)(latents)


def _itself(params, images, latents, grid) -> Table:
    """A prior on its own grid."""
    del params, images, grid
    shape = latents[VECTOR].shape
    return np.zeros(shape, np.float32), np.full(shape, GRID, np.float32)


@parallel.on_one_device
def _blocks(params, latents, grid, *, vae) -> tuple[Any, Any]:
    points = _points(vae, params, grid)
    decode = lambda latents: written_out(vae.decode(params.decoder, points(latents)))
    likelihoods = jax.vmap(decode)(latents)
    if isinstance(innermost(likelihoods), ColourLogistic):
        return likelihoods, None
    return likelihoods, jax.vmap(lambda likelihood: _flat(block_probs(likelihood)))(likelihoods)


@parallel.on_one_device
def _channel(likelihoods, blocks, levels, channel) -> tuple[Any, Any]:
    """Of a channel given those before it, `levels`; the others are not seen."""

    def one(likelihood: Any, levels: jax.Array) -> tuple[Any, jax.Array]:
        every = innermost(likelihood).given(levels)
        loc, scale = (jnp.take(array, channel, axis=-1) for array in (every.loc, every.scale))
        own = DiscretizedLogistic(loc, scale, every.levels, uniform_weight=every.uniform_weight)
        own = own.to_event(loc.ndim)
        return own, _flat(block_probs(own))

    return jax.vmap(one)(likelihoods, levels)


def _whole(likelihoods, blocks, levels, channel) -> tuple[Any, Any]:
    """Entries of x that are independent are coded at once."""
    del levels, channel
    return likelihoods, blocks


@parallel.on_one_device
def _within(likelihoods, chosen) -> jax.Array:
    def one(likelihood: Any, chosen: jax.Array) -> jax.Array:
        return _flat(level_probs(likelihood, chosen.reshape(likelihood.event_shape)))

    return jax.vmap(one)(likelihoods, chosen)


def numerics(model: Model, compiled: Programs, params: VAEParams, num_chains: int) -> bytes:
    """Fingerprint, 4 bytes: 2 of versions and device, 2 of what programs give on a probe.

    A file's programs run on one row for each of its chains in both directions, however many images
    are left, and the probe has as many. So no other size of batch can occur.
    """
    device = jax.devices()[0]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES]
    versions += [f"constriction {stack.library_version()}", device.platform, device.device_kind]
    digest = hashlib.sha256()
    size = math.prod(model.event_shape)
    num_bytes = num_chains * (size + model.latent_dim)
    noise = np.frombuffer(hashlib.shake_128(b"gapjax probe").digest(num_bytes), np.uint8)
    images = (noise[: num_chains * size] % np.uint16(model.levels)).astype(np.uint8)
    images = images.reshape(num_chains, *model.event_shape)
    indices = noise[num_chains * size :].reshape(num_chains, -1).astype(np.int32) - 128
    ends = np.cumsum(list(model.sizes.values()))[:-1]
    latents = dict(zip(model.sizes, np.split(indices, ends, axis=1), strict=True))
    outputs: list[Any] = []
    for name in model.sizes:
        outputs += compiled.infer[name](params, images, latents, model.grid)
    likelihoods, whole = compiled.blocks(params, latents, model.grid)
    for channel in range(model.channels or 1):
        likelihood, table = compiled.channel(likelihoods, whole, images.astype(np.int32), channel)
        outputs.append(table)
        if block_size(model.levels) > 1:
            chosen = of_channel(images, channel, model) // block_size(model.levels)
            outputs.append(compiled.within(likelihood, chosen.astype(np.int32)))
    for name in model.grid:
        outputs += compiled.prior[name](params, images, latents, model.grid)
    for output in outputs:
        digest.update(np.asarray(output).tobytes())
    return hashlib.sha256(" ".join(versions).encode()).digest()[:2] + digest.digest()[:2]


def of_channel(levels: np.ndarray, channel: int, model: Model) -> np.ndarray:
    """The levels [L, D] that are coded together, a view of levels [L, *event]."""
    return levels.reshape(len(levels), -1, model.channels or 1)[..., channel]


def num_levels(likelihood: Any) -> int:
    """The number of levels that an entry of x can have."""
    base = innermost(likelihood)
    if isinstance(base, dist.BernoulliLogits | dist.BernoulliProbs):
        return 2
    if isinstance(base, DiscretizedLogistic | ColourLogistic):
        return base.levels
    raise TypeError(
        f"{type_name(likelihood)} has no table of levels to code with; the codec takes "
        "Bernoulli, DiscretizedLogistic and ColourLogistic"
    )


def block_size(levels: int) -> int:
    """How many neighbouring levels make a block: about the root of their number; 1 for two."""
    return 1 if levels == 2 else math.isqrt(levels - 1) + 1


def block_probs(likelihood: Any) -> jax.Array:
    """P(the level of x is in block b), [*event, number of blocks].

    Block b holds the levels b B .. (b + 1) B - 1 with B = `block_size`; the last may hold fewer.
    """
    base, levels = innermost(likelihood), num_levels(likelihood)
    size = block_size(levels)
    first = jnp.arange(0, levels, size, dtype=jnp.float32)
    if not isinstance(base, DiscretizedLogistic):
        log_prob = lambda level: base.log_prob(jnp.full(base.batch_shape, level))
        return jnp.exp(jax.vmap(log_prob, out_axes=-1)(first))
    # On a CPU, XLA takes ten times as long with levels that are constants of the program.
    first = jax.vmap(lambda level: level + 0.0 * base.in_bins()[0], out_axes=-1)(first)

    def log_prob_of_block(first: jax.Array) -> jax.Array:
        return base.log_prob_between(first, jnp.minimum(first + size - 1, levels - 1))

    return jnp.exp(jax.vmap(log_prob_of_block, in_axes=-1, out_axes=-1)(first))


def level_probs(likelihood: Any, blocks: jax.Array) -> jax.Array:
    """P(x given its block) of each level of the block that each entry of x is in [*event, B].

    `blocks` are int [*event]. Probabilities beyond the last level are zero.
    """
    levels = num_levels(likelihood)
    size = block_size(levels)

    def one(i: jax.Array) -> jax.Array:
        level = blocks * size + i
        inside = jnp.minimum(level, levels - 1).astype(jnp.float32)
        return jnp.where(level < levels, innermost(likelihood).log_prob(inside), -jnp.inf)

    log_probs = jax.vmap(one, out_axes=-1)(jnp.arange(size))
    return jax.nn.softmax(log_probs, axis=-1)


def _flat(table: jax.Array) -> jax.Array:
    """[*event, K] as float32 [D, K]."""
    return table.reshape(-1, table.shape[-1]).astype(jnp.float32)
