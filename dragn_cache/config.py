"""Small frozen settings objects: what a command was asked for, validated once."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from dragn_cache.augment import Augmentation
from dragn_cache.decisions import check_rule
from dragn_cache.errors import InputError
from dragn_cache.intensity import Intensity

OnError = Literal["stop", "skip"]


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Decoding processes: one for each core, at most 16."""
    return min(16, usable_cores())


@dataclass(frozen=True)
class ExtractConfig:
    """Settings of stage one. None means: the data set's default, else the backbone's.

    Attributes:
        backbone: name of a torchvision classification network.
        weights: ``imagenet``, a torchvision weights name, ``random[:SEED]``, or a file.
        taps: outputs to store, by module name; None is the last map and its spatial mean.
        size: height and width of the backbone's input in pixels.
        grid: pool maps to grid × grid before storing.
        channels: ``rgb`` feeds three of them to the backbone, ``average`` any number through a
            first convolution with averaged weights, ``each`` one after the other, concatenated.
        rgb: channels of the data set that are used.
        intensity: how pixels become 0 to 255, as `Intensity.parse` takes it.
        mean, std, interpolation: the backbone's preprocessing.
        format: how parts are written.
        dtype: how features are stored.
        part_instances: the most instances of a part (4096 and 128 MB bound it anyway).
        batch_size: instances of a forward pass.
        workers: processes that decode; 0 decodes in the main process.
        device: ``cpu``, ``cuda`` or ``cuda:N``; several, separated by commas, share the work.
        on_error: ``stop`` at the first input that cannot be used, or ``skip`` and record it.
        max_errors: with ``skip``, stop after all when more inputs than that cannot be used.
        compute: ``eager``, ``compiled``, or ``auto``: as the store was begun, else what the size
            of the plan and this machine make faster.
        precision: of the network: ``float32``, ``bfloat16`` (autocast), or ``auto``: bfloat16 on
            a GPU.
        views: augmented copies of every instance beside the clean one.
        augment: what makes them differ, as ``flip,rotate90,crop:0.7``; see `Augmentation`.
        seed: of the augmentation.
    """

    backbone: str | None = None
    weights: str = "imagenet"
    taps: tuple[str, ...] | None = None
    size: tuple[int, int] | None = None
    grid: int | None = None
    channels: str | None = None
    rgb: tuple[str, ...] | None = None
    intensity: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    format: Literal["hdf5", "zarr"] = "hdf5"
    dtype: Literal["float16", "float32"] = "float16"
    part_instances: int = 4096
    batch_size: int = 32
    workers: int = field(default_factory=default_workers)
    device: str = "cpu"
    on_error: OnError = "stop"
    max_errors: int | None = None
    compute: Literal["auto", "eager", "compiled"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    views: int = 0
    augment: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("--format", self.format, ("hdf5", "zarr"))
        if self.channels is not None:
            _one_of("--channels", self.channels, ("rgb", "average", "each"))
        if self.intensity is not None:
            Intensity.parse(self.intensity)
        _one_of("--dtype", self.dtype, ("float16", "float32"))
        _one_of("--on-error", self.on_error, ("stop", "skip"))
        _at_least("--part-instances", self.part_instances, 1)
        _at_least("--batch-size", self.batch_size, 1)
        _at_least("--workers", self.workers, 0)
        _at_least("--views", self.views, 0)
        _at_least("--seed", self.seed, 0)
        Augmentation.parse(self.augment, self.views, self.seed)
        _one_of("--compute", self.compute, ("auto", "eager", "compiled"))
        _one_of("--precision", self.precision, ("auto", "float32", "bfloat16"))
        if self.grid is not None:
            _at_least("--grid", self.grid, 1)
        if self.max_errors is not None:
            _at_least("--max-errors", self.max_errors, 0)

    @property
    def augmentation(self) -> Augmentation | None:
        """What makes the augmented views; None without any."""
        return Augmentation.parse(self.augment, self.views, self.seed)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices' names."""
        return tuple(name.strip() for name in self.device.split(","))

    def with_defaults(self, defaults: Mapping[str, Any]) -> ExtractConfig:
        """Fill what was not asked for from a data set's ``[extract]`` table.

        Its taps belong to its backbone: with another backbone they are left out.
        """
        given = {key: value for key, value in asdict(self).items() if value is not None}
        if defaults.get("backbone", self.backbone) != (self.backbone or defaults.get("backbone")):
            defaults = {key: value for key, value in defaults.items() if key != "taps"}
        filled: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in defaults.items()
            if key not in given
        }
        rgb = filled.get("rgb", self.rgb)
        mode = filled.get("channels", self.channels) or "rgb"
        if (
            mode == "rgb" and rgb is not None and len(rgb) == 1
        ):  # one channel feeds all three inputs
            filled["rgb"] = tuple(rgb) * 3
        filled.setdefault("backbone", given.get("backbone", "resnet50"))
        return replace(self, **filled)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of stage two's training.

    Attributes:
        aggregator: name of an aggregator.
        options: its options, for example ``{"unit": "L3Agg"}``.
        tap: tap to train on; None is a map for methods that need maps, else a vector.
        epochs: passes over the training bags.
        batch_size: bags in a step.
        loss: name of a loss, or ``auto``: binary cross-entropy for multi-label tasks,
            cross-entropy for multi-class ones.
        loss_options: its options, for example ``{"gamma": 1.5}``.
        optimizer: ``adamw`` (weight decay decoupled from the gradient), ``adam`` or ``sgd``.
        lr, weight_decay: the optimiser's learning rate and weight decay.
        momentum: of ``sgd``.
        schedule: how the learning rate goes on: ``none``, ``plateau``, ``cosine`` or ``step``.
        schedule_options: its options, for example ``{"patience": 5}``.
        keep: the epoch whose weights are kept: the ``best``, of lowest validation loss, or the
            ``last``, for published protocols of a fixed length and validation sets too small to
            choose.
        patience: training ends after that many epochs without a lower validation loss; 0: never.
        dropout: on the bag's embedding, before the head.
        pos_weight: how much a positive target counts in a multi-label loss: a number, or
            ``balanced``, each label's (N - n) / n where n of the N training bags have it. None is
            1, but ``balanced`` for the losses ``weighted_bce`` and ``frn``.
        stage_mask: where labels that a bag's stage cannot have are masked: in ``train`` they count
            nothing in losses, in ``predict`` their probability is 0, in ``both`` both; None: never.
        stages: for the mask, labels to the stages in which alone they exist.
        scale: ``standard`` standardises each channel by the training instances' moments.
        order: order of instances in training; evaluation always uses the manifest's.
        views: ``random`` draws one of the store's views for every training instance and epoch,
            ``all`` shows every training bag once in each view; evaluation is always on clean ones.
        seed: of the split, the initialisation, dropout, and all that ``shuffle_seed`` is of.
        shuffle_seed: of the order of bags and instances, and their views; None is ``seed``.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        memory: what features may fill, as ``8GB``; ``auto`` is 60 % of what is free. Larger ones
            are streamed from the store in shuffled blocks.
        intervals: bootstrap resamples behind each 95 % interval; 0 leaves them out.
        decision: rule by which probabilities become label sets, see `Decision`.
    """

    aggregator: str = "dragn"
    options: Mapping[str, Any] | None = None
    tap: str | None = None
    epochs: int = 60
    batch_size: int = 16
    loss: str = "auto"
    loss_options: Mapping[str, Any] | None = None
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 3e-4
    weight_decay: float = 1e-2
    momentum: float = 0.9
    schedule: Literal["none", "plateau", "cosine", "step"] = "none"
    schedule_options: Mapping[str, Any] | None = None
    keep: Literal["best", "last"] = "best"
    patience: int = 0
    dropout: float = 0.5
    pos_weight: float | Literal["balanced"] | None = None
    stage_mask: Literal["train", "predict", "both"] | None = None
    stages: Mapping[str, Sequence[str]] | None = None
    scale: Literal["none", "standard"] = "none"
    order: Literal["random", "manifest"] = "random"
    views: Literal["off", "random", "all"] = "off"
    seed: int = 0
    shuffle_seed: int | None = None
    device: str = "cpu"
    memory: str = "auto"
    intervals: int = 1000
    decision: str = "default"

    def __post_init__(self) -> None:
        _one_of("--scale", self.scale, ("none", "standard"))
        _one_of("--order", self.order, ("random", "manifest"))
        _one_of("--views", self.views, ("off", "random", "all"))
        _one_of("--optimizer", self.optimizer, ("adamw", "adam", "sgd"))
        _one_of("--schedule", self.schedule, ("none", "plateau", "cosine", "step"))
        _at_least("--epochs", self.epochs, 1)
        _at_least("--batch-size", self.batch_size, 1)
        _at_least("--patience", self.patience, 0)
        _one_of("--keep", self.keep, ("best", "last"))
        if self.keep == "last" and self.patience:
            raise InputError(
                "--keep last",
                expected="training that does not stop early",
                got=f"--patience {self.patience}",
                remedy="leave one of them out",
            )
        _at_least("--intervals", self.intervals, 0)
        parse_memory(self.memory)
        check_rule(self.decision)
        _at_least("--seed", self.seed, 0)
        _at_least("--shuffle-seed", self.order_seed, 0)
        weight = 1.0 if self.pos_weight in (None, "balanced") else self.pos_weight
        if not isinstance(weight, float | int):
            raise InputError(
                "--pos-weight",
                expected="a number or balanced",
                got=repr(self.pos_weight),
                remedy="change it",
            )
        self._check_stages()
        _within("--pos-weight", weight, 0.0, 1e6)
        _within("--lr", self.lr, 0.0, 1e3)
        _within("--weight-decay", self.weight_decay, 0.0, 1e3)
        _within("--momentum", self.momentum, 0.0, 0.999)
        if self.optimizer != "sgd" and self.momentum != type(self).momentum:
            raise InputError(
                "--momentum",
                expected="--optimizer sgd, which alone reads it",
                got=self.optimizer,
                remedy="leave it out, or choose sgd",
            )
        _within("--dropout", self.dropout, 0.0, 0.999)

    def _check_stages(self) -> None:
        if self.stage_mask is not None:
            _one_of("--stage-mask", self.stage_mask, ("train", "predict", "both"))
        if (self.stage_mask is None) != (self.stages is None):
            given, absent = ("--stage-mask", "--stage-table")[:: -1 if self.stages else 1]
            raise InputError(
                given, expected=f"{absent} as well", got="none", remedy="give both or neither"
            )

    @property
    def masks_training(self) -> bool:
        """Whether labels that a bag's stage cannot have count nothing in losses."""
        return self.stage_mask in ("train", "both")

    @property
    def masks_predictions(self) -> bool:
        """Whether the probability of labels that a bag's stage cannot have is 0."""
        return self.stage_mask in ("predict", "both")

    @property
    def order_seed(self) -> int:
        """Seed of the order of bags and instances, and of their views."""
        return self.seed if self.shuffle_seed is None else self.shuffle_seed

    @property
    def label(self) -> str:
        """The method and its options as a short name: ``dragn-L3Agg``."""
        options = []
        for option, value in (self.options or {}).items():
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            options.append(text if option == "unit" else f"{option}={text}")
        return "-".join([self.aggregator.replace(":", "."), *options])


@dataclass(frozen=True)
class CrossvalConfig:
    """Settings of a cross-validation.

    Attributes:
        train: of every training; its aggregator, options and seed are replaced.
        aggregators: name and options of each method.
        folds: one is for testing, the next for validation, the rest for training.
        seeds: how many times all bags are divided into folds.
        jobs: trainings at the same time; None is one for each core, or one on a GPU.
    """

    train: TrainConfig
    aggregators: tuple[tuple[str, Mapping[str, Any]], ...]
    folds: int = 10
    seeds: int = 5
    jobs: int | None = None

    def __post_init__(self) -> None:
        _at_least("--folds", self.folds, 3)
        _at_least("--seeds", self.seeds, 1)
        if self.jobs is not None:
            _at_least("--jobs", self.jobs, 1)
        _one_of("--views", self.train.views, ("off",))
        labels = [replace(self.train, aggregator=a, options=o).label for a, o in self.aggregators]
        twice = [label for k, label in enumerate(labels) if label in labels[:k]]
        if twice or not labels:
            raise InputError(
                "--aggregator",
                expected="each aggregator once" if twice else "at least one aggregator",
                got=f"{twice[0]} twice" if twice else "none",
                remedy="leave it out once" if twice else "give --aggregator abmil,mean, say",
            )

    @property
    def methods(self) -> dict[str, TrainConfig]:
        """The settings of each method's trainings, by its label."""
        configs = [replace(self.train, aggregator=a, options=o) for a, o in self.aggregators]
        return {config.label: config for config in configs}


def flag(name: str) -> str:
    """The command line's option for a field of `TrainConfig`."""
    named = {
        "options": "--option",
        "loss_options": "--loss-option",
        "schedule_options": "--schedule-option",
        "stages": "--stage-table",
    }
    return named.get(name, f"--{name.replace('_', '-')}")


def parse_memory(text: str) -> int | None:
    """Bytes of ``8GB``, ``500MB`` or ``1000B``; None for ``auto``. A number alone says too little.

    Raises:
        InputError: it is none of these.
    """
    if text == "auto":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]B?|B)", text.upper())
    if found is None or float(found[1]) == 0:
        raise InputError(
            "--memory",
            expected="auto or a size with its unit, as 8GB",
            got=repr(text),
            remedy="correct it",
        )
    return int(float(found[1]) * 1000 ** "BKMGT".index(found[2][0]))


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(
            option, expected=" or ".join(allowed), got=repr(value), remedy="choose one of these"
        )


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(
            option, expected=f"at least {least}", got=str(value), remedy="give a larger number"
        )


def _within(option: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InputError(option, expected=f"{low} to {high}", got=str(value), remedy="change it")
