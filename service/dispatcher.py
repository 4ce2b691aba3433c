"""Names that moved to :mod:`service.scheduler`."""

from service.scheduler import Answers, End, Job

__all__ = ["Answers", "End", "Job"]
