"""In and out: other tools' feature files become a store, and a store becomes their files.

``docs/interop.md`` says what each layout holds. A layout is one class to read it and one to write
it; ``layouts.py`` lists them by name. torch is imported where a ``.pt`` is read or written only.
"""

from dragn_cache.interop.exporting import ExportReport, export_features
from dragn_cache.interop.importing import ImportReport, import_features
from dragn_cache.interop.layouts import SOURCES, TARGETS, Glimpse, find_layout, recognise

__all__ = [
    "SOURCES",
    "TARGETS",
    "ExportReport",
    "Glimpse",
    "ImportReport",
    "export_features",
    "find_layout",
    "import_features",
    "recognise",
]
