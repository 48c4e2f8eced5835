"""The classical methods by name as far as they are known before they are imported: their options.

A method is a frozen set of its options, so its class derives from the ones here. The command line,
recipes and sweeps read them without loading an array library.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Literal

from annotated_types import Gt

from dragn_cache.errors import SettingError
from dragn_cache.options import Registered, Settings, setting

Normalise = Literal["none", "l1", "l2", "power", "intra"]

option = partial(setting, sweep=True)
NORMALISE = "Normalisation of the encoded bags."


class ClassicalOptions(Settings):
    """Options of every method. C and γ are those of the highest average precision, by label."""

    normalise: Normalise = option(help=NORMALISE)
    pca: int | None = option(
        None, ge=1, help="Principal axes that instances are projected on first; none is none."
    )
    svm: Literal["linear", "rbf"] = option("linear", help="Kernel of the machines.")
    select: Literal["validation", "folds"] = option(
        "validation", help="Bags that C and γ are chosen on: validation, or folds of training."
    )
    c: Annotated[float, Gt(0)] | Literal["search"] = option(
        "search", help="C; a linear machine's is over the mean of ‖x‖²; search: 0.1 to 1000."
    )
    gamma: Annotated[float, Gt(0)] | Literal["search"] = option(
        "search", help="γ of exp(-γ‖x - y‖²); search: 0.1 to 10 over the mean of ‖x - y‖²."
    )

    def require_consistent(self) -> None:
        if self.svm == "linear" and self.gamma != "search":
            raise SettingError(
                "gamma",
                expected="none with svm=linear",
                got=repr(self.gamma),
                remedy="leave it out",
            )


class WordOptions(ClassicalOptions):
    """Options of a method with a vocabulary."""

    words: int | None = option(
        None, ge=1, help="Words; none is a tenth of the training instances, from 2 to 64."
    )


class AverageOptions(ClassicalOptions):
    normalise: Literal["l2", "none"] = option("l2", help=NORMALISE)
    svm: Literal["linear", "rbf"] = option("rbf", help="Kernel of the machines.")
    select: Literal["validation", "folds"] = option(
        "folds", help="Bags that C and γ are chosen on: validation, or folds of training."
    )


class BagOfWordsOptions(WordOptions):
    normalise: Literal["l1", "l2", "power"] = option(
        "l1",
        help="Shares of instances (l1), their roots (power, Hellinger's kernel), norm 1 (l2).",
    )
    svm: Literal["linear", "rbf"] = option("rbf", help="Kernel of the machines.")


class FisherOptions(WordOptions):
    normalise: Literal["power", "l2", "none"] = option(
        "power", help="Square roots and then norm 1 (2010), norm 1, or none (2007)."
    )


class VladOptions(WordOptions):
    normalise: Literal["l2", "power", "intra"] = option(
        "power", help="Norm 1 (l2), after square roots (power) or after each part alone (intra)."
    )


CLASSICAL: Mapping[str, Registered] = {
    "bovw": Registered(
        target="dragn_cache.classical.words:BagOfWords",
        options=BagOfWordsOptions,
        text="How often each word of a k-means codebook occurs in a bag (Csurka et al., 2004).",
    ),
    "fisher": Registered(
        target="dragn_cache.classical.fisher:FisherVectors",
        options=FisherOptions,
        text="How a bag would move a Gaussian mixture's parameters (Perronnin and Dance, 2007).",
    ),
    "svm": Registered(
        target="dragn_cache.classical.average:Average",
        options=AverageOptions,
        text="Mean of a bag's instances, the transfer protocol of AAM.",
    ),
    "vlad": Registered(
        target="dragn_cache.classical.words:Vlad",
        options=VladOptions,
        text="Sums of what separates instances from their words (Jégou et al., 2010).",
    ),
}
