"""Optional libraries: imported when there, named when not."""

import subprocess
import sys

import pytest

from acsr_ray.config import MissingExtraError
from acsr_ray.evaluation.extras import load_extra


def test_a_module_that_is_there():
    assert load_extra("json.decoder").JSONDecoder


def test_the_message_is_the_command():
    with pytest.raises(MissingExtraError, match=r"^no_such_lib is not installed: pip install 'acsr-ray\[eva"):
        load_extra("no_such_lib.figure")


def test_the_evaluation_loads_neither_matplotlib_nor_scikit_image():
    code = (
        "import sys\n"
        "import acsr_ray.evaluation.figures, acsr_ray.evaluation.quality, acsr_ray.evaluation.report\n"
        "bad = {'matplotlib', 'skimage'} & sys.modules.keys()\n"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
