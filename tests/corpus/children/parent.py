"""A parent whose child hangs: prints the child's process id, and waits to be killed."""

import sys
import threading
import time

from acsr_ray.corpus.images import DecodeLimits
from acsr_ray.corpus.isolated import IsolatedDecoder

decoder = IsolatedDecoder(DecodeLimits(), command=(sys.executable, "-P", sys.argv[1]))
threading.Thread(target=decoder.decode, args=(b"SLEEP",), daemon=True).start()
while decoder.pid is None:
    time.sleep(0.01)
print(decoder.pid, flush=True)
time.sleep(1000)
