"""Libraries that only reports need, from the optional extra `evaluation`, imported when they are used."""

import importlib
from types import ModuleType

from acsr_ray.config import MissingExtraError


def load_extra(module: str) -> ModuleType:
    """Import a module of the extra `evaluation`.

    Raises:
        MissingExtraError: it is not installed; the message is the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.split(".")[0]
        message = f"{library} is not installed: pip install 'acsr-ray[evaluation]'"
        raise MissingExtraError(message) from error
