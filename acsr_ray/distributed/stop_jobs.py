"""Stop every submitted job of this cluster cleanly and wait: what a head does before its machine goes.

`python -m acsr_ray.distributed.stop_jobs [SECONDS]`, as a pod's preStop hook: each driver gets SIGTERM,
publishes what is begun and exits 75, while the head that it needs for that still lives.
"""

import logging
import sys
import time

from ray.job_submission import JobStatus

from acsr_ray.config import AcsrError
from acsr_ray.distributed.dashboard import JobsClient, find_address, open_dashboard

logger = logging.getLogger(__name__)

WAIT_S = 45.0
ALIVE = (JobStatus.PENDING, JobStatus.RUNNING)


def _alive(client: JobsClient) -> list[str]:
    return [job.submission_id for job in client.list_jobs() if job.submission_id and job.status in ALIVE]


def stop_jobs(address: str | None = None, wait_s: float = WAIT_S) -> list[str]:
    """Stop what runs; return the submissions that still ran when the time was over.

    Args:
        address: of the dashboard; default: as for `acsr-ray submit`.
        wait_s: seconds to wait for their end.

    Raises:
        SubmitError: the dashboard cannot be reached.
    """
    client = open_dashboard(find_address(address)).client
    ends = time.monotonic() + wait_s
    running = _alive(client)
    for name in running:
        logger.warning("stopping %s", name)
        client.stop_job(name)
    while running and time.monotonic() < ends:
        time.sleep(1)
        running = _alive(client)
    return running


def main() -> None:
    """Stop all jobs; exit 1 when some would not end in time."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        left = stop_jobs(wait_s=float(sys.argv[1]) if len(sys.argv) > 1 else WAIT_S)
    except AcsrError as error:
        raise SystemExit(f"error: {error}") from error
    if left:
        raise SystemExit(f"error: still running: {', '.join(left)}")


if __name__ == "__main__":
    main()
