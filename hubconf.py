"""The trained networks for torch.hub, from any folder, with nothing but torch.

What `python -m tools.export` writes needs no torch at all.

    network = torch.hub.load("REPOSITORY", "model_3", source="local")
    normalize = torch.hub.load("REPOSITORY", "normalize", source="local")
    with torch.inference_mode():
        probabilities = network(normalize(images)).softmax(dim=1)

`images` are uint8 (N, 32, 32, 3), RGB.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch as _torch

dependencies = ["torch"]

# Absolute, and loaded by path: whoever calls may have a model_1 or a utils of his own.
_HERE = Path(__file__).resolve().parent
_REFERENCE = _HERE / "output" / "reference"


def model_1(pretrained: bool = True) -> _torch.nn.Module:
    """Model 1, 2,114,282 parameters: 92.31 % on the test set (output/reference/model_1)."""
    return _network("model_1", pretrained)


def model_1_distilled(pretrained: bool = True) -> _torch.nn.Module:
    """Model 1, taught by a ResNet: 93.02 % (output/reference/model_1_distilled)."""
    return _network("model_1_distilled", pretrained)


def model_2(pretrained: bool = True) -> _torch.nn.Module:
    """Model 2, 222,058 parameters: 89.98 % on the test set (output/reference/model_2)."""
    return _network("model_2", pretrained)


def model_2_distilled(pretrained: bool = True) -> _torch.nn.Module:
    """Model 2, taught by model_1_distilled: 91.37 % (output/reference/model_2_distilled)."""
    return _network("model_2_distilled", pretrained)


def model_3(pretrained: bool = True) -> _torch.nn.Module:
    """Model 3, 73,994 parameters: 90.60 % on the test set (output/reference/model_3)."""
    return _network("model_3", pretrained)


def model_3_distilled(pretrained: bool = True) -> _torch.nn.Module:
    """Model 3, taught by model_1_distilled: 91.95 % (output/reference/model_3_distilled)."""
    return _network("model_3_distilled", pretrained)


def model_3_robust(pretrained: bool = True) -> _torch.nn.Module:
    """Model 3, hardened against JPEG and noise: 90.14 % (output/reference/model_3_robust)."""
    return _network("model_3_robust", pretrained)


def normalize():
    """What the networks take: a function of uint8 images (N, 32, 32, 3), RGB.

    It returns float32 (N, 3, 32, 32), with the mean and standard deviation of CIFAR-10's training
    images, which all of them were trained with.
    """
    settings = json.loads((_REFERENCE / "model_1" / "settings.json").read_text())
    mean, std = (_torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))

    def normalized(images: _torch.Tensor) -> _torch.Tensor:
        if images.dtype != _torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
            found = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"wanted uint8 images (N, 32, 32, 3), RGB, got {found}")
        on = images.device
        return (images.permute(0, 3, 1, 2) / 255 - mean.to(on)) / std.to(on)

    return normalized


def _network(name: str, pretrained: bool) -> _torch.nn.Module:
    """The network of output/reference/NAME, in eval mode; or untrained, in training mode."""
    number = name.split("_")[1]
    spec = importlib.util.spec_from_file_location(
        f"_cifar10_model_{number}", _HERE / f"model_{number}.py"
    )
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = getattr(module, f"CNN_Model_{number}")()
    if pretrained:
        weights = _REFERENCE / name / "weights.pt"
        network.load_state_dict(_torch.load(weights, map_location="cpu", weights_only=True))
        network.eval()
    return network
