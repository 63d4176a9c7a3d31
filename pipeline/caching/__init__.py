"""Stage one: the teacher explains a dataset once, shard by shard."""
