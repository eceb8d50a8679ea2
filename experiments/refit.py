"""Refits the encoder of every checkpoint of a workdir: self-consistent, control and optimal.

python -m experiments.refit --workdir=runs/digits
"""

from experiments import options, phases, program


def refit(run: phases.Run) -> None:
    """The refits alone."""
    phases.refit_phase(run)


if __name__ == "__main__":
    options.define_place()
    program.run_program(refit, new_runs=False)
