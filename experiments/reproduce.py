"""Trains a VAE, refits every checkpoint's encoder, evaluates, draws: the paper's figures.

python -m experiments.reproduce --preset=digits --workdir=runs/digits

The same command on the same workdir resumes. Read report.html first.
"""

from absl import flags

from experiments import ledger, options, program, stores
from experiments.draw import draw_phase
from experiments.evaluate import evaluate_phase
from experiments.refit import refit_phase
from experiments.run import Run
from experiments.train import train_phase


def reproduce(run: Run) -> None:
    """All phases, in order."""
    train_phase(run)
    refit_phase(run)
    results = evaluate_phase(run)
    if flags.FLAGS.ledger:
        print(ledger.table(ledger.ledger_phase(run, ledger.settings_from_flags(flags.FLAGS))))
    report = draw_phase(run, results)
    stores.drop_weights(run)
    print(results["notes"][0])
    for claim in results["claims"]:
        verdict = {True: "holds", False: "DOES NOT HOLD", None: "NOT JUDGED"}[claim["holds"]]
        value = "-" if claim["value"] is None else f"{claim['value']:.4g}"
        print(f"{verdict:14} {claim['claim']}: {value}. {claim['detail']}")
    print(f"report: {report}")


if __name__ == "__main__":
    options.define_place()
    options.define_run()
    flags.DEFINE_bool("ledger", False, "Also measure where every nat goes; see the report.")
    ledger.define_flags()
    program.run_program(reproduce, new_runs=True, check=ledger.check_flags)
