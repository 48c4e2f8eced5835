"""Input of more than three channels, by averaging the weights of the first convolution."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from dragn_cache.backbones.families import family
from dragn_cache.errors import DragnCacheError, InputError


def require_channel_mode(name: str, mode: str) -> None:
    """Raise InputError if a backbone cannot take its channels in this mode."""
    if mode == "average" and family(name).options.get("transform_input"):
        raise InputError(
            f"backbone {name}",
            expected="a network that feeds its inputs to a convolution as they are, to average it",
            got="one that scales red, green and blue apart",
            remedy="use `channels=each` or `channels=rgb`, or another backbone",
        )


def average_inputs(name: str, network: fx.GraphModule, channels: int) -> None:
    """Give a network's first convolution any number of input channels, in place.

    Each channel gets the mean of the three inputs' weights, times 3 / channels. So an image with
    equal channels has the output that the network had for it as a grey image in three channels.
    """
    with torch.no_grad():
        first = _first_convolution(name, network)
        mean: Tensor = first.weight.mean(1, keepdim=True) * (3 / channels)
        first.weight = nn.Parameter(mean.repeat(1, channels, 1, 1), requires_grad=False)
    first.in_channels = channels


def _first_convolution(name: str, network: fx.GraphModule) -> nn.Conv2d:
    """The one convolution that reads the images themselves."""
    (images,) = network.graph.find_nodes(op="placeholder")
    readers = [node for node in images.users if node.op == "call_module"]
    if len(readers) == 1:
        for layer in network.get_submodule(str(readers[0].target)).modules():
            if isinstance(layer, nn.Conv2d) and (layer.in_channels, layer.groups) == (3, 1):
                return layer
    raise DragnCacheError(
        f"backbone {name}",
        expected="one first convolution of three inputs",
        got="none",
        remedy="use `channels=each` or `channels=rgb`",
    )
