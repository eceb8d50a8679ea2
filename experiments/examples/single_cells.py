"""Single cells: reads counts from an `.h5ad` file, trains a VAE, refits its encoder.

    python -m experiments.examples.single_cells [FILE.h5ad [BATCH_KEY]]

Without a file it makes one of 500 cells with 60 genes, of 4 types and 2 batches. Needs
`pip install ".[cells]"`.
"""

import math
import sys
import tempfile

import anndata
import jax
import numpy as np
import scipy.sparse

import gapjax
from gapjax import models
from gapjax.examples import count, take


def write_cells(path):
    """Negative binomial counts of cells whose genes depend on their type and batch."""
    rng = np.random.default_rng(0)
    kind, batch = rng.integers(0, 4, 500), rng.integers(0, 2, 500)
    logits = rng.normal(size=(4, 60))[kind] + 0.5 * rng.normal(size=(2, 60))[batch]
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    mean = rng.lognormal(5, 0.4, (500, 1)) * share
    counts = scipy.sparse.csr_matrix(rng.negative_binomial(2, 2 / (2 + mean)), dtype=np.float32)
    anndata.AnnData(counts, obs={"batch": batch.astype(str)}).write_h5ad(path)


def main(path=None, batch_key=None):
    """Prints nats a cell and the gaps to optimal inference, before and after a refit."""
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path, batch_key = f"{folder}/cells.h5ad", "batch"
            write_cells(path)
        data = gapjax.load_dataset(path, batch_key=batch_key)
    num_batches = len(data.provenance.get("batches", []))
    vae = models.count_vae(*data.event_shape, hidden_sizes=(64,), num_batches=num_batches)
    state, _ = gapjax.train(vae, gapjax.data_source(data.train), jax.random.key(0), num_epochs=300)
    params, key = state.params, jax.random.key(1)
    refit = gapjax.self_consistent(vae, params, data.train, key, num_epochs=30)
    optimal = gapjax.optimal_inference(vae, params, data.test, key, num_epochs=150, until=None)

    measure = lambda params, cells: gapjax.evaluate(vae, params, key, cells, num_samples=20)
    train = take(data.train, slice(count(data.test)))
    nats = math.log(2) * math.prod(data.event_shape)  # of one bit per gene
    before, after, best = (measure(each.params, data.test) for each in (state, refit, optimal))
    print(f"train {nats * measure(params, train).bpd:.2f} nats a cell")
    for name, found in (("test", before), ("self-consistent", after), ("optimal", best)):
        gap = gapjax.paired_difference(found, best)
        print(f"{name} {nats * found.bpd:.2f}, gap {nats * gap.bpd:.2f} +- {nats * gap.stderr:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
