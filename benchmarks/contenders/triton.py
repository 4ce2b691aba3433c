"""NVIDIA Triton through PyTriton, with Triton's dynamic batcher.

python -m benchmarks.contenders.triton MODEL PORT MAX_BATCH_SIZE MAX_DELAY_MICROSECONDS WORKERS
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.contenders.engine import Engine


def main(model: str, port: str, max_batch_size: str, max_delay_microseconds: str, workers: str) -> None:
    engine = Engine(model)
    d = engine.d

    @batch
    def infer(**given: Any) -> Any:
        return engine(given["inputs"])

    number = int(port)
    config = TritonConfig(http_port=number, grpc_port=number + 1, metrics_port=number + 2, log_verbose=0)
    with Triton(config=config) as triton:
        triton.bind(
            model_name="bench",
            infer_func=[infer] * int(workers),
            inputs=[Tensor(name="inputs", dtype=np.float64, shape=(d,))],
            outputs=[
                Tensor(name="value", dtype=np.float64, shape=(1,)),
                Tensor(name="gradient", dtype=np.float64, shape=(d, 1)),
                Tensor(name="hessian", dtype=np.float64, shape=(d, d, 1)),
            ],
            config=ModelConfig(
                max_batch_size=int(max_batch_size),
                batcher=DynamicBatcher(max_queue_delay_microseconds=int(max_delay_microseconds)),
            ),
        )
        triton.serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
