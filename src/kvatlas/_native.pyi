"""The native core (native/python), used through `kvatlas.index.native`. `make lint` compares this with the built module."""

__all__ = ["VERSION"]

VERSION: str
