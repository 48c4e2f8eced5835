"""The aggregators by name as far as they are known before they are imported: options and facts.

This is the only place that says them. A class takes its options, their defaults and their checks
from here, and so do the command line, recipes and sweeps, which need no torch for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge
from pydantic import model_validator

from dragn_cache.errors import SettingError
from dragn_cache.named import Registered
from dragn_cache.options import Settings, setting, value_text

Needs = Literal["map", "vector", "any"]
"""The tap that a method is meant for; "any" where a map and its average give the same result."""


BLOCK_ROWS = 2**16  # more rows than these are given to layers one block after the other


class Need(NamedTuple):
    """Memory of a method; measured, as `tests/aggregators/test_need.py` does it, and rounded up.

    Attributes:
        training: values at the peak of a training step, for each value that its layers make of an
            instance (`Aggregator.row_values`).
        evaluation: the same without gradients.
        blocks: the same in training for rows of layers that are taken in blocks of `BLOCK_ROWS`,
            beside the ``training`` of a block; None where none are.
        less: what makes it need less.
    """

    training: float = 6.0
    evaluation: float = 3.0
    blocks: float | None = None
    less: str = ""


OF_OTHERS = Need()  # of classes of one's own


@dataclass(frozen=True, kw_only=True)
class Method(Registered):
    """An aggregator in the registry.

    Attributes:
        needs: the tap that it is meant for.
        order_sensitive: whether the order of the instances changes the result; an object may
            differ from its class by an option.
        has_attention: whether it weighs instances.
        embedding_among_features: whether the embedding lies in the space of the instances' vectors.
        need: the memory that it needs.
    """

    needs: Needs
    order_sensitive: bool = False
    has_attention: bool = False
    embedding_among_features: bool = False
    need: Need = OF_OTHERS


# --- options -----------------------------------------------------------------------------------

option = partial(setting, sweep=True)
Count = Annotated[int, Ge(1)]
Widths = Count | tuple[Count, ...]


def widths(default: int | tuple[int, ...], help: str) -> Any:
    """An option for the widths of layers, one after the other."""
    expected = "one width or several, each a whole number of at least 1"
    return option(default, expected=expected, help=help)


def label_count() -> Any:
    """The number of labels, which training knows."""
    return setting(ge=1, help="How many labels; training gives it.")


FRONT = "Widths of a ReLU network in front, one or several; empty is none."


class AbmilOptions(Settings):
    attn_dim: int = option(128, ge=1, help="Width of the layer that attention is computed on.")
    embed: Widths = widths((), FRONT)


class AcmilOptions(Settings):
    labels: int = label_count()
    branches: int = option(5, ge=1, help="Attentions, each with a classifier of its own.")
    top: int = option(10, ge=1, help="Of how many of the highest scores some are masked.")
    mask: float = option(0.6, ge=0, lt=1, help="Share of them that is masked in training.")
    embed: Widths = widths(512, FRONT)
    attn_dim: int = option(128, ge=1, help="Width of the gated attention.")


class AnnoFlyOptions(Settings):
    cell: Literal["gru", "lstm"] = option("gru", help="Recurrent cell.")
    hidden: int = option(256, ge=1, help="Units of each direction.")
    bidirectional: bool = option(True, help="Forward and backward states; else forward only.")
    attn_dim: int = option(128, ge=1, help="Width of the layer that attention is computed on.")


class BiLstmOptions(Settings):
    hidden: int = option(1024, ge=1, help="Units of each direction, and width of the result.")
    readout: Literal["mean", "ends"] = option(
        "mean", help="Mean of all steps, as in the code, or the two ends, as in the paper."
    )


class BowOptions(Settings):
    clusters: int = option(64, ge=2, help="Number of words.")


class ClamOptions(Settings):
    labels: int = label_count()
    embed: Widths = widths(512, FRONT)
    attn_dim: int = option(256, ge=1, help="Width of the gated attention.")
    instances: int = option(
        8, ge=1, help="Instances of each end that the instance loss takes, at most."
    )
    instance_weight: float = option(
        0.3, ge=0, lt=1, help="Weight of the instance loss; the bag's has the rest up to 1."
    )
    subtyping: bool = option(
        False, help="Labels exclude each other: attention to an absent one is a counterexample."
    )
    dropout: float = option(0.25, ge=0, lt=1, help="Dropout inside, in training.")


class DeepMimlOptions(Settings):
    labels: int = label_count()
    subconcepts: int = option(20, ge=1, help="Sub-concepts of each label.")


class DeepSetsOptions(Settings):
    embed: Widths = widths(256, "Widths of the network on each instance; empty is none.")
    pool: Literal["sum", "mean", "max"] = option("mean", help="Pooling over the bag.")
    after: Widths = widths(256, "Widths of the network on the pooled bag; empty is none.")


UnitName = Literal["L1Agg", "L2Agg", "L3Agg"]
KernelSize = Literal[1, 3, 5, 7]
BatchNormScope = Literal["round", "window"]
Init = Literal["mean", "default"]
Mixing = Literal["shared", "per_channel", "full"]
Order = Literal["given", "permuted", "clustered"]
Short = Literal["kept", "repeated"]


class UnitOptions(Settings):
    """Options of the unit that DRAGN and HAMIL fold instances with."""

    unit: UnitName = option("L3Agg", help="Unit of 1, 2 or 3 convolutions.")
    kernel: KernelSize = option(3, help="Side of the square kernel in pixels.")
    bn: Literal["off", "on", "auto"] = option(
        "off", help="Batch normalisation after hidden convolutions; auto is on where there is any."
    )
    init: Init = option(
        "mean", help="Start as the mean of the instances, or with PyTorch's own start."
    )

    @model_validator(mode="before")
    @classmethod
    def _older_spelling(cls, values: Any) -> Any:
        """``bn`` was true, false or none, which is auto."""
        older = {True: "on", False: "off", None: "auto"}
        texts = {value_text(value): word for value, word in older.items()}
        if not isinstance(values, Mapping) or "bn" not in values:
            return values
        bn = values["bn"]
        known = bn is None or isinstance(bn, bool)
        return {**values, "bn": older[bn] if known else texts.get(bn, bn)}

    def require_consistent(self) -> None:
        if self.bn == "on" and self.unit == "L1Agg":
            raise SettingError(
                "bn",
                expected="off or auto with unit=L1Agg, which has no hidden convolution",
                got="'on'",
                remedy="leave it out",
            )


class DragnOptions(UnitOptions):
    mixing: Mixing = option(
        "shared",
        help="One kernel for all feature channels, one for each, or all channels into all.",
    )
    bn_scope: BatchNormScope = option(
        "round", help="Over what batch normalisation takes its statistics in training."
    )
    share_rounds: bool = option(True, help="One unit for all rounds; else one for each.")
    rounds: int | None = option(
        None, ge=1, help="With share_rounds=false, how many units; later rounds reuse the last."
    )
    order: Order = option(
        "given", help="Order as it comes, mean over permutations, or leaves of a single-link tree."
    )
    permutations: int | None = option(
        None, ge=1, help="With order=permuted, how many of each bag; none is 8."
    )
    short: Short = option(
        "kept", help="Bags of one or two instances as they are, or repeated to three."
    )
    cap: int | None = option(
        None, ge=1, help="At most so many instances of a bag, evenly spaced; none is all."
    )

    def require_consistent(self) -> None:
        super().require_consistent()
        if self.share_rounds != (self.rounds is None):
            allowed = "a whole number of at least 1 with share_rounds=false"
            raise SettingError(
                "rounds",
                expected="no value with share_rounds=true" if self.share_rounds else allowed,
                got=repr(self.rounds),
                remedy="share_rounds=false, rounds=R makes a unit for each of the first R rounds",
            )
        if self.permutations is not None and self.order != "permuted":
            raise SettingError(
                "permutations",
                expected=f"no value with order={self.order}",
                got=repr(self.permutations),
                remedy="order=permuted, permutations=K takes the mean over K orders of each bag",
            )


class DsmilOptions(Settings):
    labels: int = label_count()
    attn_dim: int = option(128, ge=1, help="Width of the queries.")
    query: Literal["linear", "mlp"] = option(
        "linear", help="Queries by one layer, or by two with ReLU and tanh (later code)."
    )
    value: Literal["identity", "linear", "relu"] = option(
        "linear", help="Values: linear, the features themselves (later code), or linear and ReLU."
    )


class DtfdOptions(Settings):
    labels: int = label_count()
    groups: int = option(4, ge=1, help="Pseudo-bags that a bag becomes, at most.")
    distill: Literal["afs", "max", "maxmin"] = option(
        "afs", help="What a pseudo-bag gives: its pooled feature, MaxS, or MaxMinS."
    )
    embed: Widths = widths(512, FRONT)
    attn_dim: int = option(128, ge=1, help="Width of both gated attentions.")


class HamilOptions(UnitOptions):
    symmetric: bool = option(
        True, help="A merge is the mean over both orders of its two; else order matters."
    )


class ImplocOptions(Settings):
    embed: int = option(192, ge=1, help="Width of the model.")
    layers: int = option(4, ge=1, help="Layers of the encoder.")
    heads: int = option(6, ge=1, help="Heads of each layer.")
    head_dim: int = option(32, ge=1, help="Width of a head.")
    readout: Literal["mean", "cls"] = option(
        "mean", help="Mean of the instances' rows, or a learned row in front."
    )


class NanOptions(Settings):
    blocks: Literal[1, 2] = option(2, help="Attention blocks.")
    unit_length: bool = option(False, help="Scale every instance to length 1 first.")


class NetVladOptions(Settings):
    clusters: int = option(64, ge=2, help="Number of clusters.")
    pixels: bool = option(False, help="Assign the pixels of maps, not their averages.")
    reduce: int | None = option(None, ge=1, help="Width of a linear layer after it; none is none.")


class NoOptions(Settings):
    """Of a method that has none."""


class RrtOptions(Settings):
    embed: int = option(512, ge=1, help="Width of the model, a multiple of heads.")
    heads: int = option(8, ge=1, help="Heads of both attentions.")
    regions: int = option(8, ge=1, help="Regions along each side of the square, at most.")
    kernel: int = option(15, ge=1, help="Queries that EPEG's convolution spans, an odd number.")
    means: int = option(3, ge=1, help="Weighted means that sum up a region.")
    attn_dim: int = option(128, ge=1, help="Width of the gated attention.")

    def require_consistent(self) -> None:
        _require_heads(self.embed, self.heads)
        if self.kernel % 2 == 0:
            raise SettingError(
                "kernel",
                expected="an odd number",
                got=str(self.kernel),
                remedy=f"give kernel={self.kernel + 1}",
            )


class SetTransformerOptions(Settings):
    embed: int = option(128, ge=1, help="Width of the model, a multiple of heads.")
    heads: int = option(4, ge=1, help="Heads of every block.")
    layers: int = option(2, ge=1, help="Blocks before the pooling.")
    inducing: int | None = option(
        None, ge=1, help="Inducing points of each block, for time linear in the bag; none is none."
    )

    def require_consistent(self) -> None:
        _require_heads(self.embed, self.heads)


class SiOptions(Settings):
    labels: int = label_count()
    test: Literal["max", "mean"] = option(
        "max", help="What a bag's probability is of its instances'."
    )
    task: Literal["multilabel", "multiclass"] = setting(
        "multilabel", help="Whether labels exclude each other; training gives it."
    )


class SpocOptions(Settings):
    spatial_prior: bool = option(True, help="Weigh a map's pixels by a Gaussian in its centre.")
    whiten: int | None = option(
        None, ge=1, help="Principal components that are kept and whitened; none is no PCA."
    )


class TransmilOptions(Settings):
    embed: int = option(512, ge=1, help="Width of the model, a multiple of heads.")
    heads: int = option(8, ge=1, help="Heads of both layers.")
    landmarks: int = option(
        256, ge=1, help="Landmarks of Nyström's attention; that of smaller bags is exact."
    )

    def require_consistent(self) -> None:
        _require_heads(self.embed, self.heads)


def _require_heads(embed: int, heads: int) -> None:
    if embed % heads:
        raise SettingError(
            "embed",
            expected=f"a multiple of heads, {heads}",
            got=str(embed),
            remedy=f"give embed={heads * max(1, round(embed / heads))}",
        )


# --- registry ----------------------------------------------------------------------------------

AGGREGATORS: Mapping[str, Method] = {
    "abmil": Method(
        target="dragn_cache.aggregators.abmil:Abmil",
        options=AbmilOptions,
        text="Mean of a bag's instances weighted by attention (Ilse et al., 2018).",
        needs="any",
        has_attention=True,
        need=Need(3.3, 2.2, 1.2),
    ),
    "acmil": Method(
        target="dragn_cache.aggregators.acmil:Acmil",
        options=AcmilOptions,
        text="Several gated attentions made to differ, their highest masked (Zhang et al., 2024).",
        needs="any",
        has_attention=True,
        need=Need(3.7, 1.6, 1.2, less="smaller embed and attn_dim"),
    ),
    "annofly": Method(
        target="dragn_cache.aggregators.annofly:AnnoFly",
        options=AnnoFlyOptions,
        text="A recurrent network and attention over its states (AnnoFly, Yang et al., 2019).",
        needs="any",
        order_sensitive=True,
        has_attention=True,
        need=Need(7.0, 0.7, less="a smaller hidden, or bidirectional=false"),
    ),
    "bilstm": Method(
        target="dragn_cache.aggregators.bilstm:BiLstm",
        options=BiLstmOptions,
        text="A two-layer bidirectional LSTM over the instances, FRN's head.",
        needs="any",
        order_sensitive=True,
        need=Need(3.7, 0.6, less="a smaller hidden"),
    ),
    "bow": Method(
        target="dragn_cache.aggregators.bow:Bow",
        options=BowOptions,
        text="A histogram of learned words, softly counted over all pixels of a bag (AAM).",
        needs="map",
        need=Need(3.3, 3.3, less="fewer clusters"),
    ),
    "clam_mb": Method(
        target="dragn_cache.aggregators.clam:ClamMb",
        options=ClamOptions,
        text="CLAM with a gated attention and a classifier for each label (Lu et al., 2021).",
        needs="any",
        has_attention=True,
        need=Need(6.0, 1.6, 0.8, less="smaller embed and attn_dim"),
    ),
    "clam_sb": Method(
        target="dragn_cache.aggregators.clam:ClamSb",
        options=ClamOptions,
        text="Gated attention whose extremes teach instance classifiers (CLAM, Lu et al., 2021).",
        needs="any",
        has_attention=True,
        need=Need(5.5, 1.6, 0.8, less="smaller embed and attn_dim"),
    ),
    "deepmiml": Method(
        target="dragn_cache.aggregators.deepmiml:DeepMiml",
        options=DeepMimlOptions,
        text="Largest score of each label's sub-concepts over instances (Feng and Zhou, 2017).",
        needs="any",
        need=Need(6.5, 1.3, less="fewer subconcepts"),
    ),
    "deepsets": Method(
        target="dragn_cache.aggregators.deepsets:DeepSets",
        options=DeepSetsOptions,
        text="A network on each instance, a pooling, and another network (Zaheer et al., 2017).",
        needs="any",
        need=Need(2.2, 1.4, 0.6, less="a smaller embed"),
    ),
    "dragn": Method(
        target="dragn_cache.aggregators.dragn:Dragn",
        options=DragnOptions,
        text="Each three neighbouring instances are folded into one, again and again (DRAGN).",
        needs="map",
        order_sensitive=True,
        embedding_among_features=True,
        need=Need(less="cap=4096, say, which takes so many instances of a bag, evenly spaced"),
    ),
    "dsmil": Method(
        target="dragn_cache.aggregators.dsmil:Dsmil",
        options=DsmilOptions,
        text="Attention by resemblance to each label's critical instance (Li et al., 2021).",
        needs="any",
        has_attention=True,
        need=Need(2.2, 1.7, 0.7, less="a smaller attn_dim"),
    ),
    "dtfd": Method(
        target="dragn_cache.aggregators.dtfd:Dtfd",
        options=DtfdOptions,
        text="Attention in pseudo-bags, then over what they give (DTFD-MIL, Zhang et al., 2022).",
        needs="any",
        order_sensitive=True,
        has_attention=True,
        need=Need(3.3, 1.3, 0.8, less="smaller embed and attn_dim"),
    ),
    "gated_abmil": Method(
        target="dragn_cache.aggregators.abmil:GatedAbmil",
        options=AbmilOptions,
        text="Mean of a bag's instances weighted by gated attention (Ilse et al., 2018).",
        needs="any",
        has_attention=True,
        need=Need(3.8, 1.8, 0.9),
    ),
    "hamil": Method(
        target="dragn_cache.aggregators.hamil:Hamil",
        options=HamilOptions,
        text="Instances merge two by two along a tree, the most similar first (Tu et al., 2021).",
        needs="map",
        embedding_among_features=True,
    ),
    "imploc": Method(
        target="dragn_cache.aggregators.imploc:Imploc",
        options=ImplocOptions,
        text="A transformer encoder without positions, then a mean (ImPLoc, Long et al., 2020).",
        needs="any",
        need=Need(2.4, 2.2, less="a smaller embed, or fewer layers"),
    ),
    "max": Method(
        target="dragn_cache.aggregators.max:Max",
        options=NoOptions,
        text="Maximum over a bag's instances, channel by channel (MVCNN, Su et al., 2015).",
        needs="any",
        need=Need(0.0, 0.0),
    ),
    "mean": Method(
        target="dragn_cache.aggregators.mean:Mean",
        options=NoOptions,
        text="Mean of a bag's instances.",
        needs="any",
        need=Need(0.0, 0.0),
    ),
    "nan": Method(
        target="dragn_cache.aggregators.nan:Nan",
        options=NanOptions,
        text="Attention by a learned query, then by one of the result (NAN, Yang et al., 2017).",
        needs="any",
        has_attention=True,
        need=Need(3.3, 3.3),
    ),
    "netvlad": Method(
        target="dragn_cache.aggregators.netvlad:NetVlad",
        options=NetVladOptions,
        text="How instances lie around clusters' centres (NetVLAD, Arandjelović et al., 2016).",
        needs="any",
        need=Need(1.5, 1.3, less="fewer clusters"),
    ),
    "rrt": Method(
        target="dragn_cache.aggregators.rrt:Rrt",
        options=RrtOptions,
        text="Attention in and across regions of instances, then pooling (Tang et al., 2024).",
        needs="any",
        order_sensitive=True,
        has_attention=True,
        need=Need(2.6, 2.0, less="more regions, a smaller embed, or fewer heads"),
    ),
    "set_transformer": Method(
        target="dragn_cache.aggregators.set_transformer:SetTransformer",
        options=SetTransformerOptions,
        text="Instances attend to each other, one seed to all of them (Lee et al., 2019).",
        needs="any",
        has_attention=True,
        need=Need(2.6, 1.2, less="a smaller embed, or fewer layers"),
    ),
    "si": Method(
        target="dragn_cache.aggregators.si:Si",
        options=SiOptions,
        text="A classifier of single instances, and the maximum or mean of its probabilities.",
        needs="any",
        need=Need(10.0, 5.0),
    ),
    "spoc": Method(
        target="dragn_cache.aggregators.spoc:Spoc",
        options=SpocOptions,
        text="Sum of all features, maps' centres counting most (Babenko and Lempitsky, 2015).",
        needs="map",
        need=Need(0.0, 0.0),
    ),
    "transmil": Method(
        target="dragn_cache.aggregators.transmil:Transmil",
        options=TransmilOptions,
        text="Two attention layers, a class token, positions from a square (Shao et al., 2021).",
        needs="any",
        order_sensitive=True,
        need=Need(3.6, 1.8, less="embed=128, which needs about a quarter"),
    ),
}
