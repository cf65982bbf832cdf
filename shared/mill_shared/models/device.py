"""How torch is set up for every local model."""

import os

import torch

from mill_shared.errors import ConfigError
from mill_shared.models.config import TorchConfig


def prepare_torch(config: TorchConfig) -> torch.device:
    """Set what torch keeps for the whole process and return the device."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        # Read by cuBLAS when it starts, which is after this.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    wanted = config.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted not in ("cpu", "cuda"):
        raise ConfigError(f"device {wanted!r} is not auto, cpu or cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda, but no GPU is visible; use device auto or cpu, or mend the driver")
    return torch.device(wanted)


def use_tf32(allowed: bool) -> None:
    """Allow TF32 products or not, for the whole process; each model says so before it works."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def one_line(error: Exception) -> str:
    """Return the beginning of an error's message on one line."""
    return " ".join(str(error).split())[:300]
