"""Loading data: batches of each rank's items, made ahead in threads or processes."""

from .collate import collate
from .item_rng import item_rng
from .loader import DataLoader
from .workers import DataWorkerError

__all__ = ["DataLoader", "DataWorkerError", "collate", "item_rng"]
