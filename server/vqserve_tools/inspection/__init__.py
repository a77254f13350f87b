"""Inspection of a codebook before it is served, and of its fit to latents (docs/inspecting.md).

`inspect` measures a codebook. The report of the result is printed as text or JSON, and its figures can be drawn.
"""

from vqserve_tools.inspection.inspection import Inspection, Report, inspect

__all__ = ["Inspection", "Report", "inspect"]
