"""A run's reports: records, health, sample tables, progress, plots."""

from jaxrl_llm.runs.health import WINDOW, Health, Watch, assess
from jaxrl_llm.runs.metrics import (
  Meter,
  MetricsWriter,
  last_step,
  read_metrics,
  read_records,
)
from jaxrl_llm.runs.plots import (
  Band,
  Panel,
  plot_bands,
  plot_curve,
  plot_estimates,
)
from jaxrl_llm.runs.progress import Progress
from jaxrl_llm.runs.samples import (
  Sample,
  SampleLog,
  before_after_table,
  read_samples,
  sample_table,
)
from jaxrl_llm.runs.silent import Silent

__all__ = [
  'WINDOW',
  'Band',
  'Health',
  'Meter',
  'MetricsWriter',
  'Panel',
  'Progress',
  'Sample',
  'SampleLog',
  'Silent',
  'Watch',
  'assess',
  'before_after_table',
  'last_step',
  'plot_bands',
  'plot_curve',
  'plot_estimates',
  'read_metrics',
  'read_records',
  'read_samples',
  'sample_table',
]
