"""In and out: other tools' feature files become a store, and a store becomes their files.

``docs/interop.md`` says what each layout holds. A layout is one class to read it and one to write
it; ``layouts.py`` lists them by name. torch is imported where a ``.pt`` is read or written only.
"""

import lazy_loader

# The names are those of the stub beside; each is imported when it is first asked for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
