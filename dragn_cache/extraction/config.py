"""Settings of stage one: of an extraction, of its estimate, and of the check before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from dragn_cache.backbone_input import DEFAULT_BACKBONE, ExtractDefaults
from dragn_cache.layers import merge
from dragn_cache.machine import default_workers
from dragn_cache.options import MAX_SEED, Settings, declarations, setting
from dragn_cache.store.config import DType, WriteConfig

if TYPE_CHECKING:
    from dragn_cache.images.augment import Augmentation


class CheckConfig(Settings):
    """Settings of the check of a data set."""

    workers: int = setting(2, ge=1, help="Threads that decode.")


class ExtractConfig(WriteConfig, ExtractDefaults):
    """Settings of an extraction.

    None leaves a setting of `ExtractDefaults` to the data set, and then to the backbone.
    """

    weights: str = setting(
        "imagenet",
        kind="features",
        help="imagenet, a torchvision weights name, random[:SEED], or a file.",
    )
    grid: int | None = setting(
        None, ge=1, kind="features", help="Pool maps to GRID×GRID first.", metavar="GRID"
    )
    dtype: DType = setting("float16", kind="numerics", help="How features are stored.")
    views: int = setting(
        0, ge=0, kind="features", help="Augmented copies of every instance beside the clean one."
    )
    augment: str | None = setting(
        None,
        kind="features",
        help="What makes them differ, as flip,rotate90,crop:0.7,noise:0.02.",
        metavar="STEP,…",
    )
    seed: int = setting(0, ge=0, le=MAX_SEED, kind="features", help="Of the augmentation.")
    batch_size: int = setting(32, ge=1, kind="numerics", help="Instances of a forward pass.")
    workers: int = setting(
        default_factory=default_workers,
        ge=0,
        help="Processes that decode; 0 decodes in the main one.",
        shown_default="cores, at most 16",
    )
    device: str = setting(
        "cpu",
        kind="numerics",
        help="cpu, cuda or cuda:N; several, as cuda:0,cuda:1, share the work.",
    )
    compute: Literal["auto", "eager", "compiled"] = setting(
        "auto",
        kind="numerics",
        help="Whether torch.compile speeds up the network.",
        shown_default="auto: as the store was begun, else compiled for large jobs",
    )
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        kind="numerics",
        help="Of the network.",
        shown_default="auto: bfloat16 on a GPU, else float32",
    )
    on_error: Literal["stop", "skip"] = setting(
        "stop", help="What to do at an input that cannot be used: skipped ones are recorded."
    )
    max_errors: int | None = setting(
        None, ge=0, help="With skip: stop after all when more inputs fail."
    )

    def require_consistent(self) -> None:
        _ = self.augmentation

    @property
    def augmentation(self) -> Augmentation | None:
        """The steps that make the augmented views; None without any."""
        if self.augment is None and self.views == 0:
            return None  # without waiting for numpy, as for a command's help

        from dragn_cache.images.augment import Augmentation

        return Augmentation.parse(self.augment, self.views, self.seed)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices' names."""
        return tuple(name.strip() for name in self.device.split(","))

    def with_defaults(self, defaults: Mapping[str, Any]) -> ExtractConfig:
        """Fill what was not asked for from a data set's ``[extract]`` table.

        Its taps belong to its backbone: with another backbone they are left out.
        """
        values = {name: getattr(self, name) for name in declarations(ExtractDefaults)}
        given = {name: value for name, value in values.items() if value is not None}
        own = defaults.get("backbone")
        if self.backbone is not None and own is not None and self.backbone != own:
            defaults = {key: value for key, value in defaults.items() if key != "taps"}
        filled = merge(ExtractDefaults, {"backbone": DEFAULT_BACKBONE}, defaults, given)
        rgb = filled.get("rgb")
        if filled.get("channels", "rgb") == "rgb" and rgb is not None and len(rgb) == 1:
            filled["rgb"] = tuple(rgb) * 3  # one channel feeds all three inputs
        return self.replace(**filled)


class EstimateConfig(ExtractConfig):
    """Settings of an extraction whose cost is estimated."""

    weights: str = setting(
        "random",
        kind="features",
        help="As for extract; random ones cost the same and need no download.",
    )
