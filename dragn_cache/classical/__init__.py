"""Classical methods: a bag as one vector, made without gradients, and support vector machines.

Names are imported when they are first used; where each comes from is in ``__init__.pyi``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
