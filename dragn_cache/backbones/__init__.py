"""Frozen backbones: torchvision's classification networks with taps, preprocessing and digest."""

import lazy_loader

# The names are those of the stub beside; each is imported when it is first asked for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
