"""Trains a VAE and saves its checkpoints: the first phase of experiments.reproduce, same flags.

python -m experiments.train --preset=digits --workdir=runs/digits
"""

import time

import gapjax
from experiments import options, program, stores
from experiments.run import Run, progress_bar
from experiments.stores import state_like, valid_entries
from gapjax import checkpoints
from gapjax.fit.loop import Curve, Progress
from gapjax.fit.step import TrainState, steps_per_epoch

_BETWEEN = "train_partial"  # the store of states between checkpoints, by optimizer step


def train_phase(run: Run) -> None:
    """Joint training, with a checkpoint of the whole state at every interval.

    A checkpoint that is missing or damaged is made from the newest good state before it.
    """
    config = run.config
    like = state_like(run)
    good = valid_entries(run, "train", like)
    missing = [epoch for epoch in run.epochs if epoch not in good]
    if not missing:
        return
    source = gapjax.data_source(run.dataset.train)
    steps = steps_per_epoch(source.num_examples, config.batch_size)
    optimizer = gapjax.adam(config.learning_rate)
    store, every = run.workdir.checkpoints / "train", run.saving.every
    whole = [epoch for epoch in good if not checkpoints.is_dropped(store, epoch)]
    saved = {epoch * steps: ("train", epoch) for epoch in whole}
    between = valid_entries(run, _BETWEEN, like, "an older one is used")
    saved |= {step: (_BETWEEN, step) for step in between if step not in saved}
    newest = max((step for step in saved if step < missing[0] * steps), default=0)

    def log(epoch: int, bpd: float) -> None:
        bar(epoch, bpd)
        run.workdir.log("train", epoch, {"loss_bpd": bpd})

    def stop_if_interrupted(progress: Progress) -> None:
        if run.interrupted():
            save_between(run, progress, clock)
            raise KeyboardInterrupt

    with progress_bar(run, "train", config.num_epochs, newest // steps, source.num_examples) as bar:
        progress, done = None, 0
        for epoch in missing:
            clock = time.monotonic()
            newest = max((step for step in saved if step < epoch * steps), default=0)
            if newest > done:
                where, number = saved[newest]
                state, metadata = stores.load(run, where, number, like)
                clock -= metadata["seconds"] if where == _BETWEEN else 0
                progress, done = _resumed(state, metadata.get("epoch_nats", 0.0)), newest
            again = range(done // steps + 1, epoch + 1)
            run.workdir.forget(
                lambda entry, again=again: entry["phase"] == "train" and entry["epoch"] in again
            )
            for stop in [stop for stop in again if stop == epoch or (every and stop % every == 0)]:
                state, _ = gapjax.train(
                    run.vae, source, run.key("train"), num_epochs=stop,
                    batch_size=config.batch_size, optimizer=optimizer, resume=progress,
                    on_epoch=log, on_chunk=stop_if_interrupted,
                )  # fmt: skip
                progress = _resumed(state)
                if stop < epoch:
                    save_between(run, progress, clock)
            stores.save(run, "train", epoch, state, clock)
            done = epoch * steps


def save_between(run: Run, progress: Progress, clock: float) -> None:
    """Saves a state of joint training that is no checkpoint; the newest --keep of these stay."""
    store, step = run.workdir.checkpoints / _BETWEEN, int(progress.state.step)
    stores.save(
        run, _BETWEEN, step, progress.state, clock, step=step, epoch_nats=progress.epoch_nats
    )
    keep = run.saving.keep
    checkpoints.prune(store, lambda saved: [number for number in saved if number <= step][:-keep])


def _resumed(state: TrainState, epoch_nats: float = 0.0) -> Progress:
    return Progress(state, None, Curve(), epoch_nats, 0)


if __name__ == "__main__":
    options.define_place()
    options.define_run()
    program.run_program(train_phase, new_runs=True)
