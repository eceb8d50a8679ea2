"""Presets: the defaults of a run, as plain data. A flag overrides one.

digits        ./launch.sh
              2 to 4 minutes on two cores, under 2 GB. Test BPD is lowest (about .405) near epoch
              150 and about .46 at epoch 500.
grey_digits   ./launch.sh --preset=grey_digits
              The same digits with their 17 levels.
binary_mnist  ./launch.sh --preset=binary_mnist --data_dir=FOLDER
              The paper's figures 1 and 2 (left).
grey_mnist    ./launch.sh --preset=grey_mnist --data_dir=FOLDER
              The paper's figure 2 (right). A refit's batch is the authors': 100 training images
              and 100 samples, for as many steps as 100 epochs in batches of 100 take.
"""

_PAPER_MODEL = {
    "latent_dim": 10,
    "hidden_sizes": (500, 500),
    "batch_size": 100,
    "learning_rate": 1e-3,
    "alpha": 0.5,
    "refit_epochs": 100,
    "optimal_epochs": 1000,
    "binarization_seed": 0,
    "threshold": 0.5,
}
_DIGITS = {**_PAPER_MODEL, "num_epochs": 500, "checkpoint_every": 50, "num_eval_samples": 20}
_MNIST = {**_PAPER_MODEL, "num_epochs": 1000, "checkpoint_every": 100, "num_eval_samples": 10}

PRESETS = {
    "digits": {**_DIGITS, "dataset": "digits"},
    "grey_digits": {**_DIGITS, "dataset": "grey_digits"},
    "binary_mnist": {**_MNIST, "dataset": "binary_mnist"},
    "grey_mnist": {
        **_MNIST,
        "dataset": "mnist",
        "refit_epochs": 200,
        "refit_batch_size": 200,
        "mixture": "stratified",
    },
}
