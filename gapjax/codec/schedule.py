"""The order in which the latents and pixels of a model are coded.

    bits-back   pop all latents under q, push x, push all latents under the prior
    Bit-Swap    pop z_1, push x, pop z_2, push z_1, .., pop z_L, push z_(L-1), push z_L

A decoder undoes the steps from the last to the first. Bit-Swap is possible where it knows by then
what each step depends on.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr

from gapjax.infer.newton import diagonal_normal
from gapjax.model.chain import Chain
from gapjax.model.distributions import type_name
from gapjax.model.free import written_out
from gapjax.vae import VAE, VAEParams, prior_of

ORDERS = ("bits_back", "bit_swap")
VECTOR = "z"  # the name of a latent that is one vector


class Step(NamedTuple):
    """What is coded next: a latent is popped under q or pushed under the prior, or x is pushed."""

    kind: str  # "infer", "pixels" or "prior"
    name: str  # of the latent
    given: tuple[str, ...]  # the latents that its distribution depends on
    sees_x: bool


Steps = tuple[Step, ...]


def of_vector() -> dict[str, Steps]:
    """The one order of a model whose latent is one vector; a file does not name it."""
    steps = (("infer", (), True), ("pixels", (VECTOR,), False), ("prior", (), False))
    return {"": tuple(Step(kind, VECTOR, given, sees_x) for kind, given, sees_x in steps)}


def of_chain(vae: VAE, params: VAEParams, x: Any, sizes: dict[str, int]) -> dict[str, Steps]:
    """The orders that are possible with chains of latents of these sizes, the best one last.

    `x` is the shape and dtype of an image. What a link depends on is found in its jaxpr.
    """
    names = list(sizes)  # in the order of the prior, which ends beside x
    inferred = _posterior_names(vae, params, x)
    if sorted(inferred) != sorted(names):
        raise TypeError(f"the posterior is a Chain over {inferred} and the prior over {names}")

    def infer(params: VAEParams, x: Any, z: Any, name: str) -> Any:
        link = _posterior(vae, params, x).link_at(name, z)
        return diagonal_normal(link, f"the posterior's {name}")

    def prior(params: VAEParams, x: Any, z: Any, name: str) -> Any:
        link = _chain(prior_of(vae, params.decoder), "prior").link_at(name, z)
        return diagonal_normal(link, f"the prior's {name}")

    def pixels(params: VAEParams, x: Any, z: Any, name: str) -> Any:
        return jax.tree.leaves(written_out(vae.decode(params.decoder, z)))

    z = {name: jax.ShapeDtypeStruct((size,), jnp.float32) for name, size in sizes.items()}
    look = lambda function, name: _step(function, name, params, x, z)
    pops = {name: look(infer, name) for name in inferred}
    pushes = {name: look(prior, name) for name in names}
    whole, upwards = look(pixels, ""), names[::-1]
    swapped = [pops[upwards[0]], whole]
    for below, above in itertools.pairwise(upwards):
        swapped += [pops[above], pushes[below]]
    found = {
        "bits_back": (*pops.values(), whole, *(pushes[name] for name in upwards)),
        "bit_swap": (*swapped, pushes[names[0]]),
    }
    return {order: steps for order, steps in found.items() if _is_possible(steps)}


def _chain(distribution: Any, role: str) -> Chain:
    if not isinstance(distribution, Chain):
        raise TypeError(
            f"the {role} is {type_name(distribution)}; where one of prior and posterior is a "
            "Chain, both must be, over the same latents"
        )
    return distribution


def _posterior(vae: VAE, params: VAEParams, x: Any) -> Chain:
    return _chain(vae.encode(params.encoder, x), "posterior")


def _posterior_names(vae: VAE, params: VAEParams, x: Any) -> list[str]:
    found: list[str] = []
    jax.eval_shape(lambda params, x: found.extend(_posterior(vae, params, x).links), params, x)
    return found


def _step(
    function: Callable[..., Any], name: str, params: VAEParams, x: Any, z: dict[str, Any]
) -> Step:
    """The step of a function, and which of its arguments its results depend on."""
    jaxpr = jax.make_jaxpr(lambda *inputs: function(*inputs, name))(params, x, z).jaxpr
    _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    _, sees_x, given = jax.tree.unflatten(jax.tree.structure((params, x, z)), used)
    return Step(function.__name__, name, tuple(name for name in z if given[name]), sees_x)


def _is_possible(steps: Sequence[Step]) -> bool:
    """Whether both directions know, at every step, what it depends on."""
    popped: set[str] = set()
    for step in steps:
        if step.kind == "infer":
            known = set(step.given) <= popped
            popped.add(step.name)
        else:
            known = {*step.given, step.name} - {""} <= popped
        if not known:
            return False
    decoded: set[str] = set()
    for step in reversed(steps):
        if not set(step.given) <= decoded or (step.sees_x and "" not in decoded):
            return False
        decoded.add(step.name)
    return True
