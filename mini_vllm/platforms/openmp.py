"""The environment of a process that computes and does not have the machine for itself."""

from collections.abc import Mapping

from mini_vllm.platforms.interface import usable_cores

WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""What says how threads wait, in OpenMP's words, GNU's and LLVM's. Whoever sets one of them is obeyed."""

SHAPE_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""How many shapes oneDNN and torch remember."""


def engine_environment(
    environment: Mapping[str, str], num_threads: int | None = None, cores: int | None = None
) -> dict[str, str]:
    """The environment of a process that computes with `num_threads` (None: as many as it may) beside a busy parent.

    Threads that wait at the end of a parallel region spin by default. That is quickest while each has a core. When one
    of them loses its core to the parent, the others burn theirs until it is back: on two cores beside a busy process a
    step took 170 ms instead of 8. So where the threads fill the machine they sleep instead.

    oneDNN and torch keep what they compile for each shape of a product, 1024 shapes by default: up to a GiB in
    bfloat16, since a step may have any number of tokens. The last few shapes are as quick.
    """
    chosen = {**SHAPE_CACHES, **environment}
    cores = usable_cores() if cores is None else cores
    asked = environment.get("OMP_NUM_THREADS", "")
    threads = num_threads or (int(asked) if asked.isdecimal() and int(asked) else cores)
    if threads > 1 and threads >= cores and not any(name in environment for name in WAIT_VARIABLES):
        chosen["OMP_WAIT_POLICY"] = "PASSIVE"
    return chosen
