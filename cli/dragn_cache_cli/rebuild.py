"""Commands, as text, that make a store again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dragn_cache.store import StoreDescription


def extract_command(description: StoreDescription, out: Path) -> str:
    """The command that makes such a store; its data set and weights are known by name only."""
    features, numerics, plan = (
        description.provenance[kind] for kind in ("features", "numerics", "plan")
    )
    if "imported" in numerics:
        return import_command(description, out)
    settings = features["preprocessing"]
    options: dict[str, Any] = {
        "dataset": description.made_from.get("dataset", "DATASET"),
        "backbone": features["backbone"],
        "weights": description.made_from.get("weights", "WEIGHTS"),
        "taps": ",".join(features["taps"]),
        "grid": features["grid"],
        "size": None if settings["resize_shorter"] else "x".join(map(str, settings["size"])),
        "mean": ",".join(map(str, settings["mean"])),
        "std": ",".join(map(str, settings["std"])),
        "interpolation": settings["interpolation"],
        "rgb": ",".join(settings["rgb"]) if settings["rgb"] else None,
        "channels": settings.get("channels"),
        "intensity": settings.get("intensity"),
        "format": description.format,
        "dtype": numerics["dtype"],
        "device": numerics["device"],
        "precision": numerics["autocast"] or "float32",
        "compute": numerics["compute"],
        "batch-size": numerics["batch_size"],
        "part-instances": plan["part_instances"],
    }
    augmentation = features["augmentation"]
    if augmentation:
        options |= {
            "views": augmentation["views"],
            "augment": ",".join(augmentation["steps"]),
            "seed": augmentation["seed"],
        }
    options["out"] = out
    words = [f"--{name} {shlex.quote(str(v))}" for name, v in options.items() if v is not None]
    return " ".join(["dragn-cache extract", *words])


def import_command(description: StoreDescription, out: Path) -> str:
    """The command that makes a store of imported features; its source is known by name only."""
    made_from, plan = description.made_from, description.provenance["plan"]
    dtypes = {tap.dtype for tap in description.taps}
    encoder = description.provenance["features"].get("backbone", "unknown")
    options = {
        "layout": plan["source_layout"],
        "bags": made_from.get("bags"),
        "encoder": None if encoder == "unknown" else encoder,
        "format": description.format,
        "dtype": dtypes.pop() if len(dtypes) == 1 else None,
        "part-instances": plan["part_instances"],
        "out": out,
    }
    words = [f"--{name} {shlex.quote(str(v))}" for name, v in options.items() if v is not None]
    return " ".join(["dragn-cache import", shlex.quote(made_from.get("source", "SOURCE")), *words])
