"""The rows of the atlas as plain data: which model is trained on which data, and for how long.

A row is a file of numbers that anybody can make again, so all that it depends on stands here.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import gapjax
from experiments.config import UsageError
from gapjax import models
from gapjax.examples import count, event_shape, shape_of_one, take
from gapjax.fit.objectives import ConsistentCodes, DenoisingElbo

_IMAGES = ("mixture", "reconstructions")  # recipes to choose from
_COUNTS = ("counts", "thinned")


class Row(NamedTuple):
    """One model on one set of data.

    The budget `epochs` ends at the late checkpoint; the early one has the lowest validation loss
    on the way there.
    """

    data: str  # a name of `DATA`
    model: str  # a name of `_MODELS`
    options: Mapping[str, Any] = {}  # of the model
    epochs: int = 500
    refit_epochs: int = 100  # of every recipe, so that all cost the same
    batch_size: int = 100
    learning_rate: float = 1e-3
    objective: Any = gapjax.elbo  # of the joint training
    # to choose from, beside the paper's and its control; without any there is no learned
    # refinement and no refit on the test set either
    recipes: tuple[str, ...] = _IMAGES
    max_norm: float | None = None  # of the encoder's weights; see `models.with_weight_norm`
    num_samples: int = 20  # of the posterior, for every ELBO
    num_optimal: int = 200  # test and training examples that q* is searched for
    note: str = ""


class Data(NamedTuple):
    """The parts of a data set, as examples; what they are made of."""

    train: Any
    validation: Any
    test: Any
    levels: int | None
    checksum: str


# ---- data --------------------------------------------------------------------


def _named(name: str, folder: str | None = None) -> Callable[[Path], tuple]:
    def load(data_dir: Path) -> tuple:
        path = None if folder is None else data_dir / folder
        dataset = gapjax.load_dataset(name, data_dir=path)
        return dataset.train, dataset.test, dataset.levels

    return load


def _file(path: str, **options: Any) -> Callable[[Path], tuple]:
    def load(data_dir: Path) -> tuple:
        dataset = gapjax.load_dataset(data_dir / path, **options)
        return dataset.train, dataset.test, dataset.levels

    return load


def _cells(path: str, batch: str | None = None, number: int | None = None) -> Callable:
    """Counts of the first cells, without the genes that none has; every fifth is a test cell."""

    def load(data_dir: Path) -> tuple:
        with np.load(data_dir / path) as file:
            counts = file["counts"][:number]
            batches = batch and np.unique(file[batch][:number], return_inverse=True)[1]
        counts = counts[:, counts.any(0)]
        cells = models.count_examples(counts, batches)
        is_test = _every(5, len(counts))
        return take(cells, ~is_test), take(cells, is_test), None

    return load


DATA: Mapping[str, Callable[[Path], tuple]] = {
    "digits": _named("digits"),
    "grey_digits": _named("grey_digits"),
    "binary_mnist": _named("binary_mnist", "mnist"),
    "grey_mnist": _named("grey_mnist", "mnist"),
    "omniglot": _file("omniglot/gapjax.npz", binarization="threshold"),
    "kodak": _file("kodak/gapjax.npz"),
    "starmap": _cells("starmap/counts.npz", "batch"),
    "mouse_brain": _cells("mouse_brain/counts.npz", number=5000),
}


def load(name: str, data_dir: str | None) -> Data:
    """The data of a row. A tenth of the training examples is held out for validation.

    Which ones does not depend on a seed.
    """
    folder = Path(data_dir) if data_dir else Path("data")
    try:
        train, test, levels = DATA[name](folder)
    except FileNotFoundError as error:
        raise UsageError(
            f"--data_dir is {str(folder)!r}, where {error.filename} is not; docs/atlas.md says "
            "where each data set comes from"
        ) from error
    held = _every(10, count(train))
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((train, test)):
        digest.update(np.ascontiguousarray(leaf).data)
    return Data(take(train, ~held), take(train, held), test, levels, digest.hexdigest())


def _every(number: int, size: int) -> np.ndarray:
    """One of so many [size] bool, at places that are always the same."""
    return np.random.default_rng(0).permutation(size) % number == 0


# ---- models ------------------------------------------------------------------


def _mlp(data: Data, options: Mapping) -> gapjax.VAE:
    return gapjax.mlp_vae(shape_of(data), **_pixels(data), **options)


def _hierarchy(data: Data, options: Mapping) -> gapjax.VAE:
    return models.hierarchical_vae(shape_of(data), **_pixels(data), **options)


def _convolution(data: Data, options: Mapping) -> gapjax.VAE:
    given = _pixels(data) | ({"likelihood": "colour"} if len(shape_of(data)) == 3 else {})
    return models.conv_vae(shape_of(data), **given, **options)


def _counts(data: Data, options: Mapping) -> gapjax.VAE:
    contexts = [part.context for part in (data.train, data.validation, data.test)]
    number = max((int(each["batch"].max()) + 1 for each in contexts if "batch" in each), default=0)
    most = max(int(each["library"].max()) for each in contexts)
    return models.count_vae(*shape_of(data), num_batches=number, max_library=most, **options)


_MODELS: Mapping[str, Callable[[Data, Mapping], gapjax.VAE]] = {
    "mlp": _mlp,
    "hierarchy": _hierarchy,
    "convolution": _convolution,
    "counts": _counts,
}


def model(row: Row, data: Data) -> gapjax.VAE:
    """The model of a row."""
    vae = _MODELS[row.model](data, row.options)
    return vae if row.max_norm is None else models.with_weight_norm(vae, row.max_norm)


def shape_of(data: Data) -> tuple[int, ...]:
    """The shape of one x."""
    return event_shape(shape_of_one(data.train))


def _pixels(data: Data) -> dict[str, Any]:
    assert data.levels is not None
    if data.levels == 2:
        return {"likelihood": "bernoulli"}
    return {"likelihood": "discretized_logistic", "levels": data.levels}


# ---- rows --------------------------------------------------------------------

_SMALL = Row("digits", "mlp", epochs=500)
_MNIST = Row(
    "binary_mnist", "mlp", epochs=30, refit_epochs=5, num_samples=5, num_optimal=50,
    recipes=("reconstructions",), note="30 of the paper's 1,000 epochs, for two cores",
)  # fmt: skip
_CELLS = Row("starmap", "counts", epochs=300, refit_epochs=30, recipes=_COUNTS)
_BRAIN = _CELLS._replace(
    data="mouse_brain", epochs=100, refit_epochs=10, note="5,000 of 10,000 cells, for two cores"
)
_TWO_LAYERS = {"latent_dims": (10, 10)}
# Regularization of the encoder in the joint training. The strengths are compared on validation.
_REGULARIZED: Mapping[str, Mapping[str, Any]] = {
    **{f"noise_{scale}": {"objective": DenoisingElbo(scale)} for scale in (0.2, 0.5)},
    **{f"codes_{weight}": {"objective": ConsistentCodes(weight)} for weight in (0.1, 1.0)},
    **{f"norm_{norm}": {"max_norm": norm} for norm in (0.5, 1.0)},
}
_PLAIN: Mapping[str, Any] = {"recipes": (), "num_optimal": 100}

ROWS: Mapping[str, Row] = {
    "digits": _SMALL,
    "grey_digits": _SMALL._replace(data="grey_digits"),
    "digits_hierarchy": _SMALL._replace(model="hierarchy", options=_TWO_LAYERS),
    "digits_top_down": _SMALL._replace(
        model="hierarchy", options=_TWO_LAYERS | {"form": "top_down"}
    ),
    "digits_bottom_up": _SMALL._replace(
        model="hierarchy", options=_TWO_LAYERS | {"form": "bottom_up"}
    ),
    "starmap": _CELLS,
    "starmap_poisson": _CELLS._replace(options={"likelihood": "poisson"}),
    "mouse_brain": _BRAIN,
    "mouse_brain_poisson": _BRAIN._replace(options={"likelihood": "poisson"}),
    "binary_mnist": _MNIST,
    "grey_mnist": _MNIST._replace(data="grey_mnist"),
    "binary_mnist_hierarchy": _MNIST._replace(model="hierarchy", options=_TWO_LAYERS),
    "binary_mnist_bottom_up": _MNIST._replace(
        model="hierarchy", options=_TWO_LAYERS | {"form": "bottom_up"}
    ),
    "omniglot": _MNIST._replace(data="omniglot", epochs=100, refit_epochs=20, note=""),
    "kodak": Row(
        "kodak", "convolution", {"latent_dim": 64, "num_channels": (16, 32)}, epochs=15,
        refit_epochs=3, num_samples=5, num_optimal=20, recipes=(),
        note="a small network and 15 epochs, for two cores",
    ),
    **{f"digits_{name}": _SMALL._replace(**_PLAIN, **how) for name, how in _REGULARIZED.items()},
    **{
        f"binary_mnist_{name}": _MNIST._replace(recipes=(), **how)
        for name, how in _REGULARIZED.items()
    },
}  # fmt: skip
