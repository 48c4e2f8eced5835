from .aggregators import Aggregated, Aggregator, create_aggregator
from .backbones import load_backbone
from .datasets.simulated import simulate
from .errors import DragnCacheError
from .extraction.check import check_dataset
from .extraction.config import ExtractConfig
from .extraction.extract import extract
from .interop import export_features, import_features
from .interop.config import ImportConfig
from .manifest import Bag, Instance, Manifest, read_manifest, write_manifest
from .ragged import RaggedBags
from .runs.config import ApplyConfig, EvaluateConfig, ExplainConfig
from .runs.evaluate import evaluate_run
from .runs.explain import explain_run
from .runs.predict import predict_run
from .runs.train import train_run
from .store import Store, open_store
from .studies.config import CrossvalConfig
from .studies.crossval import crossval
from .training.config import TrainConfig

__version__: str

__all__ = [
    "Aggregated",
    "Aggregator",
    "ApplyConfig",
    "Bag",
    "CrossvalConfig",
    "DragnCacheError",
    "EvaluateConfig",
    "ExplainConfig",
    "ExtractConfig",
    "ImportConfig",
    "Instance",
    "Manifest",
    "RaggedBags",
    "Store",
    "TrainConfig",
    "check_dataset",
    "create_aggregator",
    "crossval",
    "evaluate_run",
    "explain_run",
    "export_features",
    "extract",
    "import_features",
    "load_backbone",
    "open_store",
    "predict_run",
    "read_manifest",
    "simulate",
    "train_run",
    "write_manifest",
]
