"""Why the loss of a run is no longer finite: its model, its data, or the steps in between."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gapjax.fit.sources import Source, draw_examples
from gapjax.fit.steps import Objective, TrainState, batch_keys
from gapjax.model.explanation import explain
from gapjax.model.vae import VAE


class NotFiniteError(FloatingPointError):
    """A loss or a parameter became NaN or infinite.

    Attributes:
      member: number of the run in a sweep.
      step: number of optimizer steps before the one that failed.
    """

    def __init__(self, message: str, member: int, step: int):
        super().__init__(message)
        self.member, self.step = member, step


@contextlib.contextmanager
def explained(
    vae: VAE,
    objective: Objective,
    sources: Sequence[Source],
    batch_size: int,
    start: Callable[[int], TrainState],
) -> Iterator[None]:
    """Adds to a `NotFiniteError` of the run within what is the cause of it.

    The batch of the step that failed is drawn again and looked at with the parameters with which
    the run started. If the objective is not finite there, model or data are at fault, and
    otherwise the steps in between.

    Args:
      vae: the model.
      objective: of one example.
      sources: of the members.
      batch_size: examples in a step.
      start: from the number of a member to the state that it started from.
    """
    try:
        yield
    except NotFiniteError as error:
        state = start(error.member)._replace(step=jnp.asarray(error.step, jnp.int32))
        reason = _reason(vae, objective, sources[error.member], batch_size, state)
        message = f"{error}; {reason}"
        raise NotFiniteError(message, error.member, error.step) from None


def _reason(
    vae: VAE, objective: Objective, source: Source, batch_size: int, state: TrainState
) -> str:
    """Why the objective of this step is not finite, with the parameters of this state."""
    plan_key, positions, draw_keys, objective_keys = batch_keys(
        state, source.num_examples, batch_size
    )
    x = draw_examples(source, source.begin_epoch(plan_key), draw_keys, positions)
    of_all = lambda params: jax.vmap(
        lambda key, one: objective(vae, params, key, one)
    )(objective_keys, x)  # fmt: skip
    nats = jax.jit(of_all)(state.params)
    bad = np.flatnonzero(~np.isfinite(np.asarray(nats)))
    at_start = "with the parameters that the run started from"
    if len(bad):
        index = int(bad[0])
        found = explain(vae, state.params, objective_keys[index], x[index])
        return (
            f"{at_start}, too, the objective of an example of this batch is {nats[index]}: "
            f"{found or 'the objective itself is not finite'}"
        )
    gradient = jax.jit(jax.grad(lambda params: of_all(params).sum()))(state.params)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)):
        return f"{at_start}, too, the gradient of the objective is not finite on this batch"
    return f"{at_start} this batch is finite: a smaller learning rate may help"
