"""Optimizers of the whole VAE, or of its encoder alone, and their learning rate."""

import functools

import jax
import optax
from jax.typing import ArrayLike

from gapjax.model.vae import Frozen, VAEParams

_MAX_OPTIMIZERS = 64


@functools.lru_cache(_MAX_OPTIMIZERS)
def adam(learning_rate: float) -> optax.GradientTransformation:
    """Adam as in the paper, with the learning rate in its state, so that it can be lowered.

    Equal arguments give the same object, so that compiled programs are reused.
    """
    return optax.inject_hyperparams(optax.adam)(learning_rate=learning_rate)


@functools.lru_cache(_MAX_OPTIMIZERS)
def cosine_adam(
    learning_rate: float, num_steps: int, *, warmup: float = 0.0, clip: float | None = None
) -> optax.GradientTransformation:
    """Adam whose learning rate falls to 0 as half a cosine, so that no noise is left at the end.

    Args:
      learning_rate: the highest.
      num_steps: number of steps in all; see `steps.steps_per_epoch`.
      warmup: share of the steps in which the rate rises from 0 to `learning_rate`.
      clip: largest global norm of the gradient; None for any.

    Returns:
      A transformation. Equal arguments give the same object.
    """
    rising = int(warmup * num_steps)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if rising else learning_rate, learning_rate, rising, num_steps
    )
    if clip is None:
        return optax.adam(schedule)
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(schedule))


@functools.lru_cache(_MAX_OPTIMIZERS)
def encoder_only(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Restricts `optimizer` to the encoder of `VAEParams`; the decoder is frozen.

    The decoder, and what is `Frozen` in the encoder, get updates of zero and no optimizer state.
    (`optax.masked` would not do: it passes raw gradients through where the mask is false.) The
    gradient of the decoder is then unused, and the compiler removes it.

    Args:
      optimizer: any optax transformation.

    Returns:
      A transformation over `VAEParams`. Equal arguments give the same object.

    Example:
      >>> optimizer = encoder_only(optax.adam(1e-3))
      >>> opt_state = optimizer.init(params)
    """
    is_frozen = lambda node: isinstance(node, Frozen)

    def labels(params: VAEParams) -> VAEParams:
        label = lambda node: "freeze" if is_frozen(node) else "train"
        return VAEParams(jax.tree.map(label, params.encoder, is_leaf=is_frozen), "freeze")

    return optax.partition({"train": optimizer, "freeze": optax.set_to_zero()}, labels)


def scale_learning_rate(opt_state: optax.OptState, factor: ArrayLike) -> optax.OptState:
    """Multiplies the learning rate held in `opt_state` (see `adam`) by `factor`.

    Args:
      opt_state: the state of an optimizer.
      factor: a number, or an array that may be traced.

    Returns:
      A state of the same structure.

    Raises:
      KeyError: the state holds no learning rate; wrap with `optax.inject_hyperparams`.
    """
    learning_rate = optax.tree.get(opt_state, "learning_rate")
    if learning_rate is None:
        raise KeyError("opt_state holds no learning_rate; wrap with optax.inject_hyperparams")
    return optax.tree.set(opt_state, learning_rate=learning_rate * factor)


def check_learning_rate(optimizer: optax.GradientTransformation, params: VAEParams) -> None:
    """Raises ValueError unless the optimizer's state holds one learning rate, see `adam`.

    Args:
      optimizer: to be checked; nothing is computed.
      params: of the shapes that it is for.
    """
    opt_state = jax.eval_shape(optimizer.init, params)
    found = optax.tree.get_all_with_path(opt_state, "learning_rate")
    if len(found) != 1:
        raise ValueError(
            f"until lowers the learning rate, but the optimizer's state holds {len(found)} entries "
            "named learning_rate; use gapjax.adam(...) or optax.inject_hyperparams, or until=None"
        )
