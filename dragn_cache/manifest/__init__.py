"""Manifests: the instances of each bag, with labels, splits and groups."""

import lazy_loader

# The names are those of the stub beside; each is imported when it is first asked for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
