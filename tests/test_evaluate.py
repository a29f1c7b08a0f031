"""tools.evaluate and tools.predict against plain computations, and what they refuse."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image

import cifar10
import utils
from model_2 import CNN_Model_2
from support import files, provenance
from tests.conftest import PIXEL, call_main
from tools import evaluate, pictures, predict


@pytest.fixture(autouse=True)
def _no_png(monkeypatch) -> None:
    """Drawing would take longest; test_tool_pictures.py looks at the figures."""
    monkeypatch.setattr(evaluate.plots, "png", lambda *_: PIXEL)


@pytest.fixture
def no_figures(monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "draw", lambda *_: {})


def call(tool, capsys, *arguments: object) -> tuple[int, str, str]:
    return call_main(tool.main, capsys, arguments)


@pytest.fixture
def run(tmp_path, monkeypatch, sample):
    """A run's folder with trained weights, and stats that are not those of their training.

    The sample stands in for all of CIFAR-10.
    """
    monkeypatch.setattr(cifar10, "load_cifar10", lambda root, *_: sample)
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(files.HERE / "output/reference/model_2/weights.pt", folder)
    settings = {
        "network": "CNN_Model_2",
        "model_file": "model_2.py",
        "model_sha256": provenance.code_digest(files.HERE / "model_2.py"),
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def answers(folder, images, mean, std) -> torch.Tensor:
    model = CNN_Model_2().eval()
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    pixels = (images / 255 - np.array(mean)) / np.array(std)
    with torch.inference_mode():
        return model(torch.from_numpy(pixels).float().permute(0, 3, 1, 2))


def hits(logits: torch.Tensor, labels: np.ndarray) -> int:
    return int((logits.argmax(dim=1).numpy() == labels).sum())


OWN = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


def test_a_run_is_evaluated_with_its_own_stats(run, sample, capsys, tmp_path):
    out_dir = tmp_path / "out"
    status, out, error = call(
        evaluate, capsys, run, "--tta", "--device", "cpu", "--output-dir", out_dir
    )
    assert status == 0, error
    plain = answers(run, sample.test_images, *OWN)
    wanted = hits(plain, sample.test_labels)
    sample_s = answers(run, sample.test_images, *utils.channel_stats(sample.train_images))
    assert wanted != hits(sample_s, sample.test_labels)  # the wrong stats would be seen
    assert f"{wanted / 2:.2f} % of the test set ({wanted} of 200), float32 on cpu" in out
    places = plain.argsort(dim=1, descending=True).numpy() == sample.test_labels[:, None]
    top3, top5 = (int(places[:, :k].sum()) for k in (3, 5))
    loss = torch.nn.functional.cross_entropy(plain, torch.from_numpy(sample.test_labels).long())
    assert f"top-3 {top3 / 2:.2f} %, top-5 {top5 / 2:.2f} %, loss {loss:.4f}, calibration" in out
    flipped = answers(run, sample.test_images[:, :, ::-1], *OWN)
    both = hits(plain + flipped, sample.test_labels)
    assert f"with flip test-time augmentation {both / 2:.2f} %" in out
    (folder,) = out_dir.iterdir()
    assert {path.name for path in folder.iterdir() if path.name != ".lock"} == {
        "train.log", "evaluation.json", "classification_report.txt", "confusion_matrix.png",
        "class_metrics.png", "calibration.png", "most_confident_mistakes.png",
        "most_confident_correct.png",
    }  # fmt: skip
    results = json.loads((folder / "evaluation.json").read_text())
    assert (results["top1"], results["top3"], results["top5"]) == (wanted / 2, top3 / 2, top5 / 2)
    assert results["top1_with_flip"] == both / 2
    report = (folder / "classification_report.txt").read_text()
    predicted = plain.argmax(dim=1).numpy()
    lines = [line.split() for line in report.splitlines() if line.strip()][1:11]
    for label, (name, precision, recall, f1, support) in enumerate(lines):
        right = sum((predicted == label) & (sample.test_labels == label))
        shares = right / sum(predicted == label), right / sum(sample.test_labels == label)
        assert (name, support) == (cifar10.CLASSES[label], "20")
        assert [precision, recall] == [f"{share:.4f}" for share in shares]
        row = results["classes"][name]
        assert (row["precision"], row["recall"]) == pytest.approx(shares)
        assert row["f1-score"] == pytest.approx(float(f1), abs=1e-4)
    assert list(results["classes"]) == list(cifar10.CLASSES)


def test_with_flip_both_answers_count(run, sample, capsys, tmp_path, monkeypatch, no_figures):
    """Of four images, two are right plain, one flipped, and three by both answers' sum."""
    images, labels = sample.test_images[:4], np.array([0, 1, 2, 3])
    monkeypatch.setattr(evaluate, "images_of", lambda *_: ("four images", images, labels))
    # Probabilities of the class that is right and of the next one, plain and flipped.
    plain = [(0.8, 0.1), (0.7, 0.2), (0.4, 0.5), (0.1, 0.8)]
    flipped = [(0.4, 0.5), (0.4, 0.5), (0.8, 0.1), (0.2, 0.7)]
    asked = []

    def given(trained, images, labels, args) -> np.ndarray:
        asked.append(images)
        found = np.full((4, 10), 0.0125)
        for row, (right, next_one) in enumerate(plain if len(asked) == 1 else flipped):
            found[row, row : row + 2] = right, next_one
        return np.log(found)

    monkeypatch.setattr(evaluate, "answers_of", given)
    status, out, _ = call(evaluate, capsys, run, "--tta", "--output-dir", tmp_path / "out")
    assert status == 0
    assert "50.00 % of the four images (2 of 4)" in out
    assert "with flip test-time augmentation 75.00 %" in out
    assert np.array_equal(asked[0], images)
    assert np.array_equal(asked[1], images[:, :, ::-1])


def test_answers_are_of_float32_on_a_device_that_computes_with_less(run, sample, monkeypatch):
    short = utils.Device(torch.device("cpu"), torch.bfloat16, torch.channels_last)
    monkeypatch.setattr(utils.Device, "pick", lambda name=None: short)
    trained = evaluate.networks.load_trained(run)
    dtypes = []
    trained.network.conv1[0].register_forward_hook(lambda *each: dtypes.append(each[2].dtype))
    args = SimpleNamespace(device=None)
    images, labels = sample.test_images[:50], sample.test_labels[:50]
    found = evaluate.answers_of(trained, images, labels, args)
    exact = answers(run, images, *OWN).log_softmax(dim=1).numpy()
    np.testing.assert_allclose(found, exact, atol=1e-3)
    assert dtypes == [torch.float32]


def test_the_curve_of_the_calibration_and_the_bars_of_the_classes(monkeypatch):
    """In two bins: 4 answers of 40 %, 1 of them right, and 6 of 90 %, 3 of them right."""
    drawn = []
    monkeypatch.setattr(evaluate.plots, "png", lambda figure, *_: drawn.append(figure) or b"")
    sure = np.array([0.41] * 4 + [0.9] * 6, dtype=np.float32)
    evaluate.reliability(sure, np.array([1, 0, 0, 0, 1, 1, 1, 0, 0, 0], dtype=bool), "x")
    top, bottom = drawn[0].axes
    np.testing.assert_allclose(top.lines[1].get_xydata(), [(0.41, 25), (0.9, 50)], rtol=1e-6)
    heights = {round(15 * b.get_x()): b.get_height() for b in bottom.patches if b.get_height()}
    assert heights == pytest.approx({6: 40, 13: 60})
    rows = {"cat": {"precision": 0.5, "recall": 0.25, "f1-score": 0.1, "support": 4}}
    evaluate.class_metrics(rows | {"dog": dict.fromkeys(rows["cat"], 1)}, "x")
    heights = [bar.get_height() for bar in drawn[1].axes[0].patches]
    assert heights == pytest.approx([50, 100, 25, 100, 10, 100])


def test_weights_that_answer_with_no_number_are_one_line(run, capsys):
    weights = {name: value * torch.nan for name, value in CNN_Model_2().state_dict().items()}
    torch.save(weights, run / "weights.pt")
    status, _, error = call(evaluate, capsys, run, "--device", "cpu")
    assert (status, error.count("\n")) == (1, 1)
    assert "the loss became nan" in error


def test_bare_weights_need_the_network_and_take_the_stats_of_the_training_set(
    run, sample, capsys, tmp_path, monkeypatch, no_figures
):
    (run / "settings.json").unlink()
    status, _, error = call(evaluate, capsys, run / "weights.pt")
    assert status == 2
    assert "nothing beside" in error
    pixels = sample.train_images.reshape(-1, 3) / 255
    logits = answers(run, sample.test_images, pixels.mean(axis=0), pixels.std(axis=0))
    arguments = run / "weights.pt", "--model", "2", "--device", "cpu", "--output-dir"
    for dry in ((), ("--dry-run",)):
        status, out, error = call(evaluate, capsys, *arguments, tmp_path / "out", *dry)
        assert status == 0, error
        assert f"({hits(logits, sample.test_labels)} of 200)" in out
        monkeypatch.setattr(cifar10, "load_cifar10", lambda *_: pytest.fail("in a dry run"))


def test_own_pictures_were_held_out_by_no_run(run, capsys, tmp_path):
    status, _, error = call(evaluate, capsys, run, "--images", tmp_path, "--split", "val")
    assert status == 2
    assert "--images are pictures of your own; leave out --split" in error


def test_figures_by_hand():
    """Five images whose answers are known, one third, one fifth; classes 0 to 9."""
    logits = np.full((5, 10), -1.0, dtype=np.float32)
    labels = np.array([0, 0, 1, 2, 3])
    for row, ranking in enumerate(([0], [1, 5, 0], [1], [5, 6, 7, 8, 2], [3])):
        for place, label in enumerate(ranking):
            logits[row, label] = 9.0 - place
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = evaluate.figures(np.log(probabilities), labels)
    assert (found["top1"], found["top3"], found["top5"]) == pytest.approx((60, 80, 100))
    airplane, automobile = found["classes"]["airplane"], found["classes"]["automobile"]
    assert (airplane["precision"], airplane["recall"], airplane["support"]) == (1.0, 0.5, 2)
    assert (automobile["precision"], automobile["recall"]) == (0.5, 1.0)
    assert automobile["f1-score"] == pytest.approx(2 / 3)
    assert found["macro"]["recall"] == pytest.approx((0.5 + 1 + 0 + 1) / 10)
    assert found["weighted"]["recall"] == pytest.approx(0.6)
    assert found["loss"] == pytest.approx(-np.log(probabilities[range(5), labels]).mean(), rel=1e-5)


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    right = probabilities.argmax(axis=1) == labels
    return evaluate.calibration_error(probabilities.max(axis=1), right)


def test_calibration_against_a_loop():
    draw = np.random.default_rng(0)
    probabilities = draw.dirichlet(np.full(10, 0.3), 2000)
    # Right in two of three, however sure: too sure in some bins, not sure enough in others.
    labels = (probabilities.argmax(axis=1) + (draw.random(2000) > 2 / 3)) % 10
    error = 0.0
    for number in range(15):
        inside = [
            (row.max(), row.argmax() == label)
            for row, label in zip(probabilities, labels, strict=True)
            if number / 15 <= row.max() < (number + 1) / 15
        ]
        if inside:
            sure, right = np.mean(inside, axis=0)
            error += len(inside) / 2000 * abs(sure - right)
    assert error > 0.1
    assert calibration_error(probabilities, labels) == pytest.approx(error)
    found = evaluate.figures(np.log(probabilities), labels)
    assert found["expected_calibration_error"] == pytest.approx(100 * error)


def test_answers_as_often_right_as_they_are_sure_are_calibrated():
    draw = np.random.default_rng(1)
    probabilities = draw.dirichlet(np.full(10, 0.5), 100_000)
    drawn = (probabilities.cumsum(axis=1) > draw.random((100_000, 1))).argmax(axis=1)
    assert calibration_error(probabilities, drawn) < 0.005
    certain = np.eye(10)[np.zeros(1000, dtype=int)]
    assert calibration_error(certain, np.arange(1000) % 10) == pytest.approx(0.9)


def test_held_out_images_of_a_run(run, sample, capsys, tmp_path, no_figures):
    status, _, error = call(evaluate, capsys, run, "--split", "val")
    assert status == 2
    assert "comes from no run with --val-split" in error
    settings = json.loads((run / "settings.json").read_text()) | {"val_split": 100}
    other = cifar10.digests(sample) | {"train_images": "0" * 64}
    for trained_on in (None, other):
        settings["data_sha256"] = trained_on or {}
        (run / "settings.json").write_text(json.dumps(settings))
        status, _, error = call(evaluate, capsys, run, "--split", "val")
        assert status == 2
        assert "was trained on other images than these" in error
    settings["data_sha256"] = cifar10.digests(sample)
    (run / "settings.json").write_text(json.dumps(settings))
    status, out, error = call(
        evaluate, capsys, run, "--split", "val", "--device", "cpu", "--output-dir", tmp_path / "o"
    )
    assert status == 0, error
    _, held_out = utils.validation_split(1000, 100)
    logits = answers(run, sample.train_images[held_out], *OWN)
    assert f"({hits(logits, sample.train_labels[held_out])} of 100)" in out


# ---------------------------------------------------------------- pictures of one's own


@pytest.fixture
def own_pictures(tmp_path, sample):
    """Six of the sample's images, as PNG files in folders of their classes."""
    folder = tmp_path / "mine"
    for number in range(6):
        place = folder / cifar10.CLASSES[sample.test_labels[number]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sample.test_images[number]).save(place / f"{number}.png")
        (place / "notes.txt").write_text("no picture")
    return folder


def test_a_folder_of_pictures(run, own_pictures, sample, capsys, tmp_path, no_figures):
    images, labels = pictures.read_folder(own_pictures)
    pairs = zip(sample.test_images[:6], sample.test_labels[:6], strict=True)
    known = {image.tobytes(): label for image, label in pairs}
    assert len(known) == 6
    assert (images.dtype, labels.dtype) == (np.uint8, np.uint8)
    found = zip(images, labels, strict=True)
    assert {image.tobytes(): label for image, label in found} == known
    status, out, error = call(
        evaluate, capsys, run, "--images", own_pictures, "--device", "cpu",
        "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert status == 0, error
    assert f"({hits(answers(run, images, *OWN), labels)} of 6)" in out


def test_a_folder_s_name_is_no_formula(run, own_pictures, capsys, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(evaluate, "draw", lambda title, *_: titles.append(title) or {})
    folder = own_pictures.rename(tmp_path / r"x$\bad$y")
    flags = "--device", "cpu", "--output-dir", tmp_path / "out"
    status, _, error = call(evaluate, capsys, run, "--images", folder, *flags)
    assert status == 0, error
    assert titles[0].replace("\\$", "$").endswith(str(folder))
    assert not cbook.is_math_text(titles[0])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda _: torch.zeros(10), "CNN_Model_2 gives an answer of (10,) for 1 pictures"),
        (lambda images: torch.full((len(images), 10), torch.nan), "gives NaN for 1 pictures"),
    ],
)
def test_predict_refuses_what_is_no_answer(answer, said, run, own_pictures, capsys, monkeypatch):
    trained = evaluate.load(run, None)._replace(network=answer)
    monkeypatch.setattr(evaluate, "load", lambda *_: trained)
    picture = next(own_pictures.glob("*/*.png"))
    status, out, error = call(predict, capsys, picture, "--weights", run)
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert said in error


def test_predict_names_the_likeliest_classes(run, own_pictures, capsys):
    """Three of each picture, the likeliest first, in the order of the pictures."""
    paths = sorted(own_pictures.glob("*/*.png"), reverse=True)
    status, out, error = call(predict, capsys, *paths, "--weights", run)
    assert status == 0, error
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    probabilities = answers(run, images, *OWN).softmax(dim=1)
    for path, line, row in zip(paths, out.splitlines(), probabilities, strict=True):
        ranked = sorted(zip(row.tolist(), cifar10.CLASSES, strict=True), reverse=True)[:3]
        assert line == f"{path}: " + ", ".join(f"{name} {share:.1%}" for share, name in ranked)
    assert len({line.split(": ")[1] for line in out.splitlines()}) == len(paths)


def test_refusals_are_one_line(run, capsys, tmp_path, own_pictures):
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong" / "zebra").mkdir(parents=True)
    (tmp_path / "broken" / "cat").mkdir(parents=True)
    (tmp_path / "broken" / "cat" / "x.png").write_text("no picture")
    alone = tmp_path / "empty" / "weights.pt"
    alone.write_bytes((run / "weights.pt").read_bytes())
    for tool, arguments, status, message in (
        (evaluate, (tmp_path / "nowhere",), 2, "is not there; give a run's folder"),
        (evaluate, (run, "--model", "1"), 2, "was trained with other code than"),
        (evaluate, (alone, "--model", "1"), 1, "does not hold the weights of CNN_Model_1: conv1.0"),
        (evaluate, (alone,), 2, "says which network it is; give --model"),
        (evaluate, (run, "--device", "tpu"), 2, "no device 'tpu' here"),
        (evaluate, (run, "--model", "9"), 2, "'9' is neither"),
        (evaluate, (), 2, "the following arguments are required: weights"),
        (evaluate, (run, "--images", tmp_path / "nowhere"), 2, "is not a folder"),
        (evaluate, (run, "--images", tmp_path / "empty"), 2, "there are no pictures"),
        (evaluate, (run, "--images", tmp_path / "wrong"), 2, "zebra is no class"),
        (evaluate, (run, "--images", tmp_path / "broken"), 2, "cannot be read as a picture"),
        (predict, (tmp_path / "x.jpg", "--weights", run), 2, "cannot be read as a picture"),
        (predict, (), 2, "the following arguments are required: IMAGE"),
    ):
        got, _, error = call(tool, capsys, *arguments)
        assert got == status
        assert message in error
        assert error.count("\n") == 1
