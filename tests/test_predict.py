"""What `predict` promises: the answers of `evaluate` for files from anywhere, in one table that replaces no other."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import trainer.results.prediction as module
from cli import main
from data import DatasetError, DatasetWriter, make_image_folder, open_dataset
from data.builders.pictures import fit_of
from data.layout import read_builder
from pipeline import ModelError, RelevanceError, explain, load_classifier
from pipeline.device import as_input
from trainer import Prediction, evaluate, predict, train_student, train_teacher, write_predictions

ROOT = Path(__file__).parent.parent
SIDE = 28
CPU = torch.device("cpu")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["predict", *map(str, arguments)])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def picture(seed: int, height: int = SIDE, width: int = SIDE) -> Image.Image:
    """Coloured blobs, smooth enough to survive any scaling."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def save(image: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def listed(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def models(dataset, teacher, cache, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    train_teacher(dataset, folder / "erm", debias="none", steps=8, batch_size=64)
    train_student(dataset, cache, folder / "student", steps=3, batch_size=32)
    return {"teacher": teacher, "erm": folder / "erm", "student": folder / "student"}


@pytest.fixture(scope="module")
def erm(models) -> Path:
    return models["erm"]


@pytest.fixture(scope="module")
def photos(dataset, tmp_path_factory) -> Path:
    """The first 150 images of the iid split as files, in a folder for each class."""
    folder, split = tmp_path_factory.mktemp("photos"), open_dataset(dataset).split("iid")
    for row in range(150):
        name = open_dataset(dataset).class_names[int(split.labels[row])]
        save(Image.fromarray(split.images[row].transpose(1, 2, 0)), folder / name / f"{row:03}.png")
    return folder


def answers(model: Path, images: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The classes and probabilities of images, uint8 (n, C, H, W), in the plainest way."""
    classifier, config = load_classifier(model)
    with torch.no_grad():
        probabilities = classifier(as_input(images, CPU)).double().softmax(1).numpy()
    return [config.class_names[row.argmax()] for row in probabilities], probabilities


# --- what is predicted ---


@pytest.mark.parametrize("kind", ["teacher", "erm", "student"])
def test_files_of_a_splits_images_get_the_answers_that_evaluate_gives(dataset, models, tmp_path, kind):
    split, names = open_dataset(dataset).split("ood"), open_dataset(dataset).class_names
    for row in range(len(split)):
        save(Image.fromarray(split.images[row].transpose(1, 2, 0)), tmp_path / "ood" / f"{row:03}.png")
    assert run("--model", models[kind], tmp_path / "ood", "--probabilities", "--out", tmp_path / "p.csv").exit_code == 0
    rows = table(tmp_path / "p.csv")
    assert [row["path"] for row in rows] == [f"{tmp_path}/ood/{number:03}.png" for number in range(len(split))]
    classes, probabilities = answers(models[kind], np.asarray(split.images[:]))
    assert [row["class"] for row in rows] == classes
    labels = np.asarray(split.labels[:])
    correct = np.mean([row["class"] == names[label] for row, label in zip(rows, labels, strict=True)])
    assert 100 * correct == pytest.approx(evaluate(dataset, models[kind])["ood"])
    columns = [f"probability of {name}" for name in names]
    assert list(rows[0]) == ["path", "class", "probability", *columns]
    stored = np.array([[float(row[column]) for column in columns] for row in rows])
    np.testing.assert_allclose(stored, probabilities, atol=1e-5)
    assert [float(row["probability"]) for row in rows] == stored.max(1).tolist()


def test_python_gets_the_rows_that_the_file_has(erm, photos, tmp_path):
    rows = list(predict(erm, [photos / "zero", photos / "one"]))
    write_predictions(erm, [photos / "zero", photos / "one"], tmp_path / "p.csv")
    assert [(str(row.path), row.class_name, str(row.probability)) for row in rows] == [
        tuple(row.values()) for row in table(tmp_path / "p.csv")
    ]
    assert len(rows) > 2
    assert all(row.probabilities[row.class_name] == row.probability == max(row.probabilities.values()) for row in rows)
    assert all(row.problem is row.image is row.heatmap is None for row in rows)
    assert next(predict(erm, photos)).path == next(predict(erm, str(photos))).path


def test_many_files_are_decoded_in_several_processes_with_the_same_rows(erm, photos, monkeypatch):
    def rows() -> list[tuple[Path, str | None, float | None]]:
        return [(row.path, row.class_name, row.probability) for row in predict(erm, photos)]

    monkeypatch.setattr("dask.system.cpu_count", lambda: 1)
    alone = rows()
    monkeypatch.setattr("dask.system.cpu_count", lambda: 2)
    assert rows() == alone
    assert len(alone) == 150


def test_files_are_decoded_while_rows_are_taken(erm, photos, monkeypatch):
    decoded: list[Path] = []
    real = sys.modules["data.builders.loose"].read_image
    monkeypatch.setattr("data.builders.loose.read_image", lambda path: decoded.append(path) or real(path))
    monkeypatch.setattr("dask.system.cpu_count", lambda: 1)
    rows = predict(erm, photos)
    assert decoded == []
    next(rows)
    assert len(decoded) == module.AT_ONCE < 150


def test_the_callers_random_state_is_left_alone(erm, photos):
    rows = predict(erm, photos / "zero")  # loads the model, whose first weights are random
    before = torch.random.get_rng_state()
    assert len(list(rows)) > 1
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_a_file_a_line_is_printed_for_each_image(erm, photos):
    lines = run("--model", erm, photos / "zero").output.splitlines()
    assert run("--model", erm, photos / "zero", "--out", "-").output.splitlines() == lines
    rows = list(predict(erm, photos / "zero"))
    for line, row in zip(lines, rows, strict=True):
        name, share, unit, path = line.split(maxsplit=3)
        assert (name, share, unit) == (row.class_name, f"{100 * row.probability:.2f}", "%")
        assert path == str(row.path)
    (line, *_) = run("--model", erm, photos / "zero", "--probabilities").output.splitlines()
    assert all(f"{name} {100 * value:.2f} %" in line for name, value in rows[0].probabilities.items())


def test_a_reader_that_has_seen_enough_gets_no_error(erm, photos):
    code = "import sys; from cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "predict", "--model", str(erm), *[str(photos)] * 3]
    done = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    done.stdout.close()
    assert b"Error" not in done.stderr.read()
    assert done.wait() == 1


# --- which files ---


def test_all_images_below_a_folder_are_read_and_other_files_are_counted(erm, tmp_path):
    for name in ("a.png", "deep/er/b.webp", "c.JPG", "no suffix"):
        save(picture(1), tmp_path / "x" / "tmp.png").rename(tmp_path / "x.png")
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x.png").rename(tmp_path / "photos" / name)
    for name in ("notes.txt", "more.TXT", "raw.dng", "table.csv"):
        (tmp_path / "photos" / name).write_text("no image")
    for name in (".hidden.png", "__MACOSX/a.png", ".ipynb_checkpoints/a.png"):
        save(picture(1), tmp_path / "photos" / name)
    result = run("--model", erm, tmp_path / "photos", "--out", tmp_path / "p.csv")
    assert result.exit_code == 0, result.output
    names = [str(Path(row["path"]).relative_to(tmp_path / "photos")) for row in table(tmp_path / "p.csv")]
    assert names == ["a.png", "c.JPG", "no suffix", "deep/er/b.webp"]
    assert "left out 2 .txt, 1 .dng, 1 .csv, which are not images that can be decoded here" in result.output
    assert f"{tmp_path}/p.csv: 4 images" in result.output


def test_unreadable_files_are_listed_and_left_out_and_the_exit_code_tells(erm, photos, tmp_path):
    whole = save(picture(2, 200, 200), tmp_path / "in" / "whole.jpg")
    (tmp_path / "in" / "cut.jpg").write_bytes(whole.read_bytes()[:1500])
    (tmp_path / "in" / "text.png").write_text("no image")
    (tmp_path / "in" / "broken.png").symlink_to(tmp_path / "nowhere")
    result = run("--model", erm, tmp_path / "in", "--out", tmp_path / "p.csv")
    assert result.exit_code == 1
    assert [row["path"] for row in table(tmp_path / "p.csv")] == [str(whole)]
    for name, reason in (("cut.jpg", "truncated"), ("text.png", "cannot identify"), ("broken.png", "no longer there")):
        (line,) = [line for line in result.stderr.splitlines() if line.startswith(f"{tmp_path}/in/{name}: ")]
        assert reason in line
    assert result.stderr.splitlines()[-1] == "3 files cannot be read"
    printed = run("--model", erm, tmp_path / "in")
    assert printed.exit_code == 1
    assert len(printed.stdout.splitlines()) == 1
    assert printed.stderr.splitlines()[-1] == "3 files cannot be read"
    problems = [row for row in predict(erm, tmp_path / "in") if row.problem is not None]
    assert [row.path.name for row in problems] == ["broken.png", "cut.jpg", "text.png"]
    assert all(row.class_name is row.probability is None and row.probabilities == {} for row in problems)


@pytest.mark.parametrize("name", ["notes.txt", "raw.dng", "pipe"])
def test_a_file_that_was_named_is_not_left_out_in_silence(erm, photos, tmp_path, name):
    if name == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_text("no image")
    result = run("--model", erm, photos / "zero", tmp_path / name, "--out", tmp_path / "p.csv")
    assert result.exit_code == 1
    assert f"{tmp_path / name}: {name}" in result.stderr
    assert len(table(tmp_path / "p.csv")) == len(list((photos / "zero").iterdir()))


def test_files_of_one_name_in_two_folders_are_two_rows_and_a_file_named_twice_is_one(erm, tmp_path):
    one, two = save(picture(3), tmp_path / "a" / "1.png"), save(picture(4), tmp_path / "b" / "1.png")
    shutil.copy(one, tmp_path / "b" / "2.png")
    again = tmp_path / "a" / ".." / "b"
    rows = list(predict(erm, [tmp_path / "b", two, again, tmp_path / "a", again / ".." / "a" / "1.png", one]))
    assert [row.path for row in rows] == [two, tmp_path / "b" / "2.png", one]
    assert rows[1].probabilities == pytest.approx(rows[2].probabilities)


def test_a_link_to_a_folder_above_ends_no_run(erm, tmp_path):
    image = save(picture(3), tmp_path / "a" / "1.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    assert [row.path for row in predict(erm, tmp_path / "a")] == [image]


ODD = [
    "with space",
    "comma, semi;colon",
    'quo"te',
    "line\nbreak",
    "tab\t",
    "日本語 ñ é",
    "=1+1",
    "$x^{$",
    "-dash",
    "%s",
]


@pytest.mark.parametrize("explain", [False, True])
def test_odd_names_are_whole_in_the_table_and_lead_to_the_files(erm, tmp_path, explain):
    paths = [save(picture(number), tmp_path / "in" / name / f"{name}.png") for number, name in enumerate(ODD)]
    expected = {str(path): answers(erm, np.asarray(Image.open(path)).transpose(2, 0, 1)[None])[0][0] for path in paths}
    result = run("--model", erm, tmp_path / "in", "--out", tmp_path / "p.csv", *(["--explain"] if explain else []))
    assert result.exit_code == 0, result.output
    rows = table(tmp_path / "p.csv")
    assert {row["path"]: row["class"] for row in rows} == expected
    if explain:
        assert len({row["picture"] for row in rows}) == len(ODD)
        assert all((tmp_path / row["picture"]).is_file() for row in rows)
    assert len(run("--model", erm, tmp_path / "in").output.splitlines()) == len(ODD)


def test_a_name_that_is_not_utf_8_is_escaped_and_the_table_is_utf_8(erm, tmp_path):
    os.rename(save(picture(1), tmp_path / "x.png"), os.fsencode(tmp_path) + b"/caf\xe9.png")
    result = run("--model", erm, tmp_path, "--explain", "--out", tmp_path / "p.csv")
    assert result.exit_code == 0, result.output
    (row,) = table(tmp_path / "p.csv")
    assert row["path"].endswith(r"/caf\udce9.png")
    assert (tmp_path / row["picture"]).is_file()
    assert r"caf\udce9.png" in run("--model", erm, tmp_path).output


# --- their shapes and modes ---


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_an_image_of_another_shape_is_fitted_as_asked_and_this_is_said_once(erm, tmp_path, caplog, fit):
    image = picture(5, 2 * SIDE, 4 * SIDE)
    paths = [save(image, tmp_path / f"{number}.png") for number in range(3)]
    save(picture(6), tmp_path / "right.png")
    if fit == "crop":
        seen = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(SIDE, 0, 3 * SIDE, 2 * SIDE))
    elif fit == "stretch":
        seen = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    else:
        seen = Image.new("RGB", (SIDE, SIDE))
        seen.paste(image.resize((SIDE, SIDE // 2), Image.Resampling.BILINEAR), (0, SIDE // 4))
    rows = list(predict(erm, tmp_path, fit=fit, explain=True))
    classes, probabilities = answers(erm, np.asarray(seen).transpose(2, 0, 1)[None])
    for row in rows[:3]:
        assert np.array_equal(row.image.transpose(1, 2, 0), np.asarray(seen))
        assert row.class_name == classes[0]
        assert list(row.probabilities.values()) == pytest.approx(probabilities[0].tolist())
    assert [row.path for row in rows[:3]] == paths
    (record,) = caplog.records
    assert record.getMessage().startswith("3 of 4 images are scaled to 28×28, the size that the model was trained on")
    happened = {"crop": "cuts away 50 %", "pad": "have black margins", "stretch": "are stretched"}[fit]
    assert f"3 of another aspect ratio {'are cropped to the middle, which ' * (fit == 'crop')}{happened}" in caplog.text


def test_images_of_the_models_shape_are_not_spoken_of(erm, photos, caplog):
    list(predict(erm, photos / "zero"))
    assert caplog.records == []


def save_variants(folder: Path) -> np.ndarray:
    """One grey picture in many forms. Returns its values, uint8 (H, W)."""
    grey = picture(7).convert("L")
    values = np.asarray(grey)
    save(grey, folder / "l.png")
    save(grey.convert("RGB"), folder / "rgb.png")
    save(grey.convert("RGBA"), folder / "rgba.png")
    save(grey.convert("P"), folder / "palette.png")
    save(Image.fromarray(values.astype(np.uint16) * 257), folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    grey.transpose(Image.Transpose.ROTATE_90).convert("RGB").save(folder / "turned.png", exif=exif)
    return values


def test_grey_deep_transparent_and_turned_pictures_are_seen_as_a_viewer_shows_them(erm, tmp_path):
    values = save_variants(tmp_path)
    rows = list(predict(erm, tmp_path, explain=True))
    assert len(rows) == 6
    for row in rows:
        assert np.array_equal(row.image, np.stack([values] * 3)), row.path
        assert row.probabilities == pytest.approx(rows[0].probabilities)


def written(path: Path, channels: int) -> Path:
    rng = np.random.default_rng(0)
    with DatasetWriter(path) as writer:
        for split in ("train", "ood"):
            images = rng.integers(0, 256, (12, channels, SIDE, SIDE), np.uint8)
            writer.write_split(split, images=images, labels=np.arange(12) % 2)
        writer.finish(name="own", class_names=["a", "b"])
    return path


def test_a_model_of_one_channel_sees_grey_values(tmp_path):
    split = open_dataset(written(tmp_path / "d.zarr", 1)).split("ood")
    train_teacher(tmp_path / "d.zarr", tmp_path / "erm", debias="none", steps=2, batch_size=4)
    for row in range(len(split)):
        save(Image.fromarray(split.images[row][0]), tmp_path / "in" / f"{row:02}.png")
    rows = list(predict(tmp_path / "erm", tmp_path / "in", explain=True))
    assert [row.class_name for row in rows] == answers(tmp_path / "erm", np.asarray(split.images[:]))[0]
    assert np.array_equal(np.stack([row.image for row in rows]), split.images[:])
    write_predictions(tmp_path / "erm", tmp_path / "in" / "00.png", tmp_path / "p.csv", explain=True)
    assert len(list((tmp_path / "p-pictures").iterdir())) == 1


def test_a_model_of_other_channels_is_refused(tmp_path):
    written(tmp_path / "d.zarr", 2)
    train_teacher(tmp_path / "d.zarr", tmp_path / "erm", debias="none", steps=1, batch_size=4)
    save(picture(1), tmp_path / "a.png")
    with pytest.raises(DatasetError, match="takes images of 2 channels, and image files have 1 or 3"):
        next(predict(tmp_path / "erm", tmp_path / "a.png"))


# --- how the model's dataset was fitted ---


@pytest.fixture(scope="module")
def padded(tmp_path_factory) -> Path:
    """A folder with a model whose dataset was made with the fit ``pad``, and a wide picture."""
    folder = tmp_path_factory.mktemp("padded")
    for name in ("cat", "dog"):
        for number in range(6):
            save(picture(number), folder / "train" / name / f"{number}.png")
    tests = {"ood": folder / "train"}
    make_image_folder(folder / "d.zarr", folder / "train", tests, size=(28, 40), fit="pad", echo=lambda _: None)
    train_teacher(folder / "d.zarr", folder / "erm", debias="none", steps=2, batch_size=4)
    save(picture(9, 60, 200), folder / "wide.png")
    return folder


def seen(folder: Path, **options: str) -> np.ndarray:
    (row,) = predict(folder / "erm", folder / "wide.png", explain=True, **options)
    return row.image


def test_the_fit_of_the_models_dataset_is_the_default(padded, caplog):
    assert np.array_equal(seen(padded), seen(padded, fit="pad"))
    assert not np.array_equal(seen(padded), seen(padded, fit="crop"))
    assert "does not tell" not in caplog.text


@pytest.mark.parametrize("loss", ["gone", "another"])
def test_without_the_models_dataset_images_are_cropped_and_this_is_said(padded, tmp_path, caplog, loss):
    shutil.copytree(padded, tmp_path / "moved")
    starts = tmp_path / "moved" / "erm" / "starts.jsonl"
    starts.write_text(starts.read_text().replace(str(padded), str(tmp_path / "moved")))
    if loss == "another":
        group = tmp_path / "moved" / "d.zarr" / "train" / "zarr.json"
        content = json.loads(group.read_text())
        content["attributes"]["fingerprint"] = "0" * 64
        group.write_text(json.dumps(content))
    else:
        shutil.rmtree(tmp_path / "moved" / "d.zarr")
    assert np.array_equal(seen(tmp_path / "moved"), seen(padded, fit="crop"))
    assert "The dataset of the training does not tell how its images were fitted: give fit" in caplog.text


@pytest.mark.parametrize(
    ("builder", "fit"),
    [
        ({"command": "make-data image-folder", "size": 8}, "crop"),
        ({"command": "make-data image-folder", "fit": "stretch"}, "stretch"),
        ({"command": "make-data waterbirds", "size": 64}, "stretch"),
        ({"command": "make-data coloured-mnist"}, None),
        ({"fit": "else"}, None),
        ({}, None),
    ],
)
def test_a_builders_record_tells_how_it_fitted_images(builder, fit):
    assert fit_of(builder) == fit


def test_a_builders_record_is_read_without_any_array(padded, tmp_path):
    shutil.copytree(padded / "d.zarr", tmp_path / "d.zarr")
    fingerprint = open_dataset(tmp_path / "d.zarr").split("train").fingerprint
    for chunks in tmp_path.rglob("c"):
        shutil.rmtree(chunks)
    assert read_builder(tmp_path / "d.zarr", fingerprint)["fit"] == "pad"
    assert read_builder(tmp_path / "d.zarr", "0" * 64) is None
    assert read_builder(tmp_path / "nowhere", fingerprint) is None


# --- explanations ---


def test_each_image_has_a_picture_of_the_right_size_and_the_same_answer_as_without(erm, photos, tmp_path):
    arguments = ["--model", erm, photos / "zero", photos / "one"]
    assert run(*arguments, "--out", tmp_path / "plain.csv").exit_code == 0
    result = run(*arguments, "--explain", "--epsilon", 0.3, "--out", tmp_path / "p.csv")
    assert result.exit_code == 0, result.output
    assert (
        result.output
        == f"{tmp_path}/p.csv: {len(table(tmp_path / 'p.csv'))} images, with pictures in {tmp_path}/p-pictures\n"
    )
    rows = table(tmp_path / "p.csv")
    for row, plain in zip(rows, table(tmp_path / "plain.csv"), strict=True):
        assert [row["path"], row["class"]] == [plain["path"], plain["class"]]
        # other kernels compute the logits, and on some processors they differ in the last bit
        assert float(row["probability"]) == pytest.approx(float(plain["probability"]), rel=1e-6)
    assert [row["picture"] for row in rows] == [
        f"p-pictures/{path.name}" for path in sorted((tmp_path / "p-pictures").iterdir())
    ]
    sizes = set()
    for row in rows:
        with Image.open(tmp_path / row["picture"]) as drawn:
            drawn.load()
            sizes.add(drawn.size)
            about = json.loads(drawn.info["Description"])
        assert (about["image"], about["class"], about["epsilon"]) == (row["path"], row["class"], 0.3)
        assert about["explainer"] == "flex"
    assert len(sizes) == 1
    ((width, height),) = sizes
    assert width > 2 * 200  # two squares beside each other
    assert height > 200


def test_a_wide_model_has_wide_pictures(padded, tmp_path):
    write_predictions(padded / "erm", padded / "wide.png", tmp_path / "p.csv", explain=True, fit="stretch")
    (drawn,) = (tmp_path / "p-pictures").iterdir()
    black = (np.asarray(Image.open(drawn).convert("RGB")) < 60).all(2)  # the frames of the image and of the heatmap
    left, right, *_ = np.flatnonzero(black.sum(0) > 0.25 * black.shape[0])
    rows = np.flatnonzero(black[:, left : right + 1].all(1))
    assert (right - left) / (rows.max() - rows.min()) == pytest.approx(40 / 28, rel=0.03)


@pytest.mark.parametrize("explainer", ["flex", "gradient-x-input", "attention"])
def test_heatmaps_are_those_of_explain_for_the_predicted_class(erm, photos, tmp_path, explainer):
    rows = list(predict(erm, photos / "two", explain=True, explainer=explainer, epsilon=0.2))
    images = as_input(np.stack([row.image for row in rows]), CPU)
    classifier, config = load_classifier(erm)
    classes = torch.tensor([config.class_names.index(row.class_name) for row in rows])
    if explainer != "attention":
        rules, epsilon = ("flex", 0.2) if explainer == "flex" else ("gradient-x-input", 0.0)
        _, maps = explain(classifier, images, classes, epsilon, rules=rules)
        for row, heatmap in zip(rows, maps.numpy(), strict=True):
            np.testing.assert_allclose(row.heatmap, heatmap, rtol=1e-3, atol=1e-5)
    assert all(row.heatmap.ndim == 3 for row in rows)
    write_predictions(erm, photos / "two", tmp_path / "p.csv", explain=True, explainer=explainer)
    assert len(list((tmp_path / "p-pictures").iterdir())) == len(rows)


def test_names_without_a_font_are_told_in_one_message(erm, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("trainer.results.fonts._families", lambda lacking: {})
    for number in range(3):
        save(picture(number), tmp_path / "in" / f"図{number}.png")
    write_predictions(erm, tmp_path / "in", tmp_path / "p.csv", explain=True)
    (record,) = caplog.records
    assert all(f"is 図{number}.png" in record.getMessage() for number in range(3))
    assert record.getMessage().startswith(f"{tmp_path}/p-pictures: ")


# --- what is refused, and what is left behind ---

BAD = {
    "--model nowhere photos": (1, "no model at nowhere"),
    "--model photos photos": (1, "no model at photos: there is no config.json"),
    "--model erm nowhere": (1, "there is no file or folder nowhere: give image files, or folders"),
    "--model erm photos nowhere.png": (1, "there is no file or folder nowhere.png"),
    "--model erm empty": (1, "there are no files to predict: give image files, or folders that have some"),
    "--model erm texts": (1, "there are no images that can be decoded here, but 1 .txt: give image files"),
    "--model erm damaged": (1, "no image can be read, so nothing is written: give others: damaged/a.png: a.png cannot"),
    "--model erm photos --out taken.csv": (1, "taken.csv exists: choose another --out, or remove it first"),
    "--model erm photos --out photos": (1, "photos exists: choose another --out"),
    "--model erm photos --explain --out drawn.csv": (1, "drawn-pictures exists: choose another --out"),
    "--model erm photos --explain": (2, "--explain draws a picture for each image: give --out"),
    "--model erm photos --explain --out -": (2, "give --out"),
    "--model erm": (2, "Missing argument 'FILE|FOLDER…'"),
    "photos": (2, "Missing option '--model'"),
    "--model masked photos": (1, "the front of masked needs masks, which image files do not have: use its student"),
    "--model erm photos --fit cut": (2, "'cut' is not one of 'crop', 'pad', 'stretch'"),
    "--model erm photos --epsilon -1": (2, "--epsilon"),
    "--model erm photos --explainer flx": (2, "Did you mean flex?"),
    "--model erm photos --segmenter a:b": (1, "--segmenter a:b was given, but it has no segmenter"),
    "--model erm photos --device tpu": (1, "the device 'tpu' cannot be used here"),
}


@pytest.fixture(scope="module")
def world(erm, padded, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(erm, folder / "erm")
    shutil.copytree(erm, folder / "masked")
    config = json.loads((folder / "masked" / "config.json").read_text())
    (folder / "masked" / "config.json").write_text(json.dumps({**config, "debias": "mask"}))
    save(picture(1), folder / "photos" / "a.png")
    (folder / "empty").mkdir()
    for name in ("texts/a.txt", "damaged/a.png", "taken.csv", "drawn-pictures/mine"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    return folder


@pytest.mark.parametrize("line", BAD)
def test_a_wrong_call_is_refused_with_the_remedy_and_leaves_nothing(world, monkeypatch, line):
    monkeypatch.chdir(world)
    before = listed(world)
    out = [] if "--out" in line or "--explain" in line else ["--out", "new.csv"]
    result = run(*line.split(), *out)
    code, message = BAD[line]
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert listed(world) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), MemoryError])
@pytest.mark.parametrize("step", ["drawing", "writing"])
def test_a_run_that_ends_early_leaves_nothing(erm, photos, tmp_path, monkeypatch, error, step):
    real, out = module.Folder.write, tmp_path / "p.csv"

    def write(folder: object, key: str, value: object, **options: object) -> bool:
        if key.startswith("000002") if step == "drawing" else key == "p.csv":
            raise error
        return real(folder, key, value, **options)

    monkeypatch.setattr(module.Folder, "write", write)
    with pytest.raises((KeyboardInterrupt, OSError, MemoryError)):
        write_predictions(erm, photos / "zero", out, explain=True)
    assert listed(tmp_path) == []


def test_what_another_program_wrote_meanwhile_is_kept(erm, photos, tmp_path, monkeypatch):
    real = module._draw

    def draw(*arguments: object) -> None:
        (tmp_path / "p.csv").write_text("mine")
        real(*arguments)

    monkeypatch.setattr(module, "_draw", draw)
    with pytest.raises(FileExistsError, match=r"p\.csv exists"):
        write_predictions(erm, photos / "zero", tmp_path / "p.csv", explain=True)
    assert listed(tmp_path) == ["p.csv"]
    assert (tmp_path / "p.csv").read_text() == "mine"


def test_a_new_folder_is_made_for_the_table_and_the_pictures_have_the_usual_rights(erm, photos, tmp_path):
    write_predictions(erm, photos / "zero", tmp_path / "new" / "er" / "p.csv", explain=True)
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "new" / "er" / "p-pictures").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert listed(tmp_path / "new" / "er")[:2] == [
        "p-pictures",
        "p-pictures/" + sorted(os.listdir(tmp_path / "new" / "er" / "p-pictures"))[0],
    ]


def test_errors_of_python_name_options_as_python_does(erm, photos, tmp_path):
    with pytest.raises(RelevanceError, match="epsilon must be at least 0, got -1"):
        predict(erm, photos, epsilon=-1)
    with pytest.raises(DatasetError, match="there are no files to predict"):
        predict(erm, [])
    with pytest.raises(ModelError, match="no model at"):
        predict(tmp_path, photos)
    assert isinstance(next(predict(erm, photos)), Prediction)
