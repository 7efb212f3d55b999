"""The limit: how fast the memory can be read, measured in turns with everything else."""

import torch

from benchmarks.clock import synchronized

NUM_BYTES = 1 << 29  # more than any cache holds
READINGS = 5  # in a turn


class Memory:
    def __init__(self, threads, device):
        if threads:
            torch.set_num_threads(threads)
        self.device = torch.device(device)

    def load(self):
        # Of torch's reductions, the maximum of whole numbers has the least to compute: on two cores it reads
        # 50 GB/s where the sum of floats reads 34.
        self.array = torch.ones(NUM_BYTES // 8, dtype=torch.int64, device=self.device)
        self.copy = torch.empty_like(self.array) if self.device.type == "cuda" else None
        return {"threads": torch.get_num_threads(), "device": self.name()}

    def name(self):
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def run(self):
        """Bytes per second of each reading; on a GPU of each copy, which counts both ways."""
        ways, move = (1, self.array.amax) if self.copy is None else (2, lambda: self.copy.copy_(self.array))
        seconds = []
        for _ in range(READINGS):
            started = synchronized(self.device)
            move()
            seconds.append(synchronized(self.device) - started)
        return [ways * NUM_BYTES / s for s in seconds]
