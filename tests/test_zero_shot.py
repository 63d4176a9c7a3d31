"""What a vision-language teacher promises: it is open_clip's own classifier, and students need nothing of it."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import RESNET, TOWERS, VIT, save_clip, small_clip
from open_clip.transform import image_transform
from PIL import Image
from torch import nn

import pipeline.networks.zero_shot as zero_shot
from cli import main
from data import make_coloured_mnist, open_dataset
from pipeline import ModelError, Trace, ZeroShot, cache_explanations, explain, load_classifier, load_teacher, plain
from pipeline.networks.heads import AttentionPool, HeadSpec, head_arrays, l2_norm
from pipeline.networks.teacher_options import VisionLanguageOptions
from pipeline.networks.teachers import parse_teacher
from pipeline.networks.zero_shot import preprocess_of, zero_shot_network
from teacher_cache import open_cache
from trainer import TrainingError, evaluate, train_student
from trainer.results.evaluation import bias_warning

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PROMPTS = ("a handwritten {}", "the digit {}")


def tokenize(texts: list[str]) -> torch.Tensor:
    return open_clip.get_tokenizer("RN50", context_length=16)(texts)


def network_of(model: nn.Module, classes=("cat", "dog", "ship"), templates=PROMPTS) -> nn.Sequential:
    return zero_shot_network(model, tokenize, [[t.replace("{}", name) for t in templates] for name in classes])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip_teacher(files) -> ZeroShot:
    return ZeroShot(*files, templates=PROMPTS)


@pytest.fixture(scope="module")
def store(dataset, clip_teacher, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "clip.zarr"
    cache_explanations(dataset, clip_teacher, path, draws=2, features=True)
    return path


# --- it is open_clip's own classifier -----------------------------------------------------------------------


@pytest.mark.parametrize("tower", TOWERS)
def test_logits_are_those_of_open_clips_own_zero_shot_classifier_less_their_mean(tower):
    model, classes = small_clip(TOWERS[tower]), ["cat", "dog", "ship"]
    size = TOWERS[tower]["image_size"]
    images = torch.rand(4, 3, size, size)
    expected = open_clip.build_zero_shot_classifier(model, tokenize, classes, PROMPTS)
    normalise = image_transform(size, is_train=False).transforms[-1]
    with torch.no_grad():
        features = model.encode_image(torch.stack([normalise(image) for image in images]), normalize=True)
        wanted = model.logit_scale.exp() * features @ expected
        found = network_of(model, classes)(images)
    torch.testing.assert_close(found, wanted - wanted.mean(1, keepdim=True), rtol=1e-4, atol=1e-4)


def test_a_logit_bias_which_all_classes_share_is_left_out():
    assert network_of(small_clip(VIT, init_logit_bias=-3.0)).head.bias is None


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(28, 28), (40, 60), (70, 96), (224, 224)])
def test_preprocessing_is_open_clips_up_to_the_rounding_of_eight_bits(mode, interpolation, shape):
    size, rng = 64, np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize(shape[::-1], 2))
    pixels = np.where(rng.random((*shape, 1)) < 0.1, 255, smooth).astype(np.uint8)
    own = image_transform(size, is_train=False, resize_mode=mode, interpolation=interpolation)
    ours = preprocess_of({**_defaults(), "size": size, "resize_mode": mode, "interpolation": interpolation})
    found = ours(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255)[0]
    expected = own(Image.fromarray(pixels))
    assert found.shape == expected.shape
    difference = ((found - expected).abs() * ours.std[0] * 255).max()
    assert difference < 1.6  # Pillow rounds after each axis


def _defaults() -> dict:
    from dataclasses import asdict

    from open_clip.transform import PreprocessCfg

    return asdict(PreprocessCfg())


def test_a_class_is_the_normalised_mean_of_its_prompts():
    model = small_clip(VIT)
    expected = []
    with torch.no_grad():
        for name in ("cat", "dog"):
            of_prompts = model.encode_text(tokenize([t.replace("{}", name) for t in PROMPTS]), normalize=True)
            expected.append(F.normalize(of_prompts.mean(0), dim=0) * model.logit_scale.exp())
    weight = network_of(model, ["cat", "dog"]).head.weight
    torch.testing.assert_close(weight, torch.stack(expected) - sum(expected) / 2)


# --- it is explained as others explain it -------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["vit", "vit with average pooling", "vit with QuickGELU"])
def test_heatmaps_of_the_vit_equal_lxts_efficient_attnlrp(patched, tower):
    quick = tower.endswith("QuickGELU")
    model = small_clip(VIT if quick else TOWERS[tower], quick_gelu=quick)
    network, targets = network_of(model), torch.tensor([2, 0])
    images = torch.rand(2, 3, 28, 28)
    heatmaps = explain(network, images, targets, 1e-10)[1]
    patched("flex")
    from lxt.efficient.patches import layer_norm_forward, non_linear_forward
    from lxt.efficient.rules import stop_gradient

    for module in network.tower.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = layer_norm_forward.__get__(module)
        if type(module).__name__ == "QuickGELU":
            module.original_forward = module.forward
            module.forward = non_linear_forward.__get__(module)
        if isinstance(module, nn.MultiheadAttention):
            attend = type(module).forward
            module.forward = lambda q, k, v, module=module, attend=attend, **_: attend(module, q, k, v)
    leaf = images.clone().requires_grad_()
    embedding = network.tower(network.preprocess(leaf))
    logits = (embedding / stop_gradient(embedding.norm(dim=1, keepdim=True))) @ network.head.weight.T
    (gradient,) = torch.autograd.grad(logits[0, 2] + logits[1, 0], leaf)
    error = (heatmaps - images * gradient).norm() / (images * gradient).norm()
    assert error < 1e-4


def test_the_convolutions_of_the_resnet_are_explained_by_lrp_epsilon():
    """From the map in front of the attention pooling, with the relevance that it has there, to the image."""
    model, epsilon = small_clip(RESNET), 0.05
    network = network_of(model).double()
    tower = network.tower
    images, targets = torch.rand(2, 3, 64, 64, dtype=torch.float64), torch.tensor([1, 2])
    seen: list[torch.Tensor] = []
    hook = tower.attnpool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trace = Trace(network, images)
    hook.remove()
    found = trace.heatmaps(targets, epsilon, keep_graph=True)
    at_pool = trace.gradient(targets, epsilon, at=seen[0])

    # the same by plain autograd: every ReLU of output a hands on a / (a + ε), batch norms as the affine maps they are
    class Flex(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            a = x.clamp_min(0)
            ctx.save_for_backward(a)
            return a

        @staticmethod
        def backward(ctx, g):
            (a,) = ctx.saved_tensors
            return g * a / (a + epsilon)

    for module in tower.modules():
        if isinstance(module, nn.ReLU):
            module.forward = Flex.apply
    tower.attnpool = nn.Identity()
    leaf = images.clone().requires_grad_()
    maps = tower(network.preprocess(leaf))
    (gradient,) = torch.autograd.grad(maps, leaf, at_pool)
    torch.testing.assert_close(found, (images * gradient).detach(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32"])
def test_the_published_architectures_are_explained_and_teach(name, tmp_path, monkeypatch):
    """With random weights, as the published ones cannot be fetched where tests run: stage one, and a student's step."""
    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained_text=False)
    for key, parameter in model.named_parameters():
        if key.endswith("bn3.weight"):
            nn.init.ones_(parameter)
    monkeypatch.setattr(zero_shot, "_load", lambda teacher: (copy.deepcopy(model), open_clip.get_tokenizer(name)))
    make_coloured_mnist(tmp_path / "few.zarr", limit=2)
    teacher = load_teacher(ZeroShot(name, "any"), NAMES, (3, 28, 28))
    cache_explanations(tmp_path / "few.zarr", ZeroShot(name, "any"), tmp_path / "store.zarr", draws=1)
    heatmaps = open_cache(tmp_path / "store.zarr").read_shard(0).heatmaps
    assert heatmaps.shape == (2, 1, 3, 28, 28)
    assert np.isfinite(heatmaps).all()
    assert heatmaps.any()
    head = "attention-pool" if name == "RN50" else "frozen"
    told = train_student(
        tmp_path / "few.zarr", tmp_path / "store.zarr", tmp_path / "student", head=head, steps=1, batch_size=2
    )
    assert np.isfinite(told["loss"])
    arrays = head_arrays(teacher.model.network, 10)
    assert ("pool.heads" in arrays) == (name == "RN50")
    assert HeadSpec.of(arrays).normalised


# --- stage one, students, export ----------------------------------------------------------------------------


def test_the_store_says_where_its_maps_come_from(store, clip_teacher, dataset):
    cache = open_cache(store)
    assert cache.info.teacher.arch == str(clip_teacher)
    assert cache.info.teacher.class_names == open_dataset(dataset).class_names
    prompts = json.loads(cache.info.written_by["prompts"])
    assert prompts["seven"] == ["a handwritten seven", "the digit seven"]
    assert cache.info.written_by["pretrained"] == clip_teacher.pretrained
    assert set(cache.head) >= {"weight", "norm", "pool.positional_embedding", "pool.c_proj.weight", "pool.heads"}


def test_the_same_teacher_continues_its_store_and_other_prompts_do_not(store, dataset, files):
    again = cache_explanations(dataset, ZeroShot(*files, templates=PROMPTS), store, draws=2, features=True)
    assert again.computed_shards == 0
    with pytest.raises(ValueError, match=r"teacher\.weights_sha256"):
        cache_explanations(dataset, ZeroShot(*files), store, draws=2, features=True)


def test_stored_features_are_normalised_as_the_students_are(store):
    features = open_cache(store).read_shard(0).features
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("method", ["lrp", "complete-lrp", "features", "output"])
def test_a_students_last_layer_is_the_text_behind_an_adapter(store, dataset, tmp_path, method):
    train_student(dataset, store, tmp_path / "student", method=method, steps=2, batch_size=32)
    model, config = load_classifier(tmp_path / "student")
    *_, norm, layer = model.network.head
    assert isinstance(norm, nn.RMSNorm)
    np.testing.assert_array_equal(layer.weight, open_cache(store).head["weight"])
    assert config.head is not None
    assert config.head.normalised
    images = torch.rand(2, 3, 28, 28)
    entering: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    model(images)
    torch.testing.assert_close(entering[0].norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("arch", ["small-cnn", "resnet18"])
def test_a_student_takes_the_attention_pooling_too(store, dataset, tmp_path, arch):
    train_student(dataset, store, tmp_path / "s", arch=arch, head="attention-pool", steps=2, batch_size=32)
    model, _ = load_classifier(tmp_path / "s")
    (pool,) = (module for module in model.modules() if isinstance(module, AttentionPool))
    head = open_cache(store).head
    for name, value in pool.state_dict().items():
        np.testing.assert_array_equal(value, head[f"pool.{name}"])
    assert evaluate(dataset, tmp_path / "s")["kind"] == "student"


def test_the_attention_pooling_is_open_clips():
    model = small_clip(RESNET).visual.attnpool
    ours = AttentionPool(2, 256, model.num_heads, 16)
    ours.load_state_dict(model.state_dict())
    maps = torch.randn(3, 256, 2, 2)
    torch.testing.assert_close(ours(maps), model(maps), rtol=1e-5, atol=1e-6)


def test_l2_norm_is_the_division_by_the_l2_norm():
    x = torch.randn(5, 7) * torch.tensor([1e-4, 1, 1e4, 1, 0]).view(5, 1)
    torch.testing.assert_close(l2_norm(7)(x), F.normalize(x, dim=1))


ALONE = """
import sys, torch
class Forbidden:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("open_clip", "pipeline", "trainer", "timm"):
            raise ImportError(name)
sys.meta_path.insert(0, Forbidden())
images, expected = torch.load(sys.argv[1])
model = torch.load(sys.argv[2], weights_only=False)
exported = torch.export.load(sys.argv[3]).module()
with torch.no_grad():
    for found in (model(images), exported(images)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("head", ["frozen", "attention-pool", "free"])
def test_an_exported_student_needs_neither_open_clip_nor_text(store, dataset, tmp_path, head):
    train_student(dataset, store, tmp_path / "s", head=head, steps=1, batch_size=32)
    model, _ = load_classifier(tmp_path / "s")
    for form, name in (("torch-export", "s.pt2"), ("onnx", "s.onnx"), ("state-dict", "s.pt")):
        done = CliRunner().invoke(
            main, ["export", "--model", str(tmp_path / "s"), "--format", form, "--out", str(tmp_path / name)]
        )
        assert done.exit_code == 0, done.output
    images = torch.rand(3, 3, 28, 28)
    with torch.no_grad():
        torch.save((images, model(images)), tmp_path / "expected.pt")
        torch.testing.assert_close(plain(model)(images), model(images))
    (tmp_path / "alone.py").write_text(ALONE)
    arguments = [tmp_path / "alone.py", tmp_path / "expected.pt", tmp_path / "s" / "model.pt", tmp_path / "s.pt2"]
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_heads_that_do_not_fit_are_refused_with_the_remedy(store, cache, dataset, tmp_path):
    with pytest.raises(ModelError, match="pools by attention"):
        train_student(dataset, cache, tmp_path / "a", head="attention-pool")
    with pytest.raises(ModelError, match="give head='frozen'"):
        train_student(dataset, store, tmp_path / "b", head="attention-pool", arch="mobilenet_v2")
    with pytest.raises(ModelError, match="ends in a 1×1 convolution"):
        train_student(dataset, store, tmp_path / "c", arch="squeezenet1_1")
    with pytest.raises(TrainingError, match="frozen, attention-pool, free"):
        train_student(dataset, store, tmp_path / "d", head="text")


# --- on the command line ------------------------------------------------------------------------------------


def run(*arguments) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return done.exit_code, done.output


def test_the_commands_take_such_a_teacher(dataset, files, tmp_path):
    config, weights = files
    (tmp_path / "prompts.txt").write_text("a handwritten {}\n\nthe digit {}\n")
    teacher = ["--data", dataset, "--teacher", f"clip:{config}", "--pretrained", weights]
    named = [*teacher, "--prompts", tmp_path / "prompts.txt", "--classes", "0;1;2;3;4;5;6;7;8;9"]
    code, output = run("cache-explanations", *named, "--out", tmp_path / "s.zarr", "--draws", 1)
    assert code == 0, output
    assert json.loads(open_cache(tmp_path / "s.zarr").info.written_by["prompts"])["seven"] == [
        "a handwritten 7",
        "the digit 7",
    ]
    code, output = run("evaluate", *named)
    assert code == 0, output
    assert "iid" in output


def test_a_store_is_made_by_workers_as_by_this_process(dataset, clip_teacher, tmp_path):
    assert pickle.loads(pickle.dumps(clip_teacher)) == clip_teacher
    from distributed import LocalCluster

    cache_explanations(dataset, clip_teacher, tmp_path / "here.zarr", draws=1)
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        cache_explanations(dataset, clip_teacher, tmp_path / "there.zarr", draws=1, scheduler=cluster.scheduler_address)
    here, there = (open_cache(tmp_path / name).read_shard(0) for name in ("here.zarr", "there.zarr"))
    np.testing.assert_array_equal(here.target_class, there.target_class)
    np.testing.assert_allclose(here.teacher_logits, there.teacher_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["clip:RN51", "--pretrained", "x"], "Did you mean clip:RN50"),
        (["clip:RN50"], "needs --pretrained: a checkpoint's file, or one of open_clip's tags"),
        (["clip:RN50", "--pretrained", "opanai"], "opanai is no file, and no weights of clip:RN50"),
        (["clip:nowhere.json", "--pretrained", "x"], "nowhere.json cannot be read"),
        (["clip:CONFIG", "--pretrained", "WEIGHTS", "--classes", "a; b"], "--classes has 2 classes"),
        (
            ["clip:CONFIG", "--pretrained", "WEIGHTS", "--classes", "a;a;2;3;4;5;6;7;8;9"],
            "'a', which is empty",
        ),
        (["clip:CONFIG", "--pretrained", "WEIGHTS", "--prompt", "a digit"], "must have one {}"),
        (["clip:CONFIG", "--pretrained", "WEIGHTS", "--prompts", "none.txt"], "none.txt cannot be read"),
        (["clip:CONFIG", "--pretrained", "CUT"], "does not load with --pretrained"),
        (["clip:CONFIG", "--pretrained", "OTHER"], "does not load with --pretrained"),
        (["clip:NOJSON", "--pretrained", "WEIGHTS"], "is not JSON"),
        (["clip:BARE", "--pretrained", "WEIGHTS"], "must have embed_dim, vision_cfg, text_cfg"),
        (["clip:FOLDER", "--pretrained", "WEIGHTS"], "has its own weights: leave --pretrained"),
        (["clip:FOLDER"], "has no open_clip_config.json"),
        (["clip:CONFIG", "--pretrained", "WEIGHTS", "--segmenter", "a:b"], "--segmenter a:b was given, but"),
        (["FOLDER", "--prompt", "a {}"], "--prompt 'a {}' is an option of vision-language teachers"),
    ],
)
def test_what_is_wrong_with_a_teacher_is_said(dataset, files, tmp_path, options, said):
    config, weights = files
    (tmp_path / "cut.pt").write_bytes(Path(weights).read_bytes()[:1000])
    torch.save(small_clip(VIT).state_dict(), tmp_path / "other.pt")
    (tmp_path / "no.json").write_text("{")
    (tmp_path / "bare.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    places = {
        "CONFIG": config,
        "WEIGHTS": weights,
        "CUT": tmp_path / "cut.pt",
        "OTHER": tmp_path / "other.pt",
        "NOJSON": tmp_path / "no.json",
        "BARE": tmp_path / "bare.json",
        "FOLDER": tmp_path / "folder",
    }
    for name, path in places.items():
        options = [option.replace(name, str(path)) if name in option else option for option in options]
    code, output = run("cache-explanations", "--data", dataset, "--out", tmp_path / "s.zarr", "--teacher", *options)
    assert code != 0
    assert said in " ".join(output.split()), output
    assert "Traceback" not in output
    assert not (tmp_path / "s.zarr").exists()


def test_without_a_network_it_says_what_to_fetch(dataset, tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("open_clip.factory.download_pretrained", unreachable)
    command = ["cache-explanations", "--data", dataset, "--teacher", "clip:RN50", "--pretrained", "yfcc15m"]
    code, output = run(*command, "--out", tmp_path / "s.zarr")
    said = " ".join(output.split())
    assert code == 1
    assert "cannot be fetched" in said
    assert "rn50-quickgelu-yfcc15m" in said
    assert "--pretrained FILE" in said


def test_weights_by_a_published_name_have_their_activation(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(open_clip, "create_model", lambda *a, **options: made.append(options) or small_clip(VIT))
    monkeypatch.setattr(open_clip, "load_checkpoint", lambda *a: None)
    for name, quick in (("RN50.pt", True), ("mine.pt", False)):
        torch.save({}, tmp_path / name)
        zero_shot._load(ZeroShot("RN50", str(tmp_path / name)))
        assert made[-1]["force_quick_gelu"] is quick


def test_a_torchscript_archive_is_read_for_its_weights(tmp_path, files):
    model = small_clip(RESNET)
    archive = torch.jit.trace(model.visual, torch.rand(1, 3, 64, 64))
    torch.jit.save(archive, tmp_path / "archive.pt")
    found = torch.load(zero_shot._plain_checkpoint(tmp_path / "archive.pt", tmp_path), weights_only=True)
    assert found.keys() == model.visual.state_dict().keys()
    assert zero_shot._plain_checkpoint(Path(files[1]), tmp_path) == Path(files[1])


def test_a_biased_teacher_is_warned_of():
    def result(iid, kind="teacher", **others):
        splits = {name: {"accuracy": accuracy} for name, accuracy in {"iid": iid, **others}.items()}
        return {"kind": kind, "iid": iid, "splits": splits}

    assert bias_warning(result(90.0, ood=88.0, shift=86.0)) is None
    assert "loses 30.0 points from iid to shift" in str(bias_warning(result(90.0, ood=88.0, shift=60.0)))
    assert bias_warning(result(90.0, kind="student", shift=10.0)) is None
    assert bias_warning({"kind": "teacher", "iid": None, "splits": {"test": {"accuracy": 3.0}}}) is None


def test_options_become_a_teacher():
    assert parse_teacher("FOLDER") == Path("FOLDER")
    made = parse_teacher(
        "clip:RN50", VisionLanguageOptions(pretrained="openai", classes=(" a ", " b"), prompt=("x {}", "y {}"))
    )
    assert made == ZeroShot("RN50", "openai", ("a", "b"), ("x {}", "y {}"))
    assert parse_teacher("clip:RN50").templates == ("a photo of a {}",)


def test_errors_name_the_options_of_a_teacher_in_python():
    for options, message in (
        ({"prompt": ("a {}",), "prompts": "p.txt"}, "give either prompt or prompts='p.txt', not both"),
        ({"prompts": "none.txt"}, r"prompts='none.txt' cannot be read .*: give a text file"),
    ):
        with pytest.raises(ModelError, match=message):
            parse_teacher("clip:RN50", VisionLanguageOptions(**options))
    with pytest.raises(ModelError, match=r"classes='a; b' is an option of .*, but teacher='FOLDER' is a folder"):
        parse_teacher("FOLDER", VisionLanguageOptions(classes=("a", "b")))
