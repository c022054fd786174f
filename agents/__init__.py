"""The LEGION pipeline: market data -> features -> signals -> risk -> execution -> portfolio."""
