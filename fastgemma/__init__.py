"""fastgemma: fused Triton kernels under Hugging Face's Gemma 4, with stock losses and gradients.

import fastgemma
fastgemma.patch()
trainer.train()
"""

from fastgemma.api import PatchError, patch, patched, status, unpatch
from fastgemma.report import FeatureReport, PatchReport
from fastgemma.verification.measure import VerifyError
from fastgemma.verification.report import FeatureVerdict, VerifyReport
from fastgemma.verification.run import verify

__version__ = "0.1.0"
__all__ = [
    "FeatureReport",
    "FeatureVerdict",
    "PatchError",
    "PatchReport",
    "VerifyError",
    "VerifyReport",
    "patch",
    "patched",
    "status",
    "unpatch",
    "verify",
]
