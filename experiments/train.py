"""Trains a VAE and saves its checkpoints: the first phase of experiments.reproduce, same flags.

python -m experiments.train --preset=digits --workdir=runs/digits
"""

from experiments import options, phases, program


def train(run: phases.Run) -> None:
    """Joint training alone."""
    phases.train_phase(run)


if __name__ == "__main__":
    options.define_place()
    options.define_saving()
    options.define_run()
    program.run_program(train, new_runs=True)
