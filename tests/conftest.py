"""One thread for torch: beside other busy processes its threads wait for each other (1000 x).

Ctrl-C is heard: a suite that was started in the background of a shell ignores it, and so would the
tests that interrupt themselves.
"""

import os
import signal
import threading

os.environ.setdefault("OMP_NUM_THREADS", "1")
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
