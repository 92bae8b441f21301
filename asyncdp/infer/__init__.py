"""The batch-inference job: a model over many records, killed and resumed at any moment.

`asyncdp infer` is its command line; from Python it is `InferOptions` and `Job`.
"""

from .job import Job
from .options import InferOptions
from .report.summary import Plan, Reporter, Summary

__all__ = ["InferOptions", "Job", "Plan", "Reporter", "Summary"]
