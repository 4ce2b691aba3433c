"""``hessquik serve`` with workers that fail on demand. Only tests run it."""

from service import cli, workers

workers.WORKER_MODULE = "tests.service.faulty_worker"

if __name__ == "__main__":
    cli.main()
