"""Lossless compression by bits-back coding: what a bound in nats costs in bytes."""
