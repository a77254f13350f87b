"""Run once in this peer's environment: on Python 3.11.7 PyTriton's proxy trips over a lock of multiprocessing's.

`resource_tracker` asks its lock for a method that the compiled lock lacks and the same lock in Python has. The proxy
runs in an interpreter of Triton's, which reads nothing else of this environment.
"""

from pathlib import Path

import pytriton

LINES = """
import threading as _threading
from multiprocessing import resource_tracker as _resource_tracker
if not hasattr(_resource_tracker._resource_tracker._lock, "_recursion_count"):
    _resource_tracker._resource_tracker._lock = _threading._PyRLock()
"""
proxy = Path(pytriton.__file__).parent / "proxy" / "data.py"
text = proxy.read_text()
if LINES not in text:
    proxy.write_text(text + LINES)
