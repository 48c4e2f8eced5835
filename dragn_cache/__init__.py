"""dragn-cache: run a frozen CNN once over bags of images, then train aggregators on the cache."""

__version__ = "0.1.0"
