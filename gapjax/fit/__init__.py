"""Fitting: sources of x, optimizers, training and refits of the encoder."""
