"""dragn-cache: run a frozen CNN once over bags of images, then train aggregators on the cache.

What is in ``__all__`` here and in the packages' own may be relied on; docs/api.md lists it. Names
are imported when they are first used (PEP 562): ``import dragn_cache`` alone loads no torch. Where
each comes from is in ``__init__.pyi``.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
