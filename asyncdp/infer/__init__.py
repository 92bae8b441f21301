"""The batch-inference job: a model over many records, killed and resumed at any moment.

`asyncdp infer` is its command line; from Python it is `InferOptions` and `Job`.
"""

from asyncdp.infer.job import Job, Plan, Reporter, Summary
from asyncdp.infer.options import InferOptions

__all__ = ["InferOptions", "Job", "Plan", "Reporter", "Summary"]
