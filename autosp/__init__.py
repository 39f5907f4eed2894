"""autosp: run a PyTorch model that does not fit, under a hard memory budget, planned and measured for you.

plan = autosp.tune(model, sample_batch, max_gpu_gb=8)
with autosp.apply(model, plan):
    out = model(**batch)
"""

from autosp.apply import apply
from autosp.load import load
from autosp.manual import plan
from autosp.runtime.streamed_model import Stats, StreamedModel
from autosp.spec import Plan, Prediction, Profile
from autosp.studies import list_studies, load_plan
from autosp.tune import estimate, floor, profile, resume, tune

__all__ = [
    "Plan",
    "Prediction",
    "Profile",
    "Stats",
    "StreamedModel",
    "apply",
    "estimate",
    "floor",
    "list_studies",
    "load",
    "load_plan",
    "plan",
    "profile",
    "resume",
    "tune",
]
