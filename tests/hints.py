"""How type and shape hints are enforced under pytest: as mypy reads them, where an int may stand for a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
