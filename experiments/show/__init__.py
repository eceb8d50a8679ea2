"""Results as figures and as a page."""
