"""Models of other kinds and of other libraries: python -m experiments.examples.NAME."""

from typing import Any

import jax

import gapjax


def account(
    vae: gapjax.VAE, params: gapjax.VAEParams, train: Any, test: Any, num_epochs: int = 30
) -> None:
    """Prints how much the encoder over-fits, and how much of it a refit without test data wins."""
    key = jax.random.key(1)
    options: Any = {"num_epochs": num_epochs, "batch_size": 60}
    refit = lambda x: gapjax.refit_encoder(vae, params, gapjax.data_source(x), key, **options)
    encoders = {
        "as trained": params,
        "control: refitted on training data": refit(train).params,
        "self-consistent: on training data and samples of the model": gapjax.self_consistent(
            vae, params, train, key, **options
        ).params,
        "optimal inference: refitted on test data": refit(test).params,
    }
    measure = lambda params, x: gapjax.evaluate(vae, params, key, x, num_samples=20)
    print(f"bits per dimension of training data: {measure(params, train).bpd:.4f}; of test data")
    start = measure(params, test)
    for name, each in encoders.items():
        after = measure(each, test)
        won = gapjax.paired_difference(start, after)
        print(f"  {after.bpd:.4f}  won {won.bpd:7.4f} +- {won.stderr:.4f}  {name}")
