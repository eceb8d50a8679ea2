"""The table of what works with what in docs/models.md is what happens; see `draw_what_works`."""

import traceback
from pathlib import Path

import draw_what_works
import pytest

_CASES = draw_what_works.cases()
_PACKAGE = Path(draw_what_works.gapjax.__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("name", _CASES)
def test_a_column_of_the_table_is_what_happens(name):
    """Programs are traced alone here; the table was made by running them."""
    shown = draw_what_works.shown_cells()
    for function in draw_what_works.FUNCTIONS:
        works, note, error = draw_what_works.cell(function, _CASES[name], is_traced=True)
        assert shown.get((function, name)) == (works, note), "run python tests/draw_what_works.py"
        if error is not None:  # a line of ours, not a traceback from inside
            last = traceback.extract_tb(error.__traceback__)[-1]
            assert "\n" not in note
            assert Path(last.filename).is_relative_to(_PACKAGE), note
            assert str(last.line).startswith("raise "), note


def test_the_table_has_no_other_rows_and_columns():
    names = {(function, name) for function in draw_what_works.FUNCTIONS for name in _CASES}
    assert set(draw_what_works.shown_cells()) == names
