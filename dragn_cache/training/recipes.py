"""Recipes: the settings that published methods were trained with, each value with its source.

A recipe is a literal dict. Its keys are fields of `TrainConfig`; ``options.unit`` is one entry of
``options``. What a source does not state is not in it and stays at this program's default. Sources
are the papers, or the authors' code where it says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dragn_cache.errors import UnknownNameError


@dataclass(frozen=True)
class Setting:
    """A value and where it is from."""

    value: Any
    source: str


DRAGN = "DRAGN, experiments on HPA"
DRAGN_FLY = "DRAGN, experiments on Drosophila"
DRAGN_CODE = "DRAGN's code"
FRN = "FRN, V.A, third stage"
CLAM_CODE = "CLAM's code, main.py"
DSMIL_CODE = "DSMIL's code, train_tcga.py"
TRANSMIL_CODE = "TransMIL's code, TransMIL.yaml"
DTFD_CODE = "DTFD-MIL's code, Main_DTFD_MIL.py"
ACMIL_CODE = "ACMIL's code, camelyon_config.yml"
ABMIL = "Ilse et al. (2018), classical MIL data sets"
# Neither the paper's appendix nor code for these sets was at hand; the authors' code, for MNIST,
# has Adam, 5e-4 and 1e-4.
ABMIL_SECOND_HAND = ABMIL + ", at second hand: not compared with the paper"

DRAGN_SHARED = {
    "aggregator": Setting("dragn", DRAGN),
    "loss": Setting("bce", DRAGN),
    "optimizer": Setting("adam", DRAGN),
    "lr": Setting(1e-4, DRAGN),
    "weight_decay": Setting(1e-2, DRAGN_CODE),
    "dropout": Setting(0.0, "DRAGN, post-aggregation: one linear layer after the pooling"),
    "epochs": Setting(120, DRAGN_CODE + ", 80 to 120"),
    "schedule": Setting("plateau", DRAGN_CODE),
    "schedule_options.monitor": Setting("f1_macro", DRAGN_CODE),
    "schedule_options.factor": Setting(0.1, DRAGN_CODE),
    "schedule_options.patience": Setting(10, DRAGN_CODE),
}

RECIPES: dict[str, dict[str, Setting]] = {
    "abmil": {
        "aggregator": Setting("abmil", ABMIL),
        "options.embed": Setting((256, 128, 64), ABMIL_SECOND_HAND),
        "options.attn_dim": Setting(64, ABMIL_SECOND_HAND),
        "optimizer": Setting("adam", ABMIL_SECOND_HAND),
        "lr": Setting(5e-4, ABMIL_SECOND_HAND),
        "weight_decay": Setting(5e-3, ABMIL_SECOND_HAND),
        "batch_size": Setting(1, "Ilse et al.'s code: a step is one bag"),
    },
    "acmil": {
        "aggregator": Setting("acmil", ACMIL_CODE),
        "options.branches": Setting(5, "ACMIL's code, README"),
        "options.top": Setting(10, "ACMIL's code, README"),
        "options.mask": Setting(0.6, "ACMIL's code, README"),
        "options.embed": Setting(
            128, "ACMIL's code, Step3_WSI_classification_ACMIL.py, for 384-d features"
        ),
        "optimizer": Setting("adamw", "ACMIL's code, Step3_WSI_classification_ACMIL.py"),
        "lr": Setting(1e-4, ACMIL_CODE),
        "weight_decay": Setting(1e-5, ACMIL_CODE),
        "dropout": Setting(0.0, "ACMIL's code, architecture/transformer.py"),
        "batch_size": Setting(1, ACMIL_CODE),
        "epochs": Setting(50, ACMIL_CODE),
        "schedule": Setting("cosine", "ACMIL's code, half a cosine without warm-up"),
        "schedule_options.min_lr": Setting(0.0, ACMIL_CODE),
    },
    "clam": {
        "aggregator": Setting("clam_sb", CLAM_CODE),
        "optimizer": Setting("adam", CLAM_CODE),
        "lr": Setting(1e-4, CLAM_CODE),
        "weight_decay": Setting(1e-5, CLAM_CODE),
        "dropout": Setting(0.0, "CLAM's code: its dropout is in the network, not before the head"),
        "batch_size": Setting(1, "CLAM's code: a step is one slide"),
        "epochs": Setting(200, CLAM_CODE),
    },
    "dragn-fly": {
        **DRAGN_SHARED,
        "options.unit": Setting("L1Agg", DRAGN_FLY),
        "batch_size": Setting(4, DRAGN_FLY),
    },
    "dragn-hpa": {
        **DRAGN_SHARED,
        "batch_size": Setting(16, DRAGN),
    },
    "dsmil": {
        "aggregator": Setting("dsmil", DSMIL_CODE),
        "options.query": Setting("linear", "Li et al. (2021), and DSMIL's first code, dsmil.py"),
        "options.value": Setting("linear", "Li et al. (2021), and DSMIL's first code, dsmil.py"),
        "optimizer": Setting("adam", DSMIL_CODE + "; betas are 0.5 and 0.9 there"),
        "lr": Setting(2e-4, DSMIL_CODE),
        "weight_decay": Setting(5e-3, DSMIL_CODE),
        "dropout": Setting(0.0, DSMIL_CODE),
        "batch_size": Setting(1, DSMIL_CODE),
        "epochs": Setting(100, DSMIL_CODE),
        "schedule": Setting("cosine", DSMIL_CODE),
        "schedule_options.min_lr": Setting(0.0, DSMIL_CODE),
    },
    "dtfd": {
        "aggregator": Setting("dtfd", DTFD_CODE),
        "options.groups": Setting(4, DTFD_CODE),
        "options.distill": Setting("afs", DTFD_CODE),
        "optimizer": Setting("adam", DTFD_CODE),
        "lr": Setting(1e-4, DTFD_CODE),
        "weight_decay": Setting(1e-4, DTFD_CODE),
        "dropout": Setting(0.0, DTFD_CODE),
        "batch_size": Setting(1, DTFD_CODE),
        "epochs": Setting(200, DTFD_CODE),
        "schedule": Setting("step", DTFD_CODE),
        "schedule_options.milestones": Setting(100, DTFD_CODE),
        "schedule_options.factor": Setting(0.2, DTFD_CODE),
    },
    "frn": {
        "aggregator": Setting("bilstm", "FRN, III"),
        "loss": Setting("frn", "FRN, IV.A and V.A"),
        "loss_options.gamma": Setting(2.0, "FRN, IV.B"),
        "loss_options.anneal": Setting(10, "FRN, IV.B"),
        "optimizer": Setting("adam", FRN),
        "lr": Setting(1e-2, FRN),
        "weight_decay": Setting(0.0, FRN + ": none is stated"),
        "dropout": Setting(0.0, "FRN's code: its 0.5 is in the network, not before the last layer"),
        "batch_size": Setting(256, FRN),
        "epochs": Setting(60, FRN),
        "schedule": Setting("cosine", FRN),
        "schedule_options.min_lr": Setting(1e-8, FRN),
        "schedule_options.epochs": Setting(60, FRN),
        "decision": Setting("thresholds", "FRN, V.C: one for each label, chosen on validation"),
    },
    "imploc": {
        "aggregator": Setting("imploc", "Long et al. (2020)"),
        "options.layers": Setting(4, "Long et al. (2020)"),
        "options.heads": Setting(6, "Long et al. (2020)"),
        "options.head_dim": Setting(32, "Long et al. (2020)"),
    },
    "nan": {
        "aggregator": Setting("nan", "Yang et al. (2017)"),
        "options.blocks": Setting(2, "Yang et al. (2017): two attention blocks"),
    },
    "transmil": {
        "aggregator": Setting(
            "transmil", TRANSMIL_CODE + "; its attention's dropout 0.1 is not here"
        ),
        "optimizer": Setting("adam", TRANSMIL_CODE + "; RAdam in Lookahead there"),
        "lr": Setting(2e-4, TRANSMIL_CODE),
        "weight_decay": Setting(1e-5, TRANSMIL_CODE),
        "dropout": Setting(0.0, "TransMIL's code: one linear layer after the class token"),
        "batch_size": Setting(2, TRANSMIL_CODE + ": gradients of two bags are accumulated"),
        "epochs": Setting(200, TRANSMIL_CODE),
        "patience": Setting(10, TRANSMIL_CODE),
    },
}


def settings_of(name: str) -> dict[str, Any]:
    """Fields of `TrainConfig` that a recipe sets.

    Raises:
        UnknownNameError: there is no such recipe.
    """
    if name not in RECIPES:
        raise UnknownNameError("recipe", name, RECIPES)
    settings: dict[str, Any] = {}
    for key, setting in RECIPES[name].items():
        field, _, option = key.partition(".")
        if option:
            settings.setdefault(field, {})[option] = setting.value
        else:
            settings[field] = setting.value
    return settings
