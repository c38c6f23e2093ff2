"""fastgemma: fused Triton kernels under Hugging Face's Gemma 4, with stock losses and gradients.

import fastgemma
fastgemma.patch()
trainer.train()
"""

from fastgemma.api import PatchError, patch, patched, status, unpatch
from fastgemma.report import FeatureReport, PatchReport

__version__ = "0.1.0"
__all__ = ["FeatureReport", "PatchError", "PatchReport", "patch", "patched", "status", "unpatch"]
