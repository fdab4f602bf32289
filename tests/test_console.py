import pytest

from fljax import config as configs
from fljax import console


def test_where_there_is_no_terminal_what_measures_nothing_is_told_rarely(
  capsys, monkeypatch
):
  clock = [0.0]
  monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
  shown = console.Console(prefix="a ")
  shown.start("nc-prune: reversing triggers", 100, 0, unit="step")
  for done in range(0, 101, 5):
    shown.advance(done)
    clock[0] += 4
  shown.start("training", 2, 0)
  shown.advance(1, 0.5, None)
  shown.advance(2, 0.75, 0.5)
  shown.stop()
  assert capsys.readouterr().err.splitlines() == [
    "a nc-prune: reversing triggers: step 40/100",
    "a nc-prune: reversing triggers: step 80/100",
    "a training: round 1/2  TA 50.0  AA -",
    "a training: round 2/2  TA 75.0  AA 50.0",
  ]


@pytest.mark.parametrize(
  "changes, when",
  [
    ({}, "gamma 1)"),
    ({"rounds": 0}, "gamma 1)"),
    ({"attack_rounds": 9}, "gamma 1)"),
    ({"attack_start": 4}, "gamma 1, in rounds 5 to 9)"),
    ({"attack_start": 4, "attack_rounds": 2}, "gamma 1, in rounds 5 to 6)"),
    ({"attack_start": 8, "attack_rounds": 2}, "gamma 1, in rounds 9 to 9)"),
    ({"attack_start": 9}, "gamma 1, in no round of training)"),
  ],
)
def test_the_header_says_when_attackers_attack(changes, when):
  settings = configs.Config(**{"rounds": 9, "gamma": 1.0, **changes})
  assert when in console.header(settings)
