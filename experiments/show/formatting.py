"""Numbers as a reader sees them: with the digits that their standard error allows."""

import math
from collections.abc import Sequence
from typing import Any

_SPACE = "\N{NO-BREAK SPACE}"
BESIDE = f"{_SPACE}±{_SPACE}"  # between a number and its standard error


def measured(
    value: float, error: float | None, decimals: int | None = None, plus: bool = False
) -> str:
    """A number and its standard error, rounded to what the error allows."""
    if decimals is None:
        decimals = 4 if error is None else decimals_of(error)
    text = signed(value, decimals, plus)
    return text if error is None else f"{text}{BESIDE}{error:.{decimals}f}"


def decimals_of(error: float, digits: int = 2) -> int:
    """Decimals that show a standard error to so many digits."""
    if not error > 0:
        return 4
    return min(6, max(0, digits - 1 - math.floor(math.log10(error))))


def percent(share: float, error: float | None = None, decimals: int = 0) -> str:
    """A share, with its standard error where there is one."""
    text = signed(100 * share, decimals)
    if error is not None:
        text += f"{BESIDE}{100 * error:.{decimals}f}"
    return f"{text}{_SPACE}%"


def signed(value: float, decimals: int, plus: bool = False) -> str:
    """A number with a true minus sign, and none before a zero."""
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
    """A time as hours, minutes and seconds; what is no number as it is."""
    number = finite(seconds)
    if number is None:
        return str(seconds)
    if number < 60:
        return f"{number:.1f} s"
    minutes, rest = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def at_epochs(epochs: Sequence[int]) -> str:
    """Where something holds: "epoch 200", or "epochs 200, 400"."""
    return f"epoch{'s' if len(epochs) > 1 else ''} {', '.join(map(str, epochs))}"
