from .claims import Claims, claim_writing
from .codec import COMPRESSORS, PRECISIONS, Compressor, Precision, average_pool, choose_compression
from .errors import CacheError
from .inspection import committed_shards, continuing, damaged_shards, describe, inspect_cache, repair, share_of_logits
from .layout import (
    CacheInfo,
    DatasetInfo,
    ExplainerInfo,
    StorageInfo,
    TeacherInfo,
    plan_storage,
)
from .store import Cache, Shard, check_complete, create_cache, head_sha256, open_cache

__all__ = [
    "COMPRESSORS",
    "PRECISIONS",
    "Cache",
    "CacheError",
    "CacheInfo",
    "Claims",
    "Compressor",
    "DatasetInfo",
    "ExplainerInfo",
    "Precision",
    "Shard",
    "StorageInfo",
    "TeacherInfo",
    "average_pool",
    "check_complete",
    "choose_compression",
    "claim_writing",
    "committed_shards",
    "continuing",
    "create_cache",
    "damaged_shards",
    "describe",
    "head_sha256",
    "inspect_cache",
    "open_cache",
    "plan_storage",
    "repair",
    "share_of_logits",
]
