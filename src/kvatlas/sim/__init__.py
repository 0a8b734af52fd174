"""A fleet of engines on a virtual clock: what a routing policy or a cache size would do, without a GPU."""
