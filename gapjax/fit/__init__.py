"""Fitting parameters to a source of x."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules=["derived_sources", "objectives", "recipes", "sources"]
)
