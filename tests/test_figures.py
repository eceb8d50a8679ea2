"""Figures: what is drawn are the numbers in results; files are whole and the same every time."""

import copy
import doctest
import json
import os
from pathlib import Path

import numpy as np
import pytest

from experiments import results_json, show
from experiments.show import curves, figures, formatting
from experiments.show.bars import LOSSES

_ROOT = Path(show.__file__).parent.parent.parent

_EPOCHS = list(range(50, 501, 50))


def _results(epochs=_EPOCHS, shift=0.0, curves=True):
    """A run on the digits, as the main program writes it."""
    checkpoints = []
    for epoch in epochs:
        test = 0.42 + abs(epoch - 150) * (1.1e-4 if epoch > 150 else 2e-4) + shift
        optimal = 0.415 + shift
        bpd = {
            "train": 0.5 - 0.14 * (epoch / 500) ** 0.6,
            "test": test,
            "optimal": optimal,
            "self_consistent": test - 0.24 * (test - optimal),
            "control": test - 0.02 * (test - optimal),
        }
        checkpoint = {"epoch": epoch}
        for i, (key, value) in enumerate(bpd.items()):
            checkpoint[key] = {"bpd": value, "stderr": 0.004 + 0.0005 * i}
        for i, (key, better, worse) in enumerate(
            [
                ("inference_gap", "optimal", "test"),
                ("gain", "self_consistent", "test"),
                ("gain_over_control", "self_consistent", "control"),
            ]
        ):
            difference = bpd[worse] - bpd[better]
            checkpoint[key] = {"bpd": difference, "stderr": 0.001 + 0.0003 * i}
        checkpoint |= {"gap_closed": 0.24, "gap_closed_stderr": 0.01}
        if curves:
            course = {"epoch": [0, 50, 100], "test_bpd": [test, test - 0.001, test - 0.002]}
            checkpoint["refits"] = {
                "self_consistent": {"curve": course},
                "control": {"curve": {"epoch": [0, 100], "test_bpd": [test, test + 0.001]}},
            }
        checkpoints.append(checkpoint)
    results = {
        "schema": results_json.VERSION,
        "preset": "digits",
        "dataset": "digits",
        "event_shape": [8, 8],
        "config": {"alpha": 0.5},
        "environment": {},
        "checkpoints": checkpoints,
        "claims": [],
        "seconds": {},
        "data": {},
        "num_eval_samples": 20,
        "best": {"epoch": 150, "bpd": 0.42, "stderr": 0.004, "chosen_on": "test"},
        "notes": [],
    }
    return results_json.loads(results_json.dumps(results)) if epochs else results


def _column(results, key, field="bpd"):
    return [c[key][field] for c in results["checkpoints"]]


def _line(axes, key):
    (line,) = [line for line in axes.lines if line.get_label() == key]
    return np.asarray(line.get_xydata())


def _texts(figure):
    return "\n".join(text.get_text() for axes in figure.axes for text in axes.texts)


def test_overview_draws_the_numbers_of_results():
    results = _results()
    before = copy.deepcopy(results)
    figure = figures.overview(results)
    assert results == before
    panels = [("train", "test"), ("test", "optimal")]
    panels.append(("test", "control", "self_consistent", "optimal"))
    assert len(figure.axes) == 3
    for axes, keys in zip(figure.axes, panels, strict=True):
        assert {line.get_label() for line in axes.lines if line.get_label()[0] != "_"} == set(keys)
        for key in keys:
            np.testing.assert_array_equal(
                _line(axes, key), np.transpose([_EPOCHS, _column(results, key)])
            )
    assert figure.axes[1].get_ylim() == figure.axes[2].get_ylim()


def test_figure1a_has_bands_of_the_standard_error_and_marks_the_lowest_test():
    results = _results()
    axes = figures.figure1a(results).axes[0]
    bands = [c.get_paths()[0].vertices for c in axes.collections]
    for key in ("train", "test"):
        bpd, error = np.array(_column(results, key)), np.array(_column(results, key, "stderr"))
        low, high = (bpd - error).min(), (bpd + error).max()
        assert any(
            np.isclose(band[:, 1].min(), low) and np.isclose(band[:, 1].max(), high)
            for band in bands
        )
    assert "epoch 150" in _texts(axes.figure)
    assert [150, 150] in [list(line.get_xdata()) for line in axes.lines]


def test_figure1b_shades_between_test_and_optimal():
    results = _results()
    figure = figures.figure1b(results)
    (gap,) = [c for c in figure.axes[0].collections if c.get_label() == "inference_gap"]
    corners = {(float(x), round(float(y), 9)) for x, y in gap.get_paths()[0].vertices}
    expected = {
        (float(epoch), round(bpd, 9))
        for key in ("test", "optimal")
        for epoch, bpd in zip(_EPOCHS, _column(results, key), strict=True)
    }
    assert corners == expected
    assert "inference\ngeneralization gap" in _texts(figure)


def test_figure2_has_the_errors_of_paired_differences_and_says_so():
    results = _results()
    figure = figures.figure2(results)
    bars = [np.array(c.get_segments()) for c in figure.axes[0].collections]
    heights = [np.ptp(segments[..., 1], axis=1) / 2 for segments in bars]
    wanted = [0, 0, _column(results, "gain", "stderr"), _column(results, "inference_gap", "stderr")]
    for height, error in zip(heights, wanted, strict=True):
        np.testing.assert_allclose(height, np.broadcast_to(error, len(_EPOCHS)), atol=1e-12)
    assert "paired" in figure.get_supxlabel()


def test_optimal_inference_is_labelled_as_fitted_on_the_test_set():
    results = _results()
    for figure in (
        figures.figure1b(results),
        figures.figure2(results),
        figures.refit_curves(results),
    ):
        words = " ".join(_texts(figure).split())
        assert words.count("optimal inference") == words.count("(fitted on the test set)") > 0


def test_labels_at_the_ends_do_not_overlap():
    results = _results()
    for checkpoint in results["checkpoints"]:  # the hardest case: four curves in one place
        for key in ("test", "control", "self_consistent", "optimal"):
            checkpoint[key] = {"bpd": 0.42, "stderr": 0.001}
    figure = figures.figure2(results)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 4
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize("epochs", [[50], [10, 20]])
def test_few_checkpoints(epochs):
    results = _results(epochs, curves=False)
    figure = figures.overview(results)
    np.testing.assert_array_equal(
        _line(figure.axes[2], "optimal")[:, 1], _column(results, "optimal")
    )
    assert figures.refit_curves(results) is None


def test_seeds_give_their_mean_and_deviation():
    runs = [_results(shift=shift) for shift in (-0.01, 0.0, 0.01)]
    runs[0]["checkpoints"].pop()  # a run that is not yet done: only shared checkpoints are drawn
    figure = figures.figure1a(runs)
    expected = np.transpose([_EPOCHS[:-1], _column(runs[1], "test")[:-1]])
    np.testing.assert_allclose(_line(figure.axes[0], "test"), expected)
    spread = [np.ptp(c.get_paths()[0].vertices[:, 1]) for c in figure.axes[0].collections]
    test = expected[:, 1]
    assert any(np.isclose(width, np.ptp(test) + 2 * 0.01) for width in spread)
    assert "3 seeds" in figure.get_supxlabel()


def test_numbers_that_are_not_finite_leave_a_hole():
    results = _results()
    results["checkpoints"][3]["test"] = {"bpd": float("nan"), "stderr": None}
    figure = figures.overview(results)
    assert np.isnan(_line(figure.axes[0], "test")[3, 1])


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="no checkpoint"):
        figures.overview(_results([]))
    with pytest.raises(ValueError, match="share no checkpoint"):
        figures.figure1a([_results([50]), _results([100])])


def test_refit_curves_draw_the_curves_of_the_lowest_and_the_last_checkpoint():
    results = _results()
    figure = figures.refit_curves(results)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title.split()[-1] for title in titles] == ["150", "500"]
    last = results["checkpoints"][-1]
    for key in ("self_consistent", "control"):
        curve = last["refits"][key]["curve"]
        np.testing.assert_array_equal(
            _line(figure.axes[1], key), np.transpose([curve["epoch"], curve["test_bpd"]])
        )
    assert set(_line(figure.axes[1], "optimal")[:, 1]) == {last["optimal"]["bpd"]}


def test_effects_draw_what_is_won_on_each_kind_of_image():
    results = _results()
    assert figures.effects(results) is None
    for i, checkpoint in enumerate(results["checkpoints"]):
        won = lambda kind, refit, i=i: {"bpd": kind + 10 * refit + i / 100, "stderr": 0.25}
        checkpoint["effects"] = {
            name: {"control": won(kind, 1), "self_consistent": won(kind, 2)}
            for kind, name in enumerate(("model", "train", "test"))
        }
    figure = figures.effects(results)
    assert len(figure.axes) == 3
    for kind, axes in enumerate(figure.axes):
        for refit, key in enumerate(("control", "self_consistent"), start=1):
            expected = [kind + 10 * refit + i / 100 for i in range(len(_EPOCHS))]
            np.testing.assert_allclose(_line(axes, key), np.transpose([_EPOCHS, expected]))
        low, high = axes.collections[0].get_segments()[0][:, 1]
        assert high - low == pytest.approx(0.5)
    other = copy.deepcopy(results)
    for checkpoint in other["checkpoints"]:
        checkpoint["effects"]["train"]["control"]["bpd"] += 0.5
    both = figures.effects([results, other]).axes[1]
    np.testing.assert_allclose(
        _line(both, "control")[:, 1], _line(figure.axes[1], "control")[:, 1] + 0.25
    )
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert ["model" in titles[0], "training" in titles[1], "test" in titles[2]] == [True] * 3


def test_image_grid_places_and_scales_images():
    levels = 17
    images = np.zeros((6, 8, 8), np.uint8)
    images[0], images[4] = levels - 1, 8
    figure = figures.image_grid(images, levels, columns=3, row_labels=["data", "<b> & co"])
    (picture,) = figure.axes[0].images
    mosaic = np.asarray(picture.get_array())
    rows, columns = np.array_split(mosaic, 2, axis=0), 3
    cells = [np.array_split(row, columns, axis=1) for row in rows]
    centres = [[cell[cell.shape[0] // 2, cell.shape[1] // 2] for cell in row] for row in cells]
    np.testing.assert_allclose(centres, [[1, 0, 0], [0, 0.5, 0]])
    assert [text.get_text() for text in figure.texts] == ["data", "<b> & co"]
    for text in figure.texts:
        assert text.get_window_extent().x0 >= 0

    labelled = figures.image_grid(
        images, levels, columns=3, row_labels=["data", "model"], column_labels=["1", "2\nb", "3"]
    )
    labelled.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in labelled.texts}
    grid = labelled.axes[0].get_window_extent()
    thirds = [(boxes[label].x0 + boxes[label].x1) / 2 for label in ("1", "2\nb", "3")]
    places = (np.asarray(thirds) - grid.x0) / grid.width
    np.testing.assert_allclose(places, [1 / 6, 3 / 6, 5 / 6], atol=0.02)
    for label in ("1", "2\nb", "3"):
        assert grid.y1 <= boxes[label].y0 and boxes[label].y1 <= labelled.bbox.y1
    assert boxes["data"].y0 > boxes["model"].y1 and boxes["data"].x1 <= grid.x0
    assert labelled.axes[0].images[0].get_array().shape == mosaic.shape

    colour = figures.image_grid(np.zeros((5, 4, 6, 3), np.uint8), 256)
    assert colour.axes[0].images[0].get_array().shape[-1] == 3
    one = figures.image_grid(np.zeros((1, 28, 28, 1), np.uint8), 256)
    assert one.axes[0].images[0].get_array().ndim == 2


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((64,), {}, "shape"),
        ((0, 8, 8), {}, "shape"),
        ((2, 8, 8, 2), {}, "shape"),
        ((5, 8, 8), {"row_labels": ["a", "b"]}, "do not fill"),
        ((2, 8, 8), {"levels": 1}, "levels"),
    ],
)
def test_image_grid_refuses(shape, options, message):
    with pytest.raises(ValueError, match=message):
        figures.image_grid(np.zeros(shape, np.uint8), **{"levels": 2, **options})


def test_save_gives_the_same_bytes_and_leaves_nothing_else(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
        written = figures.save(figures.figure2(_results()), directory / "figure.v2", dpi=60)
        assert written == (directory / "figure.v2.png", directory / "figure.v2.pdf")
        assert sorted(os.listdir(directory)) == ["figure.v2.pdf", "figure.v2.png"]
    png, pdf = ((first / f"figure.v2.{kind}").read_bytes() for kind in ("png", "pdf"))
    assert png.startswith(b"\x89PNG") and pdf.startswith(b"%PDF")
    assert b"CreationDate" not in pdf
    assert png == (second / "figure.v2.png").read_bytes()
    assert pdf == (second / "figure.v2.pdf").read_bytes()


def test_save_that_fails_keeps_the_older_files(tmp_path):
    for kind in ("png", "pdf"):
        (tmp_path / f"figure.{kind}").write_bytes(b"older")

    class Broken:
        def savefig(self, path, **_):
            path.write_bytes(b"half of it")
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        figures.save(Broken(), tmp_path / "figure")
    assert sorted(os.listdir(tmp_path)) == ["figure.pdf", "figure.png"]
    assert {(tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == {b"older"}


def test_no_global_state_is_left_behind():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.figure1a(_results([50]))
    assert dict(matplotlib.rcParams) == before


def _ledger(epochs=(50, 500), model_gap=2.0):
    """A ledger as its program writes it; what is lost grows with the epoch."""
    entry = lambda nats, fitted=False: {"nats": nats, "stderr": 0.1, "fitted_on_test": fitted}
    rows = []
    for epoch in epochs:
        encoders = {
            "as_trained": {
                "elbo": entry(-24.0), "inference_gap_by_refit": entry(epoch / 250, True),
                "capacity_gap": entry(0.1, True), "amortization_gap": entry(0.2, True),
                "bound_gap": entry(3.0),
            },
            "self_consistent": {"elbo": entry(-23.0)},
        }  # fmt: skip
        account = {
            "num_images": 300, "num_available": 360, "log_prob": entry(-20.0),
            "optimal": entry(-21.0, True), "approximation_gap": entry(0.9, True),
            "encoders": encoders,
        }  # fmt: skip
        rows.append(
            {"epoch": epoch, "train": account, "test": account, "model_gap": entry(model_gap)}
        )
    return {"dataset": "digits", "checkpoints": rows, "subset_seed": 0}


@pytest.mark.parametrize("model_gap", [2.0, -0.3])
def test_the_parts_of_a_bar_are_the_losses_and_add_up(model_gap):
    (axes,) = figures.ledger(_ledger(model_gap=model_gap)).axes
    bars = {box.get_label(): box for box in axes.containers if box.get_label() in LOSSES}
    heights = {key: [patch.get_height() for patch in bar] for key, bar in bars.items()}
    expected = {
        "model_gap": [model_gap] * 2, "approximation_gap": [0.9] * 2, "capacity_gap": [0.1] * 2,
        "inference_gap_by_refit": [0.2, 2.0],
    }  # fmt: skip
    assert set(heights) == set(expected)
    for key, nats in expected.items():
        assert heights[key] == pytest.approx(nats), key
    top = max(bar[1].get_y() + bar[1].get_height() for bar in bars.values())
    assert top == pytest.approx(max(model_gap, 0) + 0.9 + 0.1 + 2.0)
    (dash,) = [c for c in axes.collections if c.get_label() == "self_consistent"]
    assert dash.get_segments()[0][0][1] == pytest.approx(-20.0 + 23.0)
    words = " ".join(text.get_text() for text in axes.texts)
    assert "encoder over-fits*" in words and "self-consistent" in words


def test_a_ledger_without_a_refit_draws_what_there_is():
    results = _ledger(epochs=(50,))
    encoder = results["checkpoints"][0]["test"]["encoders"]["as_trained"]
    encoder |= {"inference_gap_by_refit": None, "capacity_gap": None}
    (axes,) = figures.ledger(results).axes
    labels = {box.get_label() for box in axes.containers}
    assert {"model_gap", "approximation_gap"} <= labels
    assert not labels & {"capacity_gap", "inference_gap_by_refit"}
    with pytest.raises(ValueError, match="nothing to draw"):
        figures.ledger({"checkpoints": []})


def test_the_example_of_the_folder_runs_on_committed_results(tmp_path, monkeypatch):
    """Figures of a results.json need no workdir and no program."""
    (tmp_path / "experiments").symlink_to(_ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    tested = doctest.testmod(show, verbose=False)
    assert tested.attempted >= 6 and tested.failed == 0
    assert (tmp_path / "overview.png").stat().st_size > 10_000
    results = json.loads(Path("experiments/results/digits/results.json").read_text())
    for name, key in (("figure1a", "train"), ("figure1b", "optimal"), ("figure2", "control")):
        (axes,) = getattr(figures, name)(results).axes
        np.testing.assert_array_equal(_line(axes, key)[:, 1], _column(results, key))


def test_hundreds_of_checkpoints_leave_a_curve_to_be_seen():
    """Markers with white edges at all of 400 checkpoints covered the lines."""
    figure = figures.figure1a(_results(range(1, 401)))
    (axes,) = figure.axes
    for key in ("train", "test"):
        (line,) = [line for line in axes.lines if line.get_label() == key]
        assert len(line.get_xdata()) == 400
        assert len(line.get_xdata()[:: line.get_markevery()]) <= curves._MOST_MARKERS
    (line,) = [line for line in figures.figure1a(_results()).axes[0].lines[:1]]
    assert line.get_markevery() == 1


def test_a_notebook_shows_a_figure_as_a_picture():
    assert figures.figure1a(_results())._repr_png_().startswith(b"\x89PNG")


def test_many_epochs_are_named_by_their_range():
    assert formatting.at_epochs([200]) == "epoch 200"
    assert formatting.at_epochs([200, 400]) == "epochs 200, 400"
    assert formatting.at_epochs(range(1, 401)) == "400 epochs from 1 to 400"
    assert formatting.listed([50, 100]) == "50, 100"
    assert formatting.listed(range(1, 401)) == "400 from 1 to 400"
    assert formatting.listed([]) == "none"
