"""Reads the runs of a sweep and answers which model serves the worst-served group best under a budget.

Order of use: ``load`` -> ``pareto`` (select, aggregate, front) -> ``stats`` -> ``answers`` -> ``tables``,
``figures``, ``interactive`` -> ``page`` -> ``report``. Nothing here needs torch or Ray.
"""
