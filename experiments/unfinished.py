"""Refits that are under way, as a store keeps them: arrays as a pytree, and what is JSON."""

from collections.abc import Sequence

from gapjax.fit.loop import Curve, Progress
from gapjax.fit.steps import TrainState


def as_list(progress: Progress | list[Progress]) -> list[Progress]:
    """What `on_chunk` is given: one refit, or all of a sweep."""
    return progress if isinstance(progress, list) else [progress]


def packed(several: Sequence[Progress]) -> tuple[list[dict], list[dict]]:
    """What is saved of refits: their arrays, and the rest, which goes into the entry's record."""
    arrays = [{"state": one.state, "encoders": one.encoders} for one in several]
    facts = [
        {"curve": list(one.curve), "epoch_nats": one.epoch_nats, "plateaus": one.plateaus}
        for one in several
    ]
    return arrays, facts


def packed_like(state: TrainState, number: int) -> list[dict]:
    """The shapes of the arrays of so many refits, for restoring them.

    Args:
      state: the shapes of one's state.
      number: how many refits are one entry.
    """
    encoder = state.params.encoder
    one = {"state": state, "encoders": {"best": encoder, "averaged": encoder}}
    return [one] * number


def unpacked(arrays: Sequence[dict], facts: Sequence[dict]) -> list[Progress]:
    """The refits that `packed` was given."""
    return [
        Progress(
            one["state"], one["encoders"], Curve(*known["curve"]), known["epoch_nats"],
            known["plateaus"],
        )
        for one, known in zip(arrays, facts, strict=True)
    ]  # fmt: skip
