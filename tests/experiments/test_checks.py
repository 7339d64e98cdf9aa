import re

import pytest


@pytest.mark.slow
def test_one_refused_run_stops_the_sweep_before_the_first(run_module, tmp_path):
    result = run_module("bnlightning.train", "data.batch_size=10,1", "model.norm=none,custom", "output_dir=out")
    assert result.returncode == 1 and re.search(r"^batch_size=1 is not possible", result.stderr, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []
