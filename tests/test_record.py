"""Means between rows, of metrics that need not be there each time."""

import pytest
import torch

from pgrl import record
from pgrl.envs import Episodes
from pgrl.record import Record


def updates(count: int) -> list[dict[str, torch.Tensor]]:
    """What a delayed policy tells: one metric always, one at every third update, none in the first four."""
    rows = []
    for k in range(count):
        row = {"charts/updates": torch.tensor(float(k))}
        if k >= 4:
            row["losses/a"] = torch.tensor(float(k))
            if k % 3 == 0:
                row["losses/b"] = torch.tensor(10.0 * k)
        rows.append(row)
    return rows


@pytest.mark.parametrize("fold", [1, 2, 5, 1000])
@pytest.mark.parametrize("saved_at", [0, 6, 7])
def test_each_metric_is_averaged_over_the_updates_that_have_it(
    fold: int, saved_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "FOLD", fold)
    r = Record()
    for k, metrics in enumerate(updates(11)):
        if k == saved_at:
            state, r = r.state_dict(), Record()
            r.load_state_dict(state)
        r.add(metrics, Episodes.none())
    assert r.row() == {"charts/updates": 10.0, "losses/a": pytest.approx(7.0), "losses/b": pytest.approx(75.0)}
    r.add({"losses/a": torch.tensor(1.0)}, Episodes.none())
    assert r.row() == {"losses/a": 1.0}  # nothing of the last row is left
