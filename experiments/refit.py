"""Refits the encoder of every checkpoint of a workdir: self-consistent, control and optimal.

python -m experiments.refit --workdir=runs/digits

Refits of one checkpoint take nothing from those of another, and may be made in copies of the
workdir on other machines: an entry is one folder of checkpoints/self_consistent, control or
optimal, and can be carried back.
"""

from absl import flags

from experiments import options, phases, program
from gapjax import checkpoints


def refit(run: phases.Run) -> None:
    """The refits alone."""
    given = flags.FLAGS.checkpoints
    saved = checkpoints.numbers(run.workdir.checkpoints / "train")
    epochs = None if given is None else options.checkpoints_of("checkpoints", given, saved)
    phases.refit_phase(run, epochs)


if __name__ == "__main__":
    options.define_place()
    flags.DEFINE_list("checkpoints", None, "Which to refit, e.g. 100,500; all by default.")
    program.run_program(refit, new_runs=False)
