"""Hand-written forward and backward passes. Each computes what a plain expression of torch functions
does, which its tests compare it with; nothing here knows of layers or beliefs.
"""

from kalmannorm.kernels.all_reduce import all_reduce
from kalmannorm.kernels.layer import Through, layer, rectify_output
from kalmannorm.kernels.link import link
from kalmannorm.kernels.moments import moments
from kalmannorm.kernels.on_torch import move_running, unbiased
from kalmannorm.kernels.options import Filter, Given, Running
from kalmannorm.kernels.rectify import rectify
from kalmannorm.kernels.standardize import standardize

__all__ = [
    "Filter", "Given", "Running", "Through", "all_reduce", "layer", "link", "moments", "move_running", "rectify",
    "rectify_output", "standardize", "unbiased",
]  # fmt: skip
