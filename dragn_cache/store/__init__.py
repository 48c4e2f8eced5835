"""The feature store: a folder of parts in HDF5 or Zarr v3, keyed by bag. Knows no torch.

``open_store(path)`` reads one; ``docs/store-format.md`` is the normative description of the files.
"""

import lazy_loader

# The names are those of the stub beside; each is imported when it is first asked for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
