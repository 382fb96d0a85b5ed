"""Signals that ask a run to stop."""

import gc
import os
import signal
import sys
import time

import pytest

from jaxrl_llm import signals


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', 'SIGHUP'])
def test_stop_signal_is_polled(name):
  number = signal.Signals[name]
  before = signal.getsignal(number)
  with signals.StopSignal() as stop:
    assert not stop.requested
    stop.check()
    os.kill(os.getpid(), number)
    assert stop.requested and stop.name == name
    with pytest.raises(signals.StopRequested, match=name):
      stop.check()
  assert signal.getsignal(number) is before


def test_a_hangup_that_is_ignored_stays_so(monkeypatch):
  """As under nohup."""
  former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with signals.StopSignal() as stop:
      os.kill(os.getpid(), signal.SIGHUP)
      assert not stop.requested
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, former)


def test_second_interrupt_stops_at_once():
  with signals.StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.name == 'SIGTERM'
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_second_interrupt_is_not_lost_in_the_garbage_collector(monkeypatch):
  calls, dropped = [], []
  monkeypatch.setattr(sys, 'unraisablehook', dropped.append)

  def callback(phase, info):
    calls.append(phase)
    if len(calls) == 1:
      os.kill(os.getpid(), signal.SIGINT)

  # Finalizers of other tests' garbage, in which Python drops exceptions too,
  # are run before, and no collection comes between.
  gc.collect()
  gc.disable()
  with signals.StopSignal():
    os.kill(os.getpid(), signal.SIGINT)
    gc.callbacks.append(callback)
    try:
      with pytest.raises(KeyboardInterrupt):
        gc.collect()
        time.sleep(5)
    finally:
      gc.callbacks.remove(callback)
      gc.enable()
  assert calls and not dropped
