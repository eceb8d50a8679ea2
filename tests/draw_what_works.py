"""Writes the table of what works with what into docs/models.md, from calls on small models.

python tests/draw_what_works.py          runs all, which takes minutes
python tests/draw_what_works.py compress runs the functions whose names have such a word
"""

import contextlib
import functools
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from conftest import random_params

import gapjax
from gapjax import models, objectives, parallel
from gapjax.fit.derived_sources import (
    augmented_source,
    interpolation_source,
    noisy_source,
    reconstruction_source,
    thinned_source,
)
from gapjax.fit.objectives import ConsistentCodes, DenoisingElbo, Distillation, FreeBits, Iwae

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
_BEGIN, _END = "<!-- what works, by tests/draw_what_works.py -->", "<!-- end of what works -->"
_KEY = jax.random.key(0)
_NUMBER, _SHAPE = 8, (4, 4)
_SHORT = {"num_epochs": 1, "batch_size": 4}


class Case(NamedTuple):
    """A model with parameters and a few examples."""

    vae: gapjax.VAE
    params: gapjax.VAEParams
    examples: Any


def _encode(params, x, label):
    loc, raw_scale = jnp.split(jnp.concatenate([x.reshape(-1), label]) @ params, 2)
    return dist.Normal(loc, jax.nn.softplus(raw_scale)).to_event(1)


def _decode(params, z, label):
    logits = jnp.concatenate([z, label]) @ params["pixels"]
    return dist.Bernoulli(logits=logits.reshape(_SHAPE)).to_event(2)


def _init_conditional(rng_key):
    decoder = {"pixels": jnp.zeros((2 + 3, 16)), "prior": jnp.zeros((2, 3))}
    return gapjax.VAEParams(jnp.zeros((16 + 3, 4)), decoder)


def _prior(params, label):
    return dist.Normal(params["prior"] @ label, 1.0).to_event(1)


def cases():
    """The kinds of models, by name."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 2, (_NUMBER, *_SHAPE), np.uint8)
    colour = rng.integers(0, 256, (_NUMBER, *_SHAPE, 3), np.uint8)
    labels = np.eye(3, dtype=np.float32)[rng.integers(0, 3, _NUMBER)]
    counts = models.count_examples(rng.poisson(2.0, (_NUMBER, 5)), rng.integers(0, 2, _NUMBER))
    sizes = {"latent_dim": 2, "hidden_sizes": (4,)}
    flat = gapjax.mlp_vae(_SHAPE, **sizes)
    layers = functools.partial(
        models.hierarchical_vae, _SHAPE, latent_dims=(2, 2), hidden_sizes=(4,)
    )
    convolution = functools.partial(models.conv_vae, latent_dim=2, num_channels=(8,))
    made = {
        "flat": (flat, images),
        "conditional": (
            gapjax.VAE(_init_conditional, _encode, _decode, _prior),
            models.Given(images, labels),
        ),
        "learned prior": (models.with_prior(flat, models.MixturePrior(2, 3)), images),
        "hierarchy, non-centred": (layers(), images),
        "hierarchy, a chain": (layers(form="top_down"), images),
        "counts": (models.count_vae(5, **sizes, num_batches=2), counts),
        "colour": (convolution((*_SHAPE, 3), "colour"), colour),
        "convolutional": (convolution(_SHAPE), images),
    }
    return {name: Case(vae, random_params(vae), x) for name, (vae, x) in made.items()}


def _refit(source=None, **options):
    """A refit on a source, which is made from (vae, params, data)."""

    def call(case):
        data = gapjax.data_source(case.examples)
        x = source(case.vae, case.params, data) if source else data
        gapjax.refit_encoder(case.vae, case.params, x, _KEY, **_SHORT, **options)

    return call


def _measure(function, **options):
    return lambda case: function(case.vae, case.params, _KEY, case.examples, **options)


def _fit(function, **options):
    return lambda case: function(case.vae, case.params, case.examples, _KEY, **_SHORT, **options)


def _train(case):
    gapjax.train(case.vae, gapjax.data_source(case.examples), _KEY, **_SHORT)


def _ledger(case):
    options = {"num_samples": 2, "method": "importance", "num_importance_samples": 2}
    images = case.examples, case.examples
    gapjax.ledger(case.vae, case.params, _KEY, *images, search=_SEARCH, **options)


def _check(case):
    found = gapjax.check_vae(case.vae, case.params, case.examples)
    if found.problems:
        raise ValueError(found.problems[0])


def _compress(case):
    content = gapjax.compress(case.vae, case.params, case.examples)
    np.testing.assert_array_equal(gapjax.decompress(case.vae, case.params, content), case.examples)


_SEARCH = gapjax.PosteriorSearch(2, max_rounds=1, num_heldout=2, steps_per_round=2)
_ANNEALING = gapjax.Annealing(num_temperatures=2, num_chains=2, num_leapfrog=1)
_COMPUTED = {"`check_vae`": _check, "`compress`": _compress}  # what numbers decide
FUNCTIONS = {
    "`train`": _train,
    "`evaluate`": _measure(gapjax.evaluate, num_samples=2),
    "`refit_encoder`, `self_consistent`, `mixture_source`, `model_source`": _fit(
        gapjax.self_consistent
    ),
    "`optimal_inference`": _fit(gapjax.optimal_inference, monitor_every=1),
    '`close_gap`, "paper"': _fit(gapjax.close_gap, recipe="paper"),
    '`close_gap`, "best": several sources': _fit(gapjax.close_gap, recipe="best"),
    '`close_gap`, "larger": another encoder': _fit(gapjax.close_gap, recipe="larger"),
    '`close_gap`, "refinement_1": learned refinement': _fit(
        gapjax.close_gap, recipe="refinement_1"
    ),
    '`close_gap`, "distillation": Newton steps': _fit(gapjax.close_gap, recipe="distillation"),
    "`best_posteriors`": _measure(gapjax.best_posteriors, search=_SEARCH),
    "`refine`, Newton": _measure(gapjax.refine, refiner=gapjax.Refiner(num_steps=1, num_judged=1)),
    "`refine`, Adam": _measure(gapjax.refine, refiner=gapjax.Refiner("adam", num_steps=1)),
    "`log_likelihood`": _measure(gapjax.log_likelihood, num_samples=2),
    "`log_likelihood`, `Annealing`": _measure(gapjax.log_likelihood, method=_ANNEALING),
    "`ledger`": _ledger,
    "`objectives.Iwae`": _refit(objective=Iwae(2)),
    "`objectives.FreeBits`": _refit(objective=FreeBits(0.1)),
    "`objectives.sleep_phase`": _refit(objective=objectives.sleep_phase),
    "`objectives.DenoisingElbo`": _refit(objective=DenoisingElbo(0.3)),
    "`objectives.ConsistentCodes`": _refit(objective=ConsistentCodes(1.0)),
    "`objectives.Distillation`": _refit(objective=Distillation(gapjax.Refiner("adam"))),
    "`reconstruction_source`": _refit(reconstruction_source),
    "`interpolation_source`": _refit(interpolation_source),
    "`augmented_source`": _refit(lambda vae, params, data: augmented_source(data)),
    "`noisy_source`": _refit(lambda vae, params, data: noisy_source(data, 0.1)),
    "`thinned_source`": _refit(lambda vae, params, data: thinned_source(data, 0.3)),
    **_COMPUTED,
}


def _made_up(shape):
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(_KEY, shape.shape)
    return jax.device_put(np.ones(shape.shape, shape.dtype))  # which compiles nothing


@contextlib.contextmanager
def traced_alone():
    """Programs are traced and not compiled; they return ones of the right shapes."""
    run = parallel.Compiled.__call__

    def trace(compiled, *arrays):
        shapes = jax.eval_shape(compiled.program, *compiled.arrange(*arrays))
        return jax.tree.map(_made_up, shapes)

    parallel.Compiled.__call__ = trace
    try:
        yield
    finally:
        parallel.Compiled.__call__ = run


def cell(name, case, is_traced=False):
    """What a function does with a model: "works" or "refused", what says more, and the error."""
    alone = is_traced and name not in _COMPUTED
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with traced_alone() if alone else contextlib.nullcontext():
                FUNCTIONS[name](case)
        except Exception as error:
            return "refused", f"{type(error).__name__}: {error}", error
    told = {str(each.message): None for each in caught if each.category is UserWarning}
    return "works", "; ".join(told), None


def table(cells, names):
    """The table in Markdown with its notes, of (function, model) to the first two of a cell."""
    notes, rows = {}, [["", *names], ["---"] * (1 + len(names))]
    for function in FUNCTIONS:
        row = [function]
        for name in names:
            works, note = cells[function, name]
            number = note and f"[{notes.setdefault(note, len(notes) + 1)}]"
            row.append(" ".join(filter(None, (works, number))))
        rows.append(row)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    listed = [f"{number}. `{note}`" for note, number in notes.items()]
    return "\n".join([_BEGIN, "", *lines, "", *listed, "", _END])


def shown():
    """The table in the page."""
    text = PAGE.read_text(encoding="utf-8")
    return _BEGIN + text.partition(_BEGIN)[2].partition(_END)[0] + _END


def shown_cells():
    """(function, model) to ("works" or "refused", the note or ""), as the page has them."""
    lines = [line[1:-1] for line in shown().splitlines() if line.startswith("|")]
    notes = dict(re.findall(r"^(\d+)\. `(.*)`$", shown(), re.M))
    head, _, *rows = ([part.strip() for part in line.split(" | ")] for line in lines)
    cells = {}
    for function, *row in rows:
        for name, text in zip(head[1:], row, strict=True):
            works, _, number = text.partition("[")
            cells[function, name] = works.strip(), notes.get(number.rstrip("]"), "")
    return cells


def main():
    found, cells, words = cases(), shown_cells(), sys.argv[1:] or [""]
    functions = [name for name in FUNCTIONS if any(word in name for word in words)]
    for name, case in found.items():
        for function in functions:
            cells[function, name] = cell(function, case)[:2]
            print(name, function, *cells[function, name], sep="  ", flush=True)
    text = PAGE.read_text(encoding="utf-8").replace(shown(), table(cells, list(found)))
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
