"""Commands, as text, that make a store again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dragn_cache.backbone_input import BackboneInput
from dragn_cache.extraction.config import ExtractConfig
from dragn_cache.interop.config import ImportConfig
from dragn_cache.options import declarations
from dragn_cache_cli.options import words

if TYPE_CHECKING:
    from dragn_cache.store import StoreDescription


def rebuild_command(description: StoreDescription, out: Path) -> str | None:
    """The command that makes such a store; its data set and weights are known by name only.

    None for a store that neither an extraction nor an import has made: its provenance says nothing
    that a command could be made of.
    """
    if "imported" in description.provenance["numerics"]:
        return _import_command(description, out)
    if isinstance(description.provenance["features"].get("preprocessing"), Mapping):
        return _extract_command(description, out)
    return None


def _extract_command(description: StoreDescription, out: Path) -> str:
    features, numerics, plan = (
        description.provenance[kind] for kind in ("features", "numerics", "plan")
    )
    settings = {
        name: value
        for name, value in features["preprocessing"].items()
        if name in declarations(BackboneInput)
    }
    if features["preprocessing"]["resize_shorter"]:
        del settings["size"]  # it and the crop come with the weights
    values: dict[str, Any] = {
        "backbone": features["backbone"],
        "taps": features["taps"],
        **settings,
        "weights": description.made_from.get("weights", "WEIGHTS"),
        "grid": features["grid"],
        "format": description.format,
        "dtype": numerics["dtype"],
        "device": numerics["device"],
        "precision": numerics["autocast"] or "float32",
        "compute": numerics["compute"],
        "batch_size": numerics["batch_size"],
        "part_instances": plan["part_instances"],
    }
    augmentation = features["augmentation"]
    if augmentation:
        values |= {
            "views": augmentation["views"],
            "augment": ",".join(augmentation["steps"]),
            "seed": augmentation["seed"],
        }
    dataset = description.made_from.get("dataset", "DATASET")
    options = ["--dataset", dataset, *words(ExtractConfig, values), "--out", str(out)]
    return shlex.join(["dragn-cache", "extract", *options])


def _import_command(description: StoreDescription, out: Path) -> str:
    made_from, plan = description.made_from, description.provenance["plan"]
    dtypes = {tap.dtype for tap in description.taps}
    encoder = description.provenance["features"].get("backbone", "unknown")
    values = {
        "layout": plan["source_layout"],
        "encoder": None if encoder == "unknown" else encoder,
        "format": description.format,
        "dtype": dtypes.pop() if len(dtypes) == 1 else None,
        "part_instances": plan["part_instances"],
    }
    bags = ["--bags", made_from["bags"]] if "bags" in made_from else []
    options = [*words(ImportConfig, values), *bags, "--out", str(out)]
    return shlex.join(["dragn-cache", "import", made_from.get("source", "SOURCE"), *options])
