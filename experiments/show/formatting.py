"""Numbers as text, rounded according to their standard errors."""

import math
from collections.abc import Sequence
from typing import Any

_SPACE = "\N{NO-BREAK SPACE}"
_MOST_NAMED = 10  # epochs one by one in a sentence
BESIDE = f"{_SPACE}±{_SPACE}"  # between a number and its standard error


def measured(value: float, error: float | None, decimals: int, plus: bool = False) -> str:
    """A number and its standard error, where that is known, both with as many decimals."""
    text = signed(value, decimals, plus)
    return text if error is None else f"{text}{BESIDE}{error:.{decimals}f}"


def decimals_of(error: float, digits: int = 2) -> int:
    """The number of decimals, at most 6, that shows a standard error to `digits` digits."""
    if not error > 0:
        return 4
    return min(6, max(0, digits - 1 - math.floor(math.log10(error))))


def percent(share: float, error: float | None = None, decimals: int = 0) -> str:
    """A share in percent, with its standard error if that is given."""
    text = signed(100 * share, decimals)
    if error is not None:
        text += f"{BESIDE}{100 * error:.{decimals}f}"
    return f"{text}{_SPACE}%"


def signed(value: float, decimals: int, plus: bool = False) -> str:
    """A number with a typographic minus sign, and no sign if it rounds to zero."""
    text = f"{value:{'+' if plus else ''}.{decimals}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def finite(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def duration(seconds: Any) -> str:
    """A time as hours, minutes and seconds; a value that is not a number is not converted."""
    number = finite(seconds)
    if number is None:
        return str(seconds)
    if number < 60:
        return f"{number:.1f} s"
    minutes, rest = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]], first: int, rest: int) -> str:
    """A table as plain text; `first` and `rest` are the widths of its columns.

    The first column is aligned to the left where it holds names, to the right where numbers.
    """
    lines = []
    for name, *cells in (heads, *rows):
        start = f"{name:>{first}}" if name.strip().isdigit() else f"{name:{first}}"
        lines.append(start + "".join(f"{cell:>{rest}}" for cell in cells))
    return "\n".join(lines)


def at_epochs(epochs: Sequence[int]) -> str:
    """Epochs as text: "epoch 200", or "epochs 200, 400"; many as "12 epochs from 5 to 200"."""
    if len(epochs) > _MOST_NAMED:
        return f"{len(epochs)} epochs from {min(epochs)} to {max(epochs)}"
    return f"epoch{'s' if len(epochs) > 1 else ''} {listed(epochs)}"


def listed(numbers: Sequence[int]) -> str:
    """Numbers as text: "50, 100", many as "400 from 1 to 400", "none"."""
    if len(numbers) > _MOST_NAMED:
        return f"{len(numbers)} from {min(numbers)} to {max(numbers)}"
    return ", ".join(map(str, numbers)) or "none"
