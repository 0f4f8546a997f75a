"""The process that decodes pictures: a broken or hostile file costs this process and nothing else.

Started by `PictureReader` as ``python -m open_pisces.serve.decoding FD SETTINGS``.
"""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import socket
import sys
from typing import Any

from open_pisces.data.images import image_size, open_image
from open_pisces.errors import PiscesError
from open_pisces.serve.children import Child
from open_pisces.serve.frames import pack, read_frame

SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
"""PNG, JPEG, WebP: the only decoders that a client's bytes reach."""
MEMORY = 2 << 30
"""Bytes of address space of the process."""


class PictureError(PiscesError):
    """A picture of a request that cannot be taken; the message says why."""


class PictureReader:
    """Decodes pictures in a process of its own, which is replaced when it dies or takes too long.

    Args:
        max_pixels: refuse larger pictures, by their header.
        patience: seconds for one picture.
    """

    def __init__(self, max_pixels: int = 16_000_000, patience: float = 10.0) -> None:
        self.settings = {"max_pixels": max_pixels}
        self.patience = patience
        self.child: Child | None = None
        self.lock = asyncio.Lock()

    async def read(self, raw: bytes) -> tuple[tuple[int, int], bytes]:
        """Size and RGB pixels of a picture file.

        Raises:
            PictureError: for another format, a damaged file, too many pixels, or one that stops the decoder.
        """
        if not raw.startswith(SIGNATURES) or (raw.startswith(b"RIFF") and raw[8:12] != b"WEBP"):
            raise PictureError("the picture is neither a PNG nor a JPEG nor a WebP file")
        async with self.lock:
            if self.child is None:
                self.child = Child("open_pisces.serve.decoding", self.settings)
                await self.child.start()
            self.child.send({}, [raw])
            try:
                found = await asyncio.wait_for(self.child.receive(), self.patience)
            except BaseException:  # too slow, or the client left in the middle: its answer must not reach the next one
                await self.close()
                raise PictureError(f"the picture took more than {self.patience:g} s to decode") from None
            if found is None:
                await self.close()
                raise PictureError("the picture cannot be decoded")
        message, blobs = found
        if "error" in message:
            raise PictureError(message["error"])
        return (message["size"][0], message["size"][1]), blobs[0]

    async def close(self) -> None:
        """End the process."""
        if self.child is not None:
            child, self.child = self.child, None
            child.kill()
            await child.ended()


def decode(raw: bytes, max_pixels: int) -> tuple[dict[str, Any], list[bytes]]:
    """What the process answers to a file."""
    try:
        width, height = image_size(raw)
        if width * height > max_pixels:
            return {"error": f"the picture has {width} x {height} pixels; at most {max_pixels:,} are taken"}, []
        image = open_image(raw, max_pixels)
    except PiscesError as error:
        return {"error": str(error)}, []
    except MemoryError:
        return {"error": "the picture takes too much memory to decode"}, []
    return {"size": image.size}, [image.tobytes()]


def main() -> int:
    """Decode until the socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    settings = json.loads(sys.argv[2])
    with socket.socket(fileno=int(sys.argv[1])) as connection, connection.makefile("rb") as file:
        while (frame := read_frame(file)) is not None:
            connection.sendall(pack(*decode(frame[1][0], settings["max_pixels"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
