"""The meeting point of both paths: which copies of which blocks lie where."""

from kvatlas.index.protocol import Index, IndexLimits
from kvatlas.index.reference import ReferenceIndex

__all__ = ["Index", "IndexLimits", "ReferenceIndex"]
