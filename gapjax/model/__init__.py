"""One x and one z: models, likelihoods and bounds, in nats."""
