"""Counts of single cells from .h5ad files."""

import json
import sys

import numpy as np
import pytest
import scipy.sparse
from small_data import load_error

import gapjax
from gapjax import models
from gapjax.data import cells, load_dataset

anndata = pytest.importorskip("anndata")

COUNTS = np.random.default_rng(0).poisson(0.7, (53, 6))
BATCH = np.array(["b", "a"] * 26 + ["b"])
NAMES = [f"cell{number}" for number in range(53)]


def _write(path, x, obs=None, names=NAMES, raw=None, **layers):
    made = anndata.AnnData(x, obs={"batch": BATCH, **(obs or {})}, layers=layers)
    made.obs_names = names
    if raw is not None:
        made.raw = anndata.AnnData(raw)
    made.write_h5ad(path)
    return path


@pytest.mark.parametrize(
    "form", [np.float32, np.int64, scipy.sparse.csr_matrix, scipy.sparse.csc_array]
)
@pytest.mark.parametrize("place", ["layers/counts", "raw/X", "X"])
def test_counts_are_found_and_read_in_pieces(tmp_path, monkeypatch, form, place):
    pieces, dense = [], cells.dense
    monkeypatch.setattr(cells, "_PIECE", 42)  # of 7 cells
    monkeypatch.setattr(cells, "dense", lambda piece: pieces.append(piece.shape) or dense(piece))
    counts, other = COUNTS.copy(), np.log1p(COUNTS)
    counts[40, 3] = 70_000 if place == "X" else 300  # more than fits in the type of those before
    held = form(counts * 1.0) if hasattr(form, "tocsr") else counts.astype(form)
    layers = {"counts": held} if place == "layers/counts" else {}
    raw = held if place == "raw/X" else other if layers else None
    path = _write(tmp_path / "x.h5ad", held if place == "X" else other, raw=raw, **layers)
    dataset = load_dataset(path, batch_key="batch")
    assert max(pieces) == (7, 6) and len(pieces) == 8
    assert dataset.name == "x.h5ad" and dataset.levels is None and dataset.event_shape == (6,)
    assert dataset.train.x.dtype == (np.int32 if place == "X" else np.uint16)
    assert (len(dataset.train.x), len(dataset.test.x)) == (43, 10)
    assert place in dataset.provenance["source"] and str(tmp_path) not in json.dumps(
        dataset.provenance
    )
    of = {tuple(x): batch for x, batch in zip(counts, BATCH, strict=True)}
    for part in (dataset.train, dataset.test):
        assert all(tuple(x) in of for x in part.x)
        np.testing.assert_array_equal(part.context["library"], part.x.sum(1))
    both = np.concatenate([dataset.train.x, dataset.test.x])
    assert sorted(map(tuple, both)) == sorted(map(tuple, counts))


def test_the_split_is_that_of_the_names_or_of_a_column(tmp_path):
    """A cell is of the test set wherever it stands, whatever else the file says of it."""
    first = load_dataset(_write(tmp_path / "x.h5ad", COUNTS), batch_key="batch")
    order = np.random.default_rng(1).permutation(53)
    moved = anndata.AnnData(COUNTS[order], obs={"batch": BATCH[order]})
    moved.obs_names = [NAMES[i] for i in order]
    moved.write_h5ad(tmp_path / "y.h5ad")
    second = load_dataset(tmp_path / "y.h5ad")
    for one, other in ((first.train, second.train), (first.test, second.test)):
        assert sorted(map(tuple, one.x)) == sorted(map(tuple, other.x))
    assert second.train.context.keys() == {"library"}

    split = np.where(np.arange(53) % 3 == 1, "test", "train")
    path = _write(tmp_path / "x.h5ad", COUNTS, obs={"split": split})
    dataset = load_dataset(path, batch_key="batch")
    for part, name in ((dataset.train, "train"), (dataset.test, "test")):
        np.testing.assert_array_equal(part.x, COUNTS[split == name])
        np.testing.assert_array_equal(part.context["batch"], BATCH[split == name] == "b")
    assert dataset.provenance["batches"] == ["a", "b"]
    assert dataset.provenance["sha256"] != load_dataset(path).provenance["sha256"]
    assert "'split'" in load_error(_write(tmp_path / "z.h5ad", COUNTS, obs={"split": BATCH}))


def test_what_is_no_count_is_refused_in_a_line(tmp_path, monkeypatch):
    path = tmp_path / "x.h5ad"
    for bad in (0.5, -1, np.nan, 2.0**31):
        x = COUNTS.astype(float)
        x[50, 2] = bad
        message = load_error(_write(path, x))
        assert f"X of 'x.h5ad' holds {bad}" in message and "layers['counts']" in message
    _write(path, COUNTS)
    assert "no column of obs" in load_error(path, batch_key="donor")
    assert "['batch']" in load_error(path, batch_key="donor")
    assert "levels=2" in load_error(path, levels=2)
    assert "batch_key='batch' does not fit 'digits'" in load_error("digits", batch_key="batch")
    assert "does not exist" in load_error(tmp_path / "y.h5ad")
    missing = anndata.AnnData(COUNTS, obs={"batch": ["a", None] * 26 + ["a"]})
    missing.write_h5ad(path)
    assert "without a batch" in load_error(path, batch_key="batch")
    path.write_bytes(path.read_bytes()[:2000])
    assert "cannot be read" in load_error(path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "extra 'cells'" in load_error(path)


def test_a_count_model_takes_the_parts_as_they_are(tmp_path):
    import jax

    dataset = load_dataset(_write(tmp_path / "x.h5ad", COUNTS), batch_key="batch")
    made = models.count_examples(scipy.sparse.csr_array(dataset.train.x * 1.0))
    np.testing.assert_array_equal(made.x, dataset.train.x)
    assert made.x.dtype == np.uint8
    vae = models.count_vae(6, hidden_sizes=(4,), latent_dim=2, num_batches=2)
    params = vae.init(jax.random.key(0))
    assert gapjax.evaluate(vae, params, jax.random.key(1), dataset.test).per_image.shape == (10,)
