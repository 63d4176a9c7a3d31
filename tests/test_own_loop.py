"""A store as PyTorch datasets, and its loss as a module: what a training loop of the user's own relies on."""

from __future__ import annotations

import importlib.util
import logging
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, default_collate, random_split
from torch.utils.data.distributed import DistributedSampler

from data import open_dataset
from pipeline import cache_explanations, explain, load_classifier, synchronise_batch_norm
from teacher_cache import CacheError, layout, open_cache
from tests import ranks
from tests.test_examples import EXAMPLES, ROOT, environment
from trainer import DistillationLoss, ExplainedDataset, ExplainedStream, TrainingError, build_student
from trainer.loop.step import losses_of, on_device
from trainer.stream.order import draw_of_block
from trainer.stream.stream import explained_source, stream

SIZES = {
    "images": (torch.uint8, (3, 28, 28)),
    "labels": (None, ()),
    "groups": (None, ()),
    "heatmaps": (None, (3, 28, 28)),
    "scale": (torch.float32, ()),
    "target_class": (torch.int64, ()),
    "epsilon": (torch.float32, ()),
    "teacher_logits": (torch.float32, (10,)),
    "ids": (torch.int64, ()),
}


@pytest.fixture(scope="module")
def sharded(dataset: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of five shards, two draws a sample."""
    path = tmp_path_factory.mktemp("caches") / "sharded.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "MAX_SHARD_SAMPLES", 64)
        cache_explanations(dataset, teacher, path, draws=2)
    return path


@pytest.fixture(scope="module")
def batch(dataset: Path, sharded: Path) -> dict[str, Tensor]:
    return next(iter(ExplainedStream(dataset, sharded, batch_size=16)))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(values, other[name]) for name, values in one.items())


def test_items_are_tensors_of_the_documented_names_shapes_and_types(dataset, sharded):
    explained = ExplainedDataset(dataset, sharded)
    item = explained[-1]
    assert len(explained) == 300
    assert item["ids"] == 299
    assert item.keys() == SIZES.keys()
    for name, (dtype, shape) in SIZES.items():
        assert item[name].shape == shape, name
        assert dtype is None or item[name].dtype == dtype, name
    with pytest.raises(IndexError, match="no sample 300"):
        explained[300]


def test_items_are_what_split_and_store_hold_in_the_draw_of_the_epoch(dataset, sharded):
    explained, split, store = (
        ExplainedDataset(dataset, sharded, seed=5),
        open_dataset(dataset).split("train"),
        open_cache(sharded),
    )
    indices = [299, 0, 64, 63, 0]
    for epoch in range(3):
        explained.set_epoch(epoch)
        for index, item in zip(indices, explained.__getitems__(indices), strict=True):
            block, row = divmod(index, 64)
            drawn = store.read_draw(block, draw_of_block(block, 2, 5, epoch))
            assert torch.equal(item["images"], torch.from_numpy(split.images[index]))
            assert item["labels"] == int(split.labels[index])
            for name, values in drawn.items():
                assert torch.equal(item[name], torch.as_tensor(values[row])), name


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("kind", [ExplainedDataset, ExplainedStream])
def test_workers_yield_what_one_process_yields_and_see_the_epoch(dataset, sharded, kind, start, workers):
    explained = kind(dataset, sharded)
    size: dict[str, Any] = {"batch_size": 64} if kind is ExplainedDataset else {"batch_size": None}
    loader = DataLoader(
        explained, **size, num_workers=workers, multiprocessing_context=start, persistent_workers=True, timeout=120
    )
    for epoch in range(2):
        explained.set_epoch(epoch)
        alone = kind(dataset, sharded)
        alone.set_epoch(epoch)
        for one, other in zip(loader, DataLoader(alone, **size), strict=True):
            assert same(one, other)


def test_a_distributed_sampler_shares_the_samples(dataset, sharded):
    explained = ExplainedDataset(dataset, sharded)
    ids = []
    for rank in range(2):
        sampler = DistributedSampler(explained, 2, rank, seed=3)
        ids += [part["ids"] for part in DataLoader(explained, 50, sampler=sampler)]
    assert sorted(torch.cat(ids).tolist()) == list(range(300))


def test_a_memory_budget_that_is_too_small_changes_no_item_and_is_told(dataset, sharded, caplog):
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).tolist()
    small, large = ExplainedDataset(dataset, sharded, memory_budget=0), ExplainedDataset(dataset, sharded)
    with caplog.at_level(logging.WARNING):
        pairs = zip(small.__getitems__(order), large.__getitems__(order), strict=True)
        assert all(same(one, other) for one, other in pairs)
    assert "ExplainedStream" in caplog.text
    assert small._slots()[0].slots == 1


def test_several_indices_give_the_batch_that_a_loader_collates(dataset, sharded):
    explained = ExplainedDataset(dataset, sharded)
    order = [299, 3, 3, -1, 150, 64]
    expected = next(iter(DataLoader(explained, len(order), sampler=[index % 300 for index in order])))
    for indices in (order, torch.tensor(order)):
        assert same(explained[indices], expected)
    loader = DataLoader(explained, batch_size=None, sampler=BatchSampler(order, 4, drop_last=False))
    assert [part["ids"].tolist() for part in loader] == [[299, 3, 3, 299], [150, 64]]
    assert same(explained[torch.tensor(3)], {name: values[1] for name, values in expected.items()})


def test_a_loader_collates_the_samples_of_a_batch_without_a_copy(dataset, sharded):
    explained = ExplainedDataset(dataset, sharded)
    gathered: list[dict[str, Tensor]] = []
    gather = explained._gather
    explained._gather = lambda indices: gathered.append(gather(indices)) or gathered[-1]  # type: ignore[method-assign, func-returns-value]
    for batch in DataLoader(explained, 100, shuffle=True):
        assert type(batch) is dict
        for name, values in gathered[-1].items():
            assert batch[name].data_ptr() == values.data_ptr(), name


def _without_groups(samples: list[Any]) -> list[Any]:
    for sample in samples:
        sample.pop("groups")
    return samples


CHANGES: dict[str, tuple[Callable[[list[Any]], list[Any]], Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "each without a field": (_without_groups, lambda b: {name: b[name] for name in b if name != "groups"}),
    "the first with another value": (
        lambda samples: [samples[0].update(labels=samples[0]["labels"] * 0 + 77) or samples[0], *samples[1:]],
        lambda b: {**b, "labels": torch.cat([torch.full_like(b["labels"][:1], 77), b["labels"][1:]])},
    ),
    "fewer": (lambda samples: samples[:3], lambda b: {name: values[:3] for name, values in b.items()}),
    "in another order": (lambda samples: samples[::-1], lambda b: {name: values.flip(0) for name, values in b.items()}),
    "one of them twice": (
        lambda samples: [*samples[:-1], samples[0]],
        lambda b: {name: torch.cat([values[:-1], values[:1]]) for name, values in b.items()},
    ),
    "as dictionaries": (lambda samples: [{**sample} for sample in samples], lambda b: b),
    "pickled": (lambda samples: pickle.loads(pickle.dumps(samples)), lambda b: b),
    "with dictionaries": (lambda samples: [samples[0], *map(dict, samples[1:])], lambda b: b),
}


@pytest.mark.parametrize("case", CHANGES)
def test_samples_that_a_collate_function_changes_or_chooses_are_collated_as_dictionaries(dataset, sharded, case):
    """As a dataset of dictionaries would be."""
    change, expected = CHANGES[case]
    explained, order = ExplainedDataset(dataset, sharded), [299, 3, 0, 150, 64]
    assert same(default_collate(change(explained.__getitems__(order))), expected(explained[order]))


def test_two_batches_of_samples_are_collated_as_one(dataset, sharded):
    explained = ExplainedDataset(dataset, sharded)
    samples = [*explained.__getitems__([5, 6]), *explained.__getitems__([7, 8])]
    assert same(default_collate(samples), explained[[5, 6, 7, 8]])
    parts = random_split(explained, [200, 100], torch.Generator().manual_seed(0))
    assert all(same(batch, explained[batch["ids"]]) for part in parts for batch in DataLoader(part, 32))


@pytest.mark.parametrize("budget", [None, 0, 200_000])
def test_epochs_show_the_same_whether_shards_are_held_or_read_again(dataset, sharded, budget):
    """The rows of a shard in memory are found anew after each read, and in each epoch."""
    explained, store = ExplainedDataset(dataset, sharded, seed=5, memory_budget=budget), open_cache(sharded)
    for epoch in (0, 1, 0, 2, 1):
        explained.set_epoch(epoch)
        for seed in range(3):
            order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))[:40]
            batch = explained[order]
            for row, index in enumerate(order.tolist()):
                drawn = store.read_draw(index // 64, draw_of_block(index // 64, 2, 5, epoch))
                assert torch.equal(batch["heatmaps"][row], torch.as_tensor(drawn["heatmaps"][index % 64]))


def test_a_shard_that_cannot_be_read_is_an_error_each_time(dataset, sharded, tmp_path):
    """A slot that was filled in part must not pass for one that was read."""
    copied = tmp_path / "copied.zarr"
    shutil.copytree(sharded, copied)
    explained = ExplainedDataset(dataset, copied)
    first = explained[[0]]
    chunk = copied / "heatmaps" / "c.1.0.0.0.0"
    chunk.write_bytes(bytes(chunk.stat().st_size))
    for _ in range(2):
        with pytest.raises(CacheError):
            explained[70]
    assert same(explained[[0]], first)


def test_threads_share_an_explained_dataset(dataset, sharded):
    explained = ExplainedDataset(dataset, sharded, memory_budget=0)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).tolist()
    with ThreadPoolExecutor(4) as pool:
        items = list(pool.map(explained.__getitem__, order))
    whole = ExplainedDataset(dataset, sharded)[order]
    assert all(same(item, {name: values[row] for name, values in whole.items()}) for row, item in enumerate(items))


def test_a_program_may_end_in_the_middle_of_a_stream(dataset, sharded):
    """Without a traceback of its threads, although the stream lives longer than the modules that it uses."""
    program = (
        "import sys, torch; from trainer import ExplainedStream; it = iter(ExplainedStream(*sys.argv[1:])); next(it)\n"
        "def function(): pass\n"
        "torch.function = function"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(dataset), str(sharded)], cwd=ROOT, capture_output=True, text=True,
        env=environment(), check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stream_yields_the_batches_of_train_student(dataset, sharded):
    explained = ExplainedStream(dataset, sharded, batch_size=32, fields=["heatmaps"], seed=7)
    source = explained_source(open_dataset(dataset).split("train"), open_cache(sharded))
    expected = stream(source, batch_size=32, seed=7)
    for epoch in range(3):
        explained.set_epoch(epoch)
        batches = list(explained)
        assert len(batches) == len(explained) == 9
        for got in batches:
            one = next(expected)
            one["ids"] = one.pop("sample")
            assert same(got, one)
    expected.close()


def test_the_ranks_of_a_stream_share_each_batch(dataset, sharded):
    whole = ExplainedStream(dataset, sharded, batch_size=32)
    parts = [ExplainedStream(dataset, sharded, batch_size=32, share=(rank, 2)) for rank in range(2)]
    for expected, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(expected["ids"], torch.cat([share["ids"] for share in shares]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_where_it_stopped(dataset, sharded, workers):
    whole = ExplainedStream(dataset, sharded, batch_size=32)
    whole.set_epoch(1)
    expected = list(whole)
    stopped = ExplainedStream(dataset, sharded, batch_size=32)
    stopped.set_epoch(1)
    list(islice(stopped, 4))
    state = stopped.state_dict()
    assert state == {"epoch": 1, "step": 4}

    resumed = ExplainedStream(dataset, sharded, batch_size=32)
    resumed.load_state_dict(state)
    resumed.set_epoch(1)  # as the loop says it at the start of each epoch
    loader = DataLoader(resumed, batch_size=None, num_workers=workers)
    assert all(same(one, other) for one, other in zip(loader, expected[4:], strict=True))
    resumed.set_epoch(2)
    assert len(list(loader)) == 9


def test_the_state_of_a_stream_is_the_epoch_that_was_set_before_its_first_batch(dataset, sharded):
    explained = ExplainedStream(dataset, sharded, batch_size=32)
    for epoch in (3, 1):
        explained.set_epoch(epoch)
        assert explained.state_dict() == {"epoch": epoch, "step": 0}
    next(iter(explained))
    explained.set_epoch(1)
    assert explained.state_dict() == {"epoch": 1, "step": 1}


def test_the_state_of_a_stream_that_workers_read_is_one_clear_error(dataset, sharded):
    """In the process of the loop it would be the start of the training, without a word."""
    explained = ExplainedStream(dataset, sharded, batch_size=32)
    explained.set_epoch(1)
    list(islice(DataLoader(explained, batch_size=None, num_workers=2), 3))
    with pytest.raises(TrainingError, match=r"2 worker processes .* num_workers=0 or torchdata's StatefulDataLoader"):
        explained.state_dict()
    list(islice(DataLoader(explained, batch_size=None), 3))
    assert explained.state_dict() == {"epoch": 1, "step": 3}


@pytest.mark.parametrize("kind", [ExplainedDataset, ExplainedStream])
def test_an_explained_dataset_is_pickled_without_what_it_has_opened_or_decoded(dataset, sharded, kind):
    explained = kind(dataset, sharded)
    expected = next(iter(DataLoader(explained, batch_size=None)))
    assert len(pickle.dumps(explained)) < 5000
    assert same(next(iter(DataLoader(pickle.loads(pickle.dumps(explained)), batch_size=None))), expected)


# --- the loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"method": "output"}, {"loss": "complete-lrp=1,erm=0.1"}, {"map_loss": "cosine", "pyramid": False}]
)
def test_the_loss_and_its_gradient_are_those_of_train_student(sharded, batch, options):
    student, loss = build_student(sharded), DistillationLoss(sharded, **options)
    value = loss(student, batch)
    value.backward()
    gradients = [parameter.grad for parameter in student.parameters() if parameter.requires_grad]

    info = open_cache(sharded).info
    fields = {name: values for name, values in batch.items() if name in loss._needed}
    inputs = on_device(fields, info, loss.settings, torch.device("cpu"))
    losses = losses_of(student, inputs, info, loss.settings)
    expected = sum(weight * losses[name].mean() for name, weight in loss.settings.loss.items())
    assert torch.isclose(value, expected)
    learnt = [parameter for parameter in student.parameters() if parameter.requires_grad]
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, learnt, allow_unused=True), strict=True):
        assert (ours is None and theirs is None) or torch.allclose(ours, theirs, atol=1e-6)
    assert loss.parts.keys() == {*loss.settings.loss, "vanished"}


def changed(batch: dict[str, Tensor], **fields: Tensor | None) -> dict[str, Tensor]:
    return {name: values for name, values in {**batch, **fields}.items() if values is not None}


def test_an_epsilon_in_float64_and_a_class_in_int32_have_the_loss_of_the_stored_ones(sharded, batch):
    """As loops that convert their batches, such as Lightning's in double precision, pass them."""
    student, loss = build_student(sharded), DistillationLoss(sharded)
    converted = changed(
        batch,
        epsilon=batch["epsilon"].double(),
        scale=batch["scale"].double(),
        target_class=batch["target_class"].int(),
    )
    assert torch.equal(loss(student, converted), loss(student, batch))


def test_an_empty_batch_is_one_clear_error(sharded, batch):
    with pytest.raises(TrainingError, match="no sample: leave empty batches out"):
        DistillationLoss(sharded)(build_student(sharded), {name: values[:0] for name, values in batch.items()})


@pytest.mark.parametrize("epsilon", [None, [0.1] * 8, torch.full((8,), 0.1), torch.tensor(float("nan"))])
def test_a_loss_of_ones_own_that_forgets_the_epsilon_is_one_clear_error(sharded, batch, epsilon):
    student, images = build_student(sharded), batch["images"] / 255
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'epsilon'"):
        explain(student, images, batch["target_class"])  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="epsilon must be"):
        explain(student, images, batch["target_class"], epsilon)


def test_fields_that_there_are_not_are_one_clear_error(dataset, sharded):
    with pytest.raises(TrainingError, match="no field 'maps'"):
        ExplainedDataset(dataset, sharded, fields=["maps"])
    with pytest.raises(ValueError, match="no 'masks'"):
        ExplainedDataset(dataset, sharded, fields=["masks"])
    with pytest.raises(TrainingError, match="cannot be shared by 2"):
        ExplainedStream(dataset, sharded, batch_size=7, share=(0, 2))
    with pytest.raises(TrainingError, match="negative"):
        ExplainedDataset(dataset, sharded).set_epoch(-1)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_student_in_half_precision_is_one_clear_error(sharded, batch, half):
    with pytest.raises(TrainingError, match="keep the parameters in float32"):
        DistillationLoss(sharded)(build_student(sharded).to(half), batch)


def test_autocast_to_float16_is_one_clear_error_and_to_bfloat16_works(sharded, batch):
    loss, student = DistillationLoss(sharded), build_student(sharded)
    exact = loss(student, batch)
    with torch.autocast("cpu", torch.float16), pytest.raises(TrainingError, match=r"autocast to torch.float16 is on"):
        loss(student, batch)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, batch)
    value.backward()
    assert abs(float(value) - float(exact)) < 0.1 * float(exact)


def test_a_student_without_parameters_is_one_clear_error(sharded, batch):
    with pytest.raises(TrainingError, match="no parameter"):
        DistillationLoss(sharded)(nn.Flatten(), batch)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_validation_without_gradients_has_the_loss_of_evaluation_mode(sharded, batch, context):
    loss, student = DistillationLoss(sharded), build_student(sharded).eval()
    expected = loss(student, batch)
    with context():
        value = loss(student, batch)
    assert not value.requires_grad
    assert torch.allclose(value, expected)
    assert not student.training


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_student_in_training_mode_without_gradients_is_one_clear_error(sharded, batch, context):
    student = build_student(sharded).train()
    with context(), pytest.raises(TrainingError, match=r"gradients are off.*student.eval\(\)"):
        DistillationLoss(sharded)(student, batch)


def test_the_loss_leaves_the_mode_of_every_module_as_it_is(sharded, batch):
    student = build_student(sharded).train()
    norm = next(module for module in student.modules() if hasattr(module, "running_second_moment"))
    norm.eval()  # as a loop that freezes norms does
    modes = [module.training for module in student.modules()]
    DistillationLoss(sharded)(student, batch)
    assert [module.training for module in student.modules()] == modes


def test_a_float64_student_computes_in_float64(sharded, batch):
    assert DistillationLoss(sharded)(build_student(sharded).double(), batch).dtype == torch.float64


def test_augmentation_moves_image_and_heatmap_together_while_gradients_are_on(sharded, batch):
    """A student whose maps are the images, which a flip of both leaves as far from the teacher's."""
    student = build_student(sharded)
    plain, loss = DistillationLoss(sharded), DistillationLoss(sharded, augment=["flip"])
    with torch.no_grad():
        assert torch.equal(loss(student.eval(), batch), plain(student, batch))
    in_evaluation = DistillationLoss(sharded, augment=["flip"])(student, batch)
    assert not torch.equal(in_evaluation, plain(student, batch)), "in evaluation mode a student learns too"
    first = loss(student.train(), batch)
    assert not torch.equal(first, plain(student, batch))
    resumed = DistillationLoss(sharded, augment=["flip"])
    resumed.load_state_dict(loss.state_dict())
    assert torch.equal(resumed(student, batch), loss(student, batch))


@pytest.mark.parametrize(
    ("explainer", "resolution"), [("flex", 1), ("flex", 2), ("flex-stride4", 1), ("flex-stride4", 2), ("grad-cam", 1)]
)
def test_the_teacher_matches_its_own_maps_whatever_their_size(dataset, teacher, tmp_path, explainer, resolution):
    cache_explanations(dataset, teacher, tmp_path / "c", draws=1, explainer=explainer, resolution=resolution)
    batch = next(iter(ExplainedStream(dataset, tmp_path / "c", batch_size=16)))
    with torch.no_grad():
        assert DistillationLoss(tmp_path / "c")(load_classifier(teacher)[0].eval(), batch) < 0.01


def _step_in_ddp(data: Path, cache: Path, out: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    student = build_student(cache).double()
    synchronise_batch_norm(student)
    part = next(iter(ExplainedStream(data, cache, batch_size=16)))
    assert len(part["ids"]) == 8
    model = DistributedDataParallel(student)  # which averages gradients as long as it lives
    DistillationLoss(cache)(model, part).backward()
    torch.save([parameter.grad for parameter in student.parameters()], out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_in_ddp_have_the_gradient_of_one(dataset, sharded, batch, tmp_path):
    assert ranks.run(2, _step_in_ddp, dataset, sharded, tmp_path) == [0, 0]
    torch.manual_seed(0)
    student = build_student(sharded).double()
    DistillationLoss(sharded)(student, batch).backward()
    for rank in range(2):
        gradients = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for parameter, gradient in zip(student.parameters(), gradients, strict=True):
            assert (parameter.grad is None) == (gradient is None)
            assert gradient is None or torch.allclose(parameter.grad, gradient, atol=1e-9)


def test_a_student_has_the_teachers_last_layer_frozen_and_a_network_of_ones_own_is_copied(sharded):
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    before = [parameter.clone() for parameter in own.parameters()]
    for network in ("small-cnn", own):
        student = build_student(sharded, network)
        frozen = [parameter for parameter in student.parameters() if not parameter.requires_grad]
        assert torch.equal(frozen[0].detach(), torch.from_numpy(open_cache(sharded).head["weight"]))
        assert student(torch.rand(2, 3, 28, 28)).shape == (2, 10)
    assert all(torch.equal(*pair) for pair in zip(before, own.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in own.parameters())


LOOPS = {
    "train_pytorch": "torch",
    "train_lightning": "lightning",
    "train_hf_trainer": "accelerate",
    "train_timm": "timm",
}


@pytest.mark.parametrize("example", LOOPS)
def test_each_loop_of_the_examples_trains_and_saves_a_student(dataset, sharded, tmp_path, example):
    if importlib.util.find_spec(LOOPS[example]) is None:
        pytest.skip(f"{LOOPS[example]} is not installed")
    out, script = tmp_path / "student.pt", EXAMPLES / f"{example}.py"
    assert len(script.read_text().splitlines()) < 60
    options = (
        "--data",
        str(dataset),
        "--cache",
        str(sharded),
        "--out",
        str(out),
        "--steps",
        "11",
        "--batch-size",
        "32",
    )
    done = subprocess.run(
        [sys.executable, str(script), *options], cwd=tmp_path, capture_output=True, text=True,
        env=environment(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES=""), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "shift: " in done.stdout
    assert "Traceback" not in done.stderr
    student = build_student(sharded)
    student.load_state_dict(torch.load(out, weights_only=True))


def test_the_loss_of_a_store_with_another_precision_or_resolution_takes_it_from_the_store(dataset, teacher, tmp_path):
    values = []
    for name, storage in {"full": {}, "pooled": {"resolution": 2}, "int8": {"precision": "int8"}}.items():
        cache_explanations(dataset, teacher, tmp_path / name, draws=1, **storage)
        torch.manual_seed(0)
        student = build_student(tmp_path / name)
        values.append(
            float(DistillationLoss(tmp_path / name)(student, next(iter(ExplainedStream(dataset, tmp_path / name)))))
        )
    assert abs(values[2] / values[0] - 1) < 0.1
    assert values[1] != values[0]
