"""What is optimised: the whole VAE, or its encoder alone."""

import functools

import optax

from gapjax.model.vae import VAEParams


@functools.cache
def adam(learning_rate: float) -> optax.GradientTransformation:
    """Adam as in the paper, with the learning rate in its state where it can be lowered.

    Equal arguments give the same object, so programs compiled for it are found again.
    """
    return optax.inject_hyperparams(optax.adam)(learning_rate=learning_rate)


@functools.cache
def encoder_only(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Restricts `optimizer` to the encoder of `VAEParams`; the decoder is frozen.

    The decoder gets updates of zero and no optimizer state. (`optax.masked` would not do: it
    passes raw gradients through where the mask is false.) The gradient of the decoder is then
    used by nothing, and a compiler leaves it out.

    Args:
      optimizer: any optax transformation.

    Returns:
      A transformation over `VAEParams`. Equal arguments give the same object.

    Example:
      >>> optimizer = encoder_only(optax.adam(1e-3))
      >>> opt_state = optimizer.init(params)
    """
    return optax.partition(
        {"train": optimizer, "freeze": optax.set_to_zero()},
        VAEParams(encoder="train", decoder="freeze"),
    )


def scale_learning_rate(opt_state: optax.OptState, factor: float) -> optax.OptState:
    """Multiplies the learning rate held in `opt_state` (see `adam`) by `factor`.

    Raises:
      KeyError: the state holds no learning rate; wrap with `optax.inject_hyperparams`.
    """
    learning_rate = optax.tree.get(opt_state, "learning_rate")
    if learning_rate is None:
        raise KeyError("opt_state holds no learning_rate; wrap with optax.inject_hyperparams")
    return optax.tree.set(opt_state, learning_rate=learning_rate * factor)
