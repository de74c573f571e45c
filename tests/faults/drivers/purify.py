"""Run purify_corpus in a process of its own, with faults here and in Ray's workers.

purify.py SETTINGS(JSON) [--local]
"""

import json
import logging
import os
import sys
from pathlib import Path

os.environ["ACSR_DRIVER_PID"] = str(os.getpid())
sys.path.insert(0, str(Path(__file__).parent))

import hooks
import ray

from acsr_ray.config import AcsrError
from acsr_ray.distributed.purify import purify_corpus
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
environment = {name: os.environ[name] for name in os.environ if name.startswith(("ACSR_", "AWS_"))}
environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
options = {"env_vars": environment, "worker_process_setup_hook": "hooks.install"}
where = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100 * 2**20}
address = os.environ.get("RAY_ADDRESS")
ray.init(
    address or "local",
    log_to_driver=False,
    runtime_env=options,
    **({} if address else where),
)
hooks.install()
try:
    summary = purify_corpus(PurifyCorpusSettings.model_validate_json(sys.argv[1]))
except AcsrError as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)
print(json.dumps(summary))
