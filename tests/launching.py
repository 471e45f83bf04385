"""Commands run as launchers of several processes run them."""

import os
import socket
import subprocess
from collections.abc import Sequence


def launched(command: Sequence[object], count: int) -> list[subprocess.CompletedProcess]:
    """Run a command in so many processes, with the environment that torchrun gives them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    words = list(map(str, command))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = []
    try:
        for rank in map(str, range(count)):
            env = os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank, "CUDA_VISIBLE_DEVICES": ""}
            running.append(subprocess.Popen(words, env=env, **pipes))
        said = [one.communicate(timeout=300) for one in running]
    finally:
        for one in running:
            one.kill()
    return [subprocess.CompletedProcess(words, one.returncode, *text) for one, text in zip(running, said, strict=True)]
