"""Measuring a set of images, in nats."""
