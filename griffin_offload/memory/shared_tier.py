"""The tier in RAM that several processes of one machine share: the system's page cache.

A worker reads a byte of the checkpoint from disk; the others find it in the cache. The system itself makes one wait
for what another is reading, drops nothing when a process is killed half-way, leaves nothing behind, and gives the RAM
back where programs need it. It holds the bytes as they are in the file: encoded ones (GGUF, int4) take what they take
on disk.

A checkpoint that is larger than the room has a share of its blocks there, the same ones for all workers. The others are
read by each of them past the cache, where they would only push out what is used again."""

from dataclasses import dataclass

from .machine import MARGIN, available_memory
from .measure import resident_set


@dataclass(frozen=True)
class SharedTier:
    """`workers`: processes that read one checkpoint; `limit`: bytes of it that stay in RAM; None: what they leave
    free."""

    workers: int
    limit: int | None = None

    def share(self, checkpoint: int, host_peak: int, counts_process: bool) -> float:
        """How much of a checkpoint of so many bytes has room, 0 to 1, beside workers that each take `host_peak` bytes
        of RAM (`counts_process`: with all that this process has already)."""
        room = self.limit
        if room is None:
            missing = max(0, host_peak - resident_set()) if counts_process else host_peak
            room = int(available_memory() * (1 - MARGIN)) - self.workers * missing  # what is cached counts as free
        return min(1.0, max(0, room) / max(1, checkpoint))
