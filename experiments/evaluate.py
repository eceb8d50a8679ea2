"""Evaluates every checkpoint of a workdir and its refits; writes results.json, figures, report.

python -m experiments.evaluate --workdir=runs/digits
"""

from experiments import options, phases, program


def evaluate(run: phases.Run) -> None:
    """Evaluation and drawing alone."""
    report = phases.draw_phase(run, phases.evaluate_phase(run))
    print(f"report: {report}")


if __name__ == "__main__":
    options.define_place()
    program.run_program(evaluate, new_runs=False)
