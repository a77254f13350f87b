"""How busy the GPU is, as nvidia-smi says: the share of time in which a kernel runs."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
from types import TracebackType
from typing import Self

_EVERY_MS = 100


class Busy:
    """Samples the GPU's utilisation while it is entered; without nvidia-smi there are no samples."""

    def __init__(self, device: int = 0) -> None:
        """Name the device, as nvidia-smi counts."""
        self._device = device
        self._samples: list[float] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        program = shutil.which("nvidia-smi")
        if program is not None:
            query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", f"--loop-ms={_EVERY_MS}"]
            self._process = subprocess.Popen(
                [program, f"--id={self._device}", *query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._thread.join()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip().isdigit():
                self._samples.append(float(line))

    def __str__(self) -> str:
        return f"{statistics.mean(self._samples):.0f} %" if self._samples else "-"
