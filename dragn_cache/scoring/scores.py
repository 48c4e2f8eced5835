"""The scores of predictions, each declared once: name, words for people, average, direction.

Tables, files and figures take names and words from here; `metrics.evaluate` says how each is
computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Score:
    """One score of B bags and L labels.

    Attributes:
        name: its key in metrics.json and its column in tables.
        label: its name for people, in figures.
        average: ``macro``, the mean over labels of each label's own; ``micro``, of all pairs of bag
            and label pooled; ``samples``, the mean over bags of each bag's own.
        higher_is_better: whether better predictions have a higher one.
        highest: the largest value that it can have; the smallest of all is 0.
    """

    name: str
    label: str
    average: Literal["macro", "micro", "samples"]
    higher_is_better: bool = True
    highest: float = 1.0


AUC_MACRO = Score("auc_macro", "macro AUC", "macro")
F1_MACRO = Score("f1_macro", "macro F1", "macro")
F1_MICRO = Score("f1_micro", "micro F1", "micro")
PRECISION_MACRO = Score("precision_macro", "macro precision", "macro")
RECALL_MACRO = Score("recall_macro", "macro recall", "macro")
SENSITIVITY = Score("sensitivity", "sensitivity", "micro")
SPECIFICITY = Score("specificity", "specificity", "micro")
F1_SAMPLES = Score("f1_samples", "F1 of bags", "samples")
AUC_SAMPLES = Score("auc_samples", "AUC of bags", "samples")
MAP = Score("map", "mAP", "macro")
ACCURACY = Score("accuracy", "accuracy", "samples")
PRECISION_MACRO_REFERENCE = Score(
    "precision_macro_reference", "macro precision, unpredicted labels as 1", "macro"
)
# Of classes it is the sum over classes, which reaches 2.
BRIER = Score("brier", "Brier score", "micro", higher_is_better=False, highest=2.0)
ECE = Score("ece", "calibration error", "micro", higher_is_better=False)
ECE_MACRO = Score("ece_macro", "macro calibration error", "macro", higher_is_better=False)

# In the order of metrics.json. Scores with bootstrap intervals:
SCORES = (
    AUC_MACRO,
    F1_MACRO,
    F1_MICRO,
    PRECISION_MACRO,
    RECALL_MACRO,
    SENSITIVITY,
    SPECIFICITY,
    F1_SAMPLES,
    AUC_SAMPLES,
    MAP,
    ACCURACY,
    PRECISION_MACRO_REFERENCE,
    BRIER,
)
CALIBRATION_SCORES = (ECE, ECE_MACRO)  # and without
BY_NAME: Mapping[str, Score] = {score.name: score for score in (*SCORES, *CALIBRATION_SCORES)}

MAIN_SCORES = (AUC_MACRO, MAP, F1_MACRO)  # of a training
COMPARED_SCORES = (ACCURACY, AUC_MACRO, F1_MACRO, MAP)  # of methods, paired by fold
