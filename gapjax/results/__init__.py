"""Results: from nats per image to estimates and gaps."""
