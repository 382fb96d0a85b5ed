"""How runs of several systems become ratios."""

from benchmarks import compare_peers


def run(seconds, peak, disturbance=0.0):
  return compare_peers.Run(seconds, peak, {'jax': '1'}, disturbance, {})


def test_ratios_are_those_within_a_turn():
  # The machine is half as fast in the second turn: the ratio is the same.
  turns = [
    {'jaxrl_llm': run(1.0, 10), 'peer': run(3.0, 40)},
    {'jaxrl_llm': run(2.0, 12, 0.02), 'peer': run(6.0, 30)},
    {'jaxrl_llm': run(1.0, 11), 'peer': run(4.0, 20)},
  ]
  systems = compare_peers.summary(turns)['systems']
  assert systems['peer']['ratio'] == {'median': 3.0, 'least': 3.0, 'most': 4.0}
  assert systems['peer']['seconds']['median'] == 4.0
  assert 'ratio' not in systems['jaxrl_llm']
  assert systems['jaxrl_llm']['peak_bytes'] == 12
  assert systems['jaxrl_llm']['disturbance'] == 0.02


def test_the_table_has_a_row_for_each_system():
  turn = {'jaxrl_llm': run(0.5, 2 * 10**9), 'tunix': run(2.0, 5 * 10**9)}
  result = {
    'job': 'generate',
    'vocabulary': 32_000,
    'thrown_away': 0,
    **compare_peers.summary([turn]),
  }
  rows = compare_peers.table([result]).splitlines()
  assert len(rows) == 4
  assert rows[3] == (
    '| generate | 32,000 | tunix | 2.0 (2.0–2.0) | 5.00 | 4.0 (4.0–4.0) |'
  )
