"""The rows of the atlas as plain data: which model is trained on which data, and for how long.

A row is a file of numbers that anybody can make again, so all that it depends on stands here.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.sparse
import sklearn.datasets

import gapjax
from experiments.config import UsageError
from gapjax import models
from gapjax.examples import count, event_shape, shape_of_one, take
from gapjax.fit.objectives import ConsistentCodes, DenoisingElbo

_IMAGES = ("mixture", "reconstructions")  # recipes to choose from
_COUNTS = ("counts", "thinned")
_TRIED = ("best", "samples", "sleep", "mixture", "best_control", "larger", "refinement_2")
# The paper's recipe with other shares of model samples; its control has none, and itself 0.5.
_ALPHAS = tuple(f"alpha_{tenth / 10:g}" for tenth in (1, 2, 3, 4, 6, 7, 8, 9, 10))


class Row(NamedTuple):
    """One model on one set of data.

    The budget `epochs` ends at the late checkpoint; the early one has the lowest validation loss
    on the way there, or is that of an epoch which the row names.
    """

    data: str  # a name of `DATA`, or a file
    model: str  # a name of `_MODELS`
    options: Mapping[str, Any] = {}  # of the model
    epochs: int = 500
    refit_epochs: int = 100  # of every recipe, so that all cost the same; 0: each has its own
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
    early: int | None = None  # epoch of the early checkpoint, where it is not the best


class Data(NamedTuple):
    """The parts of a data set, as examples; what they are made of."""

    train: Any
    validation: Any
    test: Any
    levels: int | None
    checksum: str


# ---- data --------------------------------------------------------------------


def _named(name: str, folder: str | None = None, *, few: bool = False) -> Callable:
    """A data set that has a name; `few`: 5,000 of its training images and 1,000 of the others."""

    def load(data_dir: Path) -> tuple:
        path = None if folder is None else data_dir / folder
        return _parts(gapjax.load_dataset(name, data_dir=path), few=few)

    return load


def _file(path: str, *, few: bool = False, **options: Any) -> Callable:
    def load(data_dir: Path) -> tuple:
        return _parts(gapjax.load_dataset(data_dir / path, **options), few=few)

    return load


def _parts(dataset: gapjax.Dataset, *, few: bool) -> tuple:
    train, test = dataset.train, dataset.test
    if few:
        train, test = take(train, spread(len(train), 5000)), take(test, spread(len(test), 1000))
    return train, test, dataset.levels


def _centres(path: str, size: int) -> Callable:
    """The middle [size, size] of every image of a file."""

    def load(data_dir: Path) -> tuple:
        train, test, levels = _file(path)(data_dir)
        begin = (train.shape[1] - size) // 2
        middle = np.s_[:, begin : begin + size, begin : begin + size]
        return np.ascontiguousarray(train[middle]), np.ascontiguousarray(test[middle]), levels

    return load


def _documents(path: str) -> Callable:
    """Counts of words in some of the documents of 10 to 512 words, and of training ones alone."""

    def load(data_dir: Path) -> tuple:
        parts = []
        with np.load(data_dir / path) as file:
            for part, number in (("tr", 5000), ("ts", 1000)):
                pieces = [file[f"{part}_{name}"] for name in ("counts", "indices", "indptr")]
                counts = scipy.sparse.csr_array(tuple(pieces), (len(pieces[2]) - 1, 3072))
                words = np.asarray(counts.sum(1))
                counts = counts[(words >= 10) & (words <= 512)]
                parts.append(models.count_examples(counts[spread(counts.shape[0], number)]))
        return *parts, None

    return load


def _breast_cancer(data_dir: Path) -> tuple:
    """scikit-learn's table of 569 tumours, 30 features each, standardized by training rows."""
    x = sklearn.datasets.load_breast_cancer().data
    is_test = _every(5, len(x))
    mean, deviation = x[~is_test].mean(0), x[~is_test].std(0)
    x = ((x - mean) / deviation).astype(np.float32)
    return x[~is_test], x[is_test], None


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
    "binary_mnist_few": _named("binary_mnist", "mnist", few=True),
    "grey_mnist_few": _named("grey_mnist", "mnist", few=True),
    "fashion_mnist_few": _named("fashion_mnist", "fashion_mnist", few=True),
    "omniglot": _file("omniglot/gapjax.npz", binarization="threshold"),
    "omniglot_few": _file("omniglot/gapjax.npz", binarization="threshold", few=True),
    "kodak": _file("kodak/gapjax.npz"),
    "kodak_16": _centres("kodak/gapjax.npz", 16),
    "starmap": _cells("starmap/counts.npz", "batch"),
    "mouse_brain": _cells("mouse_brain/counts.npz", number=5000),
    "newsgroups": _documents("newsgroups/news20.npz"),
    "breast_cancer": _breast_cancer,
}


def load(name: str, data_dir: str | None) -> Data:
    """The data of a row. A tenth of the training examples is held out for validation.

    Which ones does not depend on a seed.
    """
    folder = Path(data_dir) if data_dir else Path("data")
    try:
        train, test, levels = DATA[name](folder) if name in DATA else _file(name)(Path())
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


def spread(size: int, number: int) -> np.ndarray:
    """So many places [number] of `size`, evenly spread, as data may be sorted."""
    return np.arange(number) * size // max(number, 1)


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
    if data.levels in (2, None):
        return {"likelihood": "bernoulli" if data.levels else "normal"}
    return {"likelihood": "discretized_logistic", "levels": data.levels}


# ---- rows --------------------------------------------------------------------

_SMALL = Row("digits", "mlp", epochs=500)
_MNIST = Row(
    "binary_mnist", "mlp", epochs=30, refit_epochs=5, num_samples=5, num_optimal=50,
    recipes=("reconstructions",), note="30 of the paper's 1,000 epochs, for two cores",
)  # fmt: skip
_MNIST_300 = _MNIST._replace(
    epochs=300, early=100, refit_epochs=10, num_samples=100, num_optimal=100,
    note="300 of the paper's 1,000 epochs, and refits of 10, for two cores",
)  # fmt: skip
_CELLS = Row("starmap", "counts", epochs=300, refit_epochs=30, recipes=_COUNTS)
_BRAIN = _CELLS._replace(
    data="mouse_brain", epochs=100, refit_epochs=10, note="5,000 of 10,000 cells, for two cores"
)
_FEW = _MNIST._replace(
    data="binary_mnist_few",
    epochs=60,
    refit_epochs=10,
    recipes=_IMAGES,
    note="5,000 images, for two cores",
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
    "binary_mnist_300": _MNIST_300,
    "binary_mnist_300_long_refits": _MNIST_300._replace(
        recipes=(), refit_epochs=100, note="300 of the paper's 1,000 epochs, for two cores"
    ),
    "binary_mnist_hierarchy": _MNIST._replace(model="hierarchy", options=_TWO_LAYERS),
    "binary_mnist_bottom_up": _MNIST._replace(
        model="hierarchy", options=_TWO_LAYERS | {"form": "bottom_up"}
    ),
    "omniglot": _MNIST._replace(data="omniglot", epochs=100, refit_epochs=20, note=""),
    **{
        f"{name}_few": _FEW._replace(data=f"{name}_few")
        for name in ("binary_mnist", "grey_mnist", "fashion_mnist", "omniglot")
    },
    "binary_mnist_few_convolution": _FEW._replace(
        model="convolution", options={"num_channels": (8, 16)}, epochs=30, refit_epochs=5
    ),
    "newsgroups": _CELLS._replace(
        data="newsgroups", options={"likelihood": "multinomial", "latent_dim": 20}, epochs=60,
        refit_epochs=10, num_samples=5, num_optimal=50, note="5,000 documents, for two cores",
    ),
    "breast_cancer": _SMALL._replace(
        data="breast_cancer", options={"hidden_sizes": (128,)}, epochs=2000, refit_epochs=400
    ),
    "kodak": Row(
        "kodak", "convolution", {"latent_dim": 64, "num_channels": (16, 32)}, epochs=15,
        refit_epochs=3, num_samples=5, num_optimal=20, recipes=(),
        note="a small network and 15 epochs, for two cores",
    ),
    "kodak_16": Row(
        "kodak_16", "convolution", {"latent_dim": 32, "num_channels": (8, 16)}, epochs=20,
        refit_epochs=3, num_samples=5, num_optimal=20, recipes=("reconstructions",),
        note="16 x 16 of each patch and 20 epochs, for two cores",
    ),
    "digits_recipes": _SMALL._replace(recipes=_TRIED, refit_epochs=0),
    "digits_alpha": _SMALL._replace(recipes=_ALPHAS, num_optimal=100),
    "grey_digits_alpha": _SMALL._replace(data="grey_digits", recipes=_ALPHAS, num_optimal=100),
    **{f"digits_{name}": _SMALL._replace(**_PLAIN, **how) for name, how in _REGULARIZED.items()},
    **{
        f"binary_mnist_{name}": _MNIST._replace(recipes=(), **how)
        for name, how in _REGULARIZED.items()
    },
}  # fmt: skip
