"""``kd_hf.train`` under FSDP2 on CPU processes.

accelerate keeps FSDP for GPUs and turns CPU processes into DDP without a word. Told that these are GPUs, it runs its
FSDP2 code on them: ``accelerate launch --config_file FSDP.yaml -m tests.fsdp_on_cpu RECIPE``.
"""

from __future__ import annotations

from accelerate import PartialState
from accelerate.utils import DistributedType

from kd_hf.errors import run_command
from kd_hf.train import main

PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

if __name__ == "__main__":
    run_command(main)
