"""Results: from nats per image to estimates, gaps and claims."""
