"""accelerate shares a model out over GPUs only; this lets it do so over CPU processes.

It then runs a module as `python -m` would.
"""

import runpy
import sys

import accelerate
from accelerate.utils import DistributedType

initialise = accelerate.state.AcceleratorState.__init__


def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if plugin := fsdp_plugin or self.__dict__.get("fsdp_plugin"):
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin


accelerate.state.AcceleratorState.__init__ = with_fsdp
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
