"""Which quantised model serves the worst-served group best, for a given bit budget?"""

__version__ = "0.1.0"
