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
from gapjax.codec import stack
from gapjax.codec.stack import GRID
from gapjax.infer.newton import Refiner, diagonal_normal, refine_one
from gapjax.model.distributions import DiscretizedLogistic, innermost, type_name
from gapjax.model.free import written_out
from gapjax.vae import VAE, VAEParams, prior_of

SEED = 0  # of the points or samples of the refinement
_LIBRARIES = ("jax", "jaxlib", "numpyro", "optax")


class Programs(NamedTuple):
    """What is computed for L images at once, one of each chain."""

    # (params, images uint8 [L, *event]) to q's loc and scale [L, Z], in steps of the latents' grid
    infer: Callable[..., tuple[jax.Array, jax.Array]]
    # (params, indices of the grid int32 [L, Z]) to p(x given z) and its blocks' [L, D, A]
    blocks: Callable[..., tuple[Any, jax.Array]]
    # (p(x given z), blocks int32 [L, D]) to the probabilities of their levels [L, D, B]
    within: Callable[..., jax.Array]


class Model(NamedTuple):
    """What the codec must know of a model; `fingerprint` is of all this and of the parameters."""

    event_shape: tuple[int, ...]
    levels: int
    latent_dim: int
    fingerprint: bytes


def describe(vae: VAE, params: VAEParams) -> Model:
    """The model that is coded with."""
    prior = prior_loc, _ = diagonal_normal(prior_of(vae, params.decoder), "the prior")
    likelihood = jax.eval_shape(vae.decode, params.decoder, jnp.zeros(prior_loc.shape))
    levels, event_shape = num_levels(likelihood), tuple(likelihood.event_shape)
    image = jax.ShapeDtypeStruct(event_shape, jnp.uint8)
    jax.eval_shape(lambda x: diagonal_normal(vae.encode(params.encoder, x), "the posterior"), image)
    digest = hashlib.sha256(f"{event_shape} {levels} {prior_loc.shape}".encode())
    # Not the prior's own leaves: NumPyro orders them by hashes, which differ among processes.
    for path, leaf in jax.tree_util.tree_flatten_with_path((params, prior))[0]:
        leaf = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return Model(event_shape, levels, len(prior_loc), digest.digest()[:8])


def programs(vae: VAE, refiner: Refiner) -> Programs:
    """The programs of a model; each is compiled for the shapes that it is called with."""
    return Programs(_infer.on(vae=vae, refiner=refiner), _blocks.on(vae=vae), _within.on())


@parallel.on_one_device
def _infer(params, images, *, vae, refiner) -> tuple[jax.Array, jax.Array]:
    prior_loc, prior_scale = diagonal_normal(prior_of(vae, params.decoder), "the prior")

    def one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        q = refine_one(vae, params, jax.random.key(SEED), x, refiner).posteriors
        loc, scale = diagonal_normal(q, "the posterior")
        step = prior_scale / GRID
        loc = jnp.clip((loc - prior_loc) / step, -stack.MAX_LOC, stack.MAX_LOC)
        scale = jnp.clip(scale / step, 0.01, stack.MAX_SCALE)
        return loc.astype(jnp.float32), scale.astype(jnp.float32)

    return jax.vmap(one)(images)


@parallel.on_one_device
def _blocks(params, indices, *, vae) -> tuple[Any, jax.Array]:
    prior_loc, prior_scale = diagonal_normal(prior_of(vae, params.decoder), "the prior")

    def decode(index: jax.Array) -> Any:
        z = prior_loc + prior_scale * (index.astype(jnp.float32) / GRID)
        return written_out(vae.decode(params.decoder, z))

    likelihoods = jax.vmap(decode)(indices)
    return likelihoods, jax.vmap(lambda likelihood: _flat(block_probs(likelihood)))(likelihoods)


@parallel.on_one_device
def _within(likelihoods, chosen) -> jax.Array:
    def one(likelihood: Any, chosen: jax.Array) -> jax.Array:
        return _flat(level_probs(likelihood, chosen.reshape(likelihood.event_shape)))

    return jax.vmap(one)(likelihoods, chosen)


def numerics(model: Model, compiled: Programs, params: VAEParams, num_chains: int) -> bytes:
    """Fingerprint, 4 bytes: 2 of versions and device, 2 of what programs give on a probe."""
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
    likelihoods, table = compiled.blocks(params, indices)
    outputs = [*compiled.infer(params, images), table]
    if block_size(model.levels) > 1:
        chosen = images.reshape(num_chains, -1) // block_size(model.levels)
        outputs.append(compiled.within(likelihoods, chosen.astype(np.int32)))
    for output in outputs:
        digest.update(np.asarray(output).tobytes())
    return hashlib.sha256(" ".join(versions).encode()).digest()[:2] + digest.digest()[:2]


def num_levels(likelihood: Any) -> int:
    """The number of levels that an entry of x can have."""
    base = innermost(likelihood)
    if isinstance(base, dist.BernoulliLogits | dist.BernoulliProbs):
        return 2
    if isinstance(base, DiscretizedLogistic):
        return base.levels
    raise TypeError(
        f"{type_name(likelihood)} has no table of levels to code with; the codec takes "
        "Bernoulli and DiscretizedLogistic"
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
