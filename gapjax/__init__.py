"""gapjax: measure and close the generalization gap of amortized inference.

`__init__.pyi` has the public names. `import gapjax` imports neither JAX nor any other large
library: a name is imported when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
