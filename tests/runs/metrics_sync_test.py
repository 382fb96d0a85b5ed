"""Records that have to be on the disk before a checkpoint is."""

import os

from jaxrl_llm import runs


def test_every_record_is_on_the_disk_after_a_sync(tmp_path, monkeypatch):
  synced, fsync = set(), os.fsync

  def watched(descriptor):
    fsync(descriptor)
    synced.add(os.fstat(descriptor).st_ino)

  monkeypatch.setattr(os, 'fsync', watched)
  with runs.MetricsWriter(tmp_path) as writer:
    writer.write(1, {'reward': 0.5}, {'step_time': 0.1})
    writer.sync()
    for name in ('metrics.jsonl', 'timings.jsonl'):
      assert (tmp_path / name).stat().st_ino in synced, name
