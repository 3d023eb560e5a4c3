"""From cells to finished trials: what runs next and where, what came of it, and how it goes on after a stop.

Nothing here knows a quantiser; one task is done by ``fqsweep.trial``, which knows nothing of this package.
"""
