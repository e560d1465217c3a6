"""Data on disk: one cache for all, made by `lens-ldm prepare` and `lens-ldm simulate`."""
