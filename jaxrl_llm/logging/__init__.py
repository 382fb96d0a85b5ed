"""What a run says: records, health, sample tables, progress, plots."""

from jaxrl_llm.logging.health import WINDOW, Health, Watch, assess
from jaxrl_llm.logging.metrics import MetricsWriter, read_metrics
from jaxrl_llm.logging.plots import (
  Band,
  Panel,
  plot_bands,
  plot_curve,
  plot_estimates,
)
from jaxrl_llm.logging.progress import Progress
from jaxrl_llm.logging.records import read_records
from jaxrl_llm.logging.samples import (
  Sample,
  SampleLog,
  before_after_table,
  read_samples,
  sample_table,
)
from jaxrl_llm.logging.silent import Silent

__all__ = [
  'WINDOW',
  'Band',
  'Health',
  'MetricsWriter',
  'Panel',
  'Progress',
  'Sample',
  'SampleLog',
  'Silent',
  'Watch',
  'assess',
  'before_after_table',
  'plot_bands',
  'plot_curve',
  'plot_estimates',
  'read_metrics',
  'read_records',
  'read_samples',
  'sample_table',
]
