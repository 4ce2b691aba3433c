"""One server per module, each with this project's engine behind it: ``python -m benchmarks.contenders.NAME``."""
