"""SafeLoader: the data loader that nnU-Net training can't be killed by.

from safeloader import SafeAugmenter
"""

from safeloader.augmenter import SafeAugmenter
from safeloader.faults.incident import Incident
from safeloader.report.stats import Report, WorkerInfo

__all__ = ["Incident", "Report", "SafeAugmenter", "WorkerInfo"]
