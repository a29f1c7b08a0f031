"""The test accuracy of trained weights, in float32, without test-time augmentation.

python -m tools.evaluate output/reference/model_2              # a run's folder
python -m tools.evaluate weights.pt --model 2                  # weights alone
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import cifar10
import cli
import train
import utils


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(
        prog="tools.evaluate",
        description="Test accuracy of trained weights, in float32, without augmentation.",
    )
    parser.add_argument("weights", type=Path, help="a run's folder, a weights.pt or a checkpoint")
    parser.add_argument("--model", help="1, 2, 3 or a model file (default: what the run says)")
    parser.add_argument("--data-dir", default="data", help="where CIFAR-10 lies or is put (data)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
    args = parser.parse_args(arguments)
    return cli.run(
        "tools.evaluate",
        lambda: print(evaluate(args.weights, args.model, args.data_dir, args.device)),
    )


def evaluate(path: Path, model: str | None, data_dir: str, device_name: str | None) -> str:
    """Evaluates the weights on the whole test set; returns the line to print.

    Raises:
        cli.UsageError: no such weights, or nothing says whose they are.
        utils.CheckpointError: the file does not hold this network's weights.
    """
    folder = path if path.is_dir() else path.parent
    file = path / "weights.pt" if path.is_dir() else path
    if not file.is_file():
        raise cli.UsageError(f"{file} is not there; give a run's folder or a file of weights")
    settings_file = folder / "settings.json"
    settings = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
    if model is None:
        model = settings.get("network", "").removeprefix("CNN_Model_")
        if model not in ("1", "2", "3"):
            raise cli.UsageError(f"nothing beside {file} says which network it is; give --model")
    chosen = train.load_network(model)
    device = utils.pick_device(device_name)
    network = chosen.build()
    utils.load_weights(network, file)
    data = cifar10.load_cifar10(data_dir)
    # A run with --val-split has stats of its own; bare weights are taken to have the usual ones.
    stats = (settings["mean"], settings["std"]) if "mean" in settings else None
    precision = utils.pick_precision(device)._replace(dtype=torch.float32)
    loader = utils.make_loader(
        data.test_images,
        data.test_labels,
        utils.test_transform(*(stats or utils.channel_stats(data.train_images))),
        train.TEST_BATCH,
        shuffle=False,
        device=device,
        precision=precision,
    )
    started = time.perf_counter()
    network = network.to(device, memory_format=precision.memory_format)
    result = utils.test(network, loader, device, precision)
    hits = int((result.logits.argmax(dim=1) == result.labels).sum())
    return (
        f"{chosen.build.__name__}, {file}: {result.accuracy:.2f} % of the test set "
        f"({hits:,} of {len(result.labels):,}), loss {result.loss:.4f}, float32 on "
        f"{utils.describe(device)}, {time.perf_counter() - started:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
