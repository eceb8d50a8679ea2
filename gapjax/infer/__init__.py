"""Inference at test time: a posterior of its own for each image, with the decoder frozen."""
