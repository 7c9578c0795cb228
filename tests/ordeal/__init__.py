"""What people with a project open go through when something befalls the servers behind it, counted.

Twelve fixed ordeals are in `canon`; any number of random ones come from `schedule` and are run by `trial`.
"""

from tests.ordeal.canon import ORDEALS, Outcome, ordeal

__all__ = ["ORDEALS", "Outcome", "ordeal"]
