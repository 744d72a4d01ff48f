# SPDX-License-Identifier: Apache-2.0
"""``python -m fastlora`` where Accelerate shards on a CPU, which it does on accelerators alone.

For commands/test_launch.py: the rest of the way is the one of a machine with GPUs.
"""

import os

from accelerate.state import DistributedType, PartialState

from fastlora.__main__ import leave, main
from fastlora.commands import finetune


def init(self, *arguments, own=PartialState.__init__, **options):
    own(self, *arguments, **options)
    if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def config(settings, own=finetune._config):
    asked = os.environ.pop("ACCELERATE_USE_FSDP")
    made = own(settings)
    os.environ["ACCELERATE_USE_FSDP"] = asked
    return made


if __name__ == "__main__":
    PartialState.__init__, finetune._config = init, config
    leave(main())
