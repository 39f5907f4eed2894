"""autosp: run a PyTorch model that does not fit, under a hard memory budget, planned and measured for you.

plan = autosp.tune(model, sample_batch, max_gpu_gb=8)
with autosp.apply(model, plan):
    out = model(**batch)
"""

from autosp.apply import apply
from autosp.batch_size import BatchSizes, Throughput, tune_batch
from autosp.estimate import estimate, floor, profile
from autosp.load import load
from autosp.manual import plan
from autosp.pareto import Front, pareto
from autosp.runtime.streamed_model import Stats, StreamedModel
from autosp.spec import Plan, Prediction, Profile
from autosp.studies import delete_study, list_studies, load_plan
from autosp.tune import resume, tune

__all__ = [
    "BatchSizes",
    "Front",
    "Plan",
    "Prediction",
    "Profile",
    "Stats",
    "StreamedModel",
    "Throughput",
    "apply",
    "delete_study",
    "estimate",
    "floor",
    "list_studies",
    "load",
    "load_plan",
    "pareto",
    "plan",
    "profile",
    "resume",
    "tune",
    "tune_batch",
]
