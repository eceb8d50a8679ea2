"""What a run will cost: parameters, memory and time; and a refusal where memory cannot suffice."""

import itertools
import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import gapjax
from experiments.config import Config, UsageError, share_images, share_samples
from experiments.show.formatting import duration
from gapjax import parallel
from gapjax.model.mlp import mlp_encoder

# While training, of float32: the parameters, Adam's two moments, the gradient and the update.
_BYTES = 5 * 4
_BASE = 600 * 2**20  # bytes of Python, JAX and compiled programs, as seen on a CPU
# The share of a large matrix product's speed that a step reaches, as seen on a CPU.
_EFFICIENCY = 0.6
_TYPICAL_OPTIMAL = 0.4  # share of --optimal_epochs after which optimal inference has converged


class Cost(NamedTuple):
    """What a run will cost."""

    encoder: int  # number of its parameters
    decoder: int
    memory: int  # bytes, of one device
    operations: dict[str, float]  # floating-point operations in matrix products, by phase


def estimate(config: Config, dataset: gapjax.Dataset, vae: gapjax.VAE, num_cores: int) -> Cost:
    """Estimates the cost of a run with a refit on each core, if any; nothing is computed.

    A product of a batch with a weight matrix takes two operations for each weight and example, its
    gradients as many each.
    """
    shapes = jax.eval_shape(vae.init, jax.random.key(0))
    encoder, decoder = _size(shapes.encoder), _size(shapes.decoder)
    num_train, num_test = len(dataset.train), len(dataset.test)
    num_checkpoints = config.num_epochs // config.checkpoint_every
    refit = 6 * encoder + 4 * decoder
    optimal_epochs = _TYPICAL_OPTIMAL * config.optimal_epochs
    per_image = lambda samples: 2 * (encoder + samples * decoder)
    operations = {
        "train": config.num_epochs * num_train * 6 * (encoder + decoder),
        "self_consistent": num_checkpoints * config.refit_epochs * num_train
        * (refit + 2 * config.alpha * decoder),
        "control": num_checkpoints * config.refit_epochs * num_train * refit,
        "optimal": num_checkpoints * optimal_epochs * num_test * refit,
        "evaluate": num_checkpoints
        * ((num_train + 10 * num_test) * per_image(config.num_eval_samples)
           + 12 * min(num_test, share_images(config)) * per_image(share_samples(config))),
    }  # fmt: skip
    memory = _BASE + max(1, num_cores) * _training_memory(encoder + decoder, dataset)
    return Cost(encoder, decoder, memory, operations)


def check_memory(config: Config, dataset: gapjax.Dataset) -> None:
    """Refuses sizes that cannot fit, before anything of that size is made."""
    pixels = math.prod(dataset.event_shape)
    outputs = pixels if dataset.levels == 2 else 2 * pixels
    encoder = mlp_encoder(
        dataset.event_shape, latent_dim=config.latent_dim, hidden_sizes=config.hidden_sizes,
        posterior=config.posterior,
    )  # fmt: skip
    number = _size(jax.eval_shape(encoder.init, jax.random.key(0)))
    decoder = [config.latent_dim, *reversed(config.hidden_sizes), outputs]
    number += sum((inputs + 1) * size for inputs, size in itertools.pairwise(decoder))
    needed, available = _training_memory(number, dataset), _memory()
    if available is not None and needed > available:
        raise UsageError(
            f"--latent_dim={config.latent_dim} and --hidden_sizes="
            f"{','.join(map(str, config.hidden_sizes))} make {number:,} parameters, which take "
            f"about {_gib(needed)} to train; there are {_gib(available)}"
        )


def describe(config: Config, cost: Cost, workdir: object) -> str:
    """What --dry_run prints: the configuration, the folder, and the estimates."""
    plain = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else value
    given = {name: value for name, value in config._asdict().items() if value is not None}
    time = "time, as a rough estimate from the speed of matrix products on one device"
    return "\n".join([
        *(f"--{name}={plain(value)}" for name, value in given.items()),
        f"workdir: {workdir}",
        f"parameters: {cost.encoder:,} of the encoder, {cost.decoder:,} of the decoder",
        f"memory: about {_gib(cost.memory)}",
        f"{time}: {describe_time(cost)}",
    ])  # fmt: skip


def describe_time(cost: Cost) -> str:
    """How long each phase may take, and all of them."""
    speed = _EFFICIENCY * _product_speed()
    phases = [f"{name} {duration(number / speed)}" for name, number in cost.operations.items()]
    return f"{', '.join(phases)}; in all {duration(sum(cost.operations.values()) / speed)}"


def _size(shapes: Any) -> int:
    """The number of parameters of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _training_memory(num_parameters: int, dataset: gapjax.Dataset) -> int:
    """Bytes that training takes: copies of the parameters, and the data."""
    return _BYTES * num_parameters + dataset.train.nbytes + dataset.test.nbytes


def _memory() -> int | None:
    """Bytes that the first device can have; None where that is not known."""
    device = parallel.all_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _product_speed() -> float:
    """Operations a second in products of 1,000 x 1,000 matrices."""
    size, repeats = 1000, 10
    multiply: Callable = jax.jit(lambda a, b: a @ b)
    a = jnp.ones((size, size))
    multiply(a, a).block_until_ready()
    start = time.perf_counter()
    for _ in range(repeats):
        product = multiply(a, a)
    product.block_until_ready()
    return repeats * 2 * size**3 / (time.perf_counter() - start)


def _gib(number: float) -> str:
    return f"{number / 2**30:,.1f} GiB"
