"""A request's body while it is incomplete: bounded for each, and for all together."""

from __future__ import annotations


class Room:
    """How many bytes of bodies are held, of all streams together."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.used_bytes = 0

    def take(self, count: int) -> bool:
        """Return whether there is room for so many bytes more; if so, it is taken."""
        if self.used_bytes + count > self.bytes_max:
            return False
        self.used_bytes += count
        return True

    def give(self, count: int) -> None:
        self.used_bytes -= count


class HeldBody:
    """The pieces of one body."""

    __slots__ = ("_pieces", "_room", "messages", "size_bytes")

    def __init__(self, room: Room) -> None:
        self._room = room
        self._pieces: list[bytes] = []
        self.messages = 0
        """How many pieces came: in some modes each needs an answer."""
        self.size_bytes = 0

    def add(self, piece: bytes) -> bool:
        """Return whether there was room for a further piece."""
        if not self._room.take(len(piece)):
            return False
        self.messages += 1
        self.size_bytes += len(piece)
        self._pieces.append(piece)
        return True

    def whole(self) -> bytes:
        """Return the body. The pieces are given up for it; asking again costs nothing."""
        if len(self._pieces) != 1:
            self._pieces = [b"".join(self._pieces)]
        return self._pieces[0]

    def drop(self) -> None:
        """Forget the pieces. May be called again."""
        self._room.give(self.size_bytes)
        self._pieces = []
        self.size_bytes = 0
