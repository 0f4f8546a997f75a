"""One process of a data stream: writes what each step's global batch held, until it is done or killed.

``python stream.py OUT FIRST LAST [RANK RANKS PORT]``: a line for each step, the digest of the samples of all
processes. Every sample is taken as the training would get it: its tokens, labels and pixels after packing.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from open_pisces.batch import SequenceBatch
from open_pisces.config import DataConfig, SourceConfig
from open_pisces.data.loader import SequenceLoader
from open_pisces.data.order import Mixture
from open_pisces.data.prefetch import prefetch
from open_pisces.data.prompts import Renderer
from open_pisces.data.tokenizer import byte_tokenizer

BATCH = 24
CONFIG = DataConfig(
    sources=[
        SourceConfig(path="fixture/train", weight=0.7, tasks={"generate_short": 1.0, "question": 1.0}),
        SourceConfig(path="fixture/pairs", weight=0.3, take=30, tasks={"caption_detailed": 1.0, "caption_short": 0.5}),
    ],
    row_length=512,
    rows=3,
)


def loader(rank: int, ranks: int) -> SequenceLoader:
    """A process's part of a mixture of two sources and four tasks, packed."""
    renderer = Renderer(byte_tokenizer("tiny"), "tiny", 16, 4)
    return SequenceLoader(
        Mixture(CONFIG, 11), renderer, CONFIG, 11, BATCH, 1, (32, 32), multiple=8, rank=rank, ranks=ranks
    )


def samples(batch: SequenceBatch) -> list[str]:
    """A digest of each sample of a packed micro-batch: tokens, labels, pixels."""
    assert batch.samples_BS is not None
    found, seen, drawn = [], 0, 0
    labels = torch.full_like(batch.ids_BS, -100).view(-1)
    labels[batch.text_at_K + 1] = batch.labels_K
    kinds = torch.zeros_like(batch.ids_BS).view(-1)
    kinds[batch.understanding_at_K], kinds[batch.generation_at_K] = 1, 2
    labels, kinds = labels.view_as(batch.ids_BS), kinds.view_as(batch.ids_BS)
    for row, numbers in enumerate(batch.samples_BS):
        for number in numbers.unique_consecutive():
            if not number:
                continue
            at = numbers == number
            digest = hashlib.sha256(
                torch.stack([batch.ids_BS[row, at], labels[row, at], kinds[row, at]]).numpy().tobytes()
            )
            for _ in range(int((kinds[row, at] == 1).sum()) // 16):
                digest.update(batch.understanding_pixels_BCHW[seen].numpy().tobytes())
                seen += 1
            for _ in range(int((kinds[row, at] == 2).sum()) // 4):
                digest.update(batch.generation_pixels_BCHW[drawn].numpy().tobytes())
                drawn += 1
            found.append(digest.hexdigest())
    return found


def main(out: str, first: int, last: int, rank: int = 0, ranks: int = 1, port: int = 0) -> None:
    """Stream steps ``first`` to ``last``; with several processes, rank 0 writes for all."""
    if ranks > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
    with Path(out).open("a") as file:
        for step, given in zip(
            range(first, last), prefetch(loader(rank, ranks), range(first, last), workers=2), strict=True
        ):
            mine = [digest for batch in given.batches for digest in samples(batch)]
            parts: list[list[str]] = [[] for _ in range(ranks)]
            if ranks > 1:
                dist.all_gather_object(parts, mine)
            else:
                parts = [mine]
            every = sorted(digest for part in parts for digest in part)
            if rank == 0:
                file.write(f"{step} {len(every)} {hashlib.sha256(' '.join(every).encode()).hexdigest()}\n")
                file.flush()
                os.fsync(file.fileno())
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
