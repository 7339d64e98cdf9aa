"""The directory of the package's own configuration files."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries conf/ inside the package; a checkout (also an editable install) keeps it beside the package.
_CHECKOUT = _PACKAGE.parent / "conf"

CONF_DIR = _CHECKOUT if (_PACKAGE.parent / "pyproject.toml").is_file() and _CHECKOUT.is_dir() else _PACKAGE / "conf"
"""The directory of ``train.yaml`` and its groups, for Hydra's ``initialize_config_dir`` and ``hydra.searchpath``."""
