"""Backbones: the registry's taps, tap values, preprocessing, weights from everywhere, digests."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import pickle
import random
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models import Weights, get_model_weights
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.transforms._presets import ImageClassification

from dragn_cache.backbones import (
    FAMILIES,
    Backbone,
    Preprocessing,
    TapInfo,
    default_preprocessing,
    describe_taps,
    family,
    fetch_weights,
    list_backbones,
    load_backbone,
    read_state_dict,
    resolve_weights,
    weights_digest,
)
from dragn_cache.backbones.building import build, build_on_meta
from dragn_cache.backbones.taps import TapGraph, tap_graph, tap_network
from dragn_cache.backbones.tracing import ShapeKeeping
from dragn_cache.backbones.weights import fit_state_dict, image_size
from dragn_cache.errors import InputError, UnknownNameError, WeightsError

SMALLEST = {  # of each family
    "alexnet": "alexnet",
    "convnext": "convnext_tiny",
    "densenet": "densenet121",
    "efficientnet": "efficientnet_b0",
    "googlenet": "googlenet",
    "inception": "inception_v3",
    "maxvit": "maxvit_t",
    "mnasnet": "mnasnet0_5",
    "mobilenet_v2": "mobilenet_v2",
    "mobilenet_v3": "mobilenet_v3_small",
    "regnet": "regnet_y_400mf",
    "resnet": "resnet18",
    "resnext": "resnext50_32x4d",
    "shufflenet": "shufflenet_v2_x0_5",
    "squeezenet": "squeezenet1_1",
    "swin": "swin_v2_t",
    "vgg": "vgg11",
    "vit": "vit_b_32",
    "wide_resnet": "wide_resnet50_2",
}
SIZE = (67, 71)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def graph_of(name: str) -> TapGraph:
    """Every backbone's graph at its own size, traced once for all tests."""
    side = family(name).image_size
    return TapGraph(name, (side, side), side)


def images(count: int = 2, size: tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


def load(name: str, taps: list[str] | None = None, **options: Any) -> Backbone:
    options = {"weights": "random", "preprocessing": {"size": SIZE}, **options}
    return load_backbone(name, taps=taps, **options)


def normalised(pixels: Tensor) -> Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def cut(network: nn.Module, name: str, taps: list[str], size: tuple[int, int]) -> Backbone:
    """A backbone of a copy of a given network."""
    network = copy.deepcopy(network)
    graph = tap_graph(name, size, family(name).image_size)
    chosen = [graph.tap(tap) for tap in taps]
    settings = Preprocessing(size=size)
    return Backbone(
        name, tap_network(network, chosen), chosen, preprocessing=settings, grid=None, digest=""
    )


def close(actual: Tensor, expected: Tensor) -> None:
    """Assert equality but for rounding, relative to the largest value, which can be 10^-12."""
    scale = expected.abs().max()
    assert scale > 0
    torch.testing.assert_close(actual / scale, expected / scale, rtol=1e-4, atol=1e-5)


def outputs_of(network: nn.Module, modules: list[str], pixels: Tensor) -> dict[str, Tensor]:
    """Copies of the modules' outputs in torchvision's own network, before any in-place change."""
    seen: dict[str, Tensor] = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output.clone()})
        )
        for name in modules
    ]
    with torch.inference_mode():
        network(normalised(pixels))
    for hook in hooks:
        hook.remove()
    return seen


# The registry


def test_the_registry_is_all_of_torchvisions_classification_networks() -> None:
    assert list_backbones() == models.list_models(module=models)
    assert len(list_backbones()) >= 80
    assert set(SMALLEST) == set(FAMILIES)
    for prefix, name in SMALLEST.items():
        assert family(name) is FAMILIES[prefix]


@pytest.mark.parametrize("name", models.list_models(module=models))
def test_default_taps_of_every_backbone_are_a_map_and_its_mean(name: str) -> None:
    graph = graph_of(name)
    feature_map, vector = (graph.tap(tap) for tap in family(name).default_taps)
    channels, height, width = feature_map.shape
    assert min(height, width) >= 4
    assert vector.shape == graph.tap("gap").shape == (channels,)
    listed = graph.describe()
    assert [t.name for t in listed if t.default] == [feature_map.name, vector.name]
    assert len({t.name for t in listed}) == len(listed)
    assert all(min(t.shape) >= 1 and len(t.shape) in (1, 3) for t in listed)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("resnet18", (64, 96), {"layer4": (512, 2, 3), "avgpool": (512,)}),
        ("densenet121", (64, 96), {"relu": (1024, 2, 3), "gap": (1024,)}),
        ("swin_t", (64, 96), {"permute": (768, 2, 3), "avgpool": (768,)}),
        ("vit_b_32", (224, 224), {"encoder": (768, 7, 7), "gap": (768,)}),
        ("resnet18", (32, 32), {"layer4": (512,), "avgpool": (512,)}),
    ],
)
def test_described_shapes(
    name: str, size: tuple[int, int], expected: dict[str, tuple[int, ...]]
) -> None:
    listed = describe_taps(name, size)
    assert {t.name: t.shape for t in listed if t.default} == expected


def test_description_follows_the_forward_order_and_counts_bytes() -> None:
    listed = describe_taps("resnet18", (64, 96))
    names = [tap.name for tap in listed]
    assert names[:4] == ["conv1", "bn1", "relu", "maxpool"]
    end = ["layer4.1.bn2", "layer4.1.relu_1", "layer4.1", "layer4", "gap", "avgpool", "fc"]
    assert names[-7:] == end
    assert listed[0] == TapInfo("conv1", "map", (64, 32, 48), 2 * 64 * 32 * 48, default=False)
    assert listed[-1] == TapInfo("fc", "vector", (1000,), 2000, default=False)


def test_description_names_modules_as_the_network_does() -> None:
    # torchvision's own node names call this block's ln_1 and ln_2 "ln" and "ln_1".
    names = {t.name for t in graph_of("vit_b_32").describe()}
    assert {"encoder.layers.encoder_layer_0.ln_1", "encoder.layers.encoder_layer_0.ln_2"} <= names
    assert "encoder.layers.encoder_layer_0.ln" not in names
    assert {"cls", "gap", "conv_proj", "encoder.layers.encoder_layer_11"} <= names


def test_description_leaves_out_what_is_no_feature_of_the_images() -> None:
    assert not [t for t in graph_of("swin_v2_t").describe() if "cpb_mlp" in t.name]
    inside = [t.name for t in graph_of("maxvit_t").describe() if "attn_layer" in t.name]
    assert inside == []


# Values


@pytest.mark.parametrize(
    ("name", "feature_map", "pooled_before"),
    [
        ("resnet18", "layer4", "fc"),
        ("mobilenet_v2", "features", "classifier.1"),
        ("shufflenet_v2_x0_5", "conv5", "fc"),
        ("efficientnet_b0", "features", "classifier.1"),
    ],
)
def test_default_taps_are_what_torchvisions_network_computes(
    name: str, feature_map: str, pooled_before: str
) -> None:
    network, pixels = build(name, 224), images()
    backbone = cut(network, name, list(family(name).default_taps), SIZE)
    pooled: list[Tensor] = []
    network.get_submodule(pooled_before).register_forward_pre_hook(
        lambda _module, inputs: pooled.append(inputs[0].clone())
    )
    reference = outputs_of(network, [feature_map], pixels)[feature_map]
    values = backbone(pixels)
    assert list(values) == list(family(name).default_taps)
    map_value, vector = values.values()
    close(map_value, reference)
    close(vector, pooled[0])
    close(vector, map_value.mean((2, 3)))
    assert all(v.dtype == torch.float32 and v.is_contiguous() for v in values.values())
    assert {tap: tuple(v.shape[1:]) for tap, v in values.items()} == backbone.tap_shapes


def test_densenets_map_is_after_its_last_relu() -> None:
    network = build("densenet121", 224)
    backbone = cut(network, "densenet121", ["features", "relu", "gap"], SIZE)
    with torch.inference_mode():
        before = network.get_submodule("features")(normalised(images()))
    values = backbone(images())
    assert before.min() < 0
    close(values["features"], before)
    close(values["relu"], before.clamp(min=0))
    close(values["gap"], before.clamp(min=0).mean((2, 3)))


def test_squeezenets_vector_is_the_mean_of_its_last_map() -> None:
    values = load("squeezenet1_1")(images())
    assert values["features"].shape == (2, 512, 4, 4)
    close(values["gap"], values["features"].mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "first", "inside", "last"),
    [
        ("swin_t", "features.0.0", "features.1.0.mlp", "norm"),
        ("convnext_tiny", "features.0", "features.1.0.block.3", None),
    ],
)
def test_maps_kept_channels_last_inside_come_out_channels_first(
    name: str, first: str, inside: str, last: str | None
) -> None:
    network, taps = build(name, 224), [first, inside] + ([last] if last else [])
    reference = outputs_of(network, taps, images(1))
    values = cut(network, name, [*taps, "avgpool", "gap"], SIZE)(images(1))
    close(values[first], reference[first])
    for tap in taps[1:]:
        turned = reference[tap].permute(0, 3, 1, 2)
        close(values[tap], turned)
    close(values["avgpool"], values["gap"])


def test_vision_transformer_gives_its_tokens_as_a_map_and_its_class_token() -> None:
    name, block = "vit_b_32", "encoder.layers.encoder_layer_0"
    pixels = images(2, (224, 224))
    network = build(name, 224)
    reference = outputs_of(network, ["encoder", f"{block}.ln_2"], pixels)
    backbone = cut(network, name, ["cls", "encoder", f"{block}.ln_2", "gap"], (224, 224))
    values = backbone(pixels)
    tokens = reference["encoder"]
    close(values["cls"], tokens[:, 0])
    close(values["gap"], tokens[:, 1:].mean(1))
    assert values["encoder"].shape == (2, 768, 7, 7)
    close(values["encoder"][:, :, 2, 5], tokens[:, 1 + 2 * 7 + 5])
    close(values[f"{block}.ln_2"][:, :, 6, 0], reference[f"{block}.ln_2"][:, 1 + 6 * 7])


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "shufflenet_v2_x0_5", "googlenet"])
def test_names_are_those_of_torchvisions_feature_extraction(name: str) -> None:
    known = get_graph_node_names(build_on_meta(name, 224), suppress_diff_warning=True)[1]
    assert list(graph_of(name).outputs) == known[1:]  # the images come first


@pytest.mark.parametrize(
    ("name", "taps"),
    [
        ("resnet18", "layer1.0.conv2 layer3.0.downsample.0 layer4.1.relu_1"),
        ("shufflenet_v2_x0_5", "stage2.1.branch2.0 stage3.4.view_1 mean"),
        ("googlenet", "inception3b.branch1.conv inception4e.cat avgpool"),
    ],
)
def test_values_are_those_of_torchvisions_feature_extractor(name: str, taps: str) -> None:
    network = build(name, 224)
    extractor = create_feature_extractor(network, taps.split(), suppress_diff_warning=True).eval()
    with torch.inference_mode():
        expected = extractor(normalised(images()))
    values = cut(network, name, taps.split(), SIZE)(images())
    for tap in taps.split():
        close(values[tap], expected[tap].reshape(values[tap].shape))


def test_taps_inside_the_classifier() -> None:
    network = build("resnet18", 224)
    with torch.inference_mode():
        logits = network(normalised(images()))
    values = cut(network, "resnet18", ["fc"], SIZE)(images())
    close(values["fc"], logits)


# In-place operations


@pytest.mark.parametrize(
    ("name", "taps"),
    [
        ("resnet18", "bn1 layer1.0.bn2 layer1.0.add layer4.1.add layer4.1 layer4"),
        ("densenet121", "features.norm0 features relu"),
        ("squeezenet1_1", "features.0 features.3.squeeze gap"),
        ("shufflenet_v2_x0_5", "conv1.1 stage2.0.branch1.3 stage2"),
    ],
)
def test_a_taps_value_does_not_depend_on_the_other_taps(name: str, taps: str) -> None:
    names, pixels, network = taps.split(), images(), build(name, 224)
    together = cut(network, name, names, SIZE)(pixels)
    reverse = cut(network, name, names[::-1], SIZE)(pixels)
    assert list(together) == names
    assert list(reverse) == names[::-1]
    for tap in names:
        alone = cut(network, name, [tap], SIZE)(pixels)[tap]
        assert torch.equal(together[tap], alone), tap
        assert torch.equal(reverse[tap], alone), tap


def test_values_are_those_before_an_inplace_relu_and_an_inplace_sum() -> None:
    taps = ["conv1", "bn1", "layer1.0.bn2", "layer4.1", "layer4.1.bn2"]
    network = build("resnet18", 224)
    reference = outputs_of(network, taps, images())
    values = cut(network, "resnet18", [*taps, "layer4", "fc"], SIZE)(images())
    assert reference["bn1"].min() < 0
    for tap in taps:
        close(values[tap], reference[tap])


class _Versions(fx.Interpreter):
    """Runs a graph and keeps every output with its count of in-place changes at that time."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.seen: list[tuple[str, Tensor, int]] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.seen.append((n.name, value, value._version))
        return value


@pytest.mark.parametrize("name", SMALLEST.values())
def test_nothing_in_any_familys_graph_is_changed_in_place(name: str) -> None:
    side = family(name).image_size
    taps = [graph_of(name).tap(tap) for tap in family(name).default_taps]
    run = _Versions(tap_network(build_on_meta(name, side), taps))
    with torch.no_grad(), ShapeKeeping():
        run.run(torch.empty(2, 3, side, side, device="meta"))
    assert len(run.seen) > 10
    assert [n for n, value, version in run.seen if value._version != version] == []


# The backbone


def test_a_backbone_is_frozen() -> None:
    backbone = load("squeezenet1_1")
    assert not any(p.requires_grad for p in backbone.parameters())
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert backbone(images())["gap"].is_inference()
    weight = backbone.network.get_parameter("features.3.expand3x3.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_value_does_not_depend_on_its_batch_mates() -> None:
    backbone, pixels = load("resnet18"), images(5)
    whole, alone = backbone(pixels), backbone(pixels[3:4])
    for tap in whole:
        close(whole[tap][3:4], alone[tap])


def test_a_grid_pools_maps_and_leaves_vectors() -> None:
    pixels = images()
    plain = load("resnet18", ["layer2", "layer3", "avgpool"])(pixels)
    backbone = load("resnet18", ["layer2", "layer3", "avgpool"], grid=3)
    pooled = backbone(pixels)
    assert plain["layer2"].shape == (2, 128, 9, 9)
    assert backbone.tap_shapes == {"layer2": (128, 3, 3), "layer3": (256, 3, 3), "avgpool": (512,)}
    # 9 places into 3: exact thirds; by hand, the mean of each 3 × 3 block.
    blocks = plain["layer2"].reshape(2, 128, 3, 3, 3, 3).mean((3, 5))
    close(pooled["layer2"], blocks)
    close(pooled["layer3"], F.adaptive_avg_pool2d(plain["layer3"], 3))
    assert torch.equal(pooled["avgpool"], plain["avgpool"])


def test_a_grid_of_one_is_the_mean_as_a_vector() -> None:
    backbone = load("resnet18", ["layer4", "gap"], grid=1)
    values = backbone(images())
    assert values["layer4"].shape == (2, 512)
    assert backbone.tap_shapes["layer4"] == (512,)
    close(values["layer4"], values["gap"])


def test_a_map_of_one_place_is_a_vector() -> None:
    backbone = load("resnet18", ["layer3", "layer4"], preprocessing={"size": (32, 29)})
    values = backbone(images(3, (32, 29)))
    assert values["layer4"].shape == (3, 512)
    assert backbone.tap_shapes == {"layer3": (256, 2, 2), "layer4": (512,)}


def test_provenance_is_json_and_tells_what_features_depend_on() -> None:
    record = load("squeezenet1_1", ["gap", "features"], grid=2).provenance()
    assert json.loads(json.dumps(record)) == record
    assert record["backbone"] == "squeezenet1_1"
    assert record["taps"] == ["gap", "features"]
    assert record["grid"] == 2
    assert len(record["weights_sha256"]) == 64
    assert Preprocessing.from_dict(record["preprocessing"]).size == SIZE


# Errors


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"taps": ["layer5"]}, UnknownNameError, r"tap of resnet18.*'layer5'.*did you mean layer"),
        ({"taps": ["cls"]}, UnknownNameError, "tap of resnet18.*'cls'"),
        ({"taps": ["x"]}, UnknownNameError, "tap of resnet18.*'x'"),
        ({"taps": []}, InputError, r"taps: expected one or more different taps, got \[\]"),
        ({"taps": ["fc", "fc"]}, InputError, r"different taps, got \['fc', 'fc'\]"),
        ({"grid": 4}, InputError, r"grid for tap layer4: expected at most 3, .* 3×3, got 4"),
        ({"grid": 0}, InputError, "grid: expected None or a whole number ≥ 1, got 0"),
        ({"grid": True}, InputError, "grid: expected None or a whole number ≥ 1, got True"),
        ({"device": "gpu"}, InputError, "^device: expected cpu, cuda or cuda:N.*got 'gpu'"),
        ({"preprocessing": {"sise": 3}}, UnknownNameError, "'sise'; did you mean size"),
        ({"weights": "IMAGENET1K_V9"}, UnknownNameError, "did you mean IMAGENET1K_V1"),
        ({"weights": "random:-1"}, InputError, "random:SEED.*got 'random:-1'"),
        ({"weights": "random:"}, InputError, "random:SEED.*got 'random:'"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        load("resnet18", **options)
    assert "\n" not in str(caught.value)


def test_an_unknown_backbone_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"'resnet19'; did you mean resnet18"):
        load_backbone("resnet19")


@pytest.mark.parametrize(
    ("name", "size", "match"),
    [
        (
            "vit_b_32",
            (256, 256),
            "size: expected images of exactly 224×224, which vit_b_32.*got 256×256",
        ),
        (
            "maxvit_t",
            (224, 256),
            "size: expected images of exactly 224×224, which maxvit_t.*got 224×256",
        ),
        (
            "vit_h_14",
            (224, 224),
            "size: expected images of exactly 518×518, which vit_h_14.*got 224×224",
        ),
        ("alexnet", (31, 31), "alexnet: expected images that are large enough.*got 31×31"),
        ("vgg11", (31, 64), "vgg11: expected images that are large enough.*got 31×64"),
        ("swin_t", (3, 3), "swin_t: expected images that are large enough.*got 3×3"),
    ],
)
def test_sizes_that_a_network_cannot_take(name: str, size: tuple[int, int], match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        describe_taps(name, size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tap", "match"),
    [
        ("vit_b_32", "encoder.layers.encoder_layer_0.self_attention", "got no tensor"),
        ("vit_b_32", "permute", r"got shape \(2, 49, 768\)"),
        ("shufflenet_v2_x0_5", "stage2.0.view", r"got shape \(2, 2, 24, 28, 28\)"),
        ("resnet18", "flatten", None),
    ],
)
def test_outputs_that_are_neither_map_nor_vector(name: str, tap: str, match: str | None) -> None:
    graph = graph_of(name)
    if match is None:
        assert graph.tap(tap).shape == (512,)
        return
    with pytest.raises(InputError, match=rf"tap {tap} of {name}.*{match}"):
        graph.tap(tap)


@pytest.mark.parametrize(
    ("pixels", "got"),
    [
        (torch.zeros(2, 3, *SIZE), r"torch.float32 \(2, 3, 67, 71\)"),
        (torch.zeros(2, 1, *SIZE, dtype=torch.uint8), r"torch.uint8 \(2, 1, 67, 71\)"),
        (torch.zeros(3, *SIZE, dtype=torch.uint8), r"torch.uint8 \(3, 67, 71\)"),
        (torch.zeros(2, 3, 71, 67, dtype=torch.uint8), r"torch.uint8 \(2, 3, 71, 67\)"),
    ],
)
def test_images_of_another_kind_are_refused(pixels: Tensor, got: str) -> None:
    with pytest.raises(InputError, match=rf"expected uint8 \(N, 3, 67, 71\), got {got}"):
        load("squeezenet1_1")(pixels)


# Preprocessing


def test_published_weights_bring_their_own_preprocessing() -> None:
    resnet = default_preprocessing("resnet18", "imagenet")
    assert resnet == Preprocessing(size=(224, 224), resize_shorter=256)
    assert resnet.mean == (0.485, 0.456, 0.406)
    v2 = default_preprocessing("resnet50", "IMAGENET1K_V2")
    assert (v2.size, v2.resize_shorter) == ((224, 224), 232)
    swag = default_preprocessing("vit_b_16", "IMAGENET1K_SWAG_E2E_V1")
    assert (swag.size, swag.resize_shorter, swag.interpolation) == ((384, 384), 384, "bicubic")
    inception = default_preprocessing("inception_v3", "imagenet")
    assert (inception.size, inception.resize_shorter) == ((299, 299), 342)


def test_other_weights_get_the_designs_size_and_the_whole_image() -> None:
    assert default_preprocessing("resnet18", "random") == Preprocessing((224, 224), None)
    assert default_preprocessing("inception_v3", "random:7").size == (299, 299)


@pytest.mark.parametrize("name", models.list_models(module=models))
def test_every_published_preprocessing_is_valid(name: str) -> None:
    for member in get_model_weights(name):
        settings = default_preprocessing(name, member.name)
        assert settings.size[0] == member.transforms().crop_size[0]
        assert Preprocessing.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_a_new_size_takes_the_whole_image() -> None:
    default = default_preprocessing("resnet18", "imagenet")
    assert default.override(size=(128, 320)).resize_shorter is None
    assert default.override(size=[128, 320]).size == (128, 320)
    assert default.override(size=(128, 320), resize_shorter=353).resize_shorter == 353
    assert default.override(rgb=["red", "green", "red"]).rgb == ("red", "green", "red")
    assert default.override(mean=(0, 0, 0)).resize_shorter == 256
    assert default.override() == default


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"size": 224},
            r"^size: expected \[height, width\] in pixels, each from 1 to 8192, got 224",
        ),
        ({"size": (0, 224)}, r"got \(0, 224\)"),
        ({"size": (224.0, 224)}, r"got \(224.0, 224\)"),
        (
            {"resize_shorter": 223},
            "resize_shorter: expected None or a whole number of at least 224.*got 223",
        ),
        ({"resize_shorter": 256.0}, "got 256.0"),
        ({"mean": (0.5, 0.5)}, r"mean: expected three numbers from 0 to 1, got \(0.5"),
        ({"mean": (123.675, 116.28, 103.53)}, "from 0 to 1"),
        ({"mean": (0.5, 0.5, float("nan"))}, "mean: expected three numbers"),
        ({"std": (0.2, 0.0, 0.2)}, r"std: expected three numbers above 0.*got \(0.2, 0.0, 0.2\)"),
        (
            {"interpolation": "cubic"},
            "bilinear, bicubic, nearest or lanczos, got 'cubic'; did you mean bicubic",
        ),
        ({"rgb": "red"}, "rgb: expected a list of channels, got 'red'"),
        ({"rgb": ("red", "")}, "rgb: expected names, none of them empty"),
        ({"rgb": ("red", "blue")}, "rgb: expected None or three channels' names"),
        ({"channels": "each"}, "rgb: expected channels' names, got None; name them"),
        ({"mean": None}, "mean: expected three numbers from 0 to 1, got None"),
        ({"size": (8193, 1)}, r"each from 1 to 8192, got \(8193, 1\)"),
        ({"sizes": (1, 1)}, "a known preprocessing setting, got 'sizes'; did you mean size"),
    ],
)
def test_preprocessing_that_cannot_be(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Preprocessing().override(**changes)


def test_preprocessing_from_a_table_needs_every_setting() -> None:
    values = Preprocessing().to_dict()
    del values["std"], values["mean"]
    with pytest.raises(InputError, match="expected every setting, got none for mean, std"):
        Preprocessing.from_dict(values)


def test_preprocessing_reaches_the_pixels() -> None:
    changes = {"mean": (0.5, 0.25, 0.125), "std": (0.5, 0.75, 0.25), "size": SIZE}
    backbone = load("squeezenet1_1", ["features.0"], preprocessing=changes)
    conv = build("squeezenet1_1", 224).get_submodule("features.0")
    pixels = images()
    scaled = pixels.double().numpy() / 255
    scaled = (scaled - np.reshape(changes["mean"], (3, 1, 1))) / np.reshape(
        changes["std"], (3, 1, 1)
    )
    with torch.inference_mode():
        expected = conv(torch.from_numpy(scaled).float())
    close(backbone(pixels)["features.0"], expected)


# Random weights


def test_random_weights_are_their_seeds() -> None:
    digests = [load("squeezenet1_1", weights=w).weights_digest for w in ("random", "random:0")]
    assert digests[0] == digests[1]
    assert load("squeezenet1_1", weights="random:1").weights_digest != digests[0]


def test_loading_leaves_the_global_random_states_alone(tmp_path: Path) -> None:
    def states() -> tuple[list[int], object, str]:
        legacy = np.random.get_state(legacy=False)  # noqa: NPY002
        return torch.get_rng_state().tolist(), random.getstate(), repr(legacy["state"]["key"][:9])

    file = saved(tmp_path, build("squeezenet1_1", 224).state_dict())
    before = states()
    load("squeezenet1_1", weights="random:3")
    load("squeezenet1_1", weights=file)
    assert states() == before


# Weights from a file


def saved(folder: Path, value: Any, name: str = "weights.pth") -> Path:
    torch.save(value, folder / name)
    return folder / name


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return dict(build("mobilenet_v3_small", 224, seed=5).state_dict())


@pytest.fixture(scope="module")
def small_state() -> dict[str, Tensor]:
    return dict(build("squeezenet1_1", 224, seed=5).state_dict())


@pytest.mark.parametrize("wrapper", ["", "state_dict", "model", "model_state_dict", "module."])
def test_a_file_gives_its_networks_features(
    wrapper: str, small_state: dict[str, Tensor], tmp_path: Path
) -> None:
    value: Any = small_state
    if wrapper == "module.":
        value = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in small_state.items()}}
    elif wrapper:
        value = {"epoch": 3, wrapper: small_state}
    backbone = load("squeezenet1_1", weights=str(saved(tmp_path, value)))
    reference = load("squeezenet1_1", weights="random:5")
    assert backbone.weights_digest == reference.weights_digest
    assert torch.equal(backbone(images())["gap"], reference(images())["gap"])


def test_the_classifier_may_be_anything(state: dict[str, Tensor], tmp_path: Path) -> None:
    name, last = "mobilenet_v3_small", "classifier.3.weight"
    body = {k: v for k, v in state.items() if not k.startswith("classifier.")}
    counted = {k: v for k, v in body.items() if not k.endswith("num_batches_tracked")}
    five = {**state, last: torch.ones(5, 1024)}
    other = {**counted, "classifier.head.weight": torch.ones(7, 11)}
    assert len(counted) < len(body) < len(state)
    digests = {
        load(name, weights=saved(tmp_path, value)).weights_digest for value in (body, five, other)
    }
    assert digests == {load(name, weights="random:5").weights_digest}
    with pytest.raises(WeightsError, match=r"4 missing \(classifier.0.weight, classifier.0.bias,"):
        load(name, ["classifier.3"], weights=saved(tmp_path, body))
    match = r"1 of wrong shape \(classifier.3.weight has \(5, 1024\) for \(1000, 1024\)\)"
    with pytest.raises(WeightsError, match=match):
        load(name, ["classifier"], weights=saved(tmp_path, five))
    assert load(name, ["classifier.0"], weights=saved(tmp_path, five)).tap_shapes == {
        "classifier.0": (1024,)
    }


def test_names_and_shapes_that_do_not_fit_are_listed(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    value = {k: v for k, v in state.items() if not k.startswith("features.12.")}
    value["features.0.0.weight"] = torch.zeros(16, 3, 5, 5)
    value["features.1.block.0.0.weight"] = torch.zeros(17, 1, 3, 3)
    value |= {f"extra.{i}": torch.zeros(2) for i in range(7)}
    with pytest.raises(WeightsError) as caught:
        load("mobilenet_v3_small", weights=saved(tmp_path, value))
    text = str(caught.value)
    # A convolution, and a batch norm's four tensors without its counter.
    assert "5 missing (features.12.0.weight, features.12.1.weight, features.12.1.bias," in text
    assert "7 unexpected (extra.0, extra.1, extra.2, extra.3, extra.4, …)" in text
    assert "2 of wrong shape (features.0.0.weight has (16, 3, 5, 5) for (16, 3, 3, 3), f" in text
    assert "\n" not in text


class _Code:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_a_pickle_that_holds_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    file = saved(tmp_path, {"state_dict": _Code(marker)})
    with pytest.raises(WeightsError, match="more than tensors"):
        read_state_dict(file)
    plain = tmp_path / "plain.pkl"
    plain.write_bytes(pickle.dumps(_Code(marker)))
    with pytest.raises(WeightsError, match="more than tensors"):
        read_state_dict(plain)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("missing", "got no such file"),
        ("folder", "IsADirectoryError"),
        ("empty", r"cannot be read \(EOFError\), perhaps damaged or cut short"),
        ("half", "perhaps damaged or cut short"),
        ("text", "perhaps damaged or cut short"),
        ("list", r"expected a state dict \(names and tensors\).*got a list"),
        ("numbers", "got a dict of \\(epoch: int, best: float\\)"),
        ("nothing", "got a dict of \\(\\)"),
    ],
)
def test_files_that_are_no_weights(
    content: str, match: str, small_state: dict[str, Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "weights.pth"
    if content == "folder":
        file.mkdir()
    elif content in ("list", "numbers", "nothing"):
        saved(tmp_path, {"list": [1], "numbers": {"epoch": 3, "best": 0.5}, "nothing": {}}[content])
    elif content != "missing":
        saved(tmp_path, small_state)
        whole = file.read_bytes()
        file.write_bytes(
            {"empty": b"", "half": whole[: len(whole) // 2], "text": b"hello"}[content]
        )
    with pytest.raises(WeightsError, match=match) as caught:
        load("squeezenet1_1", weights=file)
    assert "\n" not in str(caught.value)


def test_old_names_are_understood() -> None:
    network = build("densenet121", 224, seed=2)
    old = {
        k.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): v
        for k, v in network.state_dict().items()
        if "denselayer" in k
    }
    rest = {k: v for k, v in network.state_dict().items() if "denselayer" not in k}
    assert any(".norm.1." in k for k in old)
    fitted = build("densenet121", 224, seed=3)
    fit_state_dict(fitted, {**rest, **old}, spec=family("densenet121"), needed=(), where="weights")
    assert weights_digest(fitted.state_dict()) == weights_digest(network.state_dict())


def test_a_mnasnet_file_needs_no_version(tmp_path: Path) -> None:
    # torchvision's own loader does not take a plain dict, which removing the prefix gives.
    plain = dict(build("mnasnet0_5", 224, seed=4).state_dict())
    digest = load("mnasnet0_5", weights=saved(tmp_path, plain)).weights_digest
    assert digest == load("mnasnet0_5", weights="random:4").weights_digest


def test_a_vision_transformers_file_tells_its_image_size(tmp_path: Path) -> None:
    file = saved(
        tmp_path,
        {
            "encoder.pos_embedding": torch.zeros(1, 1 + 12 * 12, 768),
            "conv_proj.weight": torch.zeros(768, 3, 32, 32),
        },
    )
    assert image_size("vit_b_32", resolve_weights("vit_b_32", file)) == 384
    with pytest.raises(InputError, match=r"exactly 384×384.*got 224×224"):
        load_backbone("vit_b_32", weights=file)


# The digest


def test_the_digest_follows_the_weights_that_count(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    def digest(changed: dict[str, Tensor], taps: list[str] | None = None) -> str:
        file = saved(tmp_path, {**state, **changed})
        return load("mobilenet_v3_small", taps, weights=file).weights_digest

    original = digest({})
    classifier = {"classifier.3.bias": state["classifier.3.bias"] + 1}
    counter = {"features.0.1.num_batches_tracked": torch.tensor(9)}
    assert digest({**classifier, **counter}) == original
    assert digest({}, ["avgpool", "features"]) == original
    running = state["features.12.1.running_var"].clone()
    running[-1] += 2**-20
    assert digest({"features.12.1.running_var": running}) != original
    assert digest(classifier, ["classifier"]) != digest({}, ["classifier"])


@pytest.mark.parametrize("name", ["swin_t", "convnext_tiny", "shufflenet_v2_x0_5", "vit_b_32"])
def test_the_digest_covers_what_the_taps_network_holds(name: str) -> None:
    graph, network = graph_of(name), build_on_meta(name, family(name).image_size)
    taps = [graph.tap(tap) for tap in family(name).default_taps]
    covered = graph.tensors(taps)
    held = tap_network(network, taps).state_dict()
    assert set(covered) == set(held) & set(network.state_dict())
    assert not [n for n in covered if n.startswith(family(name).classifier)]
    dropped = set(network.state_dict()) - set(covered)
    assert all(n.startswith((*family(name).classifier, "norm.")) for n in dropped)


def test_the_digest_is_sha256_over_sorted_names_dtypes_shapes_and_bytes() -> None:
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    tensors = {"w": weight.T, "b": torch.tensor(3), "bn.num_batches_tracked": torch.tensor(5)}
    expected = hashlib.sha256(
        b"b\0torch.int64\0()\0"
        + (3).to_bytes(8, "little")
        + b"w\0torch.float32\0(3, 2)\0"
        + np.array([0, 3, 1, 4, 2, 5], "<f4").tobytes()
    ).hexdigest()
    assert weights_digest(tensors) == expected


# Published weights, from a server of our own


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", folder
        httpd.shutdown()
        thread.join()


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "checkpoints"


def published(url: str) -> Weights:
    transforms = partial(ImageClassification, crop_size=67, resize_size=71)
    return Weights(url=url, transforms=transforms, meta={"min_size": (17, 17)})


def serve(folder: Path, prefix: str | None = None) -> str:
    file = saved(folder, build("squeezenet1_1", 224, seed=6).state_dict())
    prefix = prefix or hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    return file.rename(folder / f"squeezenet1_1-{prefix}.pth").name


def test_published_weights_are_downloaded_once(server: tuple[str, Path], checkpoints: Path) -> None:
    url, folder = server
    name = serve(folder)
    weights = published(f"{url}/{name}")
    backbone = load_backbone("squeezenet1_1", weights=weights)
    assert (backbone.preprocessing.size, backbone.preprocessing.resize_shorter) == ((67, 67), 71)
    assert backbone.weights_digest == load("squeezenet1_1", weights="random:6").weights_digest
    assert [f.name for f in checkpoints.iterdir()] == [name]
    (folder / name).unlink()
    assert fetch_weights(weights) == checkpoints / name


def test_a_download_with_another_hash_is_refused_and_not_kept(
    server: tuple[str, Path], checkpoints: Path
) -> None:
    url, folder = server
    with pytest.raises(WeightsError, match="invalid hash value"):
        fetch_weights(published(f"{url}/{serve(folder, '0123abcd')}"))
    assert list(checkpoints.iterdir()) == []


def test_a_failed_download_says_what_to_do_by_hand(
    server: tuple[str, Path], checkpoints: Path
) -> None:
    url = f"{server[0]}/net-01234567.pth"
    with pytest.raises(WeightsError, match="HTTP Error 404") as caught:
        load_backbone("squeezenet1_1", weights=published(url))
    text = str(caught.value)
    assert url in text
    assert f"put the file into {checkpoints} ($TORCH_HOME/hub/checkpoints)" in text
    assert "`weights=FILE` or `weights=random`" in text
    assert "\n" not in text


def test_no_connection_is_the_same_error(checkpoints: Path) -> None:
    with pytest.raises(WeightsError, match=r"URLError.*download that URL"):
        fetch_weights(published("http://127.0.0.1:1/net-01234567.pth"))


def test_a_damaged_copy_in_the_folder_is_found(server: tuple[str, Path], checkpoints: Path) -> None:
    url, folder = server
    name = serve(folder)
    whole = (folder / name).read_bytes()
    checkpoints.mkdir(parents=True)
    (checkpoints / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(
        WeightsError, match=r"sha256 begins with .* delete it and download it again"
    ):
        fetch_weights(published(f"{url}/{name}"))
