"""The batch-inference job: a model over many records, killed and resumed at any moment.

`await run(...)` does a whole job, `start(...)` one that can be watched; `asyncdp infer` is the command line.
"""

from .config import read_config
from .job import Job
from .options import InferOptions
from .report.events import Event, Finished, Progress, ShardFinished, Started, Warned
from .report.summary import Plan, Summary
from .running import RunningJob, plan, run, start

__all__ = [
    "Event",
    "Finished",
    "InferOptions",
    "Job",
    "Plan",
    "Progress",
    "RunningJob",
    "ShardFinished",
    "Started",
    "Summary",
    "Warned",
    "plan",
    "read_config",
    "run",
    "start",
]
