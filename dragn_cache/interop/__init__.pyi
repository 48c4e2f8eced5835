from .exporting import ExportReport, export_features
from .importing import ImportReport, import_features
from .layouts import SOURCES, TARGETS, Glimpse, find_layout, recognise

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
