"""Training: from a configuration to a run folder with a model, its metrics and a report.

Rooms inside, in the order they import each other: ``events``, ``words``, ``observers``, ``curves``, ``report``;
``schedule``, ``runtime``, ``optim``, ``state``, ``checkpoint``, ``runs``, ``setup``, ``loop``.
"""
