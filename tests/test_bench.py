"""tools/bench: what it runs and how it reports; its figures are nobody's test."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import cpu
import networks
import plots
import utils
from tools import bench

CPU = torch.device("cpu")


def constant(value: float) -> dict[str, float]:
    return bench.spread([value])


RESULTS = {
    "transform": {
        rate: {"albumentations": constant(240), "batched": constant(16), "opencv": constant(8)}
        for rate in ("p=1", "own p")
    },
    "epoch": {
        "images": 5000,
        "images_per_second": {
            "usual": constant(700),
            "ours": constant(2100),
            "limit": constant(2200),
        },
        "times_faster": constant(3.0),
        "overhead_percent": constant(4.76),
    },
    "scaling": {
        "by_batch_size": [
            {"batch_size": size, "images_per_second": constant(size * 10), "peak_mib": 900.0}
            for size in bench.BATCH_SIZES
        ],
        "by_data_set_size": [{"images": 5000, "seconds": constant(2.38)}],
        "evaluation": [{"batch_size": 500, "images_per_second": constant(9000)}],
        "latency": [{"precision": "torch.float32", "milliseconds": constant(0.7)}],
    },
    "parts": {"batched loader": constant(1.37)},
}


def test_spread_is_median_least_and_greatest():
    assert bench.spread([3.0, 1.0, 10.0, 2.0]) == {"median": 2.5, "min": 1.0, "max": 10.0}


def test_report_names_every_figure():
    text = bench.report(RESULTS)
    for part in (
        "15.0x",
        "30.0x",
        "2,100",
        "3.00",
        "4.8",
        "900 MiB",
        "9,000",
        "0.70",
        "2.38",
        "1.37",
    ):
        assert part in text


def test_picture():
    image = Image.open(io.BytesIO(plots.bench(RESULTS, "title")))
    assert image.format == "PNG"
    pixels = np.asarray(image.convert("RGB"))
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edge == 255).all()


def test_ready_loader_gives_as_many_steps_and_images_as_the_epoch():
    loader = bench.Ours("2", CPU).loader(300)
    ready = list(bench.ReadyLoader(loader))
    assert [len(labels) for _, labels in ready] == [len(labels) for _, labels in loader]
    assert sum(len(images) for images, _ in ready) == 300


def test_usual_data_set_is_the_same_pipeline(sample):
    mean, std = utils.channel_stats(sample.test_images)
    usual = bench.UsualDataset(
        sample.test_images, sample.test_labels, utils.test_transform(mean, std)
    )
    ours = utils.make_loader(
        sample.test_images,
        sample.test_labels,
        utils.test_transform(mean, std),
        200,
        shuffle=False,
        device=CPU,
        precision=utils.Precision(torch.float32, torch.contiguous_format),
    )
    ((images, labels),) = ours
    assert [usual[index][1] for index in range(200)] == labels.tolist()
    torch.testing.assert_close(torch.stack([usual[i][0] for i in range(200)]), images)


def test_the_whole_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "TRANSFORM_IMAGES", 100)
    monkeypatch.setattr(bench, "BATCH_SIZES", (32, 64))
    # The smallest epoch that the command takes, in a network small enough not to matter.
    net = tmp_path / "net.py"
    net.write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = torch.nn.Linear(3, 10)\n"
        "    def forward(self, x):\n"
        "        return self.linear(x.mean(dim=(2, 3)))\n"
        "RECIPE = dict(optimizer='sgd', lr=0.1, weight_decay=0.0, schedule='cosine',\n"
        "              batch_size=128, target_accuracy=85.0, target_epochs=9)\n"
    )
    arguments = ["--model", str(net), "--device", "cpu", "--images", "256", "--repetitions", "1"]
    assert bench.main([*arguments, "--output-dir", str(tmp_path / "out")]) == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert sorted(path.name for path in folder.glob("[!.]*")) == [
        "bench.json",
        "bench.png",
        "train.log",
    ]
    results = json.loads((folder / "bench.json").read_text())
    assert results["network"] == "Net"
    speeds = results["epoch"]["images_per_second"]
    assert all(
        math.isfinite(speeds[way][key]) and speeds[way]["min"] > 0
        for way in ("usual", "ours", "limit")
        for key in ("median", "min", "max")
    )
    assert "1. Transform alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "9"], "'9' is neither"),
        (["--device", "tpu"], "no device 'tpu'"),
        (["--images", "10"], "'10' is not a whole number from 256 up"),
        (["--repetitions", "0"], "'0' is not a whole number from 1 to 100"),
    ],
)
def test_bad_input_gets_one_clear_line(arguments, message, capsys, tmp_path):
    try:
        status = bench.main([*arguments, "--output-dir", str(tmp_path)])
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("tools.bench: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("part", bench.PARTS)
def test_what_is_left_out_is_left_out(part):
    number = "3" if part == "faster layers" else "2"
    whole, lacking = bench.Ours(number, CPU), bench.Ours(number, CPU, part)
    assert {
        "batched loader": type(lacking.loader(256)) is not type(whole.loader(256)),
        "reduced precision": lacking.precision.dtype == torch.float32,
        "channels_last": lacking.precision.memory_format == torch.contiguous_format,
        "kept memory": True,  # of the process; it cannot be asked
        "faster layers": not any(isinstance(m, cpu.FastDropout) for m in lacking.model.modules()),
    }[part]
    lacking.train(lacking.loader(64))


def test_bench_measures_what_train_runs():
    """The same precision, layout, layers and augmentation as train.py takes."""
    crop = bench.Ours("2", CPU).loader(256).transform
    assert type(crop.steps[0]).__name__ == "PadIfNeeded"
    ours = bench.Ours("3", CPU)
    assert ours.precision == utils.pick_precision(CPU)
    assert any(isinstance(module, cpu.FastDropout) for module in ours.model.modules())
    assert ours.recipe == networks.load_network("3").recipe
