"""Calibration against hand computation and simulated preferences."""

import numpy as np
import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.evaluation import calibration

# σ(0.2) = 0.54983, σ(1) = 0.73106, σ(2) = 0.88080, σ(3) = 0.95257.
FEW = np.array([0.2, -0.2, 1.0, 0.0, 2.0, -3.0, 3.0, 3.0])


def simulate(count, scale=1.0, seed=0):
  """Margins of a model whose σ(d / scale) is how often it is right."""
  random = np.random.default_rng(seed)
  true = random.logistic(0.0, 1.5, count)
  preferred = random.random(count) < 1 / (1 + np.exp(-true))
  return scale * np.where(preferred, true, -true)


def test_numbers_by_hand():
  found = calibration.examine(FEW)
  assert found.count == 8
  # Right: 0.2, 1, 2, 3, 3; the tie counts half.
  assert found.accuracy.mean == 5.5 / 8
  losses = [0.598139, 0.798139, 0.313262, np.log(2), 0.126928]
  losses += [3.048587, 0.048587, 0.048587]
  np.testing.assert_allclose(calibration.log_loss(FEW), losses, atol=1e-6)
  assert found.log_loss.mean == pytest.approx(np.mean(losses), abs=1e-6)
  assert found.accuracy.low < found.accuracy.mean < found.accuracy.high
  assert [one.count for one in found.bins] == [3, 0, 0, 0, 1, 0, 0, 1, 0, 3]
  first, empty, *_, last = found.bins
  assert (first.low, first.high) == (0.5, 0.55)
  # 0.2, −0.2 and the tie.
  assert first.accuracy == 0.5
  assert first.confidence == pytest.approx((2 * 0.549834 + 0.5) / 3, abs=1e-6)
  assert np.isnan(empty.accuracy) and np.isnan(empty.confidence)
  assert last.accuracy == pytest.approx(2 / 3)
  gaps = [3 * 0.033223, 1 - 0.731059, 1 - 0.880797, 3 * (0.952574 - 2 / 3)]
  assert found.error == pytest.approx(sum(gaps) / 8, abs=1e-5)


def test_a_calibrated_model_is_found_to_be_one():
  margins = simulate(100_000)
  found = calibration.examine(margins, resamples=200)
  assert found.error < 0.01
  assert found.temperature == pytest.approx(1.0, abs=0.02)
  share = (1 / (1 + np.exp(-np.abs(margins)))).mean()
  assert found.accuracy.low < share < found.accuracy.high


@pytest.mark.parametrize('scale', [2.0, 0.5, 1e6, 1e-6])
def test_margins_of_another_scale_are_detected(scale):
  """Divided by the temperature, they are calibrated again."""
  margins = simulate(100_000, scale)
  found = calibration.examine(margins, resamples=2)
  assert found.error > 0.04
  assert found.temperature == pytest.approx(scale, rel=0.02)
  mended = margins / found.temperature
  assert calibration.expected_error(calibration.reliability(mended)) < 0.01
  best = calibration.log_loss(mended).mean()
  for other in (0.98, 1.02):
    assert calibration.log_loss(other * mended).mean() > best


def test_which_response_comes_first_means_nothing_to_confidence():
  """All right, all wrong, all tied: the limits of every number."""
  right = np.array([0.5, 1.0, 2.0])
  assert calibration.temperature(right) == 0.0
  assert calibration.temperature(-right) == np.inf
  assert calibration.temperature(np.zeros(3)) == np.inf
  both = [calibration.reliability(x) for x in (right, -right)]
  for one, other in zip(*both, strict=True):
    assert one.count == other.count
    if one.count:
      assert one.confidence == other.confidence
      assert (one.accuracy, other.accuracy) == (1.0, 0.0)
  extreme = calibration.examine(np.array([800.0, -800.0, 800.0]), resamples=2)
  assert extreme.log_loss.mean == pytest.approx(800 / 3)
  assert extreme.bins[-1].count == 3 and np.isfinite(extreme.temperature)
  assert calibration.examine(np.zeros(4), resamples=2).error == 0.0


def test_what_is_no_margin_is_refused():
  for wrong, words in (
    ([], r'shape \(0,\)'),
    ([[1.0, 2.0]], r'shape \(1, 2\)'),
    ([1.0, np.nan], 'pair 1 is nan'),
  ):
    with pytest.raises(UserError, match=words):
      calibration.examine(np.array(wrong))
