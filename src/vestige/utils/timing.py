"""Seconds that are true on devices that work ahead."""

import time

import torch


def synchronized_time(device: torch.device) -> float:
    """Return a clock in seconds that waits for what the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
