"""Clocks for devices that work asynchronously."""

import time

import torch


def synchronized_time(device: torch.device) -> float:
    """Return the time in seconds after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
