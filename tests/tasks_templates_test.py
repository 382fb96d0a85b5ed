import threading
import time

import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import templates, vocabulary

MESSAGES = [{'role': 'user', 'content': 'ab'}]
ENDLESS = '{% for i in range(99999) %}' * 4 + '{{ i }}' + '{% endfor %}' * 4


@pytest.fixture(scope='module')
def tokenizer():
  return vocabulary.character_tokenizer('ab:')


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(templates, 'MAX_SECONDS', 0.3)


def test_what_does_not_end_is_ended(tokenizer, quick):
  start = time.monotonic()
  with pytest.raises(UserError, match='takes more than 0.3 seconds') as error:
    templates.render(tokenizer, ENDLESS, MESSAGES)
  assert time.monotonic() - start < 5
  assert "roles ['user']" in str(error.value)
  # The next one has all of its time.
  again = templates.render(tokenizer, '{{ messages[0].content }}:', MESSAGES)
  assert again == 'ab:'


def test_threads_have_times_of_their_own(tokenizer, quick):
  """Also what is rendered while another thread's is being ended."""
  done = []

  def endless():
    with pytest.raises(UserError):
      templates.render(tokenizer, ENDLESS, MESSAGES)
    done.append('endless')

  thread = threading.Thread(target=endless)
  thread.start()
  count = 0
  while thread.is_alive():
    templates.render(tokenizer, '{{ messages[0].content }}', MESSAGES)
    count += 1
  assert done == ['endless'] and count > 100


def test_an_end_that_comes_late_is_taken_back(tokenizer, monkeypatch):
  """Renderings that end about when they are to be ended: both is right."""
  monkeypatch.setattr(templates, 'MAX_SECONDS', 0.005)
  monkeypatch.setattr(templates, '_POLL', 0.001)
  loops = '{% for i in range(NUMBER) %}{% for j in range(50) %}'
  text = loops + '{{ i }}{% endfor %}{% endfor %}'
  outcomes = []
  for number in range(10, 4010, 100):
    try:
      template = text.replace('NUMBER', str(number))
      outcomes.append(len(templates.render(tokenizer, template, MESSAGES)))
    except UserError:
      outcomes.append(None)
  time.sleep(0.1)  # Nothing is raised here.
  assert templates._begun == {}
  assert len(outcomes) == 40 and None in outcomes


def test_watching_ends_with_the_last_rendering(tokenizer):
  templates.render(tokenizer, 'a', MESSAGES)
  assert templates._watched
  end = time.monotonic() + 10
  while templates._watched and time.monotonic() < end:
    time.sleep(0.05)
  assert not templates._watched
