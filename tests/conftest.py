import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # must stand before torch starts its threads


@pytest.fixture
def case(request):
    from golden_cases import Case
    return Case(request.param) if request.param is not None else None
