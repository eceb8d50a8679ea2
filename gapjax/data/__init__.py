"""Images: from bytes to a `Dataset`."""
