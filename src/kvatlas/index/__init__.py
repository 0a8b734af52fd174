"""The meeting point of both paths: which copies of which blocks lie where."""

from kvatlas.index.choice import make_index
from kvatlas.index.protocol import Index, IndexLimits
from kvatlas.index.reference import ReferenceIndex

__all__ = ["Index", "IndexLimits", "ReferenceIndex", "make_index"]
