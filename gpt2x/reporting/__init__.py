"""From a run directory to plots. Reads files only, so a run can be looked at where torch is not installed."""

from gpt2x.reporting.metrics import column, read_metrics
from gpt2x.reporting.plots import write_plots

__all__ = ["column", "read_metrics", "write_plots"]
