"""Times one network's forward in PyTorch. Prints one JSON object, with the fields of `farm-node bench forward` and what
CUDA's libraries take of the peak.

    python forward.py dit --model DIR/dit/model --tensors DIR/dit/tensors.safetensors --threads 1
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from safetensors import safe_open

import memory
import versions
from networks import NETWORKS

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(arguments):
    torch.set_num_threads(arguments.threads)
    network = NETWORKS[arguments.network]
    began = time.perf_counter()
    module = network.load(arguments.model, PRECISIONS[arguments.precision])
    load = time.perf_counter() - began
    with safe_open(arguments.tensors, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != network.output}
    seconds = []
    with torch.inference_mode():
        for _ in range(arguments.warm_ups + arguments.runs):
            began = time.perf_counter()
            output = network.forward(module, tensors)
            seconds.append(time.perf_counter() - began)
    # Before the comparison takes memory of its own.
    peak_mib, cuda_mib = memory.peak_mib(), memory.cuda_mib()
    with safe_open(arguments.tensors, "pt") as file:
        expected = file.get_tensor(network.output).double()
    difference = output.double() - expected
    seconds = seconds[arguments.warm_ups :]
    return {
        "network": arguments.network,
        "precision": arguments.precision,
        "threads": arguments.threads,
        "load": load,
        "seconds": seconds,
        "median": statistics.median(seconds),
        "peak_mib": peak_mib,
        "cuda_mib": cuda_mib,
        "relative_l2": (difference.norm() / expected.norm()).item(),
        "max_difference": difference.abs().max().item(),
        "versions": versions.here(),
    }


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--model", type=Path, required=True, help="diffusers folder")
    parser.add_argument("--tensors", type=Path, required=True, help="inputs and expected output")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5, help="timed forwards")
    parser.add_argument("--warm-ups", type=int, default=1, help="forwards before them")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    return parser.parse_args()


if __name__ == "__main__":
    print(json.dumps(measure(parse_arguments())))
