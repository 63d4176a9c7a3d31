"""The heatmap store: layout, writer and reader. Usable alone: it needs NumPy and Zarr, no model and no PyTorch."""

from teacher_cache.layout import (
    CacheError,
    CacheInfo,
    DatasetInfo,
    ExplainerInfo,
    StorageInfo,
    TeacherInfo,
    plan_storage,
)
from teacher_cache.store import Cache, Shard, check_complete, create_cache, head_sha256, open_cache

__all__ = [
    "Cache",
    "CacheError",
    "CacheInfo",
    "DatasetInfo",
    "ExplainerInfo",
    "Shard",
    "StorageInfo",
    "TeacherInfo",
    "check_complete",
    "create_cache",
    "head_sha256",
    "open_cache",
    "plan_storage",
]
