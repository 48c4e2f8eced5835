"""Builders of data sets: each writes a manifest folder (dataset.toml, bags.csv, instances.csv)."""
