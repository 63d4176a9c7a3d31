"""What the sources of a training promise: what a method needs, of the store and of its split, and nothing else."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from stores import expected, filled, info

from data import DatasetError, DatasetWriter, open_dataset
from teacher_cache import Cache, CacheError
from trainer.stream.stream import explained_source, read_block, stream


def test_a_source_has_what_is_needed_of_store_and_split_and_reads_nothing_else(tmp_path, monkeypatch):
    of = info(samples=10)
    store = filled(tmp_path / "c.zarr", of)
    rng = np.random.default_rng(0)
    images, masks = rng.integers(0, 256, (10, 3, 6, 5), np.uint8), rng.integers(0, 2, (10, 1, 6, 5), np.uint8)
    with DatasetWriter(tmp_path / "d.zarr") as writer:
        writer.write_split("train", images=images, labels=np.arange(10) % 3, masks=masks)
        writer.write_split("bare", images=images, labels=np.arange(10) % 3)
        writer.finish(class_names=["a", "b", "c"])
    split = open_dataset(tmp_path / "d.zarr").split("train")
    drawn = {"heatmaps", "scale", "target_class", "epsilon"}
    shards = [expected(of, shard) for shard in range(of.shards)]
    right = {name: np.concatenate([getattr(shard, name) for shard in shards]) for name in store.sample_fields}
    right |= {"images": images, "labels": np.arange(10) % 3, "masks": masks}
    given = ["heatmaps", "teacher_logits", "features", "labels", "masks"]
    for needs in [[], *([name] for name in given), given]:
        source = explained_source(split, store, needs)
        assert set(source.fields) == {"images", *needs} - {"heatmaps"}
        assert set(source.draw_fields) == (drawn if "heatmaps" in needs else set())
        assert source.draws == (2 if "heatmaps" in needs else 1)
        blocks = [read_block(source, block, 0) for block in range(source.blocks)]
        for name in source.fields:
            assert np.array_equal(np.concatenate([block[name].numpy() for block in blocks]), right[name])
        (batch,) = islice(stream(source, batch_size=10, seed=0), 1)
        assert set(source.fields) | set(source.draw_fields) <= set(batch)
    with pytest.raises(ValueError, match="no store and no split has logits"):
        explained_source(split, store, ["logits"])
    with pytest.raises(DatasetError, match="the split 'bare' has no 'masks'"):
        explained_source(open_dataset(tmp_path / "d.zarr").split("bare"), store, ["masks"])
    bare = filled(tmp_path / "bare.zarr", info(features=0))
    with pytest.raises(
        CacheError, match=r"has no features of the teacher: make another with cache_explanations\(features=True\)"
    ):
        explained_source(split, bare, ["features"])
    with monkeypatch.context() as patch:  # images alone are read of the split alone
        patch.setattr(Cache, "read_samples", None)
        read_block(explained_source(split, store, ["labels"]), 0, 0)
