"""Evaluate a saved network at the points of Parquet files, on the machines of a Ray cluster.

    python examples/evaluate_with_ray.py models/peaks.safetensors points/ results/ --quantities value,gradient

It needs ``pip install 'hessquik-service[ray]' pyarrow``, and no server. Points are a column ``x`` of d numbers; their
files are read, and the results written, block by block, so there may be more of them than a machine's memory holds.
"""

from __future__ import annotations

import argparse

import ray
import ray.data
from hessquik_service.ray_data import evaluate_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate a saved network at the points of Parquet files.")
    parser.add_argument("model", help="a saved network")
    parser.add_argument("points", help="a Parquet file, or a folder of them")
    parser.add_argument("results", help="the folder to write Parquet files into")
    parser.add_argument("--quantities", default="value", help="what to compute, separated by commas")
    parser.add_argument(
        "--address", default="local", help="the cluster: auto, or HOST:PORT; this machine if not given"
    )
    parser.add_argument("--actors", type=int, default=1, help="processes that evaluate")
    arguments = parser.parse_args()
    ray.init(address=arguments.address, include_dashboard=False, log_to_driver=False)
    points = ray.data.read_parquet(arguments.points)
    quantities = arguments.quantities.split(",")
    results = evaluate_dataset(points, arguments.model, quantities, actors=arguments.actors)
    results.write_parquet(arguments.results)
    print(f"{arguments.results}: {points.count()} points")


if __name__ == "__main__":
    main()
