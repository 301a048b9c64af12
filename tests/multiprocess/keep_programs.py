"""The `maxlm` command, with every process keeping the programs it compiled.

JAX keeps those of process 0 alone: TPU and GPU processes share them. CPU processes cannot, so each life of a run would
compile everything again in all processes but one, which on two cores is most of what these tests would do.
"""

from types import SimpleNamespace

from jax._src import compiler

from maxlm.cli import run

if __name__ == "__main__":
    compiler.distributed = SimpleNamespace(global_state=SimpleNamespace(process_id=0, client=None))
    run()
