"""The schema of all options: types, ranges, rules that join several, and one line of explanation each.

A key of `conf/` without an entry here is refused, by a test too. To add one: a field in data.py (data), library.py (Trainer,
optimizers, schedulers, tasks), train.py (train, sweep) or verbs.py (the other commands), a rule in rules.py where it joins
others; then `python scripts/reference.py`, which writes the comments of `conf/` and docs/reference.md.
"""

from litdistill.config.schema.check import SCHEMAS, check

__all__ = ["SCHEMAS", "check"]
