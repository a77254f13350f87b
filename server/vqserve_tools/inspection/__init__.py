"""What a person wants to know of a codebook before serving it, and of how it fits their latents (docs/inspecting.md).

`inspect` measures; what it returns has a report for people and for programs, and can be drawn. One figure a file.
"""

from vqserve_tools.inspection.inspection import Inspection, Report, inspect

__all__ = ["Inspection", "Report", "inspect"]
