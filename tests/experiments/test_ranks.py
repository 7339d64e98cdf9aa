import re

import numpy as np
import pytest
from helpers import read_events, scalar

from bnlightning.compare.runs import read_run


@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives_and_write_the_same_files(run_module, tmp_path):
    short = (
        "+experiment=tanh",
        "model.norm=none",
        "trainer.max_steps=5",
        "callbacks.activation_monitor.every_n_steps=5",
    )
    one = run_module("bnlightning.train", *short, "output_dir=one")
    two = run_module(
        "bnlightning.train", *short, "trainer.devices=2", "trainer=ddp_cpu", "data.batch_size=5", "output_dir=two"
    )
    assert one.returncode == two.returncode == 0, two.stderr
    files = []
    for name in ("one", "two"):
        paths = (path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*") if path.is_file())
        files.append(sorted(re.sub(r"tfevents.*?(\.comparison)?$", r"tfevents\1", str(path)) for path in paths))
    assert files[0] == files[1]
    single, both = (read_events(tmp_path / name / "none") for name in ("one", "two"))
    assert single.Tags() == both.Tags()
    for tag in single.Tags()["scalars"]:
        first, second = scalar(single, tag), scalar(both, tag)
        assert list(first) == list(second)
        assert list(first.values()) == pytest.approx(list(second.values()), rel=2e-3, abs=2e-4), tag
    # Before the first step nothing has been rounded differently: the counts are equal to the last one.
    for tag in single.Tags()["histograms"]:
        first, second = (events.Histograms(tag)[0] for events in (single, both))
        assert first.histogram_value.bucket == second.histogram_value.bucket, tag
    points = [read_run(tmp_path / name / "none", tmp_path).predictions[0][1] for name in ("one", "two")]
    np.testing.assert_allclose(*(rows[np.lexsort(rows.T)] for rows in points), rtol=1e-4, atol=1e-4)
