"""Runs a script as one of several processes on a CPU; accelerate itself shards models (FSDP) on GPUs only.

    accelerate launch --config_file configs/fsdp2.yaml tests/scaling/on_cpu.py train.py …

accelerate is told that sharded processes are GPU processes whose device happens to be the CPU, and whose backend is gloo.
Everything behind that is what runs on GPUs: torch's fully_shard, the gathering of checkpoints, the trainer.
"""

import os
import runpy
import sys

import torch
from accelerate import state
from accelerate.utils import DistributedType


def prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    return "gloo", DistributedType.MULTI_GPU if sharded else DistributedType.MULTI_CPU


def set_device(self):
    self.device = torch.device("cpu")


if __name__ == "__main__":
    state.PartialState._prepare_backend = prepare_backend
    state.PartialState.set_device = set_device
    del sys.argv[0]
    sys.path.insert(0, sys.argv[0].rpartition("/")[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
